"""The prepared folder: whole or absent, the same bytes, and read back as it was written."""

import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import clinfuse.data.dataset as dataset
from clinfuse.conventions import PUBLISHED, SAFE, InputError
from clinfuse.data.dataset import (
    PreparedData,
    describe,
    file_checksum,
    fit_normaliser,
    prepare_folder,
    write_prepared,
)
from clinfuse.data.sources import open_source
from clinfuse.data.splits import SPLITS
from clinfuse.data.tasks import TaskData

CHANNELS = ("Heart Rate", "pH", "Eyes")
COLUMNS = ["Eyes->open", "Eyes->shut", "Heart Rate", "pH", *[f"mask->{name}" for name in CHANNELS]]


def made_up_task(lengths, seed=0, labels=True):
    rng = np.random.default_rng(seed)
    num, steps = len(lengths), int(sum(lengths))
    ids = [f"s{i:04d}" for i in range(num)]
    series = rng.normal(size=(steps, len(COLUMNS))).astype(np.float32)
    series[:, -3:] = rng.random((steps, 3)) < 0.5
    count = rng.integers(0, 6, num)
    events = pd.DataFrame(
        {
            "sample_id": np.repeat(ids, count),
            "hours": rng.random(count.sum()) * 48,
            "channel": rng.choice(CHANNELS, count.sum()),
            "value": rng.normal(size=count.sum()),
        }
    )
    samples = pd.DataFrame(
        {
            "sample_id": ids,
            "subject_id": pd.array(rng.integers(0, max(1, num // 2), num), dtype="Int64"),
            "hadm_id": pd.array([None] * num, dtype="Int64"),
            "stay_id": pd.array(range(num), dtype="Int64"),
            "prediction_time": pd.Timestamp("2150-01-01") + pd.to_timedelta(np.arange(num), "h"),
            "in_hospital_mortality": pd.array(
                rng.integers(0, 2, num) if labels else [None] * num, dtype="Int64"
            ),
            "age_years": rng.normal(60, 9, num),
            "series_start": np.cumsum(lengths) - np.array(lengths),
            "series_length": np.array(lengths),
        }
    )
    return TaskData(
        samples=samples,
        labels=["in_hospital_mortality"],
        attributes=["age_years"],
        series=series,
        columns=COLUMNS,
        channels=[{"name": name, "kind": "continuous", "unit": ""} for name in CHANNELS],
        continuous=[2, 3],
        events=events,
        attrition=pd.DataFrame(
            {"step": ["all"], "stays": [num], "admissions": [num], "subjects": [num]}
        ),
    )


def splits_of(num):
    return pd.Series([SPLITS[i % 3] for i in range(num)])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    task = made_up_task([3, 1, 5, 2, 4, 2], seed=1)
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (256, 256), dtype=np.uint8) for name in ("s0001", "s0004")}
    texts = pd.DataFrame(
        {"titles": ["a", "ü\n"], "radiology": [None, "clear"]}, index=["s0000", "s0001"]
    )
    out = tmp_path_factory.mktemp("prepared") / "folder"
    return task, images, write_prepared(out, None, task, SAFE, splits_of(6), images, texts)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 99))
def test_what_is_written_is_read_back(tmp_path_factory, lengths, seed):
    task = made_up_task(lengths, seed)
    shuffled = replace(task, events=task.events.sample(frac=1, random_state=seed))
    data = write_prepared(
        tmp_path_factory.mktemp("out") / "x", None, shuffled, SAFE, splits_of(len(lengths))
    )
    assert data.series_array.dtype == np.float32 and isinstance(data.series_array, np.memmap)
    for i, name in enumerate(task.samples["sample_id"]):
        begin = sum(lengths[:i])
        assert np.array_equal(data.series(name), task.series[begin : begin + lengths[i]])
        expected = task.events[task.events["sample_id"] == name].sort_values("hours")
        found = data.events(name)
        assert found["value"].tolist() == expected["value"].tolist()
        assert found["channel"].tolist() == expected["channel"].tolist()
        assert data.radiograph(name) is None and data.text(name) == {}
    assert sorted(np.concatenate([data.rows(split) for split in SPLITS])) == list(
        range(len(lengths))
    )
    pd.testing.assert_frame_equal(
        data.samples[task.samples.columns.tolist()], task.samples, check_dtype=False
    )


def test_the_test_split_cannot_change_the_scale():
    task = made_up_task([4, 4, 4, 4])
    is_train = np.array([True, False, True, False])
    before = fit_normaliser(task, is_train)
    task.series[4:8] = 1e6
    task.series[12:] = np.nan
    assert fit_normaliser(task, is_train) == before
    task.series[0] += 1
    assert fit_normaliser(task, is_train) != before


