"""The parts of IOHFuseLM and the forecasters beside it, away from their pages."""

import copy
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils import logging

from clinfuse.conventions import InputError
from clinfuse.encoders.forecasters import (
    DLinear,
    PatchTST,
    PatchTSTSettings,
    current_map,
    moving_average,
    persistence,
)
from clinfuse.encoders.language_model import (
    LanguageModelConfig,
    encode_texts,
    gpt2_blocks,
    load_tokenizer,
    word_tokenizer,
)
from clinfuse.encoders.patches import draw_patch_mask, masked_reconstruction_loss
from clinfuse.objectives.trend_residual_diffusion import (
    TREND_RESIDUAL_RECIPES,
    MixingConfig,
    TrendResidualDiffusion,
    augment_windows,
    draw_residuals,
    trend_and_residual,
    window_statistics,
)
from clinfuse.objectives.weighted_forecast import weighted_forecast_loss
from clinfuse.systems.contract import change_config, config_from_plain, load_tensors, save_tensors
from clinfuse.systems.iohfuselm import (
    IOHFUSELM_NETWORKS,
    IOHFuseLMNetwork,
    finish_pretraining,
    iohfuselm_parts,
)

torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()
quickly = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**31 - 1)
odd_kernels = st.lists(st.integers(0, 20).map(lambda k: 2 * k + 1), min_size=1, max_size=3)
SMALL = {
    "language_model.num_heads": 2,
    "language_model.dim": 16,
    "language_model.max_tokens": 6,
    "alignment.num_heads": 2,
    "history_steps": 40,
    "horizon_steps": 20,
}
SENTENCES = ["surgery is major, blood loss is high", "surgery is minor, blood loss is lower"]


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_network(recipe="quick", vocabulary_size=9, **changes):
    config = change_config(IOHFUSELM_NETWORKS[recipe], SMALL | changes)
    torch.manual_seed(0)
    return IOHFuseLMNetwork(config, vocabulary_size).eval()


def inputs(number=3, steps=40):
    ids = torch.arange(number * 6).reshape(number, 6) % 7 + 2
    text_mask = (torch.arange(6) < torch.tensor([6, 3, 0])[:number, None]).float()
    return normal(0, number, steps), ids, text_mask


def test_published_recipe_freezes_what_it_says(gpt2_folder):
    tokenizer = load_tokenizer(gpt2_folder, ["major", "high"], whole_words=False)
    changes = {"language_model.weights": gpt2_folder, "language_model.num_layers": 2}
    network = small_network("published", len(tokenizer), **changes)
    trained = {w for part in iohfuselm_parts(network, "forecast") for w in part.parameters()}
    gpt2 = network.language_model.gpt2
    frozen = {name for name, w in gpt2.named_parameters() if w not in trained}
    kinds = {".".join(name.split(".")[2:4]) for name in frozen - {"wte.weight"}}
    assert "wte.weight" in frozen
    assert kinds == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert sum(w.numel() for w in gpt2.parameters() if w in trained) == (128 + 2 * 4 + 2) * 16
    assert {w for p in iohfuselm_parts(network, "pretraining") for w in p.parameters()} >= set(
        gpt2.parameters()
    )
    ids, mask = encode_texts(tokenizer, [*SENTENCES, ""], 6)
    forecast, _ = network(normal(1, 3, 40), ids, mask)
    assert forecast.shape == (3, 20) and forecast.isfinite().all()


def test_published_recipe_lets_filling_ask_in_the_second_stage_only():
    random = LanguageModelConfig(2, 16, 2, 0.0, 6)
    config = replace(IOHFUSELM_NETWORKS["published"], language_model=random)
    network = IOHFuseLMNetwork(change_config(config, SMALL), 9).eval()
    series, ids, mask = inputs()
    _, forecast_looks = network(series, ids, mask)
    _, pretraining_looks = network(normal(0, 3, 60), ids, mask, "pretraining")
    torch.testing.assert_close(forecast_looks.sum(3), torch.ones(3, 2, 6))
    torch.testing.assert_close(pretraining_looks.sum(3), mask[:, None].expand(3, 2, 6))


def test_added_words_get_vectors_of_their_own_in_loaded_weights(gpt2_folder):
    tokenizer = load_tokenizer(gpt2_folder, ["major"])
    config = LanguageModelConfig(3, 16, 2, weights=gpt2_folder)
    blocks = gpt2_blocks(config, len(tokenizer))
    assert blocks.wte.weight.shape == (len(tokenizer), 16)
    ids, _ = encode_texts(tokenizer, ["surgery is major"], 6)
    assert ids.max() == tokenizer.pad_token_id == len(tokenizer) - 1
    assert tokenizer.convert_tokens_to_ids("major") in ids


