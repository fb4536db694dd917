"""IOHFuseLM and its rivals by the ordinary commands, on the theatre and on a folder of .vital files."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Model

from clinfuse.conventions import InputError
from clinfuse.data.dataset import PreparedData
from clinfuse.data.vital_files import write_vital
from clinfuse.evaluation.hypotension_events import (
    alarm_threshold,
    alarms,
    announcing_windows,
    hypotension_scores,
    watched_windows,
)
from clinfuse.systems.batches import invented_patients, label_array
from clinfuse.systems.contract import SYSTEMS, build_system, system_class
from clinfuse.training.checkpoints import load_run
from clinfuse.training.devices import Hardware
from clinfuse.training.loop import train_system
from clinfuse.use.command_line import COMMANDS, run_command
from clinfuse.use.recipes import explain, export, prepare, ward
from clinfuse.use.results import reachable_auroc

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
    truth = ["--truth", str(data.path.parent / "ward")]
    assert run_command(COMMANDS, [*evaluated, "--split", "validation", *truth]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    for name in ("iohfuselm", "current-map"):
        assert set(metrics["runs"][name]["labels"]) == set(data.labels)
        found = metrics["runs"][name]["hypotension"]["hypotension_15_min"]
        ranked = metrics["runs"][name]["labels"]["hypotension_15_min"]["auroc"]["value"]
        assert found["all_windows"]["auroc"]["value"] == pytest.approx(ranked)
        assert found["forecast"]["mae_hypotensive"]["value"] > 0
    page = (out / "report.html").read_text()
    best = reachable_auroc(data.path.parent / "ward", data, data.rows("train"))
    assert 0.5 < best["series"] < best["series + text"] < 1 and "from series + text" in page
    assert "Warnings before low pressure" in page and "lead time, minutes" in page
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


def test_public_weights_are_read_from_a_folder_and_saved_with_the_run(data, gpt2_folder, tmp_path):
    words = {"weights": gpt2_folder, "dim": 16, "num_heads": 2, "max_tokens": 64}
    words |= {"trained": "norms and positions"}
    changes = {f"network.language_model.{name}": value for name, value in words.items()}
    changes |= {
        "stage.num_epochs": 1,
        "pretraining.num_epochs": 0,
        "network.alignment.num_heads": 2,
    }
    flags = [f"{name}={value}" for name, value in changes.items()]
    trained = ["train", "iohfuselm", str(data.path), str(tmp_path / "run"), "--recipe", "quick"]
    assert run_command(COMMANDS, [*trained, "--quiet", "--set", *flags]) == 0
    system, public = load_run(tmp_path / "run"), GPT2Model.from_pretrained(gpt2_folder)
    found = system.network.language_model.gpt2
    for name in ("attn.c_attn", "mlp.c_fc"):
        ours, theirs = (blocks.h[0].get_submodule(name).weight for blocks in (found, public))
        assert torch.equal(ours, theirs)
    assert not torch.equal(found.h[0].ln_1.weight, public.h[0].ln_1.weight)
    assert np.isfinite(system.predict(data, np.arange(4))).all()
    wrong = [flag.replace(gpt2_folder, "/nowhere") for flag in flags]
    other = [*trained[:3], str(tmp_path / "other"), "--recipe", "quick", "--quiet", "--set", *wrong]
    assert run_command(COMMANDS, other) == 1 and not (tmp_path / "other").exists()


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31 - 1), st.floats(0.05, 1.0))
def test_alarms_announce_what_was_asked_and_only_ranks_count(data, seed, sensitivity):
    rows = np.flatnonzero(data.samples["split"] != "train")
    seen, scores = watched_windows(data, rows), np.random.default_rng(seed).random(len(rows))
    episodes = announcing_windows(seen, 1)
    threshold = alarm_threshold(scores, episodes, sensitivity)
    assert threshold >= alarm_threshold(scores, episodes, 1.0)
    counted = alarms(scores, seen, 1, threshold)
    assert counted["announced"].sum() >= sensitivity * counted["episodes"].sum() - 1e-9
    assert (
        counted["lead_minutes"].max() <= 10 and counted["is_false"].sum() <= counted["begins"].sum()
    )
    other = scores**3
    pd.testing.assert_frame_equal(
        alarms(other, seen, 1, alarm_threshold(other, episodes, sensitivity)), counted
    )


def test_a_perfect_forecast_has_no_error_and_warns_rightly(data):
    rows = data.rows("test")
    seen = watched_windows(data, rows)
    truth = np.stack([seen.labels(place) for place in range(3)], axis=1).astype(float)
    np.testing.assert_array_equal(truth, label_array(data, rows))
    found = hypotension_scores(data, rows, seen.future, truth, num_resamples=20)
    for of in found.values():
        assert of["forecast"]["mse"]["value"] == 0
        assert of["event_rule"]["balanced_accuracy"]["value"] == 1
        assert of["all_windows"]["auroc"]["value"] == 1
        assert of["alarms"]["false_alarms_per_hour"]["value"] == 0


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
