"""IOHFuseLM and its rivals by the ordinary commands, on the theatre and on a folder of .vital files."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from clinfuse.conventions import InputError
from clinfuse.data.dataset import PreparedData
from clinfuse.data.vital_files import write_vital
from clinfuse.systems.batches import invented_patients, label_array
from clinfuse.systems.contract import SYSTEMS, build_system, system_class
from clinfuse.training.checkpoints import load_run
from clinfuse.training.devices import Hardware
from clinfuse.training.loop import train_system
from clinfuse.use.command_line import COMMANDS, run_command
from clinfuse.use.recipes import explain, export, prepare, ward

TINY = {"augmentation.num_epochs": 1, "pretraining.num_epochs": 1, "stage.num_epochs": 1}
CHANGES = {
    "iohfuselm": TINY,
    "dlinear": {"stage.num_epochs": 1},
    "patchtst": {"stage.num_epochs": 1},
}
FORECASTERS = ("iohfuselm", "dlinear", "patchtst", "current-map", "persistence")
each_forecaster = pytest.mark.parametrize("name", FORECASTERS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("theatre")
    ward(place / "ward", patients=0, surgeries=14, seed=1, quiet=True)
    return prepare(place / "ward", place / "data", task="hypotension", quiet=True)


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A trained run of each, by the command line."""
    place = tmp_path_factory.mktemp("runs")
    for name in FORECASTERS:
        changes = [f"{key}={value}" for key, value in CHANGES.get(name, {}).items()]
        words = ["train", name, str(data.path), str(place / name), "--recipe", "quick", "--quiet"]
        assert run_command(COMMANDS, [*words, *(["--set", *changes] if changes else [])]) == 0
    return {name: place / name for name in FORECASTERS}


def test_registered_are_those_that_serve_the_task():
    serving = {name for name in SYSTEMS if "hypotension" in system_class(name).tasks}
    assert set(FORECASTERS) <= serving
    assert not set(FORECASTERS) & {n for n in SYSTEMS if "phenotyping" in system_class(n).tasks}


@each_forecaster
def test_forecast_and_probabilities_agree(runs, data, name):
    system, rows = load_run(runs[name]), np.arange(len(data.samples))
    forecast, told = system.forecast(data, rows), system.predict(data, rows)
    assert forecast.shape == (len(rows), 300) and np.isfinite(forecast).all()
    assert (np.diff(told, axis=1).shape, told.min() >= 0, told.max() <= 1) == (
        (len(rows), 2),
        True,
        True,
    )
    shuffled = np.random.default_rng(0).permutation(rows)
    np.testing.assert_allclose(system.forecast(data, shuffled), forecast[shuffled], atol=1e-2)
    np.testing.assert_allclose(system.predict(data, rows[7:8]), told[7:8], atol=1e-4)
    assert system.predict(data, rows[:0]).shape == (0, 3)


@each_forecaster
def test_forecasts_need_neither_future_nor_labels(runs, data, name):
    other = PreparedData(data.path)
    dropped = ["target_start", "target_length"]
    other.samples = data.samples.drop(columns=dropped).assign(**dict.fromkeys(data.labels, np.nan))
    system, rows = load_run(runs[name]), np.arange(20)
    np.testing.assert_array_equal(system.predict(other, rows), system.predict(data, rows))


