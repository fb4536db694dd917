"""Rows: the laboratory, the full chart, lengths of stay, films of strangers, and how fast and flat."""

import io
import resource

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import csv

from clinfuse.conventions import InputError
from clinfuse.ward.admissions import draw_timeline, expected_icu_hours, true_icu_hours
from clinfuse.ward.charting import EXTRA_ITEMS
from clinfuse.ward.laboratory import CONSTITUENTS
from clinfuse.ward.patients import draw_stays
from clinfuse.ward.radiographs import study_tables
from clinfuse.ward.synthetic_ward import draw_ward, ward_truth, write_ward
from clinfuse.ward.tables import CHART_ITEMS, csv_bytes

words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
times = st.integers(-(10**9), 10**10).map(lambda second: np.datetime64(second, "s"))
cells = st.tuples(
    st.none() | st.integers(-(2**40), 2**40),
    st.none() | st.floats(width=32),
    st.none() | words,
    times,
)


@given(st.lists(cells, min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_lines_are_those_of_another_writer(rows):
    whole, real, text, time = map(list, zip(*rows, strict=True))
    columns = {
        "whole": pa.array(whole, pa.int64()),
        "real": pa.array(real, pa.float64()),
        "text": pa.array(text, pa.string()),
        "time": pa.array(time, pa.timestamp("s")),
    }
    back = pd.read_csv(
        io.BytesIO(csv_bytes(pa.table(columns), list(columns))),
        names=list(columns),
        dtype={"text": str, "real": float, "whole": "Int64", "time": str},
        keep_default_na=False,
        na_values={"whole": [""], "real": ["", "nan"]},
        lineterminator="\n",
    )
    assert back["text"].tolist() == ["" if value is None else value for value in text]
    assert back["time"].tolist() == [str(value).replace("T", " ") for value in time]
    assert [None if value is pd.NA else value for value in back["whole"]] == whole
    np.testing.assert_array_equal(back["real"], np.array(real, dtype=float))


@pytest.fixture(scope="module")
def full():
    return draw_ward(400, np.random.SeedSequence(3), charting="full")


def test_numbers_stand_as_arrow_writes_them(full):
    table = pa.concat_tables(full.tables["icu/chartevents"])
    stream = pa.BufferOutputStream()
    csv.write_csv(table, stream, csv.WriteOptions(include_header=False, quoting_style="none"))
    assert stream.getvalue().to_pybytes() == csv_bytes(table, table.column_names)
    counts = table.group_by("stay_id").aggregate([("itemid", "count")])
    rows = np.asarray(counts["itemid_count"])
    assert 3_900 < rows.sum() / 400 < 5_000
    items = set(table["itemid"].unique().to_pylist())
    assert items == set(EXTRA_ITEMS) | set(CHART_ITEMS)


def test_the_rest_of_a_ward_does_not_know_how_much_was_charted(full):
    plain = draw_ward(400, np.random.SeedSequence(3))
    pd.testing.assert_frame_equal(plain.truth, full.truth)
    pd.testing.assert_frame_equal(plain.phenotypes, full.phenotypes)
    assert plain.tables["hosp/labevents"].equals(full.tables["hosp/labevents"])


def test_full_wards_repeat_themselves_in_little_memory(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    files = []
    for name in "ab":
        ward = write_ward(tmp_path / name, 300, images=False, quiet=True, charting="full")
        files.append((ward.folder / "mimic-iv/icu/chartevents.csv.gz").read_bytes())
        assert ward.counts["icu/chartevents"] > 1_000_000
    assert files[0] == files[1]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000


def test_a_charting_nobody_knows_is_refused(tmp_path):
    with pytest.raises(InputError, match="channels, full"):
        write_ward(tmp_path / "ward", 5, charting="everything")
    assert not list(tmp_path.iterdir())


def test_laboratory_knows_the_kidneys_and_the_defence():
    ward = draw_ward(600, np.random.SeedSequence(4))
    truth = ward.truth.set_index("stay_id")
    blood = ward.tables["hosp/labevents"].to_pandas()
    assert set(CONSTITUENTS) <= set(blood["itemid"])
    means = blood[blood["itemid"].isin(CONSTITUENTS)].pivot_table(
        index="stay_id", columns="itemid", values="valuenum"
    )
    for item, hidden, least in (
        (50912, "own_kidney", 0.8),
        (51006, "own_kidney", 0.8),
        (51301, "own_defence", 0.8),
        (51244, "own_defence", -0.75),
        (50813, "severity", 0.6),
    ):
        kept = means[item].dropna()
        found = kept.corr(truth.loc[kept.index, hidden], method="spearman")
        assert np.sign(least) * found > abs(least), (item, found)


def test_who_stays_two_days_is_chance_and_how_long_is_foreseen():
    generator = np.random.default_rng(8)
    stays = draw_timeline(draw_stays(40_000, generator), generator)
    hours = (stays["outtime"] - stays["intime"]).dt.total_seconds() / 3600
    lives = (stays["last_seen"] - stays["intime"]).dt.total_seconds() >= 48 * 3600
    hidden = stays[["severity", "opacity", "text_risk", "age_score", "own_systolic"]]
    assert hidden.corrwith(lives).abs().max() < 4 / np.sqrt(len(stays))
    kept, hours = stays[lives].head(15_000), hours[lives].head(15_000)
    everything = expected_icu_hours(kept["severity"], kept["opacity"], kept["text_risk"])
    forecasts = true_icu_hours(kept).assign(everything=everything)
    for name, forecast in forecasts.items():
        tenth = forecast.rank(method="first").mul(10 / len(forecast)).sub(1e-9).astype(int)
        error = (hours - forecast).groupby(tenth)
        assert (error.mean() / error.sem()).abs().max() < 4.5, name
    squared = ((forecasts.rsub(hours, axis=0)) ** 2).mean()
    assert squared["everything"] < squared.filter(like="expected").min()


def test_some_films_belong_to_nobody_in_intensive_care():
    ward = draw_ward(2000, np.random.SeedSequence(6))
    strangers = ward.images[ward.images["stay_id"].isna()]
    assert 130 < strangers["subject_id"].nunique() < 280
    people = ward.tables["hosp/patients"]["subject_id"]
    assert not set(strangers["subject_id"]) & set(people)
    assert ward.images["dicom_id"].is_unique
    assert ward.images.groupby("study_id")["subject_id"].nunique().max() == 1
    reports = ward.notes["radiology"]
    assert reports["hadm_id"].isna().sum() == strangers["study_id"].nunique()


def test_findings_agree_with_the_opacity_and_the_phenotypes_behind_it():
    ward = draw_ward(2500, np.random.SeedSequence(7))
    early = ward.images[~ward.images["betrays"] & ward.images["stay_id"].notna()]
    found = study_tables(early)["chexpert"].merge(early[["study_id", "stay_id", "opacity"]])
    found = found.merge(ward.phenotypes, on="stay_id").drop_duplicates("study_id")
    for finding, label in (
        (
            "Pneumonia",
            "pneumonia_except_that_caused_by_tuberculosis_or_sexually_transmitted_disease",
        ),
        ("Pleural Effusion", "pleurisy_pneumothorax_pulmonary_collapse"),
        ("Edema", "congestive_heart_failure_nonhypertensive"),
        ("Lung Opacity", "respiratory_failure_insufficiency_arrest_adult"),
    ):
        assert set(found[finding].dropna()) == {-1.0, 0.0, 1.0}
        is_found = found[finding] == 1
        assert found[is_found]["opacity"].min() > found[found[finding] == 0]["opacity"].max()
        assert found[label][is_found].mean() > found[label][~is_found].mean() + 0.1


def test_truth_holds_lengths_and_traits(tmp_path):
    write_ward(tmp_path / "ward", 30, images=False, quiet=True)
    truth = ward_truth(tmp_path / "ward")
    assert truth.filter(like="expected_icu_hours_").shape == (30, 4)
    assert truth.filter(like="own_").shape == (30, 12)
