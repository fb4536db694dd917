"""What one row says of a stay: the same from every engine, known in time, and never made of the test stays."""

import json

import duckdb
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_hospital import at, chart, hospital, laboratory, write_tables

from clinfuse.conventions import PUBLISHED, SAFE, InputError
from clinfuse.data.clinical_text import titled_codes
from clinfuse.data.dataset import PreparedData
from clinfuse.data.leak_audit import audit_leaks
from clinfuse.data.preparation import prepare_folder
from clinfuse.data.sources import connect, open_source
from clinfuse.data.stay_features import (
    CATEGORIES,
    ETHNICITIES,
    LABORATORY,
    NUMBERS,
    add_stay_features,
    fit_number_rules,
    scaled_numbers,
    sort_spellings,
)
from clinfuse.data.tasks import mortality_and_stay_task

TASK = "mortality-and-stay"


def first_day():
    """The small hospital with blood, heights, and the words of the admission office."""
    tables = hospital()
    words = {"admission_type": "EW EMER.", "admission_location": "PACU", "language": "SPANISH"}
    words |= {"marital_status": "WIDOWED", "race": "ASIAN - KOREAN", "insurance": "Medicaid"}
    for row in tables["hosp/admissions"]:
        row |= words
    tables["hosp/admissions"][1] |= {"race": "KLINGON", "language": "", "marital_status": "ENGAGED"}
    tables["hosp/labevents"] += [
        laboratory(1, 2, 50813, 2.0),
        laboratory(1, 20, 50813, 4.0, storetime=at(21)),
        laboratory(1, 23, 50813, 9.0, storetime=at(26)),
        laboratory(1, 30, 50813, 20.0),
        laboratory(1, -1, 50983, 150),
        laboratory(1, 3, 50971, 400),
        laboratory(2, 3, 50971, "4.5"),
    ]
    tables["icu/chartevents"] += [
        *(
            chart(1, 6, item, value)
            for item, value in ((220739, "To Speech"), (223901, "Obeys Commands"))
        ),
        chart(1, 6, 223900, "Oriented"),
        chart(1, -0.5, 226707, 70),
        chart(1, -0.5, 220045, 190),
    ]
    return tables


def prepared(tmp_path, tables, protocol=SAFE, name="out"):
    source = open_source(write_tables(tmp_path / f"source-{name}", tables))
    return prepare_folder(source, tmp_path / name, TASK, protocol, quiet=True)


@pytest.fixture(scope="module", params=[SAFE, PUBLISHED], ids=lambda p: p.name)
def data(request, tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("day"), first_day(), request.param)


def test_a_mean_holds_what_was_known(data):
    is_safe = data.manifest["protocol"] == "safe"
    rows = data.samples.set_index("stay_id")
    row = rows.loc[201]
    assert row["mean_lactate"] == (3.0 if is_safe else 5.0)
    assert row["mean_lactate_known_hours"] == (21 if is_safe else 26)
    assert row["mean_heart_rate"] == 80 and row["mean_glasgow_total"] == 14
    assert np.isnan(row["mean_sodium"]) and np.isnan(row["mean_potassium"])
    assert row["mean_height"] == pytest.approx(177.8) and row["mean_height_known_hours"] == -0.5
    assert data.manifest["counts"]["implausible values"] == {"mean_potassium": 1}
    assert rows.loc[202, "mean_potassium"] == 4.5
    assert audit_leaks(data).table.at["numbers", "late"] == (0 if is_safe else 1)


def test_words_are_sorted_and_strange_ones_counted(data):
    assert len(data.numbers) == 26 and len(data.categories) == 28 and len(data.ethnicities) == 6
    first, second = (data.samples.set_index("stay_id").loc[stay] for stay in (201, 202))
    said = [name for name in data.categories if first[name]]
    assert said == [
        "admission_type_emergency",
        "admission_location_procedure",
        "insurance_medicaid",
        "language_other",
        "marital_status_widowed",
        "first_careunit_medical",
    ]
    assert data.ethnicities[first["ethnicity"]] == "asian"
    assert data.ethnicities[second["ethnicity"]] == "unknown"
    strange = {"marital_status": {"ENGAGED": 1}, "race": {"KLINGON": 1}}
    assert data.manifest["counts"]["unknown spellings"] == strange


@given(st.lists(st.sampled_from(["WHITE", " white", "Portuguese", "x", "*", "", None]), max_size=9))
@settings(deadline=None, max_examples=30)
def test_every_spelling_finds_one_group(texts):
    codes, strange = sort_spellings(pd.Series(texts, dtype="string"), ETHNICITIES)
    assert len(codes) == len(texts) and set(codes) <= {0, 5}
    assert sum(strange.values()) == sum(text in ("x", "*") for text in texts)


