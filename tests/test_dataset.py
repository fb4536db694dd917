"""The prepared folder: whole or absent, the same bytes, and read back as it was written."""

import pickle
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import clinfuse.data.dataset as dataset
from clinfuse.conventions import SAFE, InputError
from clinfuse.data.dataset import (
    PreparedData,
    describe,
    fit_normaliser,
    write_prepared,
)
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


@pytest.mark.parametrize("broken", ["_write_tables", "fit_normaliser", "write_contents"])
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
