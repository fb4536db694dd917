"""One contract, every system: whatever is registered trains, predicts, is saved and loaded, and keeps its promises."""

import json
import warnings
from dataclasses import asdict, fields, is_dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clinfuse.conventions import InputError
from clinfuse.data.dataset import PreparedData
from clinfuse.data.preparation import prepare_folder
from clinfuse.data.sources import open_source
from clinfuse.data.summary_features import summary_features
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
from clinfuse.training.checkpoints import load_run, save_run
from clinfuse.training.loop import train_system
from clinfuse.use import recipes

ONE_EPOCH = {
    "lstm": {"stage.num_epochs": 1},
    "resnet34": {"stage.num_epochs": 1},
    "robust-fusion": {f"{part}stage.num_epochs": 1 for part in ("lstm.", "resnet34.", "")},
    "medfuse": {f"{part}stage.num_epochs": 1 for part in ("lstm.", "resnet34.", "")},
    "contrastive-fusion": {"pretraining.num_epochs": 1, "stage.num_epochs": 1},
    "card": {"stage.num_epochs": 1, "classifier.stage.num_epochs": 1}
    | {f"classifier.{part}.stage.num_epochs": 1 for part in ("lstm", "resnet34")},
    "xgboost": {"num_trees": 10},
    "m3t-lm": {"stage.num_epochs": 1, "titles": ("diagnoses",), "num_words": (50,)}
    | {"num_tokens": (9,)},
    "random-forest": {"num_trees": 10},
    "mlp": {"num_epochs": 5},
    "vgg-1d": {"stage.num_epochs": 1},
    "cnn-1d": {"stage.num_epochs": 1},
}
OF_STAYS = [n for n in SYSTEMS if "hypotension" not in system_class(n).tasks]
each_system = pytest.mark.parametrize("name", OF_STAYS)


