"""The `published` protocol gives the benchmark's mortality series bit for bit."""

import csv
import gzip
import random
from datetime import datetime, timedelta
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_benchmark import (
    ITEMS,
    PHENOTYPE_OF_CODE,
    SPELLINGS,
    VARIABLE_OF_ITEM,
    reference_mortality,
)

from clinfuse.conventions import PUBLISHED, InputError
from clinfuse.data.sources import open_source
from clinfuse.data.tasks import mortality_task
from clinfuse.ward.synthetic_ward import write_ward

HEADERS = {  # of MIMIC-IV 2.2
    "hosp/patients": "subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod",
    "hosp/admissions": "subject_id,hadm_id,admittime,dischtime,deathtime,admission_type,admit_provider_id,"
    "admission_location,discharge_location,insurance,language,marital_status,race,edregtime,edouttime,"
    "hospital_expire_flag",
    "hosp/diagnoses_icd": "subject_id,hadm_id,seq_num,icd_code,icd_version",
    "hosp/d_icd_diagnoses": "icd_code,icd_version,long_title",
    "hosp/labevents": "labevent_id,subject_id,hadm_id,specimen_id,itemid,order_provider_id,charttime,storetime,"
    "value,valuenum,valueuom,ref_range_lower,ref_range_upper,flag,priority,comments",
    "hosp/d_labitems": "itemid,label,fluid,category",
    "icu/icustays": "subject_id,hadm_id,stay_id,first_careunit,last_careunit,intime,outtime,los",
    "icu/chartevents": "subject_id,hadm_id,stay_id,caregiver_id,charttime,storetime,itemid,value,valuenum,valueuom,"
    "warning",
    "icu/d_items": "itemid,label,abbreviation,linksto,category,unitname,param_type,lownormalvalue,highnormalvalue",
}
UNIT = "Medical Intensive Care Unit (MICU)"
OTHER_UNIT = "Coronary Care Unit (CCU)"
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]


def number_or_blank(text):
    try:
        return repr(float(text))
    except ValueError:
        return ""


def write_hospital(folder, tables, version="2.2", opener=open, suffix=".csv"):
    """Write a MIMIC-IV folder from table name -> list of dictionaries; columns left out are empty."""
    common = {
        "hosp/d_icd_diagnoses": [
            {"icd_code": code, "icd_version": version, "long_title": code}
            for code in PHENOTYPE_OF_CODE
            if code != "Z9999"  # coded, but without a title
            for version in (["9", "10"] if code == "E892" else ["10" if code[0].isalpha() else "9"])
        ],
        "icu/d_items": [
            {"itemid": item, "label": variable, "linksto": "chartevents"}
            for item, variable in VARIABLE_OF_ITEM.items()
            if int(item) >= 220000
        ],
        "hosp/d_labitems": [
            {"itemid": item, "label": variable}
            for item, variable in VARIABLE_OF_ITEM.items()
            if int(item) < 220000
        ],
    }
    for name, header in HEADERS.items():
        rows = (common | tables).get(name, [])
        if version == "1.0" and name in ("hosp/patients", "hosp/admissions"):
            name, header = name.replace("hosp", "core"), header.replace("race", "ethnicity")
            rows = [{key.replace("race", "ethnicity"): row[key] for key in row} for row in rows]
        path = folder / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        with opener(path, "wt", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, header.split(","), restval="")
            writer.writeheader()
            writer.writerows(rows)
    return folder


def chart_row(subject, admission, stay, time, item, text):
    row = {"subject_id": subject, "hadm_id": admission, "stay_id": stay, "itemid": item}
    row |= {"charttime": time, "storetime": time, "value": text, "valuenum": number_or_blank(text)}
    return row | {"warning": "0"}


def laboratory_row(number, subject, admission, time, item, text):
    row = {"labevent_id": number, "subject_id": subject, "hadm_id": admission, "itemid": item}
    row |= {"specimen_id": number, "charttime": time, "storetime": time}
    return row | {"value": text, "valuenum": number_or_blank(text)}


