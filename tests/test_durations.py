"""Labels that are days or hours: every system on every task it serves, what is unknown, and what was stored before there were any."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_systems import ONE_EPOCH

from clinfuse.conventions import InputError
from clinfuse.data.dataset import PreparedData
from clinfuse.objectives.label_kinds import answers, label_losses, neutral_logits
from clinfuse.systems.batches import DataDescription, invented_patients, label_array, read_batch
from clinfuse.systems.contract import EVERY_TASK, SYSTEMS, build_system, system_class
from clinfuse.training.checkpoints import load_run, save_run
from clinfuse.training.loop import train_system, validation_scores
from clinfuse.use.model_cards import training_table
from clinfuse.use.recipes import predict, train, tune
from clinfuse.use.results import prediction_table

SERVED = [
    (name, task) for name in SYSTEMS for task in EVERY_TASK[1:] if task in system_class(name).tasks
]
KINDS = {"length-of-stay": ["hours"], "mortality-and-stay": ["binary", "days"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("folders")
    return {task: invented_patients(place / task, num_samples=50, task=task) for task in EVERY_TASK}


@pytest.fixture(scope="module")
def stays(folders):
    return folders["mortality-and-stay"]


def changed(data, **columns):
    """The same folder, some columns of its samples replaced."""
    other = PreparedData(data.path)
    other.samples = data.samples.assign(**columns)
    return other


@pytest.mark.parametrize(("name", "task"), SERVED)
def test_every_system_keeps_the_contract_on_every_task(folders, tmp_path, name, task):
    data = folders[task]
    system = build_system(name, data, "quick", changes=ONE_EPOCH.get(name))
    history = train_system(system, data, tmp_path, quiet=True)
    save_run(system, tmp_path, data, recipe="quick", seed=0, history=history)
    rows = np.arange(len(data.samples))
    found = system.predict(data, rows)
    assert found.shape == (len(rows), len(data.labels)) and np.isfinite(found).all()
    is_binary = [kind == "binary" for kind in system.description.kinds]
    assert (found >= 0).all() and (found[:, is_binary] <= 1).all()
    np.testing.assert_array_equal(load_run(tmp_path).predict(data, rows), found)
    np.testing.assert_allclose(system.predict(data, rows[::-1]), found[::-1], rtol=1e-5, atol=1e-5)
    assert ("validation_mae" in history) == (not all(is_binary))
    assert list(system.description.kinds) == KINDS.get(task, ["binary"] * len(data.labels))


@pytest.mark.parametrize("name", ["cnn-1d", "xgboost", "logistic-regression", "mlp"])
def test_hours_and_days_are_told_in_their_own_unit(folders, tmp_path, name):
    """The same patients, asked for days and for hours: about the same stay."""
    told = []
    for task, unit in (("length-of-stay", 24.0), ("mortality-and-stay", 1.0)):
        data = folders[task]
        system = build_system(name, data, "quick")
        train_system(system, data, tmp_path, quiet=True)
        rows = data.rows("train")
        told.append(system.predict(data, rows)[:, -1] / unit)
        error = np.abs(told[-1] - label_array(data, rows)[:, -1] / unit).mean()
        spread = np.abs(
            label_array(data, rows)[:, -1] / unit - label_array(data, rows)[:, -1].mean() / unit
        )
        assert error < spread.mean()
    assert 0.5 < np.median(told[0] / told[1]) < 2


def test_a_batch_without_any_known_duration_teaches_the_rest(stays):
    bare = changed(stays, length_of_stay_days=np.nan)
    system = build_system("lstm", stays, "quick").eval()
    batch = read_batch(bare, np.arange(8), system.description)
    loss = system.training_loss("series", batch)
    loss.backward()
    torch.testing.assert_close(
        loss,
        torch.nn.functional.binary_cross_entropy_with_logits(
            system(batch)[:, 0], batch.labels[:, 0]
        ),
    )
    assert (system.head.weight.grad.abs().sum(1) > 0).tolist() == [True, False]
    unknown = changed(bare, in_hospital_mortality=np.nan)
    nobody = read_batch(unknown, np.arange(8), system.description)
    assert system.training_loss("series", nobody) == 0


@pytest.mark.parametrize("name", ["lstm", "random-forest", "mlp", "vgg-1d"])
def test_durations_that_some_lack_are_no_obstacle(stays, tmp_path, name):
    days = stays.samples["length_of_stay_days"].where(np.arange(len(stays.samples)) % 3 > 0)
    data = changed(stays, length_of_stay_days=days)
    system = build_system(name, data, "quick", changes=ONE_EPOCH.get(name))
    history = train_system(system, data, tmp_path, quiet=True)
    assert np.isfinite(history["validation_mae"]).all()
    assert np.isfinite(system.predict(data, data.rows("test"))).all()


@pytest.mark.parametrize("name", ["lstm", "xgboost"])
def test_a_duration_below_zero_is_refused_by_its_sample(stays, name):
    days = stays.samples["length_of_stay_days"].copy()
    days.iloc[stays.rows("train")[3]] = -0.5
    with pytest.raises(InputError, match=r"length_of_stay_days of sample s00000\d is -0.5"):
        build_system(name, changed(stays, length_of_stay_days=days), "quick")


def test_a_folder_without_a_row_of_numbers_has_no_published_rivals(folders):
    for name in ("random-forest", "xgboost", "mlp", "vgg-1d", "cnn-1d"):
        with pytest.raises(InputError, match="has no numbers of a stay"):
            build_system(name, folders["in-hospital-mortality"], "published")
        about = build_system(name, folders["mortality-and-stay"], "published").description
        assert list(about.numbers) == folders["mortality-and-stay"].numbers


def test_numbers_are_scaled_by_the_training_patients_alone(stays):
    about = DataDescription.of(stays)
    weight = stays.samples["mean_weight"].copy()
    weight[stays.samples["split"] != "train"] = 1e6
    spoilt = changed(stays, mean_weight=weight)
    assert {
        n: v for n, v in DataDescription.of(spoilt, numbers=["mean_weight"]).numbers.items()
    } == {"mean_weight": about.numbers["mean_weight"]}
    numbers = read_batch(spoilt, spoilt.rows("test"), about, ["numbers"]).numbers[:, 1]
    _, high, _, mean, std = about.numbers["mean_weight"]
    assert torch.allclose(numbers, torch.tensor((high - mean) / std).float())


def test_words_are_those_of_the_training_patients_alone(stays):
    titles = stays.samples["text_diagnoses"].where(stays.samples["split"] == "train", "Xylophone")
    about = DataDescription.of(
        changed(stays, text_diagnoses=titles), {"diagnoses": None, "none": 3}
    )
    assert about.vocabularies["none"] == () and "xylophone" not in about.vocabularies["diagnoses"]
    rows = stays.rows("test")
    tokens = read_batch(changed(stays, text_diagnoses=titles), rows, about, ["text"]).tokens
    assert tokens["diagnoses"].tolist() == [[1]] * len(rows)
    assert tokens["none"].tolist() == [[0]] * len(rows)


def test_a_run_from_before_there_were_kinds_is_read(folders, tmp_path):
    data = folders["in-hospital-mortality"]
    later = ("label_kinds", "loss_scale", "numbers", "categories", "ethnicities", "vocabularies")
    for name in ("lstm", "logistic-regression", "xgboost"):
        run = tmp_path / name
        train(
            name,
            data.path,
            run,
            recipe="quick",
            set={"stage.num_epochs": "1"} if name == "lstm" else {},
            quiet=True,
        )
        content = json.loads((run / "config.json").read_text())
        for field in later:
            del content["description"][field]
        content["config"].pop("columns", None)
        system, rows = load_run(run), data.rows("test")
        (run / "config.json").write_text(json.dumps(content))
        old = load_run(run)
        assert old.description.kinds == ("binary",)
        np.testing.assert_array_equal(old.predict(data, rows), system.predict(data, rows))


def test_predictions_say_their_kind_and_cards_the_least_error(stays, tmp_path):
    run = tmp_path / "run"
    train("lstm", stays.path, run, recipe="quick", set={"stage.num_epochs": "3"}, quiet=True)
    table = prediction_table(run, stays, stays.rows("test"))
    kinds = table.groupby("label")["kind"].unique().map(list).to_dict()
    assert kinds == {"in_hospital_mortality": ["binary"], "length_of_stay_days": ["days"]}
    written = predict(run, stays.path, tmp_path / "out.csv", quiet=True)
    assert list(written) == ["sample_id", "label", "prediction"]
    history = pd.read_csv(run / "history.csv")
    least = training_table(history)["best validation mae"].item()
    assert least == round(history["validation_mae"].min(), 4)
    assert "best validation mae" in (run / "card.md").read_text()


def test_a_search_can_make_the_error_small(stays, tmp_path):
    pytest.importorskip("optuna", reason="the extra `tune` is not installed")
    found = tune(
        "mlp", stays.path, tmp_path / "s", trials=3, recipe="quick", metric="mae", quiet=True
    )
    assert found.score == found.trials["score"].min() and found.changes


@given(
    kinds=st.lists(st.sampled_from(["binary", "days", "hours"]), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_columns_keep_to_themselves(kinds, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(6, len(kinds), generator=generator)
    labels = torch.rand(6, len(kinds), generator=generator).round() * 5
    labels[:, [kind == "binary" for kind in kinds]] /= 5
    together, scale = label_losses(logits, labels, kinds, [2.0] * len(kinds)), [2.0]
    assert (answers(logits, kinds) >= 0).all() and (together >= 0).all()
    for place, kind in enumerate(kinds):
        column = slice(place, place + 1)
        alone = label_losses(logits[:, column], labels[:, column], [kind], scale)
        torch.testing.assert_close(together[:, column], alone)


@given(mean=st.floats(0.01, 3000), share=st.floats(1e-4, 1 - 1e-4))
@settings(max_examples=40, deadline=None)
def test_a_neutral_patient_is_told_the_mean(mean, share):
    told = answers(neutral_logits([share, mean], ["binary", "hours"]).double(), ["binary", "hours"])
    np.testing.assert_allclose(told, [share, max(mean, 0.024)], rtol=2e-3)


def test_telling_everybody_the_mean_costs_one(stays):
    about, rows = DataDescription.of(stays), stays.rows("train")
    told = np.tile(about.prevalence["all"], (len(rows), 1))
    labels = label_array(stays, rows)
    only_days = labels.copy()
    only_days[:, 0] = np.nan
    assert abs(validation_scores(told, only_days, about)["loss"] - 1) < 1e-5