@given(st.lists(st.text(max_size=30), max_size=4), st.text(max_size=40))
@settings(max_examples=10, deadline=None)
def test_any_text_can_be_encoded(texts, unseen):
    tokenizer = word_tokenizer(texts)
    ids, mask = encode_texts(tokenizer, [unseen, *texts], 8)
    assert ids.shape == mask.shape == (1 + len(texts), 8)
    assert ((ids == 0) == (mask == 0)).all() or "[PAD]" in " ".join([unseen, *texts])
    assert ids.max() < len(tokenizer)


def test_without_alignment_words_go_as_they_are():
    network = small_network(**{"alignment.is_used": "false"})
    series, ids, mask = inputs()
    forecast, looked = network(series, ids, mask)
    assert looked is None
    assert not any("alignment" in name for name in network.state_dict())
    other = network(series, ids.flip(0), mask)[0]
    assert (other[0] - forecast[0]).abs().max() > 1e-6
    torch.testing.assert_close(other[2], forecast[2])


@pytest.mark.parametrize("recipe", ["safe", "quick"])
def test_weights_come_back_and_copies_agree(tmp_path, recipe):
    network = small_network(recipe)
    series, ids, mask = inputs()
    expected, _ = network(series, ids, mask)
    save_tensors(network.state_dict(), tmp_path / "model.safetensors")
    other = IOHFuseLMNetwork(network.config, 9).eval()
    load_tensors(other, tmp_path / "model.safetensors")
    for same in (other, copy.deepcopy(network)):
        torch.testing.assert_close(same(series, ids, mask)[0], expected, rtol=0, atol=0)


def test_reduced_precision_stays_near_and_finite():
    network = small_network()
    series, ids, mask = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        reduced, _ = network(series, ids, mask)
    expected, _ = network(series, ids, mask)
    torch.testing.assert_close(reduced.float(), expected, atol=0.05, rtol=0.05)


def test_a_missing_description_leaves_gradients_finite():
    network = small_network().train()
    series, ids, mask = inputs()
    out, _ = network(series, ids, 0 * mask)
    out.square().sum().backward()
    assert all(w.grad.isfinite().all() for w in network.parameters() if w.grad is not None)


def test_hand_over_changes_forecasts_only_as_published():
    series, ids, mask = inputs()
    for carries in (True, False):
        network = small_network(carries_patches=str(carries))
        before, _ = network(series, ids, mask)
        finish_pretraining(network)
        assert torch.equal(network(series, ids, mask)[0], before) == carries


@pytest.mark.parametrize("recipe", IOHFUSELM_NETWORKS)
def test_network_configs_survive_json(recipe):
    config = IOHFUSELM_NETWORKS[recipe]
    assert config_from_plain(type(config), asdict(config)) == config


@pytest.mark.parametrize("recipe", TREND_RESIDUAL_RECIPES)
def test_diffusion_configs_survive_json(recipe):
    config = TREND_RESIDUAL_RECIPES[recipe]
    plain = asdict(config) | {"kernels": list(config.kernels)}
    assert config_from_plain(type(config), plain) == config


@given(seeds, st.integers(1, 9), st.integers(1, 70), st.floats(0.05, 0.95))
@quickly
def test_masks_of_one_seed_do_not_depend_on_how_many(seed, few, num_patches, share):
    def draw(number):
        return draw_patch_mask(number, num_patches, share, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(few), draw(few + 5)[:few])


@given(seeds, st.integers(1, 5), st.integers(1, 6), st.integers(1, 12))
@quickly
def test_reconstruction_counts_hidden_samples_and_no_others(seed, number, num_patches, length):
    predicted, series = normal(seed, 2, number, num_patches * length)
    mask = draw_patch_mask(number, num_patches, 0.5, torch.Generator().manual_seed(seed))
    found = masked_reconstruction_loss(predicted, series, mask)
    pieces = (predicted - series).square().unflatten(1, (num_patches, length))[mask]
    expected = pieces.mean() if mask.any() else torch.zeros(())
    torch.testing.assert_close(found, expected)


