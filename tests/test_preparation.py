"""From a source to a prepared folder: the same bytes, nothing half-written, and whatever is wrong is named."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

import clinfuse.data.preparation as preparation
from clinfuse.conventions import PUBLISHED, SAFE, InputError
from clinfuse.data.dataset import describe, file_checksum
from clinfuse.data.preparation import only_run, prepare_folder
from clinfuse.data.sources import open_source
from clinfuse.data.splits import SPLITS


def write_challenge(folder, num=20, seed=0, letter="a", outcomes=True):
    rng = np.random.default_rng(seed)
    (folder / f"set-{letter}").mkdir(parents=True)
    for record in range(100, 100 + num):
        rows = [
            f"{m // 60:02d}:{m % 60:02d},HR,{rng.integers(50, 140)}"
            for m in sorted(rng.integers(0, 2880, 30))
        ]
        text = "\n".join(
            ["Time,Parameter,Value", f"00:00,RecordID,{record}", "00:00,Age,50", *rows]
        )
        (folder / f"set-{letter}" / f"{record}.txt").write_text(text)
    if outcomes:
        table = "".join(f"{record},{record % 2}\n" for record in range(100, 100 + num))
        (folder / f"Outcomes-{letter}.txt").write_text("RecordID,In-hospital_death\n" + table)
    return folder


def test_an_output_that_exists_is_refused_before_any_work(tmp_path, monkeypatch):
    out = tmp_path / "x"
    out.mkdir()
    (out / "precious").write_text("kept")
    write_challenge(tmp_path / "source")
    monkeypatch.delattr(preparation, "build_task")
    with pytest.raises(InputError, match="exists already"):
        prepare_folder(open_source(tmp_path / "source"), out, quiet=True)
    assert (out / "precious").read_text() == "kept"


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_same_inputs_elsewhere_give_the_same_bytes(tmp_path):
    for name in ("one", "another/place"):
        source = open_source(write_challenge(tmp_path / name))
        prepare_folder(source, tmp_path / name / "out", protocol=PUBLISHED, seed=3, quiet=True)
    one, other = (contents(tmp_path / name / "out") for name in ("one", "another/place"))
    assert one == other
    assert str(tmp_path) not in one["manifest.json"].decode()


def test_a_changed_source_changes_its_checksum(tmp_path):
    folder = write_challenge(tmp_path / "a")
    before = file_checksum(folder / "set-a")
    (folder / "set-a" / "100.txt").write_text("Time,Parameter,Value\n00:00,Age,51\n")
    assert file_checksum(folder / "set-a") != before


def test_manifest_tells_how_the_folder_came_about(tmp_path):
    folder = write_challenge(tmp_path / "a")
    lists = tmp_path / "lists.csv"
    lists.write_text(
        "subject_id,split\n" + "".join(f"{i},{SPLITS[i % 3]}\n" for i in range(100, 120))
    )
    data = prepare_folder(
        open_source(folder), tmp_path / "x", timestep_hours=2, splits=lists, quiet=True
    )
    manifest = json.loads((tmp_path / "x" / "manifest.json").read_text())
    assert manifest["source"]["files"]["outcomes-a"] == {
        "file": "Outcomes-a.txt",
        **file_checksum(folder / "Outcomes-a.txt"),
    }
    assert (manifest["timestep_hours"], manifest["seed"]) == (2.0, None)
    assert manifest["splits_file"] == file_checksum(lists)
    assert data.samples["series_length"].tolist() == [24] * 20
    assert [SPLITS[i % 3] for i in range(100, 120)] == data.samples["split"].tolist()
    assert manifest["columns"] == data.channels and len(manifest["channels"]) == 37


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "phenotyping"}, "in-hospital-mortality"),
        ({"task": "love"}, "unknown task 'love'"),
        ({"timestep_hours": 0}, "timestep_hours"),
        ({"timestep_hours": 49}, "timestep_hours"),
        ({"splits": "nowhere.csv"}, "nowhere.csv does not exist"),
        ({"icd_map": "gem"}, "icd_map is an option of phenotyping"),
    ],
)
def test_wrong_requests_leave_nothing(tmp_path, options, message):
    source = open_source(write_challenge(tmp_path / "a"))
    with pytest.raises(InputError, match=message):
        prepare_folder(source, tmp_path / "out" / "x", quiet=True, **options)
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_set_a(challenge_2012, tmp_path):
    data = prepare_folder(open_source(challenge_2012), tmp_path / "x", quiet=True)
    assert (len(data.samples), data.series_array.shape) == (4_000, (192_000, 74))
    described = describe(data)
    assert described.prevalence["positive"].sum() == 554
    assert described.missingness["empty steps"].between(0, 1).all()
    sample = data.samples["sample_id"].iloc[7]
    events, series = data.events(sample), data.series(sample)
    hours = events.loc[events["channel"] == "HR", "hours"]
    measured = series[:, data.channels.index("mask->HR")]
    assert set(np.flatnonzero(measured)) == {max(0, int(hour - 1e-6)) for hour in hours}


@pytest.fixture(scope="module")
def ward(tmp_path_factory):
    from clinfuse.ward.synthetic_ward import write_ward

    folder = tmp_path_factory.mktemp("ward") / "ward"
    write_ward(folder, num_stays=60, seed=2, quiet=True)
    return folder


def test_bad_radiographs_are_named_and_count_as_none(ward, tmp_path):
    whole = prepare_folder(open_source(ward), tmp_path / "whole", quiet=True)
    folder = shutil.copytree(ward, tmp_path / "ward")
    for file in sorted((folder / "mimic-cxr-jpg").rglob("*.jpg"))[::2]:
        file.write_bytes(file.read_bytes()[:500])
    data = prepare_folder(open_source(folder), tmp_path / "x", quiet=True)
    bad = data.manifest["radiographs"]["bad"]
    images = [len(part.radiograph_array()) for part in (data, whole)]
    assert bad and images[0] + len(bad) == images[1]
    assert all(item["path"].startswith("files/p10/") and item["reason"] for item in bad)
    assert f"({len(bad)} unreadable)" in repr(data)
    assert np.array_equal(data.series_array, whole.series_array)
    for sample in data.samples.loc[data.samples["radiograph"] >= 0, "sample_id"]:
        assert np.array_equal(data.radiograph(sample), whole.radiograph(sample))


@pytest.fixture(scope="module")
def hourly(ward, tmp_path_factory):
    out = tmp_path_factory.mktemp("hourly") / "x"
    return prepare_folder(open_source(ward), out, task="decompensation", quiet=True)


def test_a_prefix_is_what_the_stay_held_then(hourly):
    samples = hourly.samples
    assert set(samples["prediction_hours"]) > {5.0, 24.0}
    stay = samples[samples["series_id"] == samples["series_id"].iloc[0]]
    last = stay.sort_values("prediction_hours")["sample_id"].iloc[-1]
    for row in stay.itertuples():
        series = hourly.series(row.sample_id)
        assert len(series) == row.prediction_hours
        assert np.array_equal(series, hourly.series(last)[: len(series)])
        events = hourly.events(row.sample_id)
        assert events["available_hours"].max() <= row.prediction_hours
        assert not events.duplicated(["hours", "channel"]).any()


def test_hourly_manifest_and_description(hourly):
    manifest = hourly.manifest
    assert manifest["label_kinds"] == {"decompensation": "binary"}
    assert manifest["num_samples"] == manifest["counts"]["hourly samples"] == len(hourly.samples)
    described = describe(hourly)
    assert described.overlap["samples"].sum() == len(hourly.samples)
    assert described.missingness["never measured"].between(0, 1).all()
    assert len(hourly.samples) > 10 * manifest["counts"]["series"]


def test_radiographs_and_texts_are_those_of_the_hour(hourly):
    samples = hourly.samples
    seen = samples[samples["radiograph"] >= 0]
    assert len(seen) and (seen["radiograph_time"] <= seen["prediction_time"]).all()
    stays = seen.groupby("stay_id")["radiograph"].nunique()
    firsts = samples[samples["stay_id"].isin(stays.index)].groupby("stay_id")["radiograph"].min()
    assert (firsts == -1).any() or (stays > 1).any()
    for name in [str(name) for name in samples if str(name).startswith("text_")]:
        if f"{name}_time" in samples:
            assert isinstance(samples[name].dtype, pd.CategoricalDtype)
            known = samples[samples[name].notna()]
            assert not (known[f"{name}_time"] > known["prediction_time"]).any()


@pytest.mark.parametrize("task", ["phenotyping", "length-of-stay", "mortality-and-stay"])
@pytest.mark.parametrize("protocol", [SAFE, PUBLISHED], ids=lambda p: p.name)
def test_other_tasks_are_described(ward, tmp_path, task, protocol):
    cache = ward.parent / "extracts"
    data = prepare_folder(
        open_source(ward), tmp_path / "x", task=task, protocol=protocol, cache=cache, quiet=True
    )
    described = describe(data)
    prevalence = described.prevalence.loc["train"]
    assert list(prevalence.index) == data.labels == list(data.label_kinds)
    timed = [name for name, kind in data.label_kinds.items() if kind != "binary"]
    if timed:
        row = prevalence.loc[timed[0]]
        assert row["lower quartile"] <= row["median"] <= row["upper quartile"]
        assert pd.isna(row.get("positive"))
    assert str(described) and data._repr_html_()
    steps = data.series_array[: data.samples["series_length"].iloc[0]]
    assert np.isfinite(steps).all()
    if task == "phenotyping":
        expected = {"safe": "ahrq", "published": "medfuse"}[protocol.name]
        assert data.manifest["icd_map"] == data.manifest["counts"]["icd_map"] == expected


def test_the_extract_is_used_again(ward, tmp_path, monkeypatch):
    for task in ("in-hospital-mortality", "phenotyping"):
        prepare_folder(open_source(ward), tmp_path / task, task=task, quiet=True)
        for table in ("chartevents", "labevents"):
            assert len(list((tmp_path / ".clinfuse-extracts").rglob(f"{table}.parquet"))) == 1
        monkeypatch.setattr("clinfuse.data.extracts._write_tables", None)


def test_two_runs_at_once_are_refused(tmp_path):
    with only_run(tmp_path / "x"):
        source = open_source(write_challenge(tmp_path / "a"))
        with pytest.raises(InputError, match="another run is writing"):
            prepare_folder(source, tmp_path / "x", quiet=True)
    assert prepare_folder(source, tmp_path / "x", quiet=True)


def test_batches_read_shared_series(hourly):
    from clinfuse.systems.batches import DataDescription, read_batch

    rows = hourly.rows("train")[::97]
    batch = read_batch(hourly, rows, DataDescription.of(hourly), modalities=("series",))
    assert batch.series_length.tolist() == hourly.samples["prediction_hours"].iloc[rows].tolist()
    name = hourly.samples["sample_id"].iloc[rows[1]]
    expected = hourly.normalised_series(name)
    np.testing.assert_allclose(batch.series[1, : len(expected)].numpy(), expected, atol=1e-5)


def test_ward_twice_gives_the_same_bytes(ward, tmp_path):
    for name in ("one", "two"):
        prepare_folder(open_source(ward), tmp_path / name, protocol=PUBLISHED, quiet=True)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_every_event_of_a_safe_ward_was_known_in_time(ward, tmp_path):
    data = prepare_folder(open_source(ward), tmp_path / "x", quiet=True)
    assert (
        data.events_table["hours"].max() <= 48 and data.events_table["available_hours"].max() <= 48
    )
    assert (data.events_table["available_hours"] >= data.events_table["hours"]).all()
    assert data.events_table["sample_id"].cat.codes.is_monotonic_increasing


def test_mimic_demo(mimic_demo, tmp_path):
    data = prepare_folder(open_source(mimic_demo), tmp_path / "x", quiet=True)
    assert data.series_array.shape == (48 * len(data.samples), 76)
    assert data.manifest["source"]["files"]["icu/chartevents"]["bytes"] > 1_000_000
    assert {"titles", "radiology", "codes_without_title"} <= set(data.manifest["texts"])
    split_of = data.samples.groupby("subject_id")["split"].nunique()
    assert split_of.max() == 1