def package_mortality(folder, timestep_hours):
    """What the package makes of a folder, in the form of `reference_mortality`."""
    task = mortality_task(open_source(folder), PUBLISHED, timestep_hours)
    samples = {}
    for row in task.samples.itertuples():
        series = task.series[row.series_start : row.series_start + row.series_length]
        samples[int(row.stay_id)] = (series, int(row.in_hospital_mortality))
    return samples


def assert_same(found, expected):
    assert sorted(found) == sorted(expected)
    for stay_id, (series, label) in expected.items():
        other_series, other_label = found[stay_id]
        assert other_label == label, stay_id
        assert other_series.dtype == series.dtype == np.float32
        assert other_series.shape == series.shape
        different = other_series != series
        where = [(int(t), int(c)) for t, c in np.argwhere(different)[:5]]
        values = [(float(other_series[at]), float(series[at])) for at in where]
        assert not different.any(), (
            f"stay {stay_id}: (bin, column) {where}, (found, expected) {values}"
        )
        assert other_series.tobytes() == series.tobytes(), stay_id


# A stay worked out by hand

STAY = """\
10:00:00 223761 98.6
10:05:00 226531 180
10:05:00 226707 68
11:00:00 220045 88
11:30:00 220045 98
11:30:00 220045 102
11:30:00 220050 98
11:30:00 220179 102
12:15:00 227243 120/70
12:15:00 224643 118/64
12:30:00 223835 50
13:10:00 223761 78
13:30:00 220052
15:20:00 223835 0.4
16:20:00 220277 0.97
14:50:00 220621 -5
17:30:00 220739 None
17:30:00 223901 Obeys Commands
17:30:00 223901 Localizes Pain
17:30:00 223900 No Response-ETT
18:45:00 220739 To Speech
20:00:00 220210 -7
20:00:00 220052 1000000"""  # the first day of stay 31; times of MIMIC's first ICU day, item, value

LABORATORY = """\
14:40:00 21 51478 250
15:10:00 -- 50931 300
16:00:00 21 50820 7.31
16:10:00 21 50817 ERROR"""  # admission 21 or none; no laboratory row names a stay


@pytest.fixture(scope="module")
def worked_hospital(tmp_path_factory):
    """Patient 1 with the stay below; patient 2 with stays that the rules leave out."""
    charts = [
        chart_row(1, 21, 31, f"2150-01-01 {line.split()[0]}", line.split()[1], line[16:])
        for line in STAY.splitlines()
    ]
    charts += [
        chart_row(1, 21, 31, "2150-01-01 09:59:59", 220045, "60"),  # a second before the stay
        chart_row(1, 21, 31, "2150-01-03 10:00:00", 220045, "61"),  # hour 48 itself counts
        chart_row(1, 21, 31, "2150-01-03 10:00:01", 220045, "62"),  # a second after it does not
        chart_row(1, "", 31, "2150-01-01 12:40:00", 220045, "63"),  # no admission
        chart_row(1, 21, 39, "2150-01-01 12:40:00", 220210, "64"),  # not the stay of the admission
        chart_row(2, 22, 32, "2150-02-01 12:00:00", 220045, "80"),
        chart_row(2, 23, 33, "2150-03-01 12:00:00", 220045, "81"),
        chart_row(2, 24, 34, "2150-04-01 12:00:00", 220045, "82"),
    ]
    laboratory = []
    for number, line in enumerate(LABORATORY.splitlines()):
        time, admission, item, text = line.split()
        admission = admission.strip("-")
        laboratory.append(laboratory_row(number, 1, admission, f"2150-01-01 {time}", item, text))
    stays = [  # subject, admission, stay, last unit, in, out, days
        (1, 21, 31, UNIT, "2150-01-01 10:00:00", "2150-01-03 11:00:00", repr(49 / 24)),
        (2, 22, 32, UNIT, "2150-02-01 10:00:00", "2150-02-03 09:00:00", repr(47 / 24)),  # too short
        (2, 23, 33, OTHER_UNIT, "2150-03-01 10:00:00", "2150-03-04 10:00:00", "3.0"),  # transferred
        (2, 24, 34, UNIT, "2150-04-01 10:00:00", "2150-04-04 10:00:00", "3.0"),  # no diagnosis
    ]
    tables = {
        "hosp/patients": [
            {
                "subject_id": 1,
                "gender": "F",
                "anchor_age": 70,
                "anchor_year": 2150,
                "dod": "2150-01-05",
            },
            {"subject_id": 2, "gender": "M", "anchor_age": 50, "anchor_year": 2150},
        ],
        "hosp/admissions": [
            {
                "subject_id": subject,
                "hadm_id": admission,
                "race": "WHITE",
                "hospital_expire_flag": 0,
            }
            | {"admittime": f"{start[:8]}01 08:00:00", "dischtime": f"{start[:8]}05 12:00:00"}
            | ({"deathtime": "2150-01-05 12:00:00"} if admission == 21 else {})
            for subject, admission, _, _, start, _, _ in stays
        ],
        "hosp/diagnoses_icd": [
            {"subject_id": subject, "hadm_id": admission, "seq_num": 1}
            | {"icd_code": "I10", "icd_version": 10}
            for subject, admission in [(1, 21), (2, 22), (2, 23)]
        ],
        "icu/icustays": [
            {"subject_id": subject, "hadm_id": admission, "stay_id": stay, "intime": start}
            | {"first_careunit": UNIT, "last_careunit": last, "outtime": end, "los": days}
            for subject, admission, stay, last, start, end, days in stays
        ],
        "icu/chartevents": charts,
        "hosp/labevents": laboratory,
    }
    return write_hospital(tmp_path_factory.mktemp("worked"), tables)