@given(seeds, st.integers(1, 4), st.integers(2, 90), odd_kernels)
@quickly
def test_trend_and_residual_add_up_and_follow_the_level(seed, number, length, kernels):
    series = normal(seed, number, length).double()
    trend, residual = trend_and_residual(series, kernels)
    torch.testing.assert_close(trend + residual, series)
    higher, same = trend_and_residual(3 * series + 7, kernels)
    torch.testing.assert_close(higher, 3 * trend + 7)
    torch.testing.assert_close(same, 3 * residual)
    expected = [
        np.convolve(np.pad(row, k // 2, mode="edge"), np.ones(k) / k, mode="valid")
        for row in series.numpy()
        for k in kernels[:1]
    ]
    np.testing.assert_allclose(moving_average(series, kernels[0]), expected, atol=1e-9)


@given(seeds, st.floats(0, 100), st.floats(0, 1))
@quickly
def test_forecast_loss_is_the_plain_error_with_weights(seed, alpha, share):
    forecast, target, chance = normal(seed, 3, 4, 10)
    is_low = (chance.sigmoid() < share).float()
    weights = 1 + alpha * is_low
    expected = (weights * (forecast - target) ** 2).mean()
    torch.testing.assert_close(weighted_forecast_loss(forecast, target, is_low, alpha), expected)
    normalised = weighted_forecast_loss(forecast, target, is_low, alpha, normalise=True)
    scaled = alpha * is_low.numel() / is_low.sum().clamp(min=1).item()
    torch.testing.assert_close(
        normalised, weighted_forecast_loss(forecast, target, is_low, scaled), rtol=1e-4, atol=1e-5
    )


def small_diffusion(recipe="quick", **changes):
    network = MixingConfig(20, dim=8, feedforward_dim=16, num_blocks=1)
    torch.manual_seed(0)
    return TrendResidualDiffusion(
        replace(TREND_RESIDUAL_RECIPES[recipe], network=network, **changes)
    )


def test_published_drawing_ignores_the_patients_residual():
    windows, noise = normal(0, 5, 20), normal(1, 5, 20)
    model = small_diffusion("published").eval()
    drawn = draw_residuals(model.denoiser, windows, noise, model.config)
    assert torch.equal(draw_residuals(model.denoiser, -windows, noise, model.config), drawn)
    assert drawn.abs().max() <= 1
    model = small_diffusion("safe").eval()
    drawn = draw_residuals(model.denoiser, windows, noise, model.config)
    assert not torch.equal(draw_residuals(model.denoiser, -windows, noise, model.config), drawn)


@pytest.mark.parametrize("recipe", TREND_RESIDUAL_RECIPES)
def test_every_weight_of_the_diffusion_learns_from_odd_batches(recipe):
    model = small_diffusion(recipe)
    model.loss(normal(0, 3, 20)).backward()
    assert all(w.grad.abs().sum() > 0 for w in model.parameters())
    assert "scale" in model.state_dict()


def test_copies_differ_and_keep_their_window():
    model = small_diffusion()
    windows = 10 * torch.arange(3.0)[:, None] + 0.1 * normal(0, 3, 20)
    model.fit_scale(windows)
    new = augment_windows(model, windows, 4)
    assert new.shape == (3, 4, 20)
    assert (new.mean(2) - windows.mean(1, keepdim=True)).abs().max() < 1
    assert (new.std(1) > 0).all()


def test_diffusion_refuses_windows_of_another_length():
    with pytest.raises(InputError, match="25 samples given to a network for 20"):
        augment_windows(small_diffusion(), normal(0, 2, 25))


@given(seeds, st.integers(22, 61))
@quickly
def test_power_of_a_window_is_its_variance(seed, length):
    windows = normal(seed, 6, length)
    seen = window_statistics(windows)
    torch.testing.assert_close(seen["spectrum"].sum(), windows.var(1, correction=0).mean())
    assert seen["autocorrelation"][0] == 1


FORECASTERS = {
    "dlinear": lambda: DLinear(40, 20),
    "patchtst": lambda: PatchTST(40, 20, PatchTSTSettings(8, 1, 2, 16, 8, 8, 0.0, True)),
}


@pytest.mark.parametrize("name", FORECASTERS)
def test_forecasters_learn_a_straight_line(name):
    torch.manual_seed(0)
    network = FORECASTERS[name]()
    series = torch.linspace(0, 1, 60) * normal(0, 64, 1)
    optimiser = torch.optim.Adam(network.parameters(), 0.01)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        losses.append((network(series[:, :40]) - series[:, 40:]).square().mean())
        losses[-1].backward()
        optimiser.step()
    repeated = (persistence(series[:, :40], 20) - series[:, 40:]).square().mean()
    assert losses[-1] < 0.5 * repeated and losses[-1] < 0.1 * losses[0]


@given(seeds, st.integers(1, 30))
@quickly
def test_current_pressure_lies_within_the_last_samples(seed, num_steps):
    history = normal(seed, 4, 30)
    found, last = current_map(history, num_steps), history[:, -num_steps:]
    assert ((last.amin(1) - 1e-5 <= found) & (found <= last.amax(1) + 1e-5)).all()
    assert torch.equal(current_map(history, 1), persistence(history, 1)[:, 0])


def test_nothing_heavy_is_imported_with_the_pages():
    code = (
        "import sys, clinfuse.systems.iohfuselm, clinfuse.objectives.trend_residual_diffusion; "
        "print([m for m in ('transformers', 'diffusers', 'tokenizers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
