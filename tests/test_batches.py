"""Batches: the fast way gives what the plain way gives, whatever the lengths and whoever shares a series."""

import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from clinfuse.data.dataset import PreparedData
from clinfuse.systems.batches import (
    DataDescription,
    batches_by_length,
    gather_series,
    invented_patients,
    label_array,
    read_batch,
    sample_arrays,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return invented_patients(tmp_path_factory.mktemp("data") / "data", num_samples=60)


@pytest.fixture(scope="module")
def description(data):
    return DataDescription.of(data)


def with_prefixes(data, length):
    """The same folder, every sample the first steps of one of five shared series."""
    other, num_samples = PreparedData(data.path), len(data.samples)
    shared = data.samples["series_start"].to_numpy()[np.arange(num_samples) % 5 * 10]
    other.samples = data.samples.assign(series_start=shared, series_length=length)
    return other


def plain_series(data, rows, description):
    """All at once, by one index into the mapped file: the definition that the fast way must keep."""
    start, length = (data.samples[f"series_{n}"].to_numpy()[rows] for n in ("start", "length"))
    step = np.arange(length.max())
    series = np.array(data.series_array[start[:, None] + np.minimum(step, length[:, None] - 1)])
    columns = [description.columns.index(name) for name in description.scale]
    mean, std = np.array(list(description.scale.values()), dtype=np.float32).reshape(-1, 2).T
    series[..., columns] = (series[..., columns] - mean) / std
    series[step >= length[:, None]] = 0
    return series


@given(rows=st.lists(st.integers(0, 59), min_size=1, max_size=20), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_series_are_bit_identical_to_the_plain_way(data, description, rows, seed):
    lengths = np.random.default_rng(seed).integers(1, 30, 60)
    for folder in (data, with_prefixes(data, lengths)):
        found = gather_series(folder, np.array(rows), description)
        expected = plain_series(folder, np.array(rows), description)
        assert found.dtype == np.float32 and found.tobytes() == expected.tobytes()


@given(rows=st.lists(st.integers(0, 59), min_size=1, max_size=20), clahe=st.booleans())
@settings(max_examples=25, deadline=None)
def test_images_and_tables_are_those_of_the_folder(data, description, rows, clahe):
    batch = read_batch(data, rows, description, clahe=clahe)
    samples = data.samples.iloc[rows]
    for image, sample_id in zip(batch.radiograph.numpy(), samples["sample_id"]):
        stored = data.radiograph(sample_id, clahe)
        np.testing.assert_array_equal(image, 0 if stored is None else stored)
    np.testing.assert_array_equal(batch.attributes[:, 0], samples["age_years"].astype(np.float32))
    np.testing.assert_array_equal(batch.series_length, samples["series_length"])


def test_unknown_labels_and_attributes_stay_unknown(data, description):
    other = PreparedData(data.path)
    nothing = np.full(60, np.nan)
    other.samples = data.samples.assign(in_hospital_mortality=nothing, age_years=nothing)
    batch = read_batch(other, np.arange(7), description)
    assert batch.label_mask.sum() == 0 and batch.labels.abs().sum() == 0
    assert batch.attributes.isnan().all() and np.isnan(label_array(other, np.arange(7))).all()


def test_a_batch_of_nobody_is_empty(data, description):
    batch = read_batch(data, [], description)
    assert len(batch) == 0 and batch.series.shape[0] == 0 and batch.radiograph.shape[0] == 0


def test_a_batch_belongs_to_its_reader(data, description):
    batch, again = (read_batch(data, np.arange(5), description) for _ in range(2))
    for name in ("series", "radiograph", "labels", "attributes", "series_length"):
        before = getattr(again, name).clone()
        getattr(batch, name).fill_(1)
        torch.testing.assert_close(getattr(again, name), before, equal_nan=True)
    fresh = read_batch(PreparedData(data.path), np.arange(5), description)
    torch.testing.assert_close(fresh.labels, again.labels)


def test_nothing_is_kept_of_a_folder_out_of_use(data):
    other = PreparedData(data.path)
    sample_arrays(other)
    seen = weakref.ref(other)
    del other
    gc.collect()
    assert seen() is None


def test_workers_read_the_same(data, description):
    class Reader:
        def __call__(self, rows):
            return read_batch(data, rows, description)

    assert pickle.loads(pickle.dumps(data)).path == data.path
    for alone, shared in zip(
        DataLoader(list(range(20)), 8, collate_fn=Reader()),
        DataLoader(
            list(range(20)), 8, collate_fn=Reader(), num_workers=1, multiprocessing_context="fork"
        ),
    ):
        torch.testing.assert_close(shared.series, alone.series, rtol=0, atol=0)


@given(
    length=st.lists(st.integers(1, 300), max_size=200),
    batch_size=st.integers(1, 40),
    pool=st.integers(1, 5),
    seed=st.none() | st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_every_sample_is_in_one_batch(length, batch_size, pool, seed):
    steps = np.array(length, dtype=np.int64)
    random = None if seed is None else np.random.default_rng(seed)
    batches = batches_by_length(steps, batch_size, random, pool)
    assert sorted(row for part in batches for row in part.tolist()) == list(range(len(length)))
    assert all(0 < len(part) <= batch_size for part in batches)
    if seed is None:
        assert (
            np.diff(steps[np.concatenate([*batches, np.array([], int)]).astype(int)]) >= 0
        ).all()
