"""Tuning: stopped and continued, shared, honest."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from clinfuse.conventions import InputError
from clinfuse.data.dataset import PreparedData
from clinfuse.systems.batches import invented_patients
from clinfuse.systems.contract import SYSTEMS, build_system, system_class
from clinfuse.training import tuning
from clinfuse.training.checkpoints import load_run, read_config
from clinfuse.training.tuning import PAPER_SEARCHES, default_space, read_space, tune

pytest.importorskip("optuna", reason="the extra `tune` is not installed")

SPACE = {
    "stage.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
    "stage.batch_size": [16, 32],
    "stage.num_epochs": [2],
}
OPTIONS = {"recipe": "quick", "space": SPACE, "quiet": True}
PROGRAM = """
import sys
from clinfuse.training.tuning import tune
data, out, trials, space = sys.argv[1:]
tune("lstm", data, out, int(trials), recipe="quick", space=space, quiet=True)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return invented_patients(tmp_path_factory.mktemp("data") / "data", num_samples=60)


def without_seconds(search):
    return search.trials.drop(columns="seconds")


def start(data, out, trials, space):
    words = [sys.executable, "-c", PROGRAM, str(data.path), str(out), str(trials), str(space)]
    return subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_a_search_in_two_parts_is_the_search_in_one(data, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "train_system", lambda system, *_, **__: fake_history(system))
    tune("lstm", data.path, tmp_path / "parts", 4, **OPTIONS)
    parts = tune("lstm", data.path, tmp_path / "parts", 13, **OPTIONS)
    whole = tune("lstm", data.path, tmp_path / "whole", 13, **OPTIONS)
    pd.testing.assert_frame_equal(without_seconds(parts), without_seconds(whole))
    assert parts.changes == whole.changes and parts.score == whole.score
    best = [read_config(search.folder / "best")["config"] for search in (parts, whole)]
    assert best[0] == best[1]
    late = whole.trials["stage.learning_rate"]
    assert late[10:].median() > late[:10].median(), "the later draws do not know of the earlier"


def test_the_best_run_is_what_its_settings_train(data, tmp_path):
    from clinfuse.training.loop import train_system

    search = tune("lstm", data.path, tmp_path / "search", 3, **OPTIONS)
    changes = dict(setting.split("=") for setting in search.settings)
    system = build_system("lstm", data, "quick", changes)
    train_system(system, data, tmp_path / "run", quiet=True)
    rows = data.rows("validation")
    kept = load_run(search.folder / "best")
    np.testing.assert_array_equal(kept.predict(data, rows), system.predict(data, rows))
    weights = [path.parent.name for path in search.folder.glob("trials/*/model.safetensors")]
    assert weights == [f"{search.trials['score'].idxmax():04d}"]


def test_the_test_patients_take_no_part(data, tmp_path, monkeypatch):
    honest = tune("lstm", data.path, tmp_path / "honest", 3, **OPTIONS)
    spoilt = PreparedData(data.path)
    is_test = (data.samples["split"] == "test").to_numpy()
    table = data.samples.copy()
    table.loc[is_test, "in_hospital_mortality"] = 1 - table["in_hospital_mortality"][is_test]
    series = np.array(data.series_array)
    for start, length in table.loc[is_test, ["series_start", "series_length"]].to_numpy():
        series[start : start + length] = np.nan
    spoilt.samples, spoilt.series_array = table, series
    monkeypatch.setattr(tuning, "PreparedData", lambda path: spoilt)
    blind = tune("lstm", data.path, tmp_path / "blind", 3, **OPTIONS)
    pd.testing.assert_frame_equal(without_seconds(honest), without_seconds(blind))


def test_two_processes_share_one_study(data, tmp_path):
    (tmp_path / "space.json").write_text(json.dumps(SPACE))
    hands = [start(data, tmp_path / "search", 5, tmp_path / "space.json") for _ in range(2)]
    assert [hand.wait(timeout=120) for hand in hands] == [0, 0]
    options = {**OPTIONS, "space": tmp_path / "space.json"}
    search = tune("lstm", data.path, tmp_path / "search", 5, **options)
    assert sorted(search.trials["trial"]) == list(range(5))
    assert set(search.trials["state"]) <= {"complete", "pruned"}
    assert search.trials["stage.learning_rate"].is_unique
    assert (search.folder / "best/model.safetensors").is_file()


