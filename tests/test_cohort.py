"""Who is in the cohort must not depend on anything but the rules."""

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_hospital import admission, at, hospital, patient, stay, write_tables

from clinfuse.conventions import PROTOCOLS, PUBLISHED, SAFE, InputError
from clinfuse.data.cohort import (
    STAY_COLUMNS,
    Attrition,
    published_cohort,
    safe_cohort,
    select_cohort,
)
from clinfuse.data.sources import connect, open_source

every_protocol = pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda p: p.name)


def cohort_of(folder, tables, protocol):
    return select_cohort(connect(open_source(write_tables(folder, tables))), protocol)


@st.composite
def joined(draw):
    """Stays beside their admissions and patients, as `joined_stays` gives them."""
    number = draw(st.integers(1, 12))
    rows = pd.DataFrame({"stay_id": range(number)})
    rows["hadm_id"] = [draw(st.integers(0, 6)) for _ in range(number)]
    rows["subject_id"] = rows["hadm_id"] // 2
    units = st.sampled_from(["MICU", "SICU"])
    rows["first_careunit"] = [draw(units) for _ in range(number)]
    rows["last_careunit"] = [draw(units) for _ in range(number)]
    rows["admittime"] = pd.Timestamp("2150-06-01 08:00")
    rows["dischtime"] = pd.Timestamp("2150-06-09 08:00")
    days = st.sampled_from([None, 0.2, 7, 8.0, 30, 900])
    for column in ("deathtime", "dod"):
        lag = [draw(days) for _ in range(number)]
        rows[column] = rows["admittime"] + pd.to_timedelta(pd.Series(lag, dtype=float), unit="D")
    rows["dod"] = rows["dod"].dt.normalize()
    rows["anchor_age"] = [
        draw(st.sampled_from([-1.0, 0.0, 16.0, 17.0, 18.0, 91.0])) for _ in range(number)
    ]
    rows["anchor_year"] = [draw(st.integers(2146, 2150)) for _ in range(number)]
    rows["hospital_expire_flag"] = [draw(st.integers(0, 1)) for _ in range(number)]
    return rows


@settings(deadline=None)
@given(joined(), st.randoms())
def test_order_of_rows_does_not_matter(rows, random):
    order = list(range(len(rows)))
    random.shuffle(order)
    coded = rows["hadm_id"].drop_duplicates()[::2]
    for choose in (
        lambda table: safe_cohort(table, Attrition()),
        lambda table: published_cohort(table, coded, Attrition()),
    ):
        one, other = choose(rows), choose(rows.iloc[order])
        pd.testing.assert_frame_equal(one, other.sort_index())


@settings(deadline=None)
@given(joined())
def test_rules_only_remove_and_leave_one_stay_an_admission(rows):
    for protocol in PROTOCOLS:
        attrition = Attrition()
        if protocol == "safe":
            left = safe_cohort(rows, attrition)
            ever = rows["hadm_id"].value_counts()
            assert (ever[left["hadm_id"]] == 1).all()
        else:
            left = published_cohort(rows, rows["hadm_id"], attrition)
        counts = attrition.table()[["stays", "admissions", "subjects"]]
        assert (counts.diff().dropna() <= 0).all(axis=None)
        assert left["hadm_id"].is_unique and (left["age_years"] >= 18).all()
        assert (left["first_careunit"] == left["last_careunit"]).all()


@settings(deadline=None)
@given(joined())
def test_safe_cohort_ignores_what_is_written_after_discharge(rows):
    later = rows.assign(dod=pd.NaT, dischtime=pd.NaT)
    one, other = (safe_cohort(table, Attrition()) for table in (rows, later))
    assert list(one["stay_id"]) == list(other["stay_id"])
    assert list(one["in_hospital_mortality"]) == list(other["in_hospital_mortality"])


def test_safe_needs_no_diagnosis_codes(tmp_path):
    tables = hospital()
    whole, _ = cohort_of(tmp_path / "whole", tables, SAFE)
    bare, _ = cohort_of(
        tmp_path / "bare", tables | {"hosp/diagnoses_icd": tables["hosp/diagnoses_icd"][:1]}, SAFE
    )
    pd.testing.assert_frame_equal(whole, bare)
    del tables["hosp/diagnoses_icd"]
    pd.testing.assert_frame_equal(whole, cohort_of(tmp_path / "none", tables, SAFE)[0])


def test_published_loses_stays_without_a_code(tmp_path):
    tables = hospital()
    tables["hosp/diagnoses_icd"] = tables["hosp/diagnoses_icd"][:2]
    stays, _ = cohort_of(tmp_path, tables, PUBLISHED)
    assert list(stays["stay_id"]) == [201, 202]


@every_protocol
def test_columns_and_label(tmp_path, protocol):
    stays, _ = cohort_of(tmp_path, hospital(), protocol)
    assert list(stays.columns) == STAY_COLUMNS
    assert list(stays["in_hospital_mortality"]) == [0, 1, 0, 0]
    ages = [53.0, 54.0, 55.0, 56.0] if protocol is SAFE else [51.0, 52.0, 53.0, 54.0]
    assert list(stays["age_years"]) == ages
    assert list(stays["is_female"]) == [0.0, 1.0, 0.0, 1.0]


@every_protocol
@pytest.mark.parametrize(
    "name, row",
    [
        ("icu/icustays", stay(1, 30)),
        ("hosp/admissions", admission(2)),
        ("hosp/patients", patient(3)),
    ],
)
def test_an_identifier_stands_once(tmp_path, protocol, name, row):
    tables = hospital()
    tables[name].append(row)
    with pytest.raises(InputError, match=rf"{name}\.csv, row 6, column \w+: \d+ stands twice"):
        cohort_of(tmp_path, tables, protocol)


@every_protocol
def test_a_stay_does_not_end_before_it_begins(tmp_path, protocol):
    tables = hospital()
    tables["icu/icustays"][2]["outtime"] = at(-1)
    with pytest.raises(InputError, match="row 4, column outtime: outtime is before intime"):
        cohort_of(tmp_path, tables, protocol)


@every_protocol
def test_an_admission_that_ends_before_it_begins_is_no_reason_to_stop(tmp_path, protocol):
    tables = hospital()
    tables["hosp/admissions"][3]["dischtime"] = at(-50)
    assert len(cohort_of(tmp_path, tables, protocol)[0]) == 4


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.permutations(range(4)))
def test_order_of_the_files_does_not_matter(tmp_path_factory, order):
    tables = hospital()
    shuffled = {
        name: rows if len(rows) != 4 else [rows[i] for i in order] for name, rows in tables.items()
    }
    folder = tmp_path_factory.mktemp("order")
    one, _ = cohort_of(folder / "one", tables, SAFE)
    other, _ = cohort_of(folder / "other", shuffled, SAFE)
    pd.testing.assert_frame_equal(one, other)
