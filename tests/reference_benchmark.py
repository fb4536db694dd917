"""The published benchmark's four tasks, written out slowly: loops and dictionaries, its defects included.

The oracle of `test_published_protocol.py`. It shares no line with the package, and its only aim is to be read against the
recipe: mimic3-benchmarks (Harutyunyan and others, 2019, https://doi.org/10.1038/s41597-019-0103-9) as MedFuse (Hayat and
others, 2022, https://arxiv.org/abs/2207.07027) ported it to MIMIC-IV.
"""

import csv
import gzip
import re
from datetime import datetime
from functools import lru_cache

import numpy as np

EPSILON = 1e-6  # hours
END_HOURS = 48.0

ITEMS = {  # every item id of MIMIC-IV that the benchmark marks as ready
    "Diastolic blood pressure": "220051 220180 224643 225310",
    "Fraction inspired oxygen": "223835",
    "Glascow coma scale eye opening": "220739",
    "Glascow coma scale motor response": "223901",
    "Glascow coma scale verbal response": "223900",
    "Glucose": "50809 50931 51478 220621 225664 226537",
    "Heart Rate": "220045",
    "Height": "226707 226730",
    "Mean blood pressure": "220052 220181 224322 225312",
    "Oxygen saturation": "50817 220227 220277",
    "Respiratory rate": "220210 224422 224689 224690",
    "Systolic blood pressure": "220050 220179 224167 225309 227243",
    "Temperature": "223761 223762",
    "Weight": "224639 226512 226531",
    "pH": "50820 50831 51094 51491 220274 223830",
}
VARIABLE_OF_ITEM = {item: name for name, items in ITEMS.items() for item in items.split()}
WEIGHT_LABELS = {
    "224639": "Daily Weight",
    "226512": "Admission Weight (Kg)",
    "226531": "Admission Weight (lbs.)",
}

NORMAL_VALUES = {  # what a bin holds before the first observation; the keys are the 17 channels in column order
    "Capillary refill rate": "0.0",
    "Diastolic blood pressure": "59.0",
    "Fraction inspired oxygen": "0.21",
    "Glascow coma scale eye opening": "4 Spontaneously",
    "Glascow coma scale motor response": "6 Obeys Commands",
    "Glascow coma scale total": "15",
    "Glascow coma scale verbal response": "5 Oriented",
    "Glucose": "128.0",
    "Heart Rate": "86",
    "Height": "170.0",
    "Mean blood pressure": "77.0",
    "Oxygen saturation": "98.0",
    "Respiratory rate": "19",
    "Systolic blood pressure": "118.0",
    "Temperature": "36.6",
    "Weight": "81.0",
    "pH": "7.4",
}
SPELLINGS = {  # one column each, in this order
    "Capillary refill rate": "0.0|1.0",
    "Glascow coma scale eye opening": (
        "To Pain|3 To speech|1 No Response|4 Spontaneously|None|To Speech|Spontaneously|2 To pain"
    ),
    "Glascow coma scale motor response": (
        "1 No Response|3 Abnorm flexion|Abnormal extension|No response|4 Flex-withdraws"
        "|Localizes Pain|Flex-withdraws|Obeys Commands|Abnormal Flexion|6 Obeys Commands"
        "|5 Localizes Pain|2 Abnorm extensn"
    ),
    "Glascow coma scale total": "11|10|13|12|15|14|3|5|4|7|6|9|8",
    "Glascow coma scale verbal response": (
        "1 No Response|No Response|Confused|Inappropriate Words|Oriented|No Response-ETT|5 Oriented"
        "|Incomprehensible sounds|1.0 ET/Trach|4 Confused|2 Incomp sounds|3 Inapprop words"
    ),
}


def read_table(folder, name):
    """Every row of a table as a dictionary of texts."""
    for place in (f"hosp/{name}", f"icu/{name}", f"core/{name}"):
        plain, packed = folder / f"{place}.csv", folder / f"{place}.csv.gz"
        if plain.exists():
            with open(plain, newline="", encoding="utf-8") as file:
                yield from csv.DictReader(file)
            return
        if packed.exists():
            with gzip.open(packed, "rt", newline="", encoding="utf-8") as file:
                yield from csv.DictReader(file)
            return
    raise FileNotFoundError(f"no table {name} in {folder}")


def time_of(text):
    return datetime.fromisoformat(text) if text else None


def hours_between(earlier, later):
    return (later - earlier).total_seconds() / 60 / 60


# Step 1: the stays


def died_in_hospital(admission, patient):
    admitted, discharged = time_of(admission["admittime"]), time_of(admission["dischtime"])
    deaths = [time_of(patient["dod"]), time_of(admission["deathtime"])]
    return any(death is not None and admitted <= death <= discharged for death in deaths)


def age_of(patient):
    age = int(patient["anchor_age"])
    return 90 if age < 0 else age


