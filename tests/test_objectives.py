"""Objectives, sequential fusion and the vision transformer, away from their pages."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clinfuse.conventions import InputError
from clinfuse.encoders.vision_transformer import VisionConfig, VisionEncoder
from clinfuse.fusion.sequential import SequentialFusion, pack_present
from clinfuse.objectives.contrastive import (
    ContrastiveConfig,
    NegativeQueue,
    change_brightness,
    nt_xent,
    series_view,
)
from clinfuse.objectives.diffusion import (
    Denoiser,
    DiffusionConfig,
    accuracy_by_rejection,
    averaged_copy,
    denoising_loss,
    draw_probability,
    draw_responses,
    fit_temperature,
    interval_width,
    noise_schedule,
    vote_p_value,
)
from clinfuse.objectives.losses import known_task_losses
from clinfuse.objectives.uncertainty_weighting import (
    FORMS,
    UncertaintyConfig,
    UncertaintyWeighting,
    parameter_groups,
)
from clinfuse.systems.contract import known_label_loss

torch.set_num_threads(1)
quickly = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31 - 1)
TINY = DiffusionConfig(num_steps=20, sampling_steps=5, hidden_dim=8, num_draws=6, repeats=2)


def random_tensors(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@given(seeds, st.integers(1, 9), st.integers(1, 5), st.floats(0, 1))
@quickly
def test_task_losses_average_to_the_plain_loss(seed, num_samples, num_labels, share):
    shape = (num_samples, num_labels)
    logits, labels, chance = random_tensors(seed, shape, shape, shape)
    labels, mask = (labels > 0).float(), (chance.sigmoid() < share).float()
    losses, number = known_task_losses(logits, labels, mask), mask.sum(0)
    assert (losses.isnan() == (number == 0)).all()
    together = (losses.nan_to_num() * number).sum() / number.sum().clamp(min=1)
    torch.testing.assert_close(together, known_label_loss(logits, labels, mask))


@pytest.mark.parametrize("form", FORMS)
@given(losses=st.lists(st.floats(0.01, 20), min_size=2, max_size=6))
@quickly
def test_no_other_log_variance_is_better_than_the_closed_form(form, losses):
    a, b = FORMS[form]
    weighting = UncertaintyWeighting(len(losses), UncertaintyConfig(form=form))
    losses = torch.tensor(losses)
    best = (a * losses / b).log()
    totals = []
    for shift in (-0.3, 0.0, 0.3):
        weighting.log_variance.data = best + shift
        totals.append(weighting(losses).item())
    assert totals[1] < min(totals[0], totals[2])


def test_a_batch_without_any_known_label_teaches_nothing():
    logits = torch.zeros(3, 2, requires_grad=True)
    weighting = UncertaintyWeighting(2)
    losses = known_task_losses(logits, torch.ones(3, 2), torch.zeros(3, 2))
    for reduction in ("sum", "mean"):
        weighting = UncertaintyWeighting(2, UncertaintyConfig(reduction=reduction))
        total = weighting(losses)
        total.backward(retain_graph=True)
        assert total.item() == 0 and not weighting.log_variance.grad.any()
        assert not logits.grad.any()


def test_groups_hold_every_weight_once_and_only_those_that_learn():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.frozen = nn.Linear(3, 3), nn.Linear(2, 2).requires_grad_(False)
            self.weighting, self.token = UncertaintyWeighting(3), nn.Parameter(torch.zeros(1))
            self.again = self.first

    network = Two()
    groups = parameter_groups([network, network.first, network.weighting], 0.1, weight_decay=0.5)
    found = [id(weight) for group in groups for weight in group["params"]]
    assert len(found) == len(set(found)) == 4
    assert set(found) == {id(w) for w in network.parameters() if w.requires_grad}
    own = [group for group in groups if group["lr"] != 0.1]
    assert len(own) == 1 and own[0]["weight_decay"] == 0


def test_one_task_warns_and_two_do_not():
    with pytest.warns(UserWarning, match="single task"):
        UncertaintyWeighting(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        UncertaintyWeighting(2)


@given(seeds, st.integers(2, 8), st.floats(0.05, 2))
@quickly
def test_contrast_knows_no_length_no_order_and_its_minimum(seed, number, temperature):
    first, second, scale = random_tensors(seed, (number, 5), (number, 5), (number, 1))
    loss = nt_xent(first, second, temperature)
    torch.testing.assert_close(nt_xent(first * scale.exp(), second, temperature), loss)
    order = torch.randperm(number)
    torch.testing.assert_close(nt_xent(first[order], second[order], temperature), loss)
    least = math.log1p((2 * number - 2) * math.exp((-1 / (number - 1) - 1) / temperature))
    assert loss.item() >= least - 1e-5
    corners = torch.eye(number) - 1 / number
    assert nt_xent(corners, corners, temperature).item() == pytest.approx(least, abs=1e-4)


@given(seeds, st.integers(1, 7), st.integers(1, 9), st.integers(1, 20))
@quickly
def test_blocks_change_nothing(seed, number, entries, block):
    first, second, queue, chance = random_tensors(
        seed, (number, 4), (number, 4), (entries, 4), (number, entries)
    )
    torch.testing.assert_close(
        nt_xent(first, second, 0.3, queue, chance > 0, block=block),
        nt_xent(first, second, 0.3, queue, chance > 0),
    )


def test_a_large_batch_needs_no_square_of_memory():
    first = torch.randn(3000, 8, requires_grad=True)
    loss = nt_xent(first, first.detach() + 0.1 * torch.randn(3000, 8), block=500)
    loss.backward()
    assert first.grad.isfinite().all() and first.grad.abs().sum() > 0


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 6))
@quickly
def test_the_queue_is_a_list_of_the_last(sizes, size):
    queue, seen = NegativeQueue(size, 1), []
    for number in sizes:
        new = torch.arange(len(seen), len(seen) + number)
        queue.append(new[:, None].float(), new)
        seen += new.tolist()
    kept = queue.patient[queue.patient >= 0].tolist()
    assert sorted(kept) == seen[-size:]
    assert queue.vectors[queue.patient >= 0, 0].tolist() == kept
    _, is_hidden = queue(torch.tensor([seen[-1]]))
    assert is_hidden.sum() == 1 + size - len(kept)


def test_views_without_change_are_the_data():
    still = ContrastiveConfig(series_noise=0.0, brightness=0.0)
    series, images = torch.randn(3, 4, 5), torch.rand(2, 6, 6)
    torch.testing.assert_close(series_view(series, still), series)
    torch.testing.assert_close(change_brightness(images, still), images)


@pytest.mark.parametrize("spacing", [1, 4, 20])
def test_drawing_ends_at_what_the_denoiser_believes(spacing):
    """A denoiser that believes in one outcome, whatever it sees, must draw exactly that."""
    config = DiffusionConfig(num_steps=20, sampling_steps=20 // spacing, num_draws=5)
    left = noise_schedule(config).alphas_cumprod
    belief = torch.tensor([[1.0, 0.0], [0.25, 0.5]])

    def denoiser(response, prior, patient, step):
        return (response - prior - left[step].sqrt() * (patient - prior)) / (1 - left[step]).sqrt()

    draws = draw_responses(denoiser, belief, torch.rand(2, 2), config)
    torch.testing.assert_close(draws, belief[:, None].expand(2, 5, 2), atol=1e-3, rtol=0)


@given(seeds)
@quickly
def test_draws_do_not_depend_on_company(seed):
    torch.manual_seed(seed)
    network = Denoiser(3, 2, TINY).eval()
    embedding, prior = torch.randn(5, 3), torch.rand(5, 2)
    with torch.no_grad():
        patient = network.patient(embedding)
    together = draw_responses(network, patient, prior, TINY)
    order = torch.randperm(5)
    shuffled = draw_responses(network, patient[order], prior[order], TINY)
    torch.testing.assert_close(shuffled, together[order], atol=1e-4, rtol=1e-4)
    assert (together[0].std(0) > 0).all()
    other = draw_responses(network, patient, prior, TINY, seed=1)
    assert not torch.equal(other, together)


@pytest.mark.parametrize("num_samples", [1, 3])
def test_denoising_loss_is_finite_and_unknown_labels_are_silent(num_samples):
    torch.manual_seed(0)
    network, schedule = Denoiser(3, 2, TINY), noise_schedule(TINY)
    known = torch.tensor([[1.0, 0.0]]).expand(num_samples, 2)
    embedding, prior = torch.randn(num_samples, 3), torch.rand(num_samples, 2)
    values = []
    for unknown in (0.0, 1.0):
        torch.manual_seed(1)
        labels = torch.tensor([[1.0, unknown]]).expand(num_samples, 2)
        loss = denoising_loss(network, schedule, embedding, prior, labels, known, repeats=4)
        values.append(loss.item())
    assert values[0] == values[1] and math.isfinite(values[0])
    nobody = denoising_loss(network, schedule, embedding, prior, labels, 0 * known, repeats=4)
    nobody.backward()
    assert nobody.item() == 0 and all(w.grad.isfinite().all() for w in network.parameters())


def test_the_average_ends_where_the_weights_rest():
    module = nn.Linear(2, 1)
    averaged = averaged_copy(module, 0.9)
    for _ in range(3):
        averaged.update_parameters(module)
    with torch.no_grad():
        module.weight.fill_(7.0)
    for _ in range(200):
        averaged.update_parameters(module)
    torch.testing.assert_close(averaged.module.weight, module.weight, atol=1e-4, rtol=0)


@given(seeds, st.floats(0.05, 5))
@quickly
def test_probabilities_are_monotone_and_the_fit_is_no_worse_than_one(seed, temperature):
    draws, chance = random_tensors(seed, (30, 8, 2), (30, 2))
    p = draw_probability(draws, temperature)
    assert ((p >= 0) & (p <= 1)).all()
    assert (draw_probability(draws + 0.1, temperature) >= p).all()
    labels, known = (chance > 0).float(), torch.ones(30, 2)

    def loss(t):
        q = draw_probability(draws, t).clamp(1e-6, 1 - 1e-6)
        return nn.functional.binary_cross_entropy(q, labels).item()

    assert loss(fit_temperature(draws, labels, known)) <= loss(1.0) + 1e-3


@given(seeds, st.integers(2, 30))
@quickly
def test_uncertainty_measures(seed, number):
    random = np.random.default_rng(seed)
    draws = random.normal(size=(number, 12, 2))
    width = interval_width(draws)
    np.testing.assert_allclose(interval_width(3 * draws + 1), 3 * width)
    scores = np.stack([1 - draws[..., 0], draws[..., 0]], axis=2)
    p = vote_p_value(scores)
    assert ((p >= 0) & (p <= 1)).all()
    np.testing.assert_allclose(vote_p_value(scores[..., ::-1]), p)
    is_right = random.random(number) < 0.5
    kept = accuracy_by_rejection(is_right, random.random(number), (0.0,))
    assert kept[0] == pytest.approx(is_right.mean())
    assert accuracy_by_rejection(is_right, ~is_right, (0.0, 0.5))[1] >= kept[0]


@given(seeds, st.integers(1, 6), st.integers(1, 4))
@quickly
def test_sequences_are_what_is_present(seed, batch, num_modalities):
    tokens, chance = random_tensors(seed, (batch, num_modalities, 3), (batch, num_modalities))
    mask = (chance > 0).float()
    packed, number = pack_present(tokens, mask)
    for row in range(batch):
        kept = tokens[row, mask[row] > 0]
        torch.testing.assert_close(packed[row, : len(kept)], kept)
        assert number[row] == len(kept) and not packed[row, len(kept) :].any()
    torch.manual_seed(0)
    fusion = SequentialFusion(3, 4)
    garbage = torch.where(mask[..., None] > 0, tokens, torch.inf)
    torch.testing.assert_close(fusion(garbage, mask), fusion(tokens, mask), rtol=0, atol=0)


def test_vision_transformer_serves_any_image_size_and_refuses_impossible_ones(tmp_path):
    config = VisionConfig(8, 1, 2, 16, patch_size=4, image_size=8)
    encoder = VisionEncoder(config).eval()
    for height, width in ((8, 8), (16, 16), (5, 9)):
        assert encoder(torch.rand(2, height, width)).shape == (2, 8)
    for wrong in ({"num_heads": 3}, {"patch_size": 3}):
        with pytest.raises(InputError, match="not a multiple"):
            VisionConfig(**{"dim": 8, "num_heads": 2, "patch_size": 4, "image_size": 8} | wrong)
    with pytest.raises(InputError, match="could not load"):
        VisionEncoder(VisionConfig(weights=str(tmp_path)))
