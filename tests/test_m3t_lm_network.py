"""The parts of M3T-LM away from their pages: public weights, texts, task weights in the training loop, the network."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from clinfuse.conventions import InputError
from clinfuse.encoders.attention_convolution import (
    AttentionConvolution,
    AttentionConvolutionConfig,
)
from clinfuse.encoders.inception_residual_network import (
    InceptionConfig,
    InceptionEncoder,
    InceptionResidualNetwork,
    last_map_side,
    read_public_weights,
)
from clinfuse.encoders.text import (
    PADDING,
    UNKNOWN,
    TextConfig,
    TextEncoder,
    Vocabulary,
    encode_texts,
    tokenise,
)
from clinfuse.objectives.gradient_normalisation import (
    GradientNormalisation,
    GradientNormalisationConfig,
    moved_weights,
)
from clinfuse.objectives.losses import (
    known_huber_losses,
    known_mean,
    known_quantile_losses,
    known_task_losses,
)
from clinfuse.systems.batches import DataDescription, invented_patients
from clinfuse.systems.contract import NeuralSystem, Stage, load_tensors, save_tensors
from clinfuse.systems.m3t_lm import M3TLMNetwork, M3TLMNetworkConfig, M3TLMSizes
from clinfuse.training.devices import Hardware
from clinfuse.training.loop import train_system

torch.set_num_threads(1)
quickly = settings(max_examples=20, deadline=None)
SMALL = InceptionConfig((1, 1, 1), width=0.125, batch_norm_momentum=0.1)
words = st.text("abcdeé'- 1", max_size=12)


# ---- the image branch


@pytest.mark.parametrize("size", [75, 96, 128, 150])
def test_the_last_maps_have_the_side_that_is_foretold(size):
    network = InceptionResidualNetwork(replace(SMALL, width=0.05)).eval()
    with torch.no_grad():
        maps = network(torch.zeros(1, 1, size, size))
    assert maps.shape[2:] == (last_map_side(size), last_map_side(size))


def test_names_and_shapes_are_those_of_timm():
    with torch.device("meta"):
        state = InceptionResidualNetwork(
            InceptionConfig(num_channels=3, batch_norm_scale=True)
        ).state_dict()
    known = {
        "conv2d_1a.conv.weight": (32, 3, 3, 3),
        "conv2d_4a.bn.weight": (192,),
        "mixed_5b.branch0.conv.weight": (96, 192, 1, 1),
        "mixed_5b.branch3.1.conv.weight": (64, 192, 1, 1),
        "repeat.9.branch2.2.bn.running_var": (64,),
        "repeat.0.conv2d.weight": (320, 128, 1, 1),
        "mixed_6a.branch1.2.conv.weight": (384, 256, 3, 3),
        "repeat_1.19.branch1.1.conv.weight": (160, 128, 1, 7),
        "repeat_1.0.branch1.2.conv.weight": (192, 160, 7, 1),
        "mixed_7a.branch0.1.conv.weight": (384, 256, 3, 3),
        "mixed_7a.branch2.2.bn.num_batches_tracked": (),
        "repeat_2.8.branch1.2.conv.weight": (256, 224, 3, 1),
        "block8.conv2d.bias": (2080,),
        "conv2d_7b.bn.bias": (1536,),
    }
    assert {name: tuple(state[name].shape) for name in known} == known


def test_parity_with_timm():
    timm = pytest.importorskip("timm", reason="timm is not installed; it needs torchvision")
    torch.manual_seed(0)
    theirs = timm.create_model("inception_resnet_v2", num_classes=0).eval()
    ours = InceptionResidualNetwork(InceptionConfig(num_channels=3, batch_norm_scale=True)).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.rand(2, 3, 128, 128)
    with torch.no_grad():
        torch.testing.assert_close(ours(images).mean((2, 3)), theirs(images))


def test_weights_come_from_the_hub_by_name(tmp_path, monkeypatch):
    """The real way through huggingface_hub, into a cache that holds a made-up repository."""
    from huggingface_hub import constants

    torch.manual_seed(0)
    stored = InceptionEncoder(SMALL)
    revision = "0" * 40
    repository = tmp_path / "models--somebody--inception"
    (repository / "snapshots" / revision).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    file = repository / "snapshots" / revision / "model.safetensors"
    save_file(stored.network.state_dict(), file)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    loaded = InceptionEncoder(replace(SMALL, weights="somebody/inception"))
    for name, value in stored.network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[name], value), name
    with pytest.raises(InputError, match="could not load weights 'nobody/inception'"):
        read_public_weights("nobody/inception")


@pytest.mark.parametrize("content", [b"", b"not weights at all"])
def test_damaged_weights_are_named(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="could not load weights"):
        read_public_weights(str(tmp_path))


def test_batch_norms_without_a_factor_are_batch_norms():
    """Whatever converts or replaces them must find them: processes that share a training, and private training."""
    norms = [m for m in InceptionEncoder(SMALL).modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(type(norm) is nn.BatchNorm2d and norm.eps == 1e-3 for norm in norms)
    shared = nn.SyncBatchNorm.convert_sync_batchnorm(InceptionEncoder(SMALL)).eval()
    plain = InceptionEncoder(SMALL).eval()
    plain.load_state_dict(shared.state_dict())
    images = torch.rand(2, 1, 128, 128).to(memory_format=torch.channels_last)
    torch.testing.assert_close(shared(images), plain(images))


# ---- numbers and texts


@given(st.integers(6, 40), st.integers(1, 9), st.integers(0, 99))
@quickly
def test_rows_of_any_length_keep_their_numbers(num_numbers, filters, seed):
    torch.manual_seed(seed)
    encoder = AttentionConvolution(num_numbers, AttentionConvolutionConfig(filters))
    numbers = torch.randn(3, num_numbers)
    embedded = encoder(numbers)
    assert embedded.shape == (3, encoder.dim)
    assert torch.equal(embedded[:, -num_numbers:], numbers)
    torch.testing.assert_close(encoder(numbers[1:2]), embedded[1:2])


@given(st.lists(words, max_size=6), st.lists(words, max_size=6), st.integers(1, 5))
@quickly
def test_a_vocabulary_knows_its_own_texts_and_no_others(texts, others, num_tokens):
    vocabulary = Vocabulary.of(texts)
    assert vocabulary == Vocabulary.of(texts[::-1])
    for rows, source in (
        (encode_texts(vocabulary, texts, num_tokens), texts),
        (encode_texts(vocabulary, others, num_tokens), others),
    ):
        for row, text in zip(rows, source, strict=True):
            found = tokenise(text)[:num_tokens]
            back = [(*"__", *vocabulary.words)[number] for number in row[: len(found)]]
            assert (row[len(found) :] == PADDING).all()
            assert [b if b != "_" else w for b, w in zip(back, found, strict=True)] == found
            is_new = np.array([word not in vocabulary.words for word in found], dtype=bool)
            assert ((row[: len(found)] == UNKNOWN) == is_new).all()


@given(st.lists(st.integers(0, 7), min_size=1, max_size=5), st.integers(0, 99))
@quickly
def test_each_text_is_read_as_if_alone(lengths, seed):
    torch.manual_seed(seed)
    encoder = TextEncoder(20, TextConfig(dim=3, absent="learned"))
    nn.init.normal_(encoder.absent)
    tokens = torch.randint(1, 20, (len(lengths), 7))
    for row, length in zip(tokens, lengths, strict=True):
        row[length:] = PADDING
    together = encoder(tokens)
    for place, length in enumerate(lengths):
        alone = encoder(tokens[place : place + 1, : max(length, 1)])[0]
        torch.testing.assert_close(together[place], alone if length else encoder.absent)


# ---- losses and task weights


@given(st.integers(0, 2**31 - 1), st.floats(0.1, 5), st.floats(0, 1))
@quickly
def test_unknown_outcomes_are_as_if_the_patients_were_not_there(seed, delta, share):
    generator = torch.Generator().manual_seed(seed)
    first, second, chance = torch.randn(3, 9, 1, generator=generator) * 3
    known = (chance.sigmoid() < share).float()
    some = known[:, 0] > 0
    died = (second > 0).float()
    pairs = [
        (known_huber_losses(first, second, known, delta), nn.HuberLoss(delta=delta), second),
        (known_task_losses(first, died, known), nn.BCEWithLogitsLoss(), died),
    ]
    for loss, oracle, target in pairs:
        expected = oracle(first[some], target[some])[None]
        torch.testing.assert_close(loss, expected, equal_nan=True)
    quantile = known_quantile_losses(first, second[:, 0], known[:, 0], (0.5,))
    half = known_mean((first - second).abs() / 2, known)
    torch.testing.assert_close(quantile, half, equal_nan=True)


@given(
    st.lists(st.floats(1e-3, 10), min_size=2, max_size=5),
    st.lists(st.floats(-100, 100), min_size=5, max_size=5),
    st.floats(1e-3, 5),
)
@quickly
def test_moved_weights_stay_positive_and_keep_their_sum(weights, slope, step_size):
    weights = torch.tensor(weights)
    moved = moved_weights(weights, torch.tensor(slope[: len(weights)]), step_size)
    assert (moved > 0).all()
    torch.testing.assert_close(moved.sum(), weights.sum())


class TwoTasks(NeuralSystem):
    "Outcome and age from the last hour of the series, weighed by gradient normalisation."

    name = "two-tasks"

    def __init__(self, config, description):
        super().__init__(Stage("both", ("series",), num_epochs=3, batch_size=16), description)
        self.shared = nn.Linear(len(description.columns), 4)
        self.heads = nn.Linear(4, 2)
        self.balance = GradientNormalisation(2, config)
        self.used = []

    def stages(self):
        return [self.config]

    def both(self, batch):
        return self.heads(self.shared(batch.series[:, 0]).tanh())

    def logits(self, stage, batch):
        return self.both(batch)[:, :1]

    def sample_weights(self, stage, data, rows):
        self.balance.expect_epoch(len(rows), self.config.batch_size)
        return super().sample_weights(stage, data, rows)

    def training_loss(self, stage, batch):
        self.used.append(self.balance.weights[0].item())
        answers, decades = self.both(batch), batch.attributes / 10
        losses = [
            known_huber_losses(answers[:, 1:], decades, torch.ones_like(decades)),
            known_task_losses(answers[:, :1], batch.labels, batch.label_mask),
        ]
        return self.balance(torch.cat(losses), self.shared.weight, len(batch))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return invented_patients(tmp_path_factory.mktemp("data") / "data", num_samples=90)


def trained(data, folder, config, **options):
    torch.manual_seed(0)
    system = TwoTasks(config, DataDescription.of(data))
    train_system(system, data, folder, quiet=True, **options)
    return system


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_weights_move_once_an_epoch_whatever_the_loop_does(data, tmp_path, accumulation):
    hardware = Hardware("cpu", accumulation=accumulation)
    system = trained(data, tmp_path, GradientNormalisationConfig(), hardware=hardware)
    calls = 3 * accumulation
    assert len(data.rows("train")) // 16 == 3 and len(system.used) == 3 * calls
    epochs = [set(system.used[start : start + calls]) for start in range(0, 3 * calls, calls)]
    assert [len(values) for values in epochs] == [1, 1, 1]
    assert len(set.union(*epochs)) == 3 and epochs[0] == {0.5}


@pytest.mark.parametrize("period", ["epoch", "step"])
@pytest.mark.parametrize("stop", [4, 6])
def test_a_training_that_was_stopped_ends_at_the_same_task_weights(data, tmp_path, period, stop):
    config, every_step = GradientNormalisationConfig(period), Hardware("cpu", checkpoint_seconds=0)
    whole = trained(data, tmp_path / "whole", config, hardware=every_step)

    class Stopped(TwoTasks):
        def training_loss(self, stage, batch):
            if len(self.used) == stop:
                raise KeyboardInterrupt
            return super().training_loss(stage, batch)

    torch.manual_seed(0)
    broken = Stopped(config, whole.description)
    with pytest.raises(KeyboardInterrupt):
        train_system(broken, data, tmp_path / "run", quiet=True, hardware=every_step)
    resumed = trained(data, tmp_path / "run", config, hardware=every_step, resume=True)
    assert len(resumed.used) == len(whole.used) - stop
    assert resumed.used == whole.used[stop:]
    found = resumed.state_dict()
    assert [n for n, v in whole.state_dict().items() if not torch.equal(v, found[n])] == []


def test_a_move_waits_for_a_batch_that_knows_all_tasks():
    shared = torch.ones(2, requires_grad=True)
    balance = GradientNormalisation(2)
    balance.expect_epoch(4, 2)
    for known in (True, False, False):
        first = shared.sum() if known else torch.tensor(torch.nan)
        balance(torch.stack([first, 5 * shared.square().sum()]), shared, 2)
        assert balance.weights.tolist() == [0.5, 0.5]
    balance(torch.stack([shared.sum(), 5 * shared.square().sum()]), shared, 2)
    assert balance.weights[0] > 0.5 > balance.weights[1]


# ---- the network


def patients(sizes, num_patients=3, size=128):
    titles = [torch.randint(0, number, (num_patients, 9)) for number in sizes.vocabularies]
    return (
        torch.randn(num_patients, sizes.num_numbers),
        torch.rand(num_patients, sizes.num_categories).round(),
        torch.randint(0, max(1, sizes.num_ethnicities), (num_patients,)),
        titles,
        torch.rand(num_patients, size, size),
        torch.arange(num_patients) % 2,
    )


@given(
    sizes=st.builds(
        M3TLMSizes,
        st.integers(6, 30),
        st.integers(0, 4),
        st.integers(0, 3),
        st.lists(st.integers(2, 9), max_size=3).map(tuple),
    ),
    image=st.sampled_from(["convolutions", "none"]),
    titles=st.booleans(),
    absent=st.sampled_from(["zeros", "learned"]),
)
@quickly
def test_any_combination_of_parts_answers_and_learns(sizes, image, titles, absent):
    config = M3TLMNetworkConfig(
        image,
        inception=InceptionConfig(image_size=75),
        absent_image=absent,
        titles=titles,
        text=TextConfig(absent=absent),
        trunk=(8, 4),
    )
    network = M3TLMNetwork(replace(sizes, mean_days=5.0), config)
    answers = network(*patients(sizes, size=75))
    assert answers.shape == (3, 2)
    (answers.sum() + network.penalty()).backward()
    assert all(weight.grad is not None for weight in network.trunk.parameters())


def test_a_network_is_stored_and_read_whole(tmp_path):
    sizes = M3TLMSizes(8, 2, 3, (9, 9), mean_days=4.0)
    config = M3TLMNetworkConfig(inception=SMALL, absent_image="learned")
    network, other = M3TLMNetwork(sizes, config), M3TLMNetwork(sizes, config)
    inputs = patients(sizes)
    network(*inputs)
    load_tensors(other, save_tensors(network.state_dict(), tmp_path / "model.safetensors"))
    twin = copy.deepcopy(network)
    expected = network.eval()(*inputs)
    assert torch.equal(other.eval()(*inputs), expected)
    assert torch.equal(twin.eval()(*inputs), expected)
    with pytest.raises(InputError, match="weights of another system"):
        smaller = M3TLMNetwork(replace(sizes, vocabularies=(9, 8)), config)
        load_tensors(smaller, tmp_path / "model.safetensors")


def test_absent_images_do_not_move_the_batch_statistics():
    sizes = M3TLMSizes(8, 0, 0, ())
    config = M3TLMNetworkConfig(inception=SMALL)
    torch.manual_seed(0)
    network = M3TLMNetwork(sizes, config)
    alone, inputs = copy.deepcopy(network), patients(sizes, 4)
    network(*inputs)
    alone(*(value[1::2] if isinstance(value, torch.Tensor) else value for value in inputs))
    for (name, value), other in zip(network.named_buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(value, other, msg=name)
    network(*inputs[:5], torch.zeros(4))


def test_a_compiled_training_can_be_balanced_if_the_loss_stays_outside():
    class Balanced(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.shared, self.heads = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.balance = GradientNormalisation(2, GradientNormalisationConfig("step"))

        @torch.compiler.disable
        def loss(self, features):
            losses = self.heads(self.shared(features).relu()).square().mean(0)
            return self.balance(losses, self.shared.weight, len(features))

        def forward(self, x):
            return self.loss(self.first(x).relu())

    torch.manual_seed(0)
    plain = Balanced()
    compiled = copy.deepcopy(plain)
    compiled.compile(backend="aot_eager")
    for _ in range(2):
        x = torch.randn(6, 4)
        for network in (plain, compiled):
            network(x).backward()
    assert plain.balance.weights[0] != 0.5
    torch.testing.assert_close(compiled.balance.weights, plain.balance.weights)
