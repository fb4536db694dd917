"""Folders of patient data: recognised in every form, and refused in one line when they are broken."""

import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_hospital import at, chart, cut_in_half, hospital, stay, write_tables

from clinfuse.conventions import PUBLISHED, SAFE, InputError
from clinfuse.data.source_check import check_source
from clinfuse.data.sources import (
    EXTRA_TABLES,
    SUFFIXES,
    TABLES,
    Source,
    connect,
    open_source,
    shown_address,
)
from clinfuse.data.tasks import mortality_task
from clinfuse.ward.synthetic_ward import write_ward


def refusal(action) -> str:
    """The one line with which something is refused."""
    with pytest.raises(InputError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("protocol", [SAFE, PUBLISHED], ids=lambda p: p.name)
def test_every_storage_gives_the_same_task(tmp_path, protocol):
    tasks = []
    for suffix in SUFFIXES:
        folder = write_tables(tmp_path / suffix, hospital(), suffix)
        tasks.append(mortality_task(open_source(folder), protocol))
    for task in tasks[1:]:
        assert task.series.tobytes() == tasks[0].series.tobytes()
        assert task.samples.equals(tasks[0].samples)
        assert task.events.equals(tasks[0].events)


@pytest.mark.parametrize("name", [n for n in TABLES if n != "hosp/d_icd_diagnoses"])
def test_missing_table_is_named(tmp_path, name):
    tables = hospital()
    del tables[name]
    folder = write_tables(tmp_path, tables)
    assert name in refusal(lambda: mortality_task(open_source(folder), PUBLISHED))


@pytest.mark.parametrize(
    "name, column",
    [
        ("icu/chartevents", "valuenum"),
        ("icu/chartevents", "storetime"),
        ("hosp/labevents", "value"),
        ("icu/icustays", "intime"),
        ("hosp/patients", "anchor_age"),
        ("hosp/admissions", "deathtime"),
    ],
)
def test_missing_column_is_named(tmp_path, name, column):
    tables = hospital()
    tables[name] = [{k: v for k, v in row.items() if k != column} for row in tables[name]]
    folder = write_tables(tmp_path, tables)
    message = refusal(lambda: mortality_task(open_source(folder), SAFE))
    assert f"{name}.csv" in message and f"column {column} is missing" in message


@pytest.mark.parametrize(
    "name, column, value",
    [
        ("icu/chartevents", "valuenum", "eighty"),
        ("icu/chartevents", "charttime", "yesterday"),
        ("hosp/labevents", "itemid", "glucose"),
        ("icu/icustays", "outtime", "2150-02-30 10:00:00"),
        ("hosp/patients", "anchor_age", "old"),
    ],
)
def test_unreadable_value_is_named_with_its_row(tmp_path, name, column, value):
    tables = hospital()
    tables[name][1][column] = value
    folder = write_tables(tmp_path, tables)
    message = refusal(lambda: mortality_task(open_source(folder), SAFE))
    assert f"{name}.csv, row 3, column {column}: unreadable value {value!r}" in message
    (finding,) = check_source(open_source(folder)).findings.itertuples()
    assert (finding.file, finding.row, finding.column) == (f"{name}.csv", 3, column)


@pytest.mark.parametrize("name", ["icu/chartevents", "hosp/labevents", "icu/icustays"])
def test_cut_off_download_is_named(tmp_path, name):
    tables = hospital()
    tables["icu/chartevents"] += [chart(1, n / 100, 220045, n) for n in range(3000)]
    folder = write_tables(tmp_path, tables)
    file = cut_in_half(folder / f"{name}.csv")
    assert str(file) in refusal(lambda: mortality_task(open_source(folder), SAFE))
    try:
        findings = check_source(open_source(folder)).findings
    except InputError as error:
        assert file.name in str(error)
    else:
        assert list(findings["file"]) == [f"{name}.csv.gz"]


def test_row_with_too_many_fields_is_named(tmp_path):
    folder = write_tables(tmp_path, hospital())
    file = folder / "hosp/labevents.csv"
    file.write_text(file.read_text() + "1,2,3,4,5,6,7,8,9,10\n")
    assert "labevents.csv, row 4" in refusal(lambda: mortality_task(open_source(folder), SAFE))


def test_an_empty_hospital_is_refused(tmp_path):
    folder = write_tables(tmp_path, hospital() | {"icu/icustays": [stay(9, 72)]})
    assert "no stay is left" in refusal(lambda: mortality_task(open_source(folder), SAFE))


def test_check_finds_duplicates_and_turned_times(tmp_path):
    tables = hospital()
    tables["icu/icustays"].append(stay(1, -2))
    tables["hosp/admissions"][3]["dischtime"] = at(-50)
    found = check_source(open_source(write_tables(tmp_path, tables)))
    places = {(f.file, f.row, f.column) for f in found.findings.itertuples()}
    assert places == {
        ("icu/icustays.csv", 6, "stay_id"),
        ("icu/icustays.csv", 6, "outtime"),
        ("hosp/admissions.csv", 5, "dischtime"),
    }
    assert not found.ok and "stands twice" in str(found) and "stands twice" in found._repr_html_()


@given(
    user=st.text("ab%.", min_size=1, max_size=3),
    password=st.text("xyz@:/?#%", min_size=1, max_size=9),
)
def test_no_password_is_shown(user, password):
    password = f"xyz{password}xyz"
    address = f"postgres://{user}:{password}@host:5432/ward"
    assert shown_address(address) == f"postgres://{user}@host:5432/ward"
    source = Source("mimic-iv", "2.0", Path(), {}, address=address)
    assert "xyz" not in repr(source) + source.place
    assert pickle.loads(pickle.dumps(source)) == source


def test_procedures_are_known_where_they_are(tmp_path):
    folder = write_tables(tmp_path, hospital())
    assert "hosp/procedures_icd" not in open_source(folder).files
    row = {"subject_id": 1, "hadm_id": 101, "seq_num": 1, "chartdate": "2150-01-02"}
    row |= {"icd_code": "0BH17EZ", "icd_version": 10}
    write_tables(folder, {"hosp/procedures_icd": [row]}, ".csv.gz")
    tables = connect(open_source(folder))
    rows = tables.fetch(tables.table("hosp/procedures_icd")).to_pylist()
    assert rows[0].keys() == EXTRA_TABLES["hosp/procedures_icd"].keys()
    assert rows[0]["icd_code"] == "0BH17EZ"


@pytest.mark.parametrize("version, stays", [("1.0", None), ("2.2", 73_181), ("3.1", 94_458)])
def test_a_part_of_a_release_is_set_beside_its_counts(tmp_path, version, stays):
    write_ward(tmp_path / "ward", 60, version=version, images=False, quiet=True)
    (tmp_path / "ward/truth").rename(tmp_path / "truth-elsewhere")
    found = check_source(open_source(tmp_path / "ward"))
    counts = found.counts.set_index("what")["published"]
    assert counts["icu/icustays"] == stays if stays else counts["icu/chartevents"] == 329_499_788
    steps = found.attrition.set_index("step")
    if version == "1.0":
        assert list(steps["published"][-3:]) == ["47,046 subjects", "59,344 stays", "26,226 stays"]
    assert steps.loc[steps["published"] != "", "reason"].str.contains("part of the release").all()
    assert found.remarks and found.remarks[0] in str(found)


def test_the_demo_is_whole(mimic_demo):
    source = open_source(mimic_demo)
    assert (source.kind, source.version) == ("mimic-iv", "2.1-2.2")
    found = check_source(source)
    assert found.ok, str(found)
    counts = found.counts.set_index("what")
    agree = counts["here"] == counts["published"]
    assert agree[["hosp/patients", "hosp/admissions", "icu/icustays", "hosp/labevents"]].all()


def test_the_challenge_is_whole(challenge_2012):
    source = open_source(challenge_2012)
    assert (source.kind, source.version) == ("physionet-2012", "set-a")
    found = check_source(source)
    assert found.ok and (found.counts["here"] == found.counts["published"]).all()
    assert "physionet-2012" in refusal(lambda: connect(source))


def test_challenge_faults_are_named(tmp_path):
    (tmp_path / "set-a").mkdir()
    good = "Time,Parameter,Value\n00:00,RecordID,1\n00:07,HR,70\n07:10,AST,1.1e+04\n"
    (tmp_path / "set-a/1.txt").write_text(good)
    (tmp_path / "set-a/2.txt").write_text(good.replace("70", "seventy"))
    (tmp_path / "Outcomes-a.txt").write_text("RecordID,SAPS-I,In-hospital_death\n1,3,1\n")
    found = check_source(open_source(tmp_path))
    rows = found.findings.fillna({"row": 0})
    assert list(rows["file"]) == ["set-a/2.txt", "Outcomes-a.txt"]
    assert list(rows["row"]) == [3, 0]
    assert found.counts.set_index("what")["here"].to_dict() == {"set-a": 2, "deaths in set-a": 1}


def test_cut_off_archive_is_named(tmp_path):
    generator = np.random.default_rng(0)
    (tmp_path / "1.txt").write_bytes(generator.bytes(50_000))
    with tarfile.open(tmp_path / "set-b.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "1.txt", "set-b/1.txt")
    content = (tmp_path / "set-b.tar.gz").read_bytes()
    (tmp_path / "set-b.tar.gz").write_bytes(content[: len(content) // 2])
    found = check_source(open_source(tmp_path))
    assert list(found.findings["file"]) == ["set-b.tar.gz"]


def test_extra_folders_are_found_and_checked(tmp_path):
    write_tables(tmp_path / "mimic-iv", hospital())
    (tmp_path / "mimic-cxr-jpg/files").mkdir(parents=True)
    notes = [
        {"subject_id": 1, "hadm_id": 101, "charttime": at(1), "storetime": at(2), "text": "a\nb"}
    ]
    write_tables(tmp_path / "mimic-iv-note", {"note/radiology": notes}, ".csv.gz")
    source = open_source(tmp_path)
    assert source.radiographs == tmp_path / "mimic-cxr-jpg"
    assert source.notes == tmp_path / "mimic-iv-note"
    found = check_source(source)
    assert list(found.findings["file"]) == ["cxr/metadata"]
    assert found.counts.set_index("what").loc["note/radiology", "here"] == 1
    given = open_source(tmp_path / "mimic-iv", notes=tmp_path / "mimic-iv-note")
    assert given.radiographs is None and given.files["note/radiology"].exists()