def filled(num_bins, changes):
    """(num_bins, 76) from column -> {bin: value from there on}; columns not named are 0."""
    series = np.zeros((num_bins, 76), np.float32)
    for column, values in changes.items():
        for start, value in values.items():
            series[start:, column] = value
    return series


NEVER_MEASURED = {  # normal values: capillary refill "0.0", Glasgow total "15"
    0: {0: 1.0},
    28: {0: 1.0},
}
HOURLY = {
    # 12:15 "118/64" keeps the second number for the diastolic pressure; before it the normal 59
    2: {0: 59.0, 2: 64.0},
    # every fraction is divided by 100: 50 -> 0.5 at 12:30, and 0.4 -> 0.004 at 15:20
    3: {0: 0.21, 2: 0.5, 5: 0.004},
    # eye: "4 Spontaneously" until 17:30 (hour 7.5), then "None", then at 18:45 "To Speech"
    7: {0: 1.0, 7: 0.0},
    8: {7: 1.0, 8: 0.0},
    9: {8: 1.0},
    # motor: "6 Obeys Commands" until 17:30; of two texts at that time the last of the alphabet, "Obeys Commands"
    21: {0: 1.0, 7: 0.0},
    19: {7: 1.0},
    # verbal: "5 Oriented", then "No Response-ETT"
    43: {0: 1.0, 7: 0.0},
    42: {7: 1.0},
    # glucose: urine counts (14:40, hour 4.67); -5 at 14:50 is missing, so the later value does not win;
    # 300 at 15:10 has no admission
    49: {0: 128.0, 4: 250.0},
    # heart rate: hour 1 exactly falls into bin 0 (88); at 11:30 "98" > "102" as text; hour 48 falls into bin 47 (61)
    50: {0: 88.0, 1: 98.0, 47: 61.0},
    # 68 inches stay 68
    51: {0: 68.0},
    # mean pressure: the empty text at 13:30 is no value; 1000000 at 20:00 (hour 10: bin 9) passes
    52: {0: 77.0, 9: 1e6},
    # oxygen saturation: "ERROR" at 16:10 is missing; 0.97 at 16:20 is a fraction
    53: {0: 98.0, 6: 97.0},
    # a negative respiratory rate passes; the row of stay 39 (64) does not
    54: {0: 19.0, 9: -7.0},
    # systolic: 98 and 102 at 11:30 are numbers, so 102; then "120/70" at 12:15
    55: {0: 118.0, 1: 102.0, 2: 120.0},
    # 98.6 F is 37; 78 F is below 79 and stays 78
    56: {0: 37.0, 3: 78.0},
    # 180 * 0.453592
    57: {0: 81.64656},
    # pH at 16:00 (hour 6: bin 5)
    58: {0: 7.4, 5: 7.31},
}
HOURLY_SEEN = {60: [2], 61: [2, 5], 62: [7, 8], 63: [7], 65: [7], 66: [4], 67: [0, 1, 47], 68: [0]}
HOURLY_SEEN |= {69: [9], 70: [6], 71: [9], 72: [1, 2], 73: [0, 3], 74: [0], 75: [5]}

