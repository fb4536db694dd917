"""Patient-level splits: properties over any cohort, and lists read from files."""

import gzip

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinfuse.conventions import InputError
from clinfuse.data.splits import SPLITS, read_splits, split_by_patient

subjects = st.lists(st.integers(10_000_000, 19_999_999), min_size=1, max_size=80)


@settings(deadline=None)
@given(subjects, st.integers(0, 5), st.randoms(use_true_random=False))
def test_every_stay_of_a_patient_shares_one_split_in_any_row_order(ids, seed, random):
    ids = ids + ids[: len(ids) // 2]
    drawn = dict(zip(ids, split_by_patient(ids, seed)))
    shuffled = random.sample(ids, len(ids))
    assert [drawn[i] for i in shuffled] == split_by_patient(shuffled, seed).tolist()
    assert set(drawn.values()) <= set(SPLITS)


@settings(deadline=None)
@given(
    st.integers(1, 300),
    st.integers(0, 9),
    st.sampled_from([(0.7, 0.1, 0.2), (1, 0, 0), (0, 0.5, 0.5)]),
)
def test_sizes_are_the_fractions_to_the_patient(num_patients, seed, fractions):
    drawn = split_by_patient(range(num_patients), seed, fractions)
    for name, fraction in zip(SPLITS, fractions):
        assert abs((drawn == name).sum() - fraction * num_patients) <= 1


@settings(deadline=None, max_examples=30)
@given(st.integers(50, 300), st.integers(0, 9))
def test_a_patient_who_leaves_moves_at_most_one_at_each_border(num_patients, seed):
    everybody = split_by_patient(range(num_patients), seed)
    fewer = split_by_patient(range(num_patients - 1), seed)
    assert (everybody[:-1] != fewer).sum() <= 2


def test_index_and_type_of_identifiers():
    ids = pd.Series([7, 7, 8, 9], index=["d", "a", "b", "c"], dtype="Int64")
    drawn = split_by_patient(ids)
    assert drawn.index.equals(ids.index) and drawn.name == "split"
    assert split_by_patient(["7", "7", "8", "9"]).tolist() == drawn.tolist()
    assert split_by_patient(np.array([7, 7, 8, 9])).tolist() == drawn.tolist()
    assert split_by_patient([]).tolist() == []


def test_pinned_draw():
    """A change of these means that every prepared folder changes its splits."""
    assert "".join(name[1] for name in split_by_patient(range(20), seed=0)) == PINNED


PINNED = "aerrrerrrrrererrarrr"


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.7, 0.1, 0.3), (1.2, -0.1, -0.1)])
def test_wrong_fractions_are_named(fractions):
    with pytest.raises(InputError, match="fractions"):
        split_by_patient([1, 2, 3], fractions=fractions)


def write(tmp_path, text, name="splits.csv"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_list_may_be_longer_than_the_data_padded_repeated_and_compressed(tmp_path):
    text = "note,subject_id,split\nx, 5 , test\ny,6,train\nz,5,test\n"
    ids = pd.Series([6, 5, 5], index=[3, 4, 5])
    path = tmp_path / "splits.csv.gz"
    path.write_bytes(gzip.compress(text.encode()))
    for file in (write(tmp_path, text), path):
        taken = read_splits(file, ids)
        assert taken.tolist() == ["train", "test", "test"] and taken.index.equals(ids.index)


def test_what_was_drawn_can_be_written_and_read_back(tmp_path):
    ids = pd.Series(range(40))
    drawn = split_by_patient(ids, seed=4)
    path = tmp_path / "splits.csv"
    pd.DataFrame({"subject_id": ids, "split": drawn}).to_csv(path, index=False)
    assert read_splits(path, ids).tolist() == drawn.tolist()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a readable CSV"),
        ("subject_id\n1\n", "column 'split' is missing"),
        ("subject_id,split\n1,Train\n", "row 2: unknown split 'Train'"),
        ("subject_id,split\n1,train\n2,\n", "row 3: unknown split ''"),
        ("subject_id,split\n1,train\n1,validation\n", "row 3: subject_id 1 stands in two splits"),
        ("subject_id,split\n2,test\n", "1 patients have no split, the first is 1"),
    ],
)
def test_doubtful_lists_are_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as caught:
        read_splits(write(tmp_path, text), [1])
    assert "splits.csv" in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_archive_is_refused(tmp_path):
    path = tmp_path / "splits.csv.gz"
    path.write_bytes(gzip.compress(b"subject_id,split\n1,train\n" * 400)[:40])
    with pytest.raises(InputError, match="not a readable CSV"):
        read_splits(path, [1])


def test_folder_is_not_a_list(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_splits(tmp_path, [1])
