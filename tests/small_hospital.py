"""A hospital of four patients in the layout of MIMIC-IV, small enough to be typed."""

import gzip
from pathlib import Path

import pandas as pd

TIME = "%Y-%m-%d %H:%M:%S"
START = pd.Timestamp("2150-01-01 10:00")  # every stay begins here
UNIT = "Medical Intensive Care Unit (MICU)"
NEVER = ""


def at(hours: float) -> str:
    """The time so many hours after the beginning of the stay."""
    return (START + pd.Timedelta(hours=hours)).strftime(TIME)


def stay(subject: int, hours: float, **other: object) -> dict:
    row = {"subject_id": subject, "hadm_id": 100 + subject, "stay_id": 200 + subject}
    row |= {"first_careunit": UNIT, "last_careunit": UNIT, "intime": at(0), "outtime": at(hours)}
    return row | {"los": repr(hours / 24)} | other


def admission(subject: int, **other: object) -> dict:
    row = {"subject_id": subject, "hadm_id": 100 + subject, "admittime": at(-5), "race": "OTHER"}
    row |= {"dischtime": at(100), "deathtime": NEVER, "insurance": "Other"}
    return row | {"hospital_expire_flag": 0} | other


def patient(subject: int, **other: object) -> dict:
    row = {"subject_id": subject, "gender": "FM"[subject % 2], "anchor_age": 50 + subject}
    row |= {"anchor_year": 2148, "anchor_year_group": "2011 - 2013", "dod": NEVER}
    return row | other


def chart(subject: int, hours: float, item: int, value: object, **other: object) -> dict:
    number = value if isinstance(value, int | float) else NEVER
    row = {"subject_id": subject, "hadm_id": 100 + subject, "stay_id": 200 + subject}
    row |= {"charttime": at(hours), "storetime": at(hours), "itemid": item}
    return row | {"value": value, "valuenum": number} | other


def laboratory(subject: int, hours: float, item: int, value: object, **other: object) -> dict:
    row = chart(subject, hours, item, value) | other
    return {name: row[name] for name in row if name != "stay_id"}


def hospital() -> dict[str, list[dict]]:
    """Patients 1 and 2 live and die; 3 has no values; 4 leaves after a day."""
    return {
        "hosp/patients": [patient(1), patient(2), patient(3), patient(4)],
        "hosp/admissions": [
            admission(1),
            admission(2, deathtime=at(70), dischtime=at(70), hospital_expire_flag=1),
            admission(3),
            admission(4),
        ],
        "hosp/diagnoses_icd": [
            {
                "subject_id": n,
                "hadm_id": 100 + n,
                "seq_num": 1,
                "icd_code": "I10",
                "icd_version": 10,
            }
            for n in (1, 2, 3, 4)
        ],
        "hosp/d_icd_diagnoses": [
            {"icd_code": "I10", "icd_version": 10, "long_title": "Essential hypertension"}
        ],
        "hosp/labevents": [
            laboratory(1, 5, 50931, 140),
            laboratory(2, 47, 50931, 300, storetime=at(50)),
        ],
        "icu/icustays": [stay(1, 60), stay(2, 72), stay(3, 50), stay(4, 24)],
        "icu/chartevents": [
            chart(1, 0.5, 220045, 80),
            chart(1, 30, 220045, 95),
            chart(1, 31, 223761, 98.6),
            chart(2, 1, 220045, 110),
            chart(2, 40, 220739, "To Speech"),
            chart(2, 40, 223901, "Obeys Commands"),
            chart(2, 40, 223900, "Confused"),
            chart(4, 3, 220045, 70),
        ],
    }


def write_tables(folder: Path, tables: dict[str, list[dict]], suffix: str = ".csv") -> Path:
    """Write tables as .csv, .csv.gz or .parquet; the columns are those of the first row."""
    for name, rows in tables.items():
        file = folder / f"{name}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        frame = pd.DataFrame(rows)
        if suffix == ".parquet":
            frame.astype(str).replace("", None).to_parquet(file)
        else:
            frame.to_csv(file, index=False)
    return folder


def cut_in_half(file: Path) -> Path:
    """Compress a file and lose its second half, as an interrupted download does."""
    content = gzip.compress(file.read_bytes())
    file.unlink()
    file.with_name(f"{file.name}.gz").write_bytes(content[: len(content) // 2])
    return file.with_name(f"{file.name}.gz")
