"""The rivals of robust fusion keep the contract: MedFuse, contrastive fusion and CARD."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from clinfuse.conventions import InputError
from clinfuse.data.dataset import PreparedData
from clinfuse.systems.batches import DataDescription, invented_patients, label_array, read_batch
from clinfuse.systems.card import (
    CARD,
    Concatenation,
    card_draws,
    fit_card_temperature,
    predict_draws,
)
from clinfuse.systems.contract import change_config
from clinfuse.systems.contrastive_fusion import ContrastiveFusion
from clinfuse.systems.medfuse import MedFuse
from clinfuse.training.loop import train_system

KINDS = {"medfuse": MedFuse, "contrastive-fusion": ContrastiveFusion, "card": CARD}
STAGES = {
    "medfuse": ("lstm.stage", "resnet34.stage", "stage"),
    "contrastive-fusion": ("pretraining", "stage"),
    "card": ("classifier.lstm.stage", "classifier.resnet34.stage", "classifier.stage", "stage"),
}
each_rival = pytest.mark.parametrize("name", KINDS)
torch.set_num_threads(1)


def build(name, data, seed=1, **changes):
    changes = {f"{stage}.num_epochs": 1 for stage in STAGES[name]} | changes
    torch.manual_seed(seed)
    config = change_config(KINDS[name].recipes["quick"], changes)
    return KINDS[name](config, DataDescription.of(data))


def copy_of(data, **columns):
    """The same prepared folder with other values in some columns of its samples."""
    other = PreparedData(data.path)
    other.samples = other.samples.assign(**columns)
    return other


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return invented_patients(tmp_path_factory.mktemp("data") / "data", num_samples=60)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    systems = {}
    for name in KINDS:
        systems[name] = build(name, data)
        train_system(systems[name], data, tmp_path_factory.mktemp(name), seed=1, quiet=True)
    return systems


@each_rival
def test_gradients_reach_every_weight_of_each_stage(data, name):
    system = build(name, data).train()
    batch = read_batch(data, np.arange(30), system.description, clahe=system.clahe)
    reached = set()
    for stage in system.stages():
        system.requires_grad_(False).zero_grad(set_to_none=True)
        for module in system.stage_modules(stage.name):
            module.requires_grad_(True)
        system.training_loss(stage.name, batch).backward()
        for key, weight in system.named_parameters():
            assert weight.requires_grad == bool(
                weight.grad is not None and weight.grad.abs().sum() > 0
            ), key
            reached |= {key} if weight.requires_grad else set()
    assert {k for k, _ in system.named_parameters() if not k.startswith("averaged.")} == reached


@each_rival
def test_predicts_each_sample_alone(trained, data, name):
    system, rows = trained[name], np.arange(len(data.samples))
    together = system.predict(data, rows)
    assert together.shape == (60, 1) and ((together >= 0) & (together <= 1)).all()
    shuffled = np.random.default_rng(0).permutation(rows)
    np.testing.assert_allclose(system.predict(data, shuffled), together[shuffled], atol=1e-4)
    np.testing.assert_allclose(system.predict(data, rows[7:8]), together[7:8], atol=1e-4)
    assert system.predict(data, rows[:0]).shape == (0, 1)


@each_rival
def test_an_absent_radiograph_cannot_be_seen(trained, data, name):
    system = trained[name].eval()
    batch = read_batch(data, np.arange(40), system.description)
    is_absent = batch.modality_mask[:, 1] == 0
    answers = []
    for value in (0, 255):
        batch.radiograph[is_absent] = value
        with torch.no_grad():
            answers.append(system(batch)[is_absent])
    torch.testing.assert_close(*answers, rtol=0, atol=0)


@each_rival
def test_a_radiograph_that_is_there_is_seen(trained, data, name):
    system = trained[name].eval()
    rows = np.flatnonzero(data.samples["radiograph"].to_numpy() >= 0)[:8]
    batch = read_batch(data, rows, system.description)
    with torch.no_grad():
        before = system(batch)
        batch.radiograph = 255 - batch.radiograph
        assert not torch.equal(system(batch), before)


@each_rival
def test_trains_without_any_radiograph(data, name, tmp_path):
    bare = copy_of(data, radiograph=-1)
    system = build(name, bare)
    if name == "contrastive-fusion":
        train_system(system, bare, tmp_path, quiet=True)
    else:
        with pytest.warns(UserWarning, match="stage radiograph left out"):
            train_system(system, bare, tmp_path, quiet=True)
    for folder in (bare, data):
        assert np.isfinite(system.predict(folder, folder.rows("test"))).all()


@each_rival
def test_unknown_labels_teach_nothing(data, name):
    system = build(name, data).train()
    batch = read_batch(data, np.arange(20), system.description)
    batch.label_mask[3] = 0
    for stage in system.stages():
        losses = []
        for value in (0.0, 1.0):
            batch.labels[3] = value
            again = build(name, data).train()
            torch.manual_seed(0)
            losses.append(again.training_loss(stage.name, batch).item())
        assert losses[0] == losses[1] and math.isfinite(losses[0])


@each_rival
def test_weights_come_back_and_others_are_refused(trained, data, name, tmp_path):
    system, rows = trained[name], data.rows("test")
    system.save_weights(tmp_path)
    again = build(name, data, seed=9)
    again.load_weights(tmp_path)
    np.testing.assert_array_equal(again.predict(data, rows), system.predict(data, rows))
    other = next(kind for kind in KINDS if kind != name)
    with pytest.raises(InputError, match="another system"):
        build(other, data).load_weights(tmp_path)


@each_rival
def test_repeats_with_the_same_seed(trained, data, name, tmp_path):
    again, rows = build(name, data), data.rows("test")
    train_system(again, data, tmp_path, seed=1, quiet=True)
    np.testing.assert_array_equal(again.predict(data, rows), trained[name].predict(data, rows))


@each_rival
def test_predicting_changes_nothing(trained, data, name):
    system = trained[name].train()
    before = {key: value.clone() for key, value in system.state_dict().items()}
    system.predict(data, np.arange(10))
    assert system.training
    system.eval()
    assert all(torch.equal(value, before[key]) for key, value in system.state_dict().items())


@each_rival
def test_serves_many_labels(data, name):
    labels = tuple(f"label_{i}" for i in range(25))
    description = replace(
        DataDescription.of(data),
        labels=labels,
        prevalence={"all": (0.2,) * 25, "without radiograph": (0.1,) * 25},
    )
    torch.manual_seed(0)
    system = KINDS[name](KINDS[name].recipes["quick"], description).train()
    batch = read_batch(data, np.arange(6), DataDescription.of(data))
    batch.labels, batch.label_mask = torch.randint(2, (6, 25)).float(), torch.ones(6, 25)
    for stage in system.stages():
        assert system.training_loss(stage.name, batch).isfinite()
    with torch.no_grad():
        assert system.eval()(batch).shape == (6, 25)


@pytest.mark.parametrize("name", ["medfuse", "contrastive-fusion"])
def test_the_quick_recipe_learns(name, tmp_path):
    more = invented_patients(tmp_path / "data", num_samples=300, seed=2)
    torch.manual_seed(0)
    system = KINDS[name](KINDS[name].recipes["quick"], DataDescription.of(more))
    train_system(system, more, tmp_path, quiet=True)
    rows = more.rows("test")
    rows = rows[more.samples["radiograph"].to_numpy()[rows] >= 0]
    died = label_array(more, rows)[:, 0]
    assert roc_auc_score(died, system.predict(more, rows)[:, 0]) > 0.7


def test_contrast_counts_pairs_only(data):
    """Within the first stage a patient without a radiograph meets the listening head alone."""
    system = build("contrastive-fusion", data).train()
    has_image = data.samples["radiograph"].to_numpy() >= 0
    for rows, is_used in ((np.flatnonzero(~has_image)[:6], False), (np.arange(20), True)):
        batch = read_batch(data, rows, system.description)
        system.zero_grad(set_to_none=True)
        system.training_loss("contrast", batch).backward()
        grads = [w.grad for w in system.contrast.parameters() if w.grad is not None]
        assert any(grad.abs().sum() > 0 for grad in grads) == is_used


def test_the_first_answer_is_frozen(data):
    system = build("card", data).train()
    batch = read_batch(data, np.arange(12), system.description)
    before = {key: value.clone() for key, value in system.classifier.state_dict().items()}
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        losses.append(system.training_loss("diffusion", batch).item())
    assert all(torch.equal(v, before[k]) for k, v in system.classifier.state_dict().items())
    assert losses[0] == losses[1]
    assert isinstance(system.classifier, Concatenation)


def test_the_temperature_is_saved_and_needs_a_validation_split(trained, data, tmp_path):
    system = trained["card"]
    old = system.temperature.item()
    fit_card_temperature(system, data)
    fitted = system.temperature.item()
    assert 0.01 <= fitted <= 100
    system.save_weights(tmp_path)
    again = build("card", data, seed=3)
    again.load_weights(tmp_path)
    assert again.temperature.item() == fitted
    merged = data.samples["split"].replace("validation", "train")
    system.finish_stage("diffusion", copy_of(data, split=merged))
    assert system.temperature.item() == 1.0
    system.finish_stage("series", data)
    assert system.temperature.item() == 1.0
    system.temperature.fill_(old)


def test_draws_are_the_prediction(trained, data):
    system, rows = trained["card"], np.arange(9)
    draws = predict_draws(system, data, rows, batch_size=4)
    assert draws.shape == (9, system.config.diffusion.num_draws, 1)
    expected = 1 / (1 + np.exp(-(2 * draws - 1) / system.temperature.item()))
    np.testing.assert_allclose(system.predict(data, rows), expected.mean(1), atol=1e-4)
    batch = read_batch(data, rows, system.description, clahe=system.clahe)
    torch.testing.assert_close(
        card_draws(system.eval(), batch), torch.from_numpy(draws), atol=1e-3, rtol=1e-3
    )
    assert predict_draws(system, data, rows[:0]).shape[0] == 0
