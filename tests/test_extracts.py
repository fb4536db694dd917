"""An extract is whole or absent, follows its source, and never has to be believed blindly."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import duckdb
import pandas as pd
import pytest
from small_hospital import cut_in_half, hospital, stay, write_tables

from clinfuse.conventions import PUBLISHED, SAFE, InputError
from clinfuse.data.channels import channel_items
from clinfuse.data.extracts import extract_counts, extract_source
from clinfuse.data.sources import SUFFIXES, open_source
from clinfuse.data.tasks import mortality_task
from clinfuse.ward.synthetic_ward import write_ward

ITEMS = sorted(set(channel_items(SAFE)) | set(channel_items(PUBLISHED)))


def extract(folder, cache, items=ITEMS):
    return extract_source(open_source(folder), cache, items, quiet=True)


def written(cache):
    return sorted(file.parent.name for file in cache.glob("*/extract.json"))


def refusal(action):
    """The one line with which something is refused."""
    with pytest.raises(InputError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("protocol", [SAFE, PUBLISHED], ids=lambda p: p.name)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_storage_has_an_extract_with_the_same_task(tmp_path, suffix, protocol):
    folder = write_tables(tmp_path / "hospital", hospital(), suffix)
    source = extract(folder, tmp_path / "cache")
    expected, task = mortality_task(open_source(folder), protocol), mortality_task(source, protocol)
    assert task.series.tobytes() == expected.series.tobytes()
    assert task.samples.equals(expected.samples) and task.events.equals(expected.events)


@pytest.mark.parametrize("version", ["1.0", "3.1"])
def test_every_version_has_an_extract_with_the_same_task(tmp_path, version):
    write_ward(tmp_path / "ward", 20, version=version, images=False, quiet=True)
    source = extract(tmp_path / "ward", tmp_path / "cache")
    expected = mortality_task(open_source(tmp_path / "ward"), SAFE)
    assert source.version.startswith(version[0])
    assert mortality_task(source, SAFE).series.tobytes() == expected.series.tobytes()


def test_only_what_is_wanted_is_kept(tmp_path):
    tables = hospital()
    outside = {**tables["icu/chartevents"][0], "subject_id": 99, "hadm_id": 199}
    other = {**tables["icu/chartevents"][0], "itemid": 220046}
    tables["icu/chartevents"] += [outside, other]
    note = {"subject_id": 1, "hadm_id": 101, "charttime": "2150-01-01 11:00:00"}
    note |= {"storetime": "2150-01-01 12:00:00", "text": 'one\ntwo, "three"'}
    tables["note/radiology"] = [note, {**note, "subject_id": 99}]
    folder = write_tables(tmp_path / "ward/mimic-iv", tables)
    (tmp_path / "ward/mimic-iv-note").mkdir()
    (folder / "note").rename(tmp_path / "ward/mimic-iv-note/note")
    source = extract(tmp_path / "ward", tmp_path / "cache")
    rows = {
        name: duckdb.sql(f"FROM '{source.files[name]}'").df()
        for name in ("icu/chartevents", "note/radiology")
    }
    assert len(rows["icu/chartevents"]) == len(hospital()["icu/chartevents"])
    assert list(rows["note/radiology"]["text"]) == ['one\ntwo, "three"']


def test_a_second_time_reads_nothing(tmp_path, monkeypatch):
    folder = write_tables(tmp_path / "hospital", hospital(), ".csv.gz")
    first = extract(folder, tmp_path / "cache")
    monkeypatch.setattr("clinfuse.data.extracts._write_tables", None)
    monkeypatch.setattr("clinfuse.data.extracts._sha256", None)
    assert extract(folder, tmp_path / "cache").files == first.files
    assert extract(folder, tmp_path / "cache", ITEMS[:3]).files == first.files


def test_a_touched_file_is_summed_again_and_a_copy_is_recognised(tmp_path, monkeypatch):
    folder = write_tables(tmp_path / "hospital", hospital())
    first = extract(folder, tmp_path / "cache")
    shutil.copytree(folder, tmp_path / "copy")
    os.utime(folder / "icu/chartevents.csv", (1, 1))
    monkeypatch.setattr("clinfuse.data.extracts._write_tables", None)
    for place in (folder, tmp_path / "copy"):
        assert extract(place, tmp_path / "cache").facts["fingerprint"] == first.facts["fingerprint"]


def test_a_changed_file_is_another_extract(tmp_path):
    folder, cache = write_tables(tmp_path / "hospital", hospital()), tmp_path / "cache"
    first = extract(folder, cache)
    file = folder / "icu/chartevents.csv"
    times = file.stat()
    file.write_text(file.read_text().replace(",80,80", ",81,81"))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    second = extract(folder, cache)
    assert file.stat().st_size == times.st_size and len(written(cache)) == 2
    assert second.facts["fingerprint"] != first.facts["fingerprint"]
    values = set(duckdb.sql(f"SELECT value FROM '{second.files['icu/chartevents']}'").df()["value"])
    assert "81" in values and "80" not in values


@pytest.mark.parametrize("harm", ["missing", "cut", "altered", "unmarked"])
def test_a_broken_extract_is_written_anew(tmp_path, harm):
    folder, cache = write_tables(tmp_path / "hospital", hospital()), tmp_path / "cache"
    source = extract(folder, cache)
    file = source.files["icu/chartevents"]
    content = file.read_bytes()
    if harm == "missing":
        file.unlink()
    elif harm == "unmarked":
        file.parents[1].joinpath("extract.json").write_text("{")
    else:
        half = len(content) // 2
        file.write_bytes(
            content[:half] if harm == "cut" else content[:half] + bytes(9) + content[half + 9 :]
        )
    again = extract(folder, cache)
    rows = duckdb.sql(f"FROM '{again.files['icu/chartevents']}'").df()
    assert len(rows) == len(hospital()["icu/chartevents"]) and len(written(cache)) == 1


@pytest.mark.parametrize(
    "harm, said",
    [
        ("table", "table icu/chartevents is missing"),
        ("column", "labevents.csv: column value is missing"),
        ("value", "chartevents.csv, row 3, column valuenum: unreadable value 'eighty'"),
        ("twin", "icustays.csv, row 6, column stay_id: 201 stands twice"),
        ("turned", "icustays.csv, row 2, column outtime: outtime is before intime"),
        ("download", "chartevents.csv.gz"),
    ],
)
def test_a_bad_source_is_named_and_leaves_nothing(tmp_path, harm, said):
    tables, cache = hospital(), tmp_path / "cache"
    if harm == "table":
        del tables["icu/chartevents"]
    elif harm == "column":
        tables["hosp/labevents"] = [
            {k: v for k, v in row.items() if k != "value"} for row in tables["hosp/labevents"]
        ]
    elif harm == "value":
        tables["icu/chartevents"][1]["valuenum"] = "eighty"
    elif harm == "twin":
        tables["icu/icustays"].append(stay(1, 60))
    elif harm == "turned":
        tables["icu/icustays"][0] = stay(1, -2)
    folder = write_tables(tmp_path / "hospital", tables)
    if harm == "download":
        cut_in_half(folder / "icu/chartevents.csv")
    line = refusal(lambda: extract(folder, cache))
    assert said in line and str(folder) in line
    assert not written(cache) and not list(cache.glob(".*.partial"))


def test_an_admission_that_ends_before_it_begins_is_no_reason_to_refuse(tmp_path):
    tables = hospital()
    tables["hosp/admissions"][3]["dischtime"] = "2149-01-01 00:00:00"
    extract(write_tables(tmp_path / "hospital", tables), tmp_path / "cache")


def test_what_a_manifest_tells(tmp_path):
    tables = hospital()
    tables["icu/chartevents"][0]["storetime"] = ""
    tables["icu/chartevents"][1] |= {"value": "ERROR", "valuenum": ""}
    tables["icu/chartevents"][7] |= {"value": "120/80", "valuenum": ""}
    folder = write_tables(tmp_path / "hospital", tables)
    source = extract(folder, tmp_path / "cache")
    assert extract_counts(source, ITEMS, ITEMS[:0]) == {"wanted rows without a storage time": 1}
    counts = extract_counts(source, ITEMS, [220045])
    assert counts["unreadable texts of item 220045"] == 1
    facts = json.loads(json.dumps(source.facts))
    assert facts["files"]["icu/chartevents"]["file"] == "chartevents.csv"
    assert str(tmp_path) not in json.dumps(facts)


PROGRAM = """
import sys
from pathlib import Path
from clinfuse.data.extracts import extract_source
from clinfuse.data.sources import open_source
print("begins", flush=True)
extract_source(open_source(sys.argv[1]), Path(sys.argv[2]), [220045, 220277], quiet=True)
"""


def start(folder, cache):
    command = [sys.executable, "-c", PROGRAM, str(folder), str(cache)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_killed_run_leaves_nothing_and_two_runs_wait_for_each_other(tmp_path):
    write_ward(tmp_path / "ward", 400, images=False, quiet=True)
    cache = tmp_path / "cache"
    killed = start(tmp_path / "ward", cache)
    killed.stdout.readline()
    while not list(cache.glob(".*.partial")) and killed.poll() is None:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not written(cache)
    two = [start(tmp_path / "ward", cache) for _ in range(2)]
    assert [each.wait() for each in two] == [0, 0]
    assert len(written(cache)) == 1 and not list(cache.glob(".*.partial"))
    charts = pd.read_csv(next((tmp_path / "ward").rglob("chartevents.csv.gz")))
    kept = duckdb.sql(f"SELECT itemid FROM '{cache}/*/icu/chartevents.parquet'").df()
    assert len(kept) == charts["itemid"].isin([220045, 220277]).sum()


def test_nobody_else_may_read_the_cache(tmp_path):
    if os.name != "posix":
        pytest.skip("rights of files are those of POSIX here")
    folder = write_tables(tmp_path / "hospital", hospital())
    source = extract(folder, tmp_path / "cache")
    for place in (tmp_path / "cache", source.files["icu/icustays"].parents[1]):
        assert place.stat().st_mode & 0o077 == 0
