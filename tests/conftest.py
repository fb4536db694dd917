"""What several test files share."""

import gc
import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers on two cores: more threads only wait

import diffusers  # noqa: F401  # after the number of threads is set
import ibis  # noqa: F401
import sklearn.metrics  # noqa: F401
import transformers  # noqa: F401

gc.freeze()  # what the libraries left is no garbage, and looking through it takes a quarter of a second

SHARED_DATA = Path(__file__).parents[2] / "shared/data"


@pytest.fixture(scope="session")
def mimic_demo():
    """The folder of the MIMIC-IV demo."""
    folder = SHARED_DATA / "mimic-iv-demo"
    if not folder.exists():
        pytest.skip(f"the MIMIC-IV demo is not at {folder}")
    return folder


@pytest.fixture(scope="session")
def challenge_2012():
    """The folder of the PhysioNet Challenge 2012, set A."""
    folder = SHARED_DATA / "physionet-2012"
    if not folder.exists():
        pytest.skip(f"the PhysioNet Challenge 2012 is not at {folder}")
    return folder


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory):
    """Three blocks of a tiny GPT-2 and its tokenizer, as the Hugging Face Hub would hold them."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2Model, GPT2TokenizerFast

    folder = str(tmp_path_factory.mktemp("gpt2"))
    sentences = ["surgery is major, blood loss is high", "surgery is minor, blood loss is lower"]
    pieces = ByteLevelBPETokenizer()
    pieces.train_from_iterator(sentences, 400, 1, False, ["<|endoftext|>"])
    pieces.save_model(folder)
    tokenizer = GPT2TokenizerFast.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 128}
    GPT2Model(GPT2Config(vocab_size=len(tokenizer), **size)).save_pretrained(folder)
    return folder