def test_the_scale_is_computed_in_double_precision():
    task = made_up_task([40_000])
    task.series[:, 2] = 100_000 + np.tile([0.0, 1.0], 20_000)
    state = fit_normaliser(task, np.array([True]))
    assert state["mean"][0] == pytest.approx(100_000.5, abs=1e-9)
    assert state["std"][0] == pytest.approx(0.5, abs=1e-9)
    task.series[:, 2] = np.float32(0.1)
    assert fit_normaliser(task, np.array([True]))["constant"] == ["Heart Rate"]


def test_normalised_series_has_the_scale_of_the_training_split(prepared):
    task, _, data = prepared
    names = task.samples["sample_id"].iloc[data.rows("train")]
    train = np.concatenate([data.normalised_series(name) for name in names]).astype(float)
    np.testing.assert_allclose(train[:, [2, 3]].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(train[:, [2, 3]].std(0), 1, atol=1e-5)
    raw = np.concatenate([data.series(name) for name in names])
    assert np.array_equal(train[:, [0, 1, 4, 5, 6]], raw[:, [0, 1, 4, 5, 6]])


def test_a_copy_is_handed_out(prepared):
    task, images, data = prepared
    data.series("s0000")[:] = 0
    data.radiograph("s0001")[:] = 0
    assert np.array_equal(data.series("s0000"), task.series[:3])
    assert np.array_equal(data.radiograph("s0001"), images["s0001"])


def test_radiographs_and_texts(prepared):
    _, images, data = prepared
    assert data.samples["radiograph"].tolist() == [-1, 0, -1, -1, 1, -1]
    assert np.array_equal(data.radiograph("s0004"), images["s0004"])
    assert data.radiograph_array().shape == data.radiograph_array(clahe=True).shape == (2, 256, 256)
    assert not np.array_equal(data.radiograph("s0004", clahe=True), images["s0004"])
    assert data.text("s0000") == {"titles": "a"}
    assert data.text("s0001") == {"titles": "ü\n", "radiology": "clear"}
    assert data.manifest["texts"] == {"titles": 2, "radiology": 1}


def test_data_travels_to_worker_processes(prepared):
    _, _, data = prepared
    _ = data.series_array, data.events_table
    packed = pickle.dumps(data)
    assert len(packed) < 2_000
    assert np.array_equal(pickle.loads(packed).series("s0002"), data.series("s0002"))


def test_labels_may_be_unknown(tmp_path):
    data = write_prepared(
        tmp_path / "x", None, made_up_task([2, 2], labels=False), SAFE, splits_of(2)
    )
    assert data.manifest["has_labels"] is False
    assert data.samples["in_hospital_mortality"].isna().all()
    assert describe(data).prevalence["labelled"].sum() == 0
    assert "in_hospital_mortality" in data._repr_html_()


def test_no_radiographs_is_an_empty_array(tmp_path):
    data = write_prepared(tmp_path / "x", None, made_up_task([2]), SAFE, splits_of(1))
    assert data.radiograph_array(clahe=True).shape == (0, 256, 256)


@pytest.mark.parametrize("broken", ["_write_tables", "_write_manifest"])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("x")]
)
def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, broken, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(dataset, broken, fail)
    with pytest.raises(InputError if isinstance(error, OSError) else type(error)):
        write_prepared(tmp_path / "x", None, made_up_task([2]), SAFE, splits_of(1))
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_refused_before_any_work(tmp_path, monkeypatch):
    out = tmp_path / "x"
    out.mkdir()
    (out / "precious").write_text("kept")
    write_challenge(tmp_path / "source")
    monkeypatch.setattr(dataset, "_TASK_OF_KIND", {})
    with pytest.raises(InputError, match="exists already"):
        prepare_folder(open_source(tmp_path / "source"), out, quiet=True)
    assert (out / "precious").read_text() == "kept"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged"),
        ("[]", "format None"),
        ('{"format": 2}', "format 2; this version of clinfuse reads 1"),
    ],
)
def test_other_folders_are_refused(tmp_path, content, message):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=message):
        PreparedData(tmp_path)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(InputError, match="no prepared folder"):
        PreparedData(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name", ["samples.parquet", "series.npy", "events.parquet", "normaliser.json"]
)
def test_missing_and_damaged_parts_are_named(tmp_path, name):
    out = write_prepared(tmp_path / "x", None, made_up_task([2]), SAFE, splits_of(1)).path
    for spoil in (lambda file: file.write_bytes(b"\x93NUMPY"), lambda file: file.unlink()):
        spoil(out / name)
        with pytest.raises(InputError, match=name):
            data = PreparedData(out)
            data.events("s0000")
            data.normalised_series("s0000")


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
    assert set(data.manifest["texts"]) == {"titles", "radiology", "codes_without_title"}
    split_of = data.samples.groupby("subject_id")["split"].nunique()
    assert split_of.max() == 1