def test_no_spelling_stands_in_two_groups():
    for groups in (*CATEGORIES.values(), ETHNICITIES):
        spellings = [spelling for group in groups.values() for spelling in group]
        assert len(spellings) == len(set(spellings))
        assert all(spelling == spelling.upper().strip() for spelling in spellings)
    assert all(number.low < number.high for number in NUMBERS)


def test_the_demo_knows_every_item_and_spelling(mimic_demo, tmp_path):
    items = pd.read_csv(mimic_demo / "hosp/d_labitems.csv.gz").set_index("itemid")["label"]
    for item, name in LABORATORY.items():
        said = name.removeprefix("mean_").split("_")[0].removesuffix("s")
        known = items[item].lower().replace("hemo", "haemo")
        assert said[:5] in known
    data = prepare_folder(open_source(mimic_demo), tmp_path / "demo", TASK, quiet=True)
    assert data.manifest["counts"]["unknown spellings"] == {}
    assert data.samples["mean_height"].notna().mean() > 0.3
    assert audit_leaks(data).proven


def test_a_database_without_the_words_gives_the_same_row(tmp_path):
    tables = first_day()
    for row in tables["hosp/admissions"]:
        for name in ("admission_type", "admission_location", "language", "marital_status"):
            del row[name]
    files = prepared(tmp_path, tables)
    assert (files.samples[["language_other", "admission_type_other"]] == 1).all(axis=None)
    assert files.manifest["counts"]["unknown spellings"] == {"race": {"KLINGON": 1}}
    with duckdb.connect(str(tmp_path / "hospital.duckdb")) as database:
        for path in (tmp_path / "source-out").rglob("*.csv"):
            schema = f"mimiciv_{path.parent.name}"
            database.execute(f"CREATE SCHEMA IF NOT EXISTS {schema}")
            database.execute(f"CREATE TABLE {schema}.{path.stem} AS FROM '{path}'")
    source = open_source(tmp_path / "hospital.duckdb")
    base = prepare_folder(source, tmp_path / "base", TASK, quiet=True)
    pd.testing.assert_frame_equal(base.samples, files.samples)


def test_a_stay_without_a_length_or_a_life_is_no_sample(tmp_path):
    tables = first_day()
    tables["icu/chartevents"].append(chart(3, 2, 220045, 77))
    tables["hosp/admissions"][0] |= {"dischtime": at(-5)}
    tables["hosp/admissions"][1] |= {"deathtime": at(20)}
    tables["hosp/admissions"][2] |= {"dischtime": at(-6)}
    source = open_source(write_tables(tmp_path, tables))
    safe, published = (mortality_and_stay_task(source, p) for p in (SAFE, PUBLISHED))
    assert [set(t.samples["stay_id"]) for t in (safe, published)] == [{204}, {202, 204}]
    steps = safe.attrition.set_index("step")["stays"]
    assert steps["the admission has an end"] - steps["after its beginning"] == 2
    assert published.attrition.attrs["counts"]["dead before the prediction"] == 1
    row = add_stay_features(source, safe, SAFE).samples.iloc[0]
    assert row["mean_heart_rate"] == 70 and np.isnan(row["mean_lactate"])


def test_a_blank_title_is_no_text(tmp_path):
    tables = first_day()
    tables["hosp/d_icd_diagnoses"][0]["long_title"] = "  "
    connection = connect(open_source(write_tables(tmp_path, tables)))
    titles = connection.fetch(titled_codes(connection))["long_title"].to_pylist()
    assert titles == [None] * 4


def write_records(folder, lengths):
    (folder / "set-a").mkdir(parents=True)
    for record in range(len(lengths)):
        rows = [
            "00:00,Age,60",
            "00:00,Gender,1",
            "00:00,Height,170",
            f"00:00,ICUType,{record % 4 + 1}",
        ]
        rows += [
            "01:00,MAP,70",
            "02:00,NIMAP,80",
            "03:00,Lactate,2",
            "30:00,Lactate,8",
            "04:00,HR,500",
        ]
        text = "\n".join(["Time,Parameter,Value", f"00:00,RecordID,{100 + record}", *rows])
        (folder / "set-a" / f"{100 + record}.txt").write_text(text)
    lines = [f"{100 + record},{days},0" for record, days in enumerate(lengths)]
    header = "RecordID,Length_of_stay,In-hospital_death"
    (folder / "Outcomes-a.txt").write_text("\n".join([header, *lines]))
    return open_source(folder)