def test_a_killed_trial_is_tried_again(data, tmp_path):
    (tmp_path / "space.json").write_text(json.dumps({**SPACE, "stage.num_epochs": [200]}))
    hand = start(data, tmp_path / "search", 2, tmp_path / "space.json")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("search/trials/.0000.*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    hand.send_signal(signal.SIGKILL)
    hand.wait()
    options = {**OPTIONS, "space": tmp_path / "space.json"}
    search = tune("lstm", data.path, tmp_path / "search", 1, **options)
    assert list(search.trials["state"]) == ["fail", "complete"]
    assert search.trials["stage.learning_rate"].nunique() == 1
    assert not list(tmp_path.glob("search/trials/.*"))


def test_a_paper_grid_is_tried_once_each(data, tmp_path, monkeypatch):
    grid = {"stage.batch_size": [16, 32], "stage.learning_rate": [0.001, 0.002, 0.005]}
    monkeypatch.setitem(PAPER_SEARCHES, "lstm", ("grid", grid))
    monkeypatch.setattr(tuning, "train_system", lambda system, *_, **__: fake_history(system))
    options = {"recipe": "quick", "space": "paper", "quiet": True}
    search = tune("lstm", data.path, tmp_path / "search", 100, **options)
    pairs = set(zip(search.trials["stage.batch_size"], search.trials["stage.learning_rate"]))
    assert len(search.trials) == len(pairs) == 6
    assert search.changes["stage.learning_rate"] == 0.005


def fake_history(system):
    """Better the larger the step."""
    rate = system.config.stage.learning_rate
    row = {"stage": "series", "epoch": 1, "validation_auroc": rate, "is_best": True}
    return pd.DataFrame([row])


def test_a_hopeless_trial_is_pruned(data, tmp_path, monkeypatch):
    def train(system, data, folder, seed, quiet, on_epoch):
        rate = system.config.stage.learning_rate
        history = []
        for epoch in range(1, 6):
            row = {"stage": "series", "epoch": epoch, "validation_auroc": rate, "is_best": False}
            history.append(row)
            on_epoch(history)
        return pd.DataFrame(history).assign(is_best=[False] * 4 + [True])

    monkeypatch.setattr(tuning, "train_system", train)
    search = tune("lstm", data.path, tmp_path / "search", 12, **OPTIONS)
    states = search.trials["state"]
    assert (states[:5] == "complete").all() and (states == "pruned").any()
    pruned = search.trials[states == "pruned"]["stage.learning_rate"]
    assert pruned.max() < search.trials["stage.learning_rate"].max()
    assert not [name for name in pruned.index if (search.folder / f"trials/{name:04d}").exists()]


def test_a_loss_without_bound_ends_a_trial_and_not_the_search(data, tmp_path, monkeypatch):
    def train(system, *_, **__):
        if system.config.stage.learning_rate > 0.003:
            raise InputError("the loss became nan at step 3")
        return fake_history(system)

    monkeypatch.setattr(tuning, "train_system", train)
    search = tune("lstm", data.path, tmp_path / "search", 6, **OPTIONS)
    wild = search.trials["stage.learning_rate"] > 0.003
    assert 0 < wild.sum() < 6
    assert (search.trials["state"] == np.where(wild, "pruned", "complete")).all()
    assert search.trials["reason"][wild].str.contains("became nan").all()


def test_any_other_failure_stops_the_search(data, tmp_path, monkeypatch):
    def train(*_, **__):
        raise RuntimeError("no more memory")

    with monkeypatch.context() as patched:
        patched.setattr(tuning, "train_system", train)
        with pytest.raises(RuntimeError, match="no more memory"):
            tune("lstm", data.path, tmp_path / "search", 2, **OPTIONS)
    assert not list(tmp_path.glob("search/trials/*"))
    search = tune("lstm", data.path, tmp_path / "search", 1, **OPTIONS)
    assert list(search.trials["state"]) == ["fail", "complete"]


def test_trees_are_searched_too(data, tmp_path):
    pytest.importorskip("xgboost")
    options = {"recipe": "quick", "quiet": True, "metric": "loss"}
    search = tune("xgboost", data.path, tmp_path / "search", 3, **options)
    assert set(default_space("xgboost")) <= set(search.trials.columns)
    assert search.score == search.trials["score"].min()
    assert isinstance(search.changes["depth"], int)
    load_run(search.folder / "best").predict(data, data.rows("validation"))


@pytest.mark.parametrize("system", sorted(set(SYSTEMS) - {"current-map", "persistence"}))
def test_every_system_has_a_space_that_fits_it(system):
    for recipe in system_class(system).recipes:
        how, space = read_space("default", system, recipe)
        assert how == "tpe" and space


@pytest.mark.parametrize("system", [name for name in PAPER_SEARCHES if name in SYSTEMS])
def test_every_paper_search_fits_its_system(system):
    assert read_space("paper", system)[0] in ("random", "grid")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "accuracy"}, "unknown metric 'accuracy'"),
        ({"trials": 0}, "trials must be at least 1"),
        ({"space": "nowhere.json"}, "missing or damaged"),
        ({"space": {"encoder.dim": {"low": 8}}}, "expected a list of values or low <= high"),
        ({"space": {"encoder.dim": []}}, "expected a list of values or low <= high"),
        ({"recipe": "fast"}, "known: safe, published, quick"),
        ({"system": "oracle"}, "unknown system 'oracle'"),
    ],
)
def test_bad_requests_are_named(data, tmp_path, change, message):
    words = {"system": "lstm", "data": data.path, "out": tmp_path / "search", "trials": 1}
    with pytest.raises(InputError, match=message):
        tune(**{**words, **OPTIONS, **change})


def test_one_outcome_only_is_no_basis_for_auroc(data, tmp_path, monkeypatch):
    other = PreparedData(data.path)
    table = data.samples.copy()
    table.loc[table["split"] == "validation", "in_hospital_mortality"] = 0
    other.samples = table
    monkeypatch.setattr(tuning, "PreparedData", lambda path: other)
    with pytest.raises(InputError, match="patients with both outcomes"):
        tune("lstm", data.path, tmp_path / "search", 1, **OPTIONS)
    search = tune("lstm", data.path, tmp_path / "other", 1, **{**OPTIONS, "metric": "loss"})
    assert np.isfinite(search.score)