TWO_HOURLY = {
    2: {0: 59.0, 1: 64.0},
    3: {0: 0.21, 1: 0.5, 2: 0.004},
    7: {0: 1.0, 3: 0.0},  # 17:30 is hour 7.5: bin 3, which holds "None"
    8: {3: 1.0, 4: 0.0},
    9: {4: 1.0},
    21: {0: 1.0, 3: 0.0},
    19: {3: 1.0},
    43: {0: 1.0, 3: 0.0},
    42: {3: 1.0},
    49: {0: 128.0, 2: 250.0},
    50: {0: 98.0, 23: 61.0},  # 11:30 is later than 11:00 in the same bin
    51: {0: 68.0},
    52: {0: 77.0, 4: 1e6},  # hour 10 exactly: bin 4
    53: {0: 98.0, 3: 97.0},
    54: {0: 19.0, 4: -7.0},
    55: {0: 102.0, 1: 120.0},
    56: {0: 37.0, 1: 78.0},
    57: {0: 81.64656},
    58: {0: 7.4, 2: 7.31},  # hour 6 exactly: bin 2
}
TWO_HOURLY_SEEN = {60: [1], 61: [1, 2], 62: [3, 4], 63: [3], 65: [3], 66: [2], 67: [0, 23], 68: [0]}
TWO_HOURLY_SEEN |= {69: [4], 70: [3], 71: [4], 72: [0, 1], 73: [0, 1], 74: [0], 75: [2]}


def worked_by_hand(timestep_hours):
    num_bins, changes, seen = {
        1: (48, HOURLY, HOURLY_SEEN),
        2: (24, TWO_HOURLY, TWO_HOURLY_SEEN),
    }[timestep_hours]
    series = filled(num_bins, NEVER_MEASURED | changes)
    for column, bins in seen.items():
        series[bins, column] = 1.0
    return {31: (series, 1)}  # died at the minute of discharge


timesteps = pytest.mark.parametrize("timestep_hours", [1, 2])


@timesteps
def test_reference_agrees_with_the_hand(worked_hospital, timestep_hours):
    assert_same(
        reference_mortality(worked_hospital, timestep_hours), worked_by_hand(timestep_hours)
    )


@timesteps
def test_package_agrees_with_the_hand(worked_hospital, timestep_hours):
    assert_same(package_mortality(worked_hospital, timestep_hours), worked_by_hand(timestep_hours))


reference_of_demo = cache(reference_mortality)


def test_reference_finds_the_published_cohort_of_the_demo(mimic_demo):
    samples = reference_of_demo(mimic_demo, 1)
    assert len(samples) == 54
    assert sum(label for _, label in samples.values()) == 9


@timesteps
def test_demo_is_bit_equal(mimic_demo, timestep_hours):
    expected = reference_of_demo(mimic_demo, timestep_hours)
    assert_same(package_mortality(mimic_demo, timestep_hours), expected)