@pytest.mark.parametrize("protocol", [SAFE, PUBLISHED], ids=lambda p: p.name)
def test_the_challenge_fills_what_it_has(tmp_path, protocol):
    source = write_records(tmp_path / "a", [5, 0, -1, 9])
    data = prepare_folder(source, tmp_path / "out", TASK, protocol, quiet=True)
    row = data.samples.iloc[0]
    assert [row["mean_arterial_pressure"], row["mean_lactate"], row["mean_height"]] == [75, 2, 170]
    assert np.isnan(row["mean_heart_rate"]) and len(data.numbers) == 26
    counts = data.manifest["counts"]
    assert counts["unknown outcomes"]["length_of_stay_days"] == 2
    assert "mean_neutrophils" in counts["numbers never measured"]
    assert counts["implausible values"] == ({} if protocol is SAFE else {"mean_heart_rate": 4})
    units = ["coronary", "cardiac_vascular", "medical", "surgical"]
    assert all(data.samples[f"first_careunit_{u}"][i] == 1 for i, u in enumerate(units))
    assert audit_leaks(data).proven


def test_a_hospital_of_ones_own_brings_its_own_numbers(tmp_path):
    for name, text in {
        "stays": "stay_id,subject_id,in_hospital_mortality,length_of_stay_days,attribute_age_years\n"
        "1,1,0,4,60\n2,2,1,0,70\n3,3,0,6,50\n",
        "events": "stay_id,channel,value,hours,available_hours\n1,pulse,80,1,1\n1,pulse,90,2,2\n"
        "2,pulse,70,1,1\n3,pulse,70,1,30\n3,pulse,60,3,3\n",
        "channels": "name,unit,kind,normal,low,high\npulse,per minute,continuous,80,20,300\n",
    }.items():
        (tmp_path / f"{name}.csv").write_text(text)
    data = prepare_folder(open_source(tmp_path), tmp_path / "out", TASK, quiet=True)
    assert data.numbers == ["age_years", "window_hours", "mean_pulse"]
    assert data.samples["mean_pulse"].tolist() == [85, 70, 60]
    assert data.manifest["counts"]["unknown outcomes"]["length_of_stay_days"] == 1
    stays = (
        (tmp_path / "stays.csv").read_text().replace("attribute_age_years", "attribute_mean_pulse")
    )
    (tmp_path / "stays.csv").write_text(stays)
    with pytest.raises(InputError, match="mean_pulse is the name of a feature"):
        prepare_folder(open_source(tmp_path), tmp_path / "other", TASK, quiet=True)


def test_rules_are_those_of_training_and_values_stay_as_measured(tmp_path):
    source = write_records(tmp_path / "a", [5] * 30)
    text = (tmp_path / "a/set-a/105.txt").read_text()
    (tmp_path / "a/set-a/105.txt").write_text(text.replace("Age,60", "Age,90"))
    splits = tmp_path / "splits.csv"
    lines = [f"{100 + i},{'test' if i in (5, 6) else 'train'}" for i in range(30)]
    splits.write_text("\n".join(["subject_id,split", *lines]))
    data = prepare_folder(source, tmp_path / "out", TASK, splits=splits, quiet=True)
    rules = json.loads((data.path / "normaliser.json").read_text())["numbers"]
    age = data.numbers.index("age_years")
    assert rules["high"][age] == rules["median"][age] == 60
    assert data.samples["age_years"].max() == 90 and data.samples["mean_sodium"].isna().all()
    scaled = scaled_numbers(data.samples[data.numbers], data.number_rules)
    assert np.isfinite(scaled).all() and scaled.shape == (30, 26)


def test_an_older_folder_has_no_stays(tmp_path):
    source = write_records(tmp_path / "a", [5] * 6)
    data = prepare_folder(source, tmp_path / "out", quiet=True)
    assert {"numbers", "categories", "ethnicities"}.isdisjoint(data.manifest)
    again = PreparedData(tmp_path / "out")
    assert [again.numbers, again.categories, again.ethnicities, again.number_rules] == [
        [],
        [],
        [],
        {},
    ]


def test_a_folder_for_testing_only_has_values_and_no_rules(tmp_path):
    source = write_records(tmp_path / "a", [5] * 6)
    (tmp_path / "splits.csv").write_text(
        "subject_id,split\n" + "".join(f"{100 + i},test\n" for i in range(6))
    )
    data = prepare_folder(
        source, tmp_path / "out", TASK, splits=tmp_path / "splits.csv", quiet=True
    )
    assert data.samples["mean_lactate"].notna().all()
    with pytest.raises(InputError, match="no training samples"):
        _ = data.number_rules


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_no_test_stay_moves_a_rule(seed):
    random = np.random.default_rng(seed)
    values = random.normal(size=(20, 4)) * 10 ** random.uniform(-3, 3, 4)
    values[random.random(values.shape) < 0.3] = np.nan
    is_train = random.random(20) < 0.6
    rules = fit_number_rules(values, is_train)
    changed = np.where(is_train[:, None], values, random.normal(size=values.shape) * 1e6)
    assert fit_number_rules(changed, is_train) == rules
    scaled = scaled_numbers(values, rules)
    assert np.isfinite(scaled).all()
    assert np.array_equal(scaled[is_train], scaled_numbers(values[is_train], rules))