def read_cohort(folder):
    """The one stay of every admission that is kept: hadm_id -> dictionary."""
    admissions = {row["hadm_id"]: row for row in read_table(folder, "admissions")}
    patients = {row["subject_id"]: row for row in read_table(folder, "patients")}
    diagnosed = {row["hadm_id"] for row in read_table(folder, "diagnoses_icd")}
    untransferred = {}
    for stay in read_table(folder, "icustays"):
        if stay["first_careunit"] == stay["last_careunit"]:
            untransferred.setdefault(stay["hadm_id"], []).append(stay)

    cohort = {}
    for hadm_id, stays in untransferred.items():
        if len(stays) != 1 or hadm_id not in admissions or hadm_id not in diagnosed:
            continue
        [stay] = stays
        patient = patients.get(stay["subject_id"])
        if patient is None or age_of(patient) < 18:
            continue
        cohort[hadm_id] = {
            "subject_id": stay["subject_id"],
            "stay_id": stay["stay_id"],
            "intime": time_of(stay["intime"]),
            "outtime": time_of(stay["outtime"]),
            "los_hours": float(stay["los"]) * 24 if stay["los"] else None,
            "died": died_in_hospital(admissions[hadm_id], patient),
            "deathtime": time_of(admissions[hadm_id]["deathtime"]),
        }
    return cohort


# Step 2: the events that count


def read_events(folder, cohort):
    """Subject -> list of (time, variable, item, text, stay_id)."""
    events = {}
    for name in ("chartevents", "labevents"):
        for row in read_table(folder, name):
            if row["itemid"] not in VARIABLE_OF_ITEM:
                continue
            if row["value"] == "" or row["hadm_id"] not in cohort:
                continue
            stay = cohort[row["hadm_id"]]
            stay_id = row.get("stay_id") or stay["stay_id"]
            if stay_id != stay["stay_id"]:
                continue
            variable = VARIABLE_OF_ITEM[row["itemid"]]
            event = (time_of(row["charttime"]), variable, row["itemid"], row["value"], stay_id)
            events.setdefault(row["subject_id"], []).append(event)
    return events


# Step 3: cleaning, variable by variable; None is "missing"


