"""Stays are invented between training stays of the rarer outcome, or not at all."""

import inspect
import sys

import numpy as np
import pandas as pd
import pytest

import clinfuse.objectives.class_imbalance as class_imbalance
from clinfuse.conventions import SAFE, InputError
from clinfuse.data.dataset import PreparedData, write_prepared
from clinfuse.data.stay_features import scaled_numbers
from clinfuse.data.tasks import TaskData
from clinfuse.objectives.class_imbalance import class_weights, synthetic_stays

LABEL = "in_hospital_mortality"


def folder(path, outcomes, splits="train", num_numbers=3, kind="binary", seed=0):
    size, random = len(outcomes), np.random.default_rng(seed)
    names = [f"mean_{i}" for i in range(num_numbers)]
    samples = pd.DataFrame(
        {
            "sample_id": [f"s{i:03d}" for i in range(size)],
            "subject_id": np.arange(size),
            **{name: pd.array([None] * size, dtype="Int64") for name in ("hadm_id", "stay_id")},
            "prediction_time": pd.NaT,
            LABEL: pd.array(outcomes, dtype="Int64"),
            **{name: random.normal(50, 9, size) for name in names},
            "series_start": np.arange(size),
            "series_length": 1,
        }
    )
    events = {
        "sample_id": samples["sample_id"],
        "hours": 0.5,
        "channel": "Heart Rate",
        "value": 1.0,
    }
    task = TaskData(
        samples=samples,
        labels=[LABEL],
        label_kinds={LABEL: kind},
        attributes=[],
        series=np.ones((size, 2), np.float32),
        columns=["Heart Rate", "mask->Heart Rate"],
        channels=[{"name": "Heart Rate", "kind": "continuous", "unit": ""}],
        continuous=[0],
        events=pd.DataFrame(events),
        attrition=pd.DataFrame({"step": ["all"], "stays": [size]}),
        numbers=names,
    )
    return write_prepared(
        path, None, task, SAFE, pd.Series([splits] * size if isinstance(splits, str) else splits)
    )


def test_the_rarer_outcome_may_be_survival(tmp_path):
    data = folder(tmp_path / "a", [1] * 30 + [0] * 10)
    made = synthetic_stays(data, num_neighbours=3)
    assert len(made.numbers) == 20 and set(data.samples[LABEL][made.seed_rows]) == {0}


def test_balanced_outcomes_need_nobody(tmp_path):
    made = synthetic_stays(folder(tmp_path / "a", [0, 1] * 8))
    assert made.numbers.shape == (0, 3) and made.seed_rows.shape == (0,)
    assert class_weights(folder(tmp_path / "b", [0, 1] * 8)) == (1, 1)


def test_unknown_outcomes_do_not_count(tmp_path):
    data = folder(tmp_path / "a", [0] * 20 + [1] * 8 + [None] * 40)
    made = synthetic_stays(data)
    assert len(made.seed_rows) == 12 and made.seed_rows.min() >= 20 and made.seed_rows.max() < 28
    assert class_weights(data) == pytest.approx((28 / 40, 28 / 16))


def test_seeds_are_positions_in_the_whole_table(tmp_path):
    splits = ["test", "train", "validation", "train"] * 20
    outcomes = np.random.default_rng(1).permutation(np.repeat([0, 1], [60, 20]))
    data = folder(tmp_path / "a", outcomes, splits)
    made = synthetic_stays(data, num_neighbours=2)
    own = scaled_numbers(data.samples[data.numbers], data.number_rules)
    rows = data.rows("train")[outcomes[data.rows("train")] == 1]
    assert set(made.seed_rows) <= set(rows)
    reach = np.linalg.norm(own[rows][:, None] - own[rows], axis=2)
    third = dict(zip(rows, np.sort(reach, axis=1)[:, 2]))
    far = np.linalg.norm(made.numbers - own[made.seed_rows], axis=1)
    assert all(far <= [third[row] + 1e-9 for row in made.seed_rows])


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_seed_invents_the_same(tmp_path, seed):
    data = folder(tmp_path / "a", [0] * 30 + [1] * 10)
    one, other, third = (synthetic_stays(data, seed=s) for s in (seed, seed, seed + 1))
    assert np.array_equal(one.numbers, other.numbers) and np.array_equal(
        one.seed_rows, other.seed_rows
    )
    assert not np.array_equal(one.numbers, third.numbers)


@pytest.mark.parametrize("num", [2, 5])
def test_too_few_neighbours_are_told_with_both_counts(tmp_path, num):
    data = folder(tmp_path / "a", [0] * 20 + [1] * num)
    with pytest.raises(InputError, match=rf"{num} training stays .*; {num} neighbours"):
        synthetic_stays(data, num_neighbours=num)
    assert len(synthetic_stays(data, num_neighbours=num - 1).numbers) == 20 - num


def test_a_split_of_one_outcome_is_refused_though_others_have_two(tmp_path):
    data = folder(tmp_path / "a", [0] * 10 + [1] * 10, ["train"] * 10 + ["test"] * 10)
    with pytest.raises(InputError, match="all 10 training stays"):
        synthetic_stays(data)


def test_days_cannot_be_balanced(tmp_path):
    data = folder(tmp_path / "a", [0, 1] * 8, kind="days")
    for balance in (synthetic_stays, class_weights):
        with pytest.raises(InputError, match="no outcome of two classes"):
            balance(data)


def test_nothing_takes_rows_instead_of_a_folder():
    for name, function in inspect.getmembers(class_imbalance, inspect.isfunction):
        if function.__module__ == class_imbalance.__name__ and not name.startswith("_"):
            kinds = [p.annotation for p in inspect.signature(function).parameters.values()]
            assert kinds[0] is PreparedData and not {np.ndarray, pd.DataFrame} & set(kinds)


def test_without_the_extra_one_line_says_what_to_install(tmp_path, monkeypatch):
    data = folder(tmp_path / "a", [0] * 20 + [1] * 8)
    monkeypatch.setitem(sys.modules, "imblearn.over_sampling", None)
    with pytest.raises(InputError, match=r"pip install 'clinfuse\[imbalance\]'"):
        synthetic_stays(data)
    assert class_weights(data)[1] == 28 / 16
