"""One contract, every system: whatever is registered trains, predicts, is saved and loaded, and keeps its promises."""

import json
from dataclasses import asdict, fields, is_dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clinfuse.conventions import InputError
from clinfuse.data.dataset import PreparedData
from clinfuse.data.preparation import prepare_folder
from clinfuse.data.sources import open_source
from clinfuse.systems.batches import DataDescription, invented_patients, label_array, read_batch
from clinfuse.systems.contract import (
    SYSTEMS,
    NeuralSystem,
    Stage,
    build_system,
    change_config,
    config_from_plain,
    stage_rows,
    system_class,
)
from clinfuse.systems.tabular_baselines import summary_features
from clinfuse.training.checkpoints import load_run, save_run
from clinfuse.training.loop import train_system

ONE_EPOCH = {
    "lstm": {"stage.num_epochs": 1},
    "resnet34": {"stage.num_epochs": 1},
    "robust-fusion": {f"{part}stage.num_epochs": 1 for part in ("lstm.", "resnet34.", "")},
    "medfuse": {f"{part}stage.num_epochs": 1 for part in ("lstm.", "resnet34.", "")},
    "contrastive-fusion": {"pretraining.num_epochs": 1, "stage.num_epochs": 1},
    "card": {"stage.num_epochs": 1, "classifier.stage.num_epochs": 1}
    | {f"classifier.{part}.stage.num_epochs": 1 for part in ("lstm", "resnet34")},
    "xgboost": {"num_trees": 10},
}
each_system = pytest.mark.parametrize("name", SYSTEMS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return invented_patients(tmp_path_factory.mktemp("data") / "data", num_samples=60)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Every system, trained for one tiny epoch, and its run folder."""
    torch.set_num_threads(1)
    runs = {}
    for name in SYSTEMS:
        system = build_system(name, data, "quick", changes=ONE_EPOCH.get(name), seed=1)
        folder = tmp_path_factory.mktemp(name)
        history = train_system(system, data, folder, seed=1, quiet=True)
        save_run(system, folder, data, recipe="quick", seed=1, history=history)
        runs[name] = system, folder, history
    return runs


def copy_of(data, change):
    """The same prepared folder, its table of samples changed in memory."""
    other = PreparedData(data.path)
    change(other.samples)
    return other


@each_system
def test_predicts_a_probability_for_everybody(trained, data, name):
    rows = np.arange(len(data.samples))
    predicted = trained[name][0].predict(data, rows)
    assert predicted.shape == (len(rows), len(data.labels)) and predicted.dtype == np.float64
    assert ((predicted >= 0) & (predicted <= 1)).all()


@each_system
def test_predicts_each_sample_alone(trained, data, name):
    system, rows = trained[name][0], np.arange(len(data.samples))
    together = system.predict(data, rows)
    shuffled = np.random.default_rng(0).permutation(rows)
    np.testing.assert_allclose(system.predict(data, shuffled), together[shuffled], atol=1e-5)
    np.testing.assert_allclose(system.predict(data, rows[7:8]), together[7:8], atol=1e-5)
    assert system.predict(data, rows[:0]).shape == (0, 1)


@each_system
def test_prediction_needs_no_label(trained, data, name):
    def forget(samples):
        samples["in_hospital_mortality"] = np.nan

    system, rows = trained[name][0], np.arange(20)
    np.testing.assert_array_equal(
        system.predict(copy_of(data, forget), rows), system.predict(data, rows)
    )


@each_system
def test_prediction_needs_no_radiograph(trained, data, name):
    def remove(samples):
        samples["radiograph"] = -1

    predicted = trained[name][0].predict(copy_of(data, remove), np.arange(20))
    assert np.isfinite(predicted).all()


@each_system
def test_prediction_uses_the_scale_of_its_training(trained, data, name):
    system, other = trained[name][0], PreparedData(data.path)
    other.normaliser = {key: value * 5 for key, value in data.normaliser.items()}
    np.testing.assert_array_equal(
        system.predict(other, np.arange(9)), system.predict(data, np.arange(9))
    )


@each_system
def test_a_saved_run_is_the_trained_system(trained, data, name):
    system, folder, history = trained[name]
    loaded, rows = load_run(folder), data.rows("test")
    np.testing.assert_array_equal(loaded.predict(data, rows), system.predict(data, rows))
    assert type(loaded) is type(system) and loaded.config == system.config
    assert not [path for path in folder.rglob("*") if path.suffix in (".pkl", ".pickle", ".pt")]
    assert not [path for path in folder.rglob(".*")]
    assert {"stage", "epoch", "seconds", "validation_auroc", "is_best"} <= set(history.columns)
    assert history.groupby("stage")["is_best"].sum().eq(1).all()


@each_system
def test_repeats_with_the_same_seed(trained, data, name, tmp_path):
    again = build_system(name, data, "quick", changes=ONE_EPOCH.get(name), seed=1)
    train_system(again, data, tmp_path, seed=1, quiet=True)
    rows = data.rows("test")
    np.testing.assert_array_equal(again.predict(data, rows), trained[name][0].predict(data, rows))


@each_system
def test_configurations_are_small_frozen_and_plain(name):
    for config in system_class(name).recipes.values():
        plain = json.loads(json.dumps(asdict(config)))
        assert config_from_plain(type(config), plain) == config
        waiting = [config]
        while waiting:
            part = waiting.pop()
            assert len(fields(part)) <= 8 and part.__dataclass_params__.frozen
            waiting += [
                getattr(part, f.name) for f in fields(part) if is_dataclass(getattr(part, f.name))
            ]


@each_system
def test_refuses_data_of_other_columns(trained, data, name):
    other = PreparedData(data.path)
    other.channels = ["Lactate", *data.channels[1:]]
    other.manifest = {**data.manifest, "channels": [{"name": "Lactate"}, {"name": "Temperature"}]}
    if name == "resnet34":
        pytest.skip("reads no column")
    with pytest.raises(InputError, match="trained on"):
        trained[name][0].predict(other, np.arange(3))


@each_system
def test_refuses_unlabelled_training(data, name):
    def forget(samples):
        samples["in_hospital_mortality"] = np.nan

    with pytest.raises(InputError, match="no training sample has a label"):
        build_system(name, copy_of(data, forget), "quick")


@each_system
def test_refuses_unknown_tasks(data, name):
    other = PreparedData(data.path)
    other.manifest = {**data.manifest, "task": "hypotension"}
    with pytest.raises(InputError, match="does not serve the task hypotension; can: -"):
        build_system(name, other)


@each_system
def test_trains_without_a_validation_split(data, name, tmp_path):
    def merge(samples):
        samples["split"] = samples["split"].replace("validation", "train")

    other = copy_of(data, merge)
    system = build_system(name, other, "quick", changes=ONE_EPOCH.get(name))
    history = train_system(system, other, tmp_path, quiet=True)
    assert history["validation_auroc"].isna().all()
    assert np.isfinite(system.predict(other, other.rows("test"))).all()


def test_fusion_trains_without_any_radiograph(data, tmp_path):
    def remove(samples):
        samples["radiograph"] = -1

    bare = copy_of(data, remove)
    system = build_system("robust-fusion", bare, "quick", changes=ONE_EPOCH["robust-fusion"])
    with pytest.warns(UserWarning, match="stage radiograph left out"):
        history = train_system(system, bare, tmp_path, quiet=True)
    assert set(history["stage"]) == {"series", "joint"}
    assert np.isfinite(system.predict(data, data.rows("test"))).all()


@pytest.mark.parametrize("name", ["lstm", "resnet34", "robust-fusion"])
def test_no_state_changes_while_predicting(trained, data, name):
    system = trained[name][0]
    before = {key: value.clone() for key, value in system.state_dict().items()}
    system.train()
    system.predict(data, np.arange(10))
    assert system.training
    system.eval()
    assert all(torch.equal(value, before[key]) for key, value in system.state_dict().items())


@given(st.lists(st.integers(0, 59), min_size=1, max_size=12))
@settings(max_examples=25, deadline=None)
def test_batches_hold_what_was_prepared(data, rows):
    description = DataDescription.of(data)
    batch = read_batch(data, rows, description)
    for place, row in enumerate(rows):
        sample_id, length = data.samples["sample_id"][row], int(batch.series_length[place])
        expected = data.normalised_series(sample_id)
        np.testing.assert_allclose(batch.series[place, :length], expected, atol=1e-5)
        image = data.radiograph(sample_id)
        assert bool(batch.modality_mask[place, 1]) == (image is not None)
        assert (batch.radiograph[place].numpy() == (0 if image is None else image)).all()
    np.testing.assert_array_equal(batch.labels, label_array(data, np.array(rows)))


@given(rate=st.floats(1e-9, 10), epochs=st.integers(1, 10**6))
@settings(max_examples=30, deadline=None)
def test_settings_survive_their_text(rate, epochs):
    changed = change_config(Stage("x"), {"learning_rate": str(rate), "num_epochs": str(epochs)})
    assert (changed.learning_rate, changed.num_epochs) == (rate, epochs)


def test_stage_rows_follow_their_modalities(data):
    for kind in map(system_class, SYSTEMS):
        if not issubclass(kind, NeuralSystem):
            continue
        system = build_system(kind.name, data, "quick")
        for stage in system.stages():
            rows = stage_rows(data, "train", stage)
            batch = read_batch(data, rows, system.description, stage.modalities)
            assert (batch.modality_mask.sum(1) > 0).all()


def test_summary_features_match_pandas(data):
    table = summary_features(data, np.arange(len(data.samples)))
    events = data.events_table.astype({"sample_id": str, "channel": str})
    hours = data.samples.set_index("sample_id")["series_length"]
    late = events[events["hours"] > events["sample_id"].map(hours) - 12]
    for part, suffix in ((events, ""), (late, " of the last 12 h")):
        grouped = part.groupby(["channel", "sample_id"])["value"]
        for name in ("mean", "min", "max"):
            for channel, values in grouped.agg(name).groupby(level="channel"):
                found = table[f"{channel}: {name}{suffix}"].dropna()
                expected = values.droplevel("channel").reindex(found.index)
                np.testing.assert_allclose(found, expected)
    assert (table.filter(like="count") >= 0).all(axis=None)


def test_trees_on_real_stays_come_near_the_yardstick(challenge_2012, tmp_path):
    stays = prepare_folder(open_source(challenge_2012), tmp_path / "stays", quiet=True)
    system = build_system("xgboost", stays, "quick")
    history = train_system(system, stays, tmp_path, quiet=True)
    assert history["validation_auroc"].iloc[0] > 0.8
    died, predicted = (
        label_array(stays, stays.rows("test"))[:, 0],
        system.predict(stays, stays.rows("test"))[:, 0],
    )
    from sklearn.metrics import roc_auc_score

    assert roc_auc_score(died, predicted) > 0.82