def task_of(name):
    """The first task that a system serves."""
    return system_class(name).tasks[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A prepared folder for each task that some system serves first."""
    place = tmp_path_factory.mktemp("data")
    tasks = {task_of(name) for name in OF_STAYS}
    return {task: invented_patients(place / task, num_samples=60, task=task) for task in tasks}


@pytest.fixture
def data(folders, request):
    """Patients for the system of the test, if it is about one."""
    about = getattr(request.node, "callspec", None)
    return folders[task_of(about.params.get("name", "lstm") if about else "lstm")]


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory):
    """Every system, trained for one tiny epoch, and its run folder."""
    torch.set_num_threads(1)
    runs = {}
    for name in OF_STAYS:
        data = folders[task_of(name)]
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
def test_predicts_a_probability_or_a_duration_for_everybody(trained, data, name):
    rows = np.arange(len(data.samples))
    predicted = trained[name][0].predict(data, rows)
    assert predicted.shape == (len(rows), len(data.labels)) and predicted.dtype == np.float64
    is_time = np.array(trained[name][0].description.kinds) != "binary"
    assert ((predicted >= 0) & ((predicted <= 1) | is_time)).all() and np.isfinite(predicted).all()


@each_system
def test_predicts_each_sample_alone(trained, data, name):
    system, rows = trained[name][0], np.arange(len(data.samples))
    together = system.predict(data, rows)
    shuffled = np.random.default_rng(0).permutation(rows)
    np.testing.assert_allclose(system.predict(data, shuffled), together[shuffled], atol=1e-5)
    np.testing.assert_allclose(system.predict(data, rows[7:8]), together[7:8], atol=1e-5)
    assert system.predict(data, rows[:0]).shape == (0, len(data.labels))


@each_system
def test_prediction_needs_no_label(trained, data, name):
    def forget(samples):
        samples[data.labels] = np.nan

    system, rows = trained[name][0], np.arange(20)
    told = system.predict(copy_of(data, forget), rows)
    np.testing.assert_allclose(told, system.predict(data, rows), rtol=1e-12)


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
    told = system.predict(other, np.arange(9))
    np.testing.assert_allclose(told, system.predict(data, np.arange(9)), rtol=1e-12)


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
    other.samples = data.samples.rename(columns={"mean_lactate": "mean_sodium"})
    if name == "resnet34":
        pytest.skip("reads no column")
    with pytest.raises(InputError, match="trained on"):
        trained[name][0].predict(other, np.arange(3))


@each_system
def test_refuses_unlabelled_training(data, name):
    def forget(samples):
        samples[data.labels] = np.nan

    with pytest.raises(InputError, match="no training sample has a label"):
        build_system(name, copy_of(data, forget), "quick")


@each_system
def test_refuses_unknown_tasks(data, name):
    other = PreparedData(data.path)
    other.manifest = {**data.manifest, "task": "hypotension"}
    with pytest.raises(InputError, match="does not serve the task hypotension; can: iohfuselm"):
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


@each_system
def test_a_label_of_one_class_is_learned_or_refused(data, name, tmp_path):
    def same(samples):
        samples["in_hospital_mortality"] = 0

    other = copy_of(data, same)
    system = build_system(name, other, "quick", changes=ONE_EPOCH.get(name))
    if name == "logistic-regression":
        with pytest.raises(InputError, match="in_hospital_mortality: all 36 training samples"):
            train_system(system, other, tmp_path, quiet=True)
        return
    history = train_system(system, other, tmp_path, quiet=True)
    assert history["validation_auroc"].isna().all()
    predicted = system.predict(other, other.rows("test"))
    assert np.isfinite(predicted).all() and predicted[:, 0].mean() < 0.5


@each_system
@pytest.mark.parametrize("imaged", ["train", "test"])
def test_an_unpaired_split_trains(data, name, imaged, tmp_path):
    def unpair(samples):
        samples.loc[samples["split"] != imaged, "radiograph"] = -1

    other = copy_of(data, unpair)
    if name == "resnet34" and imaged == "test":
        with pytest.raises(
            InputError, match="no training sample has a radiograph; can: robust-fusion"
        ):
            build_system(name, other, "quick")
        return
    system = build_system(name, other, "quick", changes=ONE_EPOCH.get(name))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="stage radiograph left out")
        history = train_system(system, other, tmp_path, quiet=True)
    assert np.isfinite(history.filter(like="train_loss")).all(axis=None)
    assert np.isfinite(system.predict(other, other.rows("test"))).all()


@pytest.mark.parametrize("name", [n for n in OF_STAYS if issubclass(system_class(n), NeuralSystem)])
def test_batches_of_one_train(name, tmp_path):
    few = invented_patients(tmp_path / "few", num_samples=14, task=task_of(name))
    changes = ONE_EPOCH[name] | {
        stage.replace("num_epochs", "batch_size"): 1
        for stage in ONE_EPOCH[name]
        if stage.endswith("num_epochs")
    }
    system = build_system(name, few, "quick", changes=changes)
    history = train_system(system, few, tmp_path, quiet=True)
    assert np.isfinite(history["train_loss"]).all()
    assert np.isfinite(system.predict(few, np.arange(14))).all()


def test_fusion_refuses_weights_of_another_system_and_of_another_size(trained, data, tmp_path):
    _, folder, _ = trained["robust-fusion"]
    with pytest.raises(InputError, match=r"weights of another system: fusion"):
        build_system("medfuse", data, "quick").load_weights(folder)
    wider = build_system("robust-fusion", data, "quick", changes={"lstm.encoder.dim": 32})
    with pytest.raises(InputError, match=r"has shape .*64.*, expected .*32"):
        wider.load_weights(folder)


def test_fusion_trains_without_any_radiograph(data, tmp_path):
    def remove(samples):
        samples["radiograph"] = -1

    bare = copy_of(data, remove)
    system = build_system("robust-fusion", bare, "quick", changes=ONE_EPOCH["robust-fusion"])
    with pytest.warns(UserWarning, match="stage radiograph left out"):
        history = train_system(system, bare, tmp_path, quiet=True)
    assert set(history["stage"]) == {"series", "joint"}
    assert np.isfinite(system.predict(data, data.rows("test"))).all()


def twenty_five_labels(data):
    """The same patients with invented phenotypes, all known."""
    labels = [f"phenotype_{number}" for number in range(25)]
    random, other = np.random.default_rng(0), PreparedData(data.path)
    invented = {label: random.integers(0, 2, len(data.samples)) for label in labels}
    other.samples, other.labels = other.samples.assign(**invented), labels
    return other


def test_weighted_labels_learn_and_may_be_split(data, tmp_path):
    many, changes = twenty_five_labels(data), {"objective": "uncertainty"}
    changes |= ONE_EPOCH["robust-fusion"] | {"uncertainty.learning_rate": "0.1"}
    system = build_system("robust-fusion", many, "quick", changes=changes)
    train_system(system, many, tmp_path, quiet=True)
    moved = system.weighting.log_variance.detach().abs()
    assert (moved > 0.01).all()
    rows, halves = np.arange(30), (np.arange(20), np.arange(20, 30))
    losses = [
        system.training_loss("joint", read_batch(many, part, system.description)).item()
        for part in (rows, *halves)
    ]
    assert losses[0] == pytest.approx((20 * losses[1] + 10 * losses[2]) / 30, rel=1e-5)


def test_one_label_is_not_weighed(data):
    with pytest.warns(UserWarning, match="plain cross-entropy") as found:
        published = build_system("robust-fusion", data, "published")
    assert len(found) == 1 and published.weighting is None


@pytest.fixture(scope="module")
def ward_data(tmp_path_factory):
    """A tiny ward, prepared for mortality and for the findings of all films."""
    folder = tmp_path_factory.mktemp("ward")
    recipes.ward(folder / "ward", patients=40, quiet=True)
    source, asked = folder / "ward", {"splits": folder / "stays", "quiet": True}
    stays = recipes.prepare(source, folder / "stays", task="in-hospital-mortality", quiet=True)
    return stays, recipes.prepare(source, folder / "films", task="chest-findings", **asked)


def test_findings_of_all_films_are_where_fusion_starts(ward_data, tmp_path):
    (stays, films), folder = ward_data, tmp_path / "films"
    changes = {"stage.num_epochs": "1"}
    recipes.train("resnet34", films.path, folder, recipe="quick", set=changes, quiet=True)
    learned = load_run(folder).encoder.backbone.state_dict()
    for name in ("robust-fusion", "medfuse", "card"):
        changes = {stage: int("lstm" in stage) for stage in ONE_EPOCH[name]}
        part = "classifier." if name == "card" else ""
        changes[f"{part}resnet34.encoder.weights"] = str(folder)
        system = build_system(name, stays, "quick", changes=changes)
        history = train_system(system, stays, tmp_path / name, quiet=True)
        assert history["stage"].tolist() == ["series"]
        found = system.get_submodule(f"{part}resnet34.encoder.backbone").state_dict()
        assert all(torch.equal(value, learned[key]) for key, value in found.items())
    weights = {"resnet34.encoder.weights": str(folder)}
    with pytest.raises(InputError, match=r"resnet34 \(\(1, 1, 1\), .* expected resnet34 \(\(3, 4"):
        build_system("robust-fusion", stays, "safe", changes=weights)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="damaged run folder"):
        build_system("robust-fusion", stays, "quick", changes=weights)


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
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
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


def test_stage_rows_follow_their_modalities(folders):
    for kind in map(system_class, OF_STAYS):
        if not issubclass(kind, NeuralSystem):
            continue
        data = folders[kind.tasks[0]]
        system = build_system(kind.name, data, "quick")
        for stage in system.stages():
            rows = stage_rows(data, "train", stage)
            if "numbers" in stage.modalities:
                assert rows.tolist() == data.rows("train").tolist()
                continue
            batch = read_batch(data, rows, system.description, stage.modalities)
            assert (batch.modality_mask.sum(1) > 0).all() or batch.numbers.shape[0] == len(rows)


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
