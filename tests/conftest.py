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