def laboratory_number(text):
    return float(text) if re.fullmatch(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", text) else None


def clean(variable, item, text):
    if variable in ("Glucose", "pH"):
        return laboratory_number(text)
    if variable == "Oxygen saturation":
        saturation = laboratory_number(text)
        is_fraction = saturation is not None and saturation <= 1
        return saturation * 100 if is_fraction else saturation
    if variable == "Fraction inspired oxygen":
        return float(text) / 100
    if variable == "Temperature":
        temperature = float(text)
        return (temperature - 32) * 5 / 9 if temperature >= 79 else temperature
    if variable == "Weight":
        weight = float(text)
        if "oz" in WEIGHT_LABELS[item]:
            weight = weight / 16
        if "oz" in WEIGHT_LABELS[item] or "lb" in WEIGHT_LABELS[item]:
            weight = weight * 0.453592
        return weight
    if variable == "Height":
        return float(text)
    if variable in ("Systolic blood pressure", "Diastolic blood pressure"):
        if "/" in text:
            systolic, diastolic = text.split("/")
            text = systolic if variable.startswith("Systolic") else diastolic
        return float(text)
    return text


# Step 4: one value of a variable at one time of one patient


def largest_at_each_time(events):
    """(time, variable) -> value; and time -> the stays that charted anything then.

    The benchmark makes one row of all values of a patient at one time, so that a stay owns the whole row.
    """
    values, stays = {}, {}
    for time, variable, item, text, stay_id in events:
        value = clean(variable, item, text)
        if value is None:
            continue
        key = (time, variable)
        if key not in values or value > values[key]:
            values[key] = value
        stays.setdefault(time, set()).add(stay_id)
    return values, stays


@lru_cache(maxsize=1)
def read_hospital(folder):
    """The cohort, and subject -> values and stays at each time."""
    cohort = read_cohort(folder)
    events = read_events(folder, cohort)
    return cohort, {subject: largest_at_each_time(rows) for subject, rows in events.items()}


# Steps 5 and 6: the events of one stay


def events_of_stay(stay, values, stays, end_hours=END_HOURS):
    """List of (hours, variable, value), oldest first, up to the end of the window."""
    mine = []
    for (time, variable), value in values.items():
        during = stay["outtime"] is not None and stay["intime"] <= time <= stay["outtime"]
        if stay["stay_id"] in stays[time] or during:
            hours = hours_between(stay["intime"], time)
            if -EPSILON < hours < end_hours + EPSILON:
                mine.append((hours, variable, value))
    return sorted(mine, key=lambda event: event[0])


# Steps 7 to 9: bins, imputation, columns


def last_value_in_each_bin(events, timestep_hours, end_hours=END_HOURS):
    """One dictionary a bin: variable -> value."""
    num_bins = int(end_hours / timestep_hours + 1 - EPSILON)
    bins = [{} for _ in range(num_bins)]
    for hours, variable, value in events:
        bins[int(hours / timestep_hours - EPSILON)][variable] = value
    return bins


def columns_of_value(variable, value):
    if variable not in SPELLINGS:
        return [float(value)]
    spellings = SPELLINGS[variable].split("|")
    if value not in spellings:
        raise ValueError(f"{variable}: {value!r} is none of {spellings}")
    return [1.0 if value == spelling else 0.0 for spelling in spellings]


def series_of(bins):
    current = dict(NORMAL_VALUES)
    rows = []
    for found in bins:
        current.update(found)
        row = []
        for variable in NORMAL_VALUES:
            row += columns_of_value(variable, current[variable])
        for variable in NORMAL_VALUES:
            row.append(1.0 if variable in found else 0.0)
        rows.append(row)
    return np.array(rows, dtype=np.float64).astype(np.float32)


def reference_mortality(folder, timestep_hours):
    """stay_id -> (float32 series (bin, 76), 1 where the patient died in hospital)."""
    cohort, by_subject = read_hospital(folder)
    samples = {}
    for stay in cohort.values():
        if stay["los_hours"] is None or stay["los_hours"] < END_HOURS - EPSILON:
            continue
        mine = events_of_stay(stay, *by_subject.get(stay["subject_id"], ({}, {})))
        if mine:
            series = series_of(last_value_in_each_bin(mine, timestep_hours))
            samples[int(stay["stay_id"])] = (series, int(stay["died"]))
    return samples


# Phenotyping: the whole stay, and the groups of the codes

PHENOTYPE_OF_CODE = {  # a few codes in the benchmark's list; whatever the version; None: in no group
    "I10": "Essential hypertension",
    "4019": "Essential hypertension",
    "J9601": None,
    "I4891": "Cardiac dysrhythmias",
    "I480": None,
    "42731": "Cardiac dysrhythmias",
    "E892": None,
    "N179": "Acute and unspecified renal failure",
    "5849": "Acute and unspecified renal failure",
    "R6520": "Septicemia (except in labor)",
    "R6521": "Shock",
    "78552": "Shock",
    "E8720": None,
    "Z9999": None,
}


def codes_of_admissions(folder):
    """hadm_id -> set of codes that have a title, whatever their versions."""
    titled = {row["icd_code"] for row in read_table(folder, "d_icd_diagnoses")}
    codes = {}
    for row in read_table(folder, "diagnoses_icd"):
        if row["icd_code"] in titled:
            codes.setdefault(row["hadm_id"], set()).add(row["icd_code"])
    return codes


def reference_phenotyping(folder, timestep_hours, group_of_code=PHENOTYPE_OF_CODE):
    """stay_id -> (float32 series (bin, 76), set of the names of the groups)."""
    cohort, by_subject = read_hospital(folder)
    codes = codes_of_admissions(folder)
    samples = {}
    for hadm_id, stay in cohort.items():
        if stay["los_hours"] is None:
            continue
        end_hours = float(f"{stay['los_hours']:.6f}")  # as printed in the list file
        mine = events_of_stay(stay, *by_subject.get(stay["subject_id"], ({}, {})), end_hours)
        if mine:
            series = series_of(last_value_in_each_bin(mine, timestep_hours, end_hours))
            groups = {group_of_code.get(code) for code in codes.get(hadm_id, ())} - {None}
            samples[int(stay["stay_id"])] = (series, groups)
    return samples


# Length of stay and decompensation: every hour


def hours_asked(stay, events, task):
    """The sample times of one stay, in hours since its beginning."""
    end = stay["los_hours"]
    if task == "decompensation" and stay["deathtime"] is not None:
        end = min(end, hours_between(stay["intime"], stay["deathtime"]))
    times, time = [], 0
    while time < end + EPSILON:
        if time > 4 and time > events[0][0]:
            times.append(time)
        time += 1
    return times


def hourly_label(stay, time, task):
    if task == "length-of-stay":
        return float(f"{stay['los_hours'] - time:.6f}")
    if not stay["died"] or stay["deathtime"] is None:
        return 0
    return int(hours_between(stay["intime"], stay["deathtime"]) - time < 24)


def reference_hourly(folder, task):
    """stay_id -> (events of the stay, {hour -> label})."""
    cohort, by_subject = read_hospital(folder)
    samples = {}
    for stay in cohort.values():
        if stay["los_hours"] is None:
            continue
        whole = by_subject.get(stay["subject_id"], ({}, {}))
        mine = events_of_stay(stay, *whole, stay["los_hours"])
        times = hours_asked(stay, mine, task) if mine else []
        if times:
            labels = {time: hourly_label(stay, time, task) for time in times}
            samples[int(stay["stay_id"])] = (mine, labels)
    return samples


def hourly_series(events, time, timestep_hours):
    """float32 series (bin, 76) of what was measured up to an hour."""
    past = [event for event in events if event[0] <= time + EPSILON]
    return series_of(last_value_in_each_bin(past, timestep_hours, time))