@pytest.mark.parametrize(
    ("version", "timestep_hours"), [("2.2", 1), ("2.2", 2), ("1.0", 1), ("3.1", 2)]
)
def test_ward_is_bit_equal(tmp_path, version, timestep_hours):
    write_ward(tmp_path / "ward", 60, seed=3, version=version, images=False, quiet=True)
    folder = tmp_path / "ward" / "mimic-iv"
    expected = reference_mortality(folder, timestep_hours)
    assert len(expected) > 20
    assert_same(package_mortality(folder, timestep_hours), expected)


# Hospitals made at random

ORIGIN = datetime(2150, 1, 1, 10)
HOURS_OF_INTEREST = (0, 0, 1, 2, 3, 4, 5, 10, 24, 46, 47, 48, 48, 49, 50)
SECONDS_OF_INTEREST = [3600 * hour + s for hour in HOURS_OF_INTEREST for s in (-1, 0, 1, 1800)]
NUMBERS = [
    "0",
    "0.5",
    "1",
    "1.0",
    "7.4",
    "9",
    "21",
    "40",
    "78",
    "79",
    "80.0",
    "98",
    "98.6",
    "98.10",
    "100",
    "102",
    "120",
    "-3",
    "-0.5",
    "1000000",
    ".5",
]
ODD_TEXTS = ["ERROR", "<5", ">500", "___", "12 mg", "1e2", "+5", "7.", "5.0.1", "98/60", ""]
PRESSURES = ["120/80", "98/60", "102/9", "0/0", "-1", "110.25", ""]
NOT_READY = ["223951", "227242", "999999", "50912"]


def texts_of(item):
    """Texts with which the benchmark does not stop with an error."""
    variable = VARIABLE_OF_ITEM.get(item)
    if variable in SPELLINGS:
        return [*SPELLINGS[variable].split("|"), ""]
    if variable in (None, "Glucose", "pH", "Oxygen saturation"):
        return NUMBERS + ODD_TEXTS
    return NUMBERS + PRESSURES if "tolic" in variable else [*NUMBERS, ""]


def random_stays(chance, subject):
    """One to three stays, ten days apart; some share an admission."""
    stays = []
    for number in range(chance.randint(1, 3)):
        start = ORIGIN + timedelta(days=10 * number, seconds=chance.randint(0, 3))
        seconds = chance.choice([172_800 - 1, 172_800, 172_801, 176_400, 200_000, 260_001])
        shares = number > 0 and chance.random() < 0.3
        row = {"subject_id": subject, "stay_id": 1000 * subject + number}
        row["hadm_id"] = stays[-1]["hadm_id"] if shares else 100 * subject + number
        row |= {"first_careunit": UNIT, "last_careunit": chance.choice([UNIT] * 4 + [OTHER_UNIT])}
        row |= {"intime": start, "outtime": start + timedelta(seconds=seconds)}
        stays.append(row | {"los": repr(seconds / 86400)})
    if len(stays) == 1 and chance.random() < 0.5:
        stays[0]["outtime"] -= timedelta(hours=10)  # then later rows count by their stay_id alone
    return stays


def random_admission(chance, stays):
    """The admission of some stays; the death may touch its borders."""
    admitted = stays[0]["intime"] - timedelta(hours=chance.choice([0, 2]))
    discharged = stays[-1]["outtime"] + timedelta(hours=chance.choice([0, 5]))
    second, hour = timedelta(seconds=1), timedelta(hours=1)
    deaths = [None, admitted, discharged, discharged - hour, discharged + second, admitted - second]
    row = {key: stays[0][key] for key in ("subject_id", "hadm_id")}
    row |= {"admittime": admitted, "dischtime": discharged, "deathtime": chance.choice(deaths)}
    return row | {"admission_type": "URGENT", "race": "WHITE", "hospital_expire_flag": 0}


