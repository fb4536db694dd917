"""Encoders and fusion: what must hold for any size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clinfuse.encoders.recurrent import RecurrentConfig, RecurrentEncoder
from clinfuse.encoders.residual_network import (
    QUICK_TRANSFORM,
    RadiographTransform,
    ResidualConfig,
    ResidualEncoder,
    transform_matrices,
    transform_radiographs,
)
from clinfuse.fusion.modality_attention import AttentionConfig, ModalityAttention, modality_shares


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    num_layers=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_each_series_is_encoded_as_if_alone(lengths, num_layers, seed):
    torch.manual_seed(seed)
    encoder = RecurrentEncoder(3, RecurrentConfig(dim=4, num_layers=num_layers)).eval()
    series = torch.randn(len(lengths), 9, 3)
    together = encoder(series, torch.tensor(lengths))
    for place, length in enumerate(lengths):
        alone = encoder(series[place : place + 1, :length], torch.tensor([length]))
        torch.testing.assert_close(together[place : place + 1], alone)


def test_the_future_cannot_change_the_past():
    torch.manual_seed(0)
    encoder = RecurrentEncoder(3, RecurrentConfig(dim=4)).eval()
    series = torch.randn(1, 10, 3)
    early = encoder(series, torch.tensor([6]))
    series[:, 6:] = 99.0
    torch.testing.assert_close(encoder(series, torch.tensor([6])), early, rtol=0, atol=0)


@given(chance=st.lists(st.floats(0, 1), min_size=8, max_size=8))
@settings(max_examples=50, deadline=None)
def test_a_shift_stays_within_its_limits(chance):
    transform = RadiographTransform(size=80, crop=60, rotation_degrees=15, shear_degrees=5)
    matrix = transform_matrices(torch.tensor([chance]), transform)[0]
    most = 2 * transform.translation + 1 - 60 / 80
    assert matrix[:, 2].abs().max() <= most + 1e-6
    area = matrix[:, :2].det().abs() / (60 / 80) ** 2
    assert 0.9 < area < 1.12


def test_a_moved_image_moves():
    image = torch.zeros(1, 64, 64, dtype=torch.uint8)
    image[0, 30:34, 30:34] = 255
    still = dict(size=64, crop=64, random_crop=False, rotation_degrees=0, scale=0)
    moved = transform_radiographs(
        image,
        RadiographTransform(**still, translation=0.25),
        True,
        torch.Generator().manual_seed(0),
    )
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    chance = torch.rand(1, 8, generator=torch.Generator().manual_seed(0))[0]
    for axis, place in ((columns, 4), (rows, 5)):
        centre = (axis * moved[0]).sum() / moved[0].sum()
        expected = 31.5 - (2 * chance[place] - 1) * 0.25 * 64
        torch.testing.assert_close(centre, expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("shape", [(256, 256), (100, 180), (512, 420)])
def test_any_image_size_is_accepted(shape):
    images = torch.randint(0, 256, (2, *shape), dtype=torch.uint8)
    for training in (True, False):
        out = transform_radiographs(images, QUICK_TRANSFORM, training)
        assert out.shape == (2, 64, 64) and out.min() >= 0 and out.max() <= 1


def test_one_image_is_enough_to_train():
    encoder = ResidualEncoder(ResidualConfig(depths=(1, 1), widths=(4, 8))).train()
    encoder(torch.rand(1, 64, 64)).sum().backward()
    assert encoder.backbone.embedder.embedder.convolution.weight.grad.isfinite().all()


@given(
    readout=st.sampled_from(["mean", "class token"]),
    num_modalities=st.integers(2, 5),
    seed=st.integers(0, 999),
)
@settings(max_examples=30, deadline=None)
def test_modalities_have_no_order(readout, num_modalities, seed):
    torch.manual_seed(seed)
    config = AttentionConfig(num_heads=2, feedforward_dim=8, readout=readout)
    fusion = ModalityAttention(4, config, num_modalities).eval()
    tokens = torch.randn(3, num_modalities, 4)
    mask = (torch.rand(3, num_modalities) > 0.4).float()
    mask[:, 0] = 1
    order = torch.randperm(num_modalities)
    torch.testing.assert_close(
        fusion(tokens[:, order], mask[:, order])[0], fusion(tokens, mask)[0], atol=1e-5, rtol=1e-5
    )


@given(seed=st.integers(0, 999), num_modalities=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_weights_are_shares_of_what_is_there(seed, num_modalities):
    torch.manual_seed(seed)
    fusion = ModalityAttention(4, AttentionConfig(num_heads=2, feedforward_dim=8), num_modalities)
    mask = (torch.rand(5, num_modalities) > 0.5).float()
    _, weights = fusion.eval()(torch.randn(5, num_modalities, 4), mask)
    torch.testing.assert_close(weights.sum(-1), torch.ones(5, num_modalities))
    some = mask.sum(1) > 0
    assert (weights[some] * (1 - mask[some])[:, None]).abs().max() == 0 if some.any() else True


@given(seed=st.integers(0, 999), num_modalities=st.integers(2, 4))
@settings(max_examples=20, deadline=None)
def test_shares_follow_their_modality_and_add_up(seed, num_modalities):
    torch.manual_seed(seed)
    config = AttentionConfig(num_heads=2, feedforward_dim=8, readout="mean")
    fusion = ModalityAttention(4, config, num_modalities).eval()
    head, tokens = torch.nn.Linear(4, 3), torch.randn(5, num_modalities, 4)
    mask = (torch.rand(5, num_modalities) > 0.4).float()
    mask[:, 0] = 1
    order = torch.randperm(num_modalities)
    shares = modality_shares(lambda m: head(fusion(tokens, m)[0]), mask)
    torch.testing.assert_close(shares.sum(2), torch.ones(5, 3))
    assert (shares * (1 - mask)[:, None]).abs().max() == 0
    permuted = modality_shares(lambda m: head(fusion(tokens[:, order], m)[0]), mask[:, order])
    torch.testing.assert_close(permuted, shares[..., order], atol=1e-4, rtol=1e-4)


def test_a_visible_zero_is_seen():
    torch.manual_seed(0)
    fusion = ModalityAttention(8, AttentionConfig(num_heads=2, missing="zero")).eval()
    _, weights = fusion(torch.randn(2, 2, 8), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    assert (weights > 0).all()
