"""Corrupted folders are consistent wherever they come from, and a sweep runs every system from the prompt."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_own_hospital import made_up, write

from clinfuse.conventions import InputError
from clinfuse.data.corruption import (
    KINDS,
    Corruption,
    Layout,
    change_cells,
    event_steps,
    write_corrupted,
)
from clinfuse.data.dataset import PreparedData, describe
from clinfuse.data.leak_audit import Views, audit_leaks
from clinfuse.data.preparation import prepare_folder
from clinfuse.data.sources import open_source
from clinfuse.evaluation.robustness import corruption_plan, possible_kinds, sweep
from clinfuse.systems.batches import invented_patients
from clinfuse.use.recipes import train
from clinfuse.ward.synthetic_ward import write_ward

SYSTEMS = {
    "logistic-regression": (),
    "xgboost": (),
    "lstm": ("stage",),
    "resnet34": ("stage",),
    "robust-fusion": ("lstm.stage", "resnet34.stage", "stage"),
}
LAYOUT = Layout([[0], [1, 2]], np.array([True, False]), np.array([80, 1, 0, 0, 0], np.float32))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return invented_patients(tmp_path_factory.mktemp("data") / "data", num_samples=60)


@pytest.fixture(scope="module")
def ward(tmp_path_factory):
    return write_ward(tmp_path_factory.mktemp("ward") / "ward", num_stays=20, seed=3, quiet=True)


def slow_loss(measurements, first_rows, is_hit):
    """What a grid shows when some measurements are gone, one cell at a time."""
    grid = np.tile(LAYOUT.before, (len(first_rows), 1))
    for row, first in enumerate(first_rows):
        for channel, columns in enumerate(LAYOUT.columns):
            for earlier in range(row, first - 1, -1):
                if measurements[earlier][channel] is not None and not is_hit[earlier, channel]:
                    grid[row, columns] = measurements[earlier][channel]
                    grid[row, channel - 2] = earlier == row
                    break
    return grid


numbers = st.none() | st.integers(60, 99).map(lambda number: [number])
categories = st.none() | st.sampled_from([[1, 0], [0, 1]])
steps = st.tuples(numbers, categories, st.booleans(), st.booleans(), st.booleans())


@given(st.lists(steps, min_size=1, max_size=12))
def test_a_loss_is_that_of_a_slow_loop(rows):
    measurements, is_hit = [row[:2] for row in rows], np.array([row[2:4] for row in rows])
    begins = np.array([True, *(row[4] for row in rows[1:])])
    first_rows = np.maximum.accumulate(np.where(begins, np.arange(len(rows)), 0))
    grid = slow_loss(measurements, first_rows, np.zeros_like(is_hit))
    lost = change_cells(grid, first_rows, LAYOUT, is_hit, None)
    assert (lost == slow_loss(measurements, first_rows, is_hit)).all()


@pytest.mark.parametrize("task", ["phenotyping", "decompensation"])
def test_corrupted_grids_follow_from_their_events(ward, tmp_path, task):
    clean = prepare_folder(open_source(ward.folder), tmp_path / "clean", task, quiet=True)
    _, step, hides = event_steps(clean, Views.of(clean.samples, len(clean.series_array)))
    assert (step != hides).any() == (task == "decompensation")  # overtaken results are met
    for kind in KINDS:
        corrupted = write_corrupted(clean, tmp_path / kind, Corruption(kind, 0.4))
        assert audit_leaks(corrupted).proven
        some = write_corrupted(clean, tmp_path / f"{kind}-test", Corruption(kind, 0.4), 0, "test")
        for name in some.samples["sample_id"][:20]:
            assert (some.series(name) == corrupted.series(name)).all()
            assert some.events(name).equals(corrupted.events(name))


def test_a_hospital_of_its_own_can_be_corrupted(tmp_path):
    source = write(tmp_path / "hospital", *made_up(5, num_stays=9, num_events=200))
    clean = prepare_folder(source, tmp_path / "clean", quiet=True)
    for kind in possible_kinds(clean):
        assert audit_leaks(write_corrupted(clean, tmp_path / kind, Corruption(kind, 0.5))).proven
    nothing = write_corrupted(clean, tmp_path / "nothing", Corruption("channels", 1.0))
    assert len(nothing.events_table) == 0 and nothing.series_array[:, -3:].max() == 0
    assert set(nothing.series_array[:, clean.channels.index("Pulse")]) == {80.0}
    assert possible_kinds(clean) == ["noise", "channels", "hours"]
    with pytest.raises(InputError, match="no radiographs to take away"):
        write_corrupted(clean, tmp_path / "x", Corruption("radiographs", 0.5))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_more_corruption_contains_less(data, tmp_path, kind):
    copies = [
        write_corrupted(data, tmp_path / str(share), Corruption(kind, share, "zero_mean"), seed=4)
        for share in (0.0, 0.4, 0.8)
    ]
    none, little, more = (copy.events_table for copy in copies)
    assert none.equals(data.events_table) and (copies[0].series_array == data.series_array).all()
    assert copies[0].samples.equals(data.samples)
    if kind == "noise":
        hit = little["value"] != none["value"]
        assert 0.3 < hit.mean() < 0.5 < (more["value"] != none["value"]).mean() < 0.9
        assert more["value"][hit].equals(little["value"][hit])
    elif kind == "radiographs":
        gone = [set(copy.samples.query("radiograph < 0")["sample_id"]) for copy in copies]
        assert gone[0] < gone[1] < gone[2]
    else:
        keys = [set(zip(t["sample_id"], t["hours"], t["channel"])) for t in (none, little, more)]
        assert keys[0] > keys[1] > keys[2]
    assert "train" in str(describe(copies[2]))


def test_noise_is_drawn_from_its_seed(data, tmp_path):
    half = Corruption("noise", 0.5)
    copies = [
        write_corrupted(data, tmp_path / str(i), half, seed) for i, seed in enumerate((0, 0, 1))
    ]
    for name in ("series.npy", "radiographs.npy", "events.parquet", "manifest.json"):
        first, second, other = ((copy.path / name).read_bytes() for copy in copies)
        assert first == second != other
    assert copies[0].manifest["corruption"]["scale"] == copies[2].manifest["corruption"]["scale"]


def test_channels_are_lost_only_where_it_is_known_what_was_measured(data, tmp_path):
    blind = PreparedData(data.path)
    blind.channels = [name.replace("mask", "seen") for name in blind.channels]
    for kind in ("channels", "hours", "noise"):
        with pytest.raises(InputError, match="no masks"):
            write_corrupted(blind, tmp_path / kind, Corruption(kind, 0.5))
    assert possible_kinds(blind) == ["noise", "radiographs"]


def test_labels_may_be_several_and_missing(data):
    several = PreparedData(data.path)
    died = several.samples["in_hospital_mortality"].astype("Int64")
    partly = died.where(np.arange(len(died)) % 3 > 0)
    several.samples = several.samples.assign(sepsis=partly, never=0)
    several.labels = ["in_hospital_mortality", "sepsis", "never"]
    several.label_kinds = dict.fromkeys(several.labels, "binary")

    def truth(folder, rows):
        return np.repeat(folder.samples[["in_hospital_mortality"]].to_numpy(float)[rows], 3, axis=1)

    swept = sweep({"truth": truth}, several, corruption_plan(["hours"], levels=[0.5]), quiet=True)
    assert (swept.curves["value"] == 1).all() and (swept.areas["area"] == 1).all()
    several.label_kinds["sepsis"] = "days"
    with pytest.raises(InputError, match="sepsis is no outcome of yes and no"):
        sweep({"truth": truth}, several, corruption_plan(["hours"]), quiet=True)


def clinfuse(*words):
    command = [sys.executable, "-m", "clinfuse.use.command_line", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


def test_every_system_is_swept_from_the_prompt(data, tmp_path):
    for system, stages in SYSTEMS.items():
        changes = {f"{stage}.num_epochs": "1" for stage in stages}
        train(system, data.path, tmp_path / system, recipe="quick", set=changes, quiet=True)
    options = ["--levels", 1, "--seeds", 2, "--modes", "replace", "--quiet"]
    runs = [tmp_path / system for system in SYSTEMS]
    out = tmp_path / "out"
    done = clinfuse("robustness", *runs, "--data", data.path, "--out", out, *options)
    assert done.returncode == 0, done.stderr
    assert "noise replace" in done.stdout and done.stderr == ""
    found = json.loads((out / "robustness.json").read_text())
    areas = pd.DataFrame(found["areas"]).set_index(["system", "kind", "metric"])
    assert len(areas) == len(SYSTEMS) * len(KINDS) * 2
    assert len(found["pairs"]) == 10 * len(KINDS) * 2
    for system in ("logistic-regression", "xgboost", "lstm"):
        assert areas.loc[(system, "radiographs", "auroc")]["low"] == 1
    for kind in ("channels", "hours"):
        assert areas.loc[("resnet34", kind, "auroc")]["area"] == 1
        assert areas.loc[("xgboost", kind, "auroc")]["area"] < 1
    curves = pd.read_csv(out / "robustness.csv")
    assert set(curves[curves["kind"] == "noise"]["noise_seed"].dropna()) == {0, 1}
    assert len(list((out / "figures").glob("*.png"))) == len(KINDS)
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") == len(KINDS) and "http" not in page


def test_what_cannot_be_swept_is_said_in_one_line(data, tmp_path):
    train("logistic-regression", data.path, tmp_path / "run", quiet=True)
    options = ["--data", data.path, "--out", tmp_path / "out", "--quiet"]
    done = clinfuse("robustness", tmp_path / "run", *options, "--levels", 30)
    assert done.returncode == 1 and "share of corruption is 30.0" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()
    assert clinfuse("robustness", tmp_path / "run", *options, "--kinds", "fog").returncode == 2