def random_event(chance, stays, moments, number):
    """A table and a row around one of a patient's stays; a few moments, so that many rows tie."""
    stay, other = chance.choice(stays), chance.choice(stays)
    time = str(stay["intime"] + timedelta(seconds=chance.choice(moments)))
    subject, own = stay["subject_id"], stay["hadm_id"]
    admission = chance.choice([own] * 12 + [other["hadm_id"]] * 2 + ["", 99])
    often = [
        item for item in VARIABLE_OF_ITEM if VARIABLE_OF_ITEM[item] in ("Heart Rate", "Glucose")
    ]
    item = chance.choice(list(VARIABLE_OF_ITEM) * 2 + often * 3 + NOT_READY)
    text = chance.choice(texts_of(item))
    if int(item) < 220000:
        return "hosp/labevents", laboratory_row(number, subject, admission, time, item, text)
    named = chance.choice([stay["stay_id"]] * 12 + [other["stay_id"]] * 2 + ["", 99])
    return "icu/chartevents", chart_row(subject, admission, named, time, item, text)


def random_hospital(seed, num_patients, num_events):
    chance = random.Random(seed)
    tables = {name: [] for name in HEADERS if not name.split("/")[1].startswith("d_")}
    for subject in range(1, 1 + num_patients):
        stays = random_stays(chance, subject)
        deaths = [None, None] + [
            stay[end].date() for stay in stays for end in ("intime", "outtime")
        ]
        patient = {"subject_id": subject, "gender": "F", "anchor_year": 2150}
        patient |= {"anchor_age": chance.choice([17, 18, 50, 70, 91]), "dod": chance.choice(deaths)}
        tables["hosp/patients"].append(patient | {"anchor_year_group": "2014 - 2016"})
        tables["icu/icustays"] += stays
        for admission in sorted({stay["hadm_id"] for stay in stays}):
            mine = [stay for stay in stays if stay["hadm_id"] == admission]
            tables["hosp/admissions"].append(random_admission(chance, mine))
            diagnosis = {"subject_id": subject, "hadm_id": admission, "seq_num": 1}
            if chance.random() < 0.85:
                for code in chance.sample(list(PHENOTYPE_OF_CODE), 3):
                    version = 10 if code[0].isalpha() and chance.random() < 0.9 else 9
                    tables["hosp/diagnoses_icd"] += [
                        diagnosis | {"icd_code": code, "icd_version": version}
                    ]
        moments = chance.sample(SECONDS_OF_INTEREST, 10)
        moments += [chance.randint(-7200, 280_000) for _ in range(8)]
        for number in range(num_events):
            table, row = random_event(chance, stays, moments, 1000 * subject + number)
            tables[table].append(row)
    return tables


LAYOUTS = [("2.2", open, ".csv"), ("2.2", gzip.open, ".csv.gz"), ("1.0", open, ".csv")]


@settings(
    max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=SLOW
)
@given(
    seed=st.integers(0, 2**32),
    num_patients=st.integers(4, 12),
    num_events=st.sampled_from([100, 200, 400, 5]),
    timestep_hours=st.sampled_from([1, 2, 0.5, 5]),
    layout=st.sampled_from(LAYOUTS),
)
def test_random_hospitals_are_bit_equal(
    tmp_path_factory, seed, num_patients, num_events, timestep_hours, layout
):
    tables = random_hospital(seed, num_patients, num_events)
    folder = write_hospital(tmp_path_factory.mktemp("hospital"), tables, *layout)
    expected = reference_mortality(folder, timestep_hours)
    if expected:
        assert_same(package_mortality(folder, timestep_hours), expected)
    else:
        with pytest.raises(InputError, match="no stay"):
            package_mortality(folder, timestep_hours)


@pytest.mark.parametrize("name", ["hosp/admissions", "hosp/patients"])
def test_stays_without_admission_or_patient_are_left_out(tmp_path, name):
    tables = random_hospital(seed=20, num_patients=6, num_events=200)
    tables[name] = tables[name][:3]
    folder = write_hospital(tmp_path, tables)
    expected = reference_mortality(folder, 1)
    assert expected
    assert_same(package_mortality(folder, 1), expected)


def test_items_are_disjoint():
    assert len(VARIABLE_OF_ITEM) == sum(len(items.split()) for items in ITEMS.values()) == 44