def test_evaluate_and_predict_by_command(runs, data, tmp_path):
    words = [str(runs[name]) for name in ("iohfuselm", "current-map")]
    out = tmp_path / "report"
    evaluated = ["evaluate", *words, "--data", str(data.path), "--out", str(out), "--quiet"]
    assert run_command(COMMANDS, [*evaluated, "--split", "validation"]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    for name in ("iohfuselm", "current-map"):
        assert set(metrics["runs"][name]["labels"]) == set(data.labels)
    table = tmp_path / "told.csv"
    told = ["predict", str(runs["iohfuselm"]), str(data.path), str(table), "--quiet"]
    assert run_command(COMMANDS, told) == 0
    forecast, rows = np.load(tmp_path / "forecast.npy"), pd.read_csv(table)
    assert forecast.shape == (len(data.samples), 300) and forecast.dtype == np.float32
    assert len(rows) == 3 * len(data.samples)
    again = [*told[:3], str(tmp_path / "other.csv"), "--quiet"]
    assert run_command(COMMANDS, again) == 1 and not (tmp_path / "other.csv").exists()


def stopped_and_resumed(data, folder, stop_after):
    """A training that was interrupted after so many epochs, taken up by another system."""

    def stop(history):
        if len(history) == stop_after:
            raise KeyboardInterrupt

    build = [build_system("iohfuselm", data, "quick", changes=TINY, seed=s) for s in (0, 9)]
    options = {"quiet": True, "hardware": Hardware("cpu", checkpoint_seconds=0)}
    with pytest.raises(KeyboardInterrupt):
        train_system(build[0], data, folder, on_epoch=stop, **options)
    train_system(build[1], data, folder, resume=True, **options)
    return build[1].state_dict()


@pytest.mark.parametrize("stop_after", [1, 2])
def test_killed_between_its_stages_it_ends_with_the_same_bits(runs, data, tmp_path, stop_after):
    whole = load_run(runs["iohfuselm"]).state_dict()
    found = stopped_and_resumed(data, tmp_path, stop_after)
    assert [name for name in whole if not torch.equal(whole[name], found[name])] == []


def test_history_says_what_chose_the_epoch(runs):
    history = pd.read_csv(runs["iohfuselm"] / "history.csv")
    assert history["stage"].tolist() == ["augmentation", "pretraining", "forecast"]
    assert np.isfinite(history[["train_loss", "validation_loss"]]).all(axis=None)


def test_no_low_pressure_leaves_the_first_stages_out(data, tmp_path):
    calm = PreparedData(data.path)
    calm.samples = data.samples.assign(**dict.fromkeys(data.labels, 0))
    system = build_system("iohfuselm", calm, "quick", changes=TINY)
    with pytest.warns(UserWarning, match="stage (augmentation|pretraining) left out"):
        history = train_system(system, calm, tmp_path, quiet=True)
    assert history["stage"].tolist() == ["forecast"]
    np.testing.assert_array_equal(system.temperature, 5.0)


def test_other_tasks_are_refused(tmp_path):
    stays = invented_patients(tmp_path / "stays")
    with pytest.raises(
        InputError, match=r"does not serve the task in-hospital-mortality; can: rob"
    ):
        build_system("iohfuselm", stays)


def test_a_folder_of_vital_files_from_first_to_last(tmp_path):
    chance, folder = np.random.default_rng(0), tmp_path / "vital"
    folder.mkdir()
    seconds = np.arange(0, 6000, 2.0)
    for case in range(1, 11):
        dips = 22 * np.sin(seconds / 500 + case) + chance.normal(0, 1.5, len(seconds))
        write_vital(
            folder / f"{case}.vital", {"Solar8000/ART_MBP": (seconds, 80 + dips, 0.0)}, 1.7e9
        )
    words = ["prepare", str(folder), str(tmp_path / "data"), "--task", "hypotension", "--quiet"]
    assert run_command(COMMANDS, words) == 0
    data = PreparedData(tmp_path / "data")
    run, told = str(tmp_path / "run"), str(tmp_path / "told.csv")
    changes = [f"{key}={value}" for key, value in TINY.items()]
    trained = ["train", "iohfuselm", str(data.path), run, "--recipe", "quick", "--quiet", "--set"]
    assert run_command(COMMANDS, [*trained, *changes]) == 0
    assert run_command(COMMANDS, ["predict", run, str(data.path), told, "--quiet"]) == 0
    rows = pd.read_csv(told).pivot(index="sample_id", columns="label", values="prediction")
    truth = label_array(data, np.arange(len(data.samples)))[:, 0]
    told = rows.loc[data.samples["sample_id"], data.labels[0]].to_numpy()
    assert told[truth == 1].mean() > told[truth == 0].mean()


@pytest.mark.parametrize("name", ["iohfuselm", "dlinear"])
def test_forecasters_are_explained_and_exported(data, runs, name, tmp_path):
    sample = str(data.samples["sample_id"].iloc[data.rows("test")[0]])
    out = tmp_path / "stay.html"
    explained = explain(runs[name], data=data.path, sample=sample, out=out, quiet=True)
    whole = explained.subsets[frozenset(explained.shares)]
    assert abs(sum(explained.shares.values()) - whole + explained.subsets[frozenset()]) < 1e-9
    assert explained.unit == "mmHg lower" and "Every subset of the kinds" in out.read_text()
    if name == "dlinear":
        assert explained.series[0].shape[0] == 1 and explained.series[2] < 1e-3
    exported = export(runs[name], tmp_path / "shared")
    assert exported.guarded.ok and "model.safetensors" in exported.files
