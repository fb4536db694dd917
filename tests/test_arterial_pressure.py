"""Recordings of arterial pressure: read from every layout, cut, labelled, split, prepared and proven."""

import gzip
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinfuse.conventions import PUBLISHED, SAFE, InputError
from clinfuse.data.arterial_pressure import (
    SURGICAL_PLAN,
    artefacts,
    pressure_segments,
    window_labels,
    window_starts,
)
from clinfuse.data.clinical_descriptions import SURGERIES, clinical_description
from clinfuse.data.dataset import describe
from clinfuse.data.hypotension_events import (
    EVENT_RULES,
    HYPOTENSION,
    event_starts,
    has_event,
    hypotensive_steps,
    lowest_stretch,
)
from clinfuse.data.hypotension_windows import cut_recording, hypotension_task
from clinfuse.data.leak_audit import audit_leaks
from clinfuse.data.preparation import prepare_folder
from clinfuse.data.pressure_sources import operations_of, recognised
from clinfuse.data.source_check import check_source
from clinfuse.data.sources import open_source
from clinfuse.data.vital_files import read_vital, write_vital

ART = "Solar8000/ART_MBP"
SHARED = Path(__file__).parents[2] / "shared/data"
pressures = st.lists(st.integers(55, 75), min_size=25, max_size=120)


def course(case, minutes=50):
    """A pressure every two seconds, with two minutes below the threshold in every second case."""
    generator = np.random.default_rng(case)
    seconds = 2.0 * np.arange(30 * minutes) + generator.uniform(0, 0.4, 30 * minutes).round(3)
    fall = 22 * ((seconds > 1800) & (seconds < 1920) & (case % 2 == 0))
    return seconds, (82 + generator.normal(0, 2, len(seconds)) - fall).round(1).astype(np.float32)


def write_theatre(folder, cases=range(1, 13)):
    """A folder of .vital files and a table of cases."""
    folder.mkdir(parents=True)
    for case in cases:
        write_vital(folder / f"{case}.vital", {ART: (*course(case), 0.0)}, 1.7e9)
    table = {"caseid": list(cases), "subjectid": [100 + case // 2 for case in cases]}
    table |= {"age": [">89" if case == 3 else "60" for case in cases], "sex": "F"}
    table |= {"optype": "Breast", "ane_type": "General"}
    pd.DataFrame(table).to_csv(folder / "cases.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def theatre(tmp_path_factory):
    return write_theatre(tmp_path_factory.mktemp("theatre") / "recordings")


@pytest.fixture(scope="module")
def prepared(theatre):
    return prepare_folder(
        open_source(theatre), theatre.parent / "prepared", "hypotension", quiet=True
    )


@given(pressures, st.sampled_from(sorted(EVENT_RULES)))
def test_an_event_never_goes_away_when_the_pressure_falls(values, name):
    rule = replace(EVENT_RULES[name], duration_seconds=60.0)
    higher, lower = np.array(values, float), np.array(values, float) - 1
    assert (event_starts(higher, 3.0, rule) <= event_starts(lower, 3.0, rule)).all()
    flagged = hypotensive_steps(higher, 3.0, rule)
    assert flagged.any() == event_starts(higher, 3.0, rule).any()
    if rule.share == 1:
        assert (higher[flagged] < 65).all() and (flagged.sum() == 0 or flagged.sum() >= 20)


@given(st.lists(st.integers(55, 75), min_size=100, max_size=100))
def test_nothing_within_the_reaction_time_changes_the_answer(values):
    future = np.array(values, float)
    altered = np.concatenate([np.full(40, 20.0), future[40:]])
    assert has_event(future, 3.0) == has_event(altered, 3.0)
    assert lowest_stretch(future, 3.0) == pytest.approx(lowest_stretch(altered, 3.0))
    assert not has_event(future, 3.0) or lowest_stretch(future, 3.0) < HYPOTENSION.threshold_mmhg


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(700, 1100))
def test_the_future_cannot_change_the_past(seed, cut):
    generator = np.random.default_rng(seed)
    seconds = np.sort(generator.uniform(0, 3600, 1500)).round(3)
    seconds = seconds[~((seconds > 900) & (seconds < 900 + generator.uniform(0, 60)))]
    values = np.round(80 + generator.normal(0, 12, len(seconds)), 1)
    values[generator.random(len(values)) < 0.02] = 250
    changed = np.where(seconds < 3 * cut, values, 45.0)

    def histories(values):
        kept = ~np.any(list(artefacts(seconds, values).values()), axis=0)
        found = {}
        for segment in pressure_segments(seconds[kept], values[kept], 3.0, 30.0):
            for start in window_starts(segment)[0]:
                end = segment.first_bin + start + 300
                if end <= cut:
                    found[end] = segment.values[start : start + 300]
        return found

    one, other = histories(values), histories(changed)
    for end in one.keys() & other.keys():
        np.testing.assert_array_equal(one[end], other[end])


def test_the_labels_of_the_windows_are_those_of_a_slow_reading(prepared):
    samples = prepared.samples
    for _, row in samples.iloc[:: max(len(samples) // 40, 1)].iterrows():
        future = prepared.target(row["sample_id"])
        for minutes in (5, 10, 15):
            judged, run, longest = future[40 : 20 * minutes], 0, 0
            for value in judged:
                run = run + 1 if value < 65 else 0
                longest = max(longest, run)
            assert row[f"hypotension_{minutes}_min"] == (longest >= 20)


def test_the_prepared_folder_is_what_the_contract_says(prepared):
    samples, manifest = prepared.samples, prepared.manifest
    assert prepared.labels == [f"hypotension_{minutes}_min" for minutes in (5, 10, 15)]
    assert samples["sample_id"].is_unique and samples["sample_id"].is_monotonic_increasing
    assert (samples["series_start"] + samples["series_length"] == samples["target_start"]).all()
    assert set(samples["series_length"]) == set(samples["target_length"]) == {300}
    assert manifest["timestep_hours"] == pytest.approx(3 / 3600)
    assert manifest["windows"]["rule"]["threshold_mmhg"] == 65
    assert len(prepared.series_array) < 0.2 * samples["series_length"].sum()
    assert samples.groupby("subject_id")["split"].nunique().max() == 1
    assert set(prepared.text(samples["sample_id"][0])) == {"description", "attributes"}
    assert samples.set_index("case_id").loc["3", "age_years"].iloc[0] == 90
    train = samples[samples["split"] == "train"]
    steps = np.unique(np.concatenate([np.arange(s, s + 300) for s in train["series_start"]]))
    mean = prepared.series_array[steps, 0].astype(float).mean()
    assert prepared.normaliser["mean"][0] == pytest.approx(mean, rel=1e-6)
    last = samples["series_start"] + samples["series_length"] - 1
    assert (prepared.series_array[last, 1] == 1).all()


def test_the_audit_proves_the_series_and_finds_a_changed_cell(prepared, tmp_path):
    assert audit_leaks(prepared).proven
    assert "Mean arterial pressure" in describe(prepared).missingness.index
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in prepared.path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    series = np.load(copy / "series.npy")
    series[250, 0] += 1
    np.save(copy / "series.npy", series)
    assert audit_leaks(type(prepared)(copy)).num_altered == 1


def test_bad_recordings_are_named_and_the_others_go_on(tmp_path):
    folder = write_theatre(tmp_path / "mixed")
    whole = (folder / "1.vital").read_bytes()
    (folder / "1.vital").write_bytes(whole[: len(whole) // 2])
    (folder / "2.vital").write_bytes(b"no recording")
    seconds, values = course(4)
    write_vital(folder / "4.vital", {"Solar8000/NIBP_MBP": (seconds, values, 0.0)}, 1.7e9)
    write_vital(folder / "5.vital", {ART: (seconds, np.full_like(values, 77), 0.0)}, 1.7e9)
    write_vital(folder / "6.vital", {ART: (seconds, values * np.nan, 0.0)}, 1.7e9)
    write_vital(folder / "7.vital", {ART: (seconds[:500], values[:500], 0.0)}, 1.7e9)
    torn = {ART: (seconds + 600 * (seconds > 1500), values, 0.0)}
    write_vital(folder / "8.vital", torn, 1.7e9)
    made = prepare_folder(open_source(folder), tmp_path / "out", "hypotension", quiet=True)
    left_out = made.manifest["counts"]["left out"]
    assert set(left_out) == {"1", "2", "4", "5", "6", "7", "8"}
    assert "1.vital: the file is damaged or cut off" in left_out["1"]
    assert "2.vital: no .vital file" in left_out["2"]
    assert "4.vital: no arterial pressure" in left_out["4"]
    assert "1500 flat line" in left_out["5"] and "no arterial pressure" in left_out["6"]
    assert "minutes of pressure" in left_out["7"] and "shorter than a window" in left_out["8"]
    assert (made.samples.loc[made.samples["case_id"] == "3", "age_years"] == 90).all()
    steps = {row["step"]: row["operations"] for row in made.manifest["attrition"]}
    assert steps["with a readable recording"] == 10 and min(steps.values()) == 5
    check = check_source(open_source(folder))
    assert [Path(p.split(":")[0]).name for p in check.findings["problem"]] == ["1.vital", "2.vital"]
    for file in folder.glob("*.vital"):
        file.write_bytes(b"")
    with pytest.raises(InputError, match=r"no recording is left; the first: .*1.vital"):
        prepare_folder(open_source(folder), tmp_path / "none", "hypotension", quiet=True)
    assert not (tmp_path / "none").exists()


def test_time_that_goes_back_costs_one_case(tmp_path):
    folder = write_theatre(tmp_path / "table", cases=())
    rows = []
    for case in (1, 2, 3, 4, 5, 6):
        seconds, values = course(case)
        if case == 2:
            seconds[100], seconds[101] = seconds[101], seconds[100]
        rows.append(pd.DataFrame({"case_id": case, "seconds": seconds, "map_mmhg": values}))
    pd.concat(rows).to_parquet(folder / "pressure.parquet")
    pd.DataFrame({"case_id": [1, 2, 3, 4, 5, 6], "subject_id": 1}).to_csv(
        folder / "cases.csv", index=False
    )
    task = hypotension_task(recognised(folder), SAFE)
    assert set(task.samples["case_id"]) == {"1", "3", "4", "5", "6"}
    assert "time goes back" in task.attrition.attrs["counts"]["left out"]["2"]
    assert (task.samples["surgery"] == "unknown").all()


def test_a_patient_in_two_splits_is_refused(theatre, tmp_path):
    lists = tmp_path / "cases.csv"
    lists.write_text(
        "caseid,split\n" + "".join(f"{c},{'train' if c < 3 else 'test'}\n" for c in range(1, 13))
    )
    with pytest.raises(InputError, match="patient 101 stands in two splits, with the cases 2, 3"):
        prepare_folder(
            open_source(theatre), tmp_path / "out", "hypotension", splits=lists, quiet=True
        )
    assert not (tmp_path / "out").exists()


def test_a_second_run_writes_the_same_bytes_and_published_keeps_everybody(
    theatre, prepared, tmp_path
):
    again = prepare_folder(open_source(theatre), tmp_path / "again", "hypotension", quiet=True)
    for file in prepared.path.iterdir():
        assert (again.path / file.name).read_bytes() == file.read_bytes(), file.name
    young = pd.read_csv(theatre / "cases.csv").assign(age=12, ane_type="Spinal")
    folder = write_theatre(tmp_path / "young")
    young.to_csv(folder / "cases.csv", index=False)
    with pytest.raises(InputError, match="no operation is included"):
        hypotension_task(open_source(folder), SAFE)
    assert hypotension_task(open_source(folder), PUBLISHED).samples["case_id"].nunique() == 12


def test_six_and_ten_seconds_are_other_grids(theatre):
    source = open_source(theatre)
    for step, size in ((6, 150), (10, 90)):
        task = hypotension_task(source, SAFE, step / 3600)
        assert set(task.samples["series_length"]) == {size}
    with pytest.raises(InputError, match="on a grid of 7 s"):
        hypotension_task(source, SAFE, 7 / 3600)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_ten_hours_with_twenty_tracks_are_read_and_cleaned_in_a_second(tmp_path):
    generator, hours = np.random.default_rng(0), 10
    wave = np.tile(generator.integers(0, 4000, (1800, 500)).astype(np.int16), (20, 1))
    tracks = {"SNUADC/ART": (np.arange(3600.0 * hours), wave, 500.0)}
    for number in range(19):
        name = ART if number == 9 else f"Solar8000/N{number}"
        seconds = 2.0 * np.arange(1800 * hours) + number / 100
        tracks[name] = (seconds, generator.normal(82, 5, len(seconds)), 0.0)
    write_vital(tmp_path / "1.vital", tracks, 1.7e9)
    program = """
import re, sys, time
from pathlib import Path
from clinfuse.data.hypotension_windows import cut_recording
from clinfuse.data.pressure_sources import operations_of
from clinfuse.data.sources import open_source
operations = operations_of(open_source(sys.argv[1]))
begin = time.process_time()
cut = cut_recording(operations.read("1"), operations)
seconds, status = time.process_time() - begin, Path("/proc/self/status").read_text()
print(seconds, int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) / 1024, len(cut.windows[0]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True
    )
    seconds, megabytes, windows = map(float, done.stdout.split())
    assert seconds < 3 and megabytes < 300, (seconds, megabytes)  # 0.4 s where nothing else runs
    assert windows > 1000


@pytest.mark.skipif(not importlib.util.find_spec("vitaldb"), reason="vitaldb is not installed")
def test_the_vitaldb_package_reads_and_writes_the_same_pressures(tmp_path):
    import vitaldb

    seconds, values = course(1)
    write_vital(tmp_path / "ours.vital", {ART: (seconds, values, 0.0)}, 1.7e9)
    theirs = vitaldb.VitalFile(str(tmp_path / "ours.vital"))
    grid = theirs.to_numpy([ART], 3)[:, 0]
    ours = read_vital(tmp_path / "ours.vital")
    assert set(grid[~np.isnan(grid)].astype(np.float32)) <= set(ours.map_mmhg)
    theirs.to_vital(str(tmp_path / "theirs.vital"))
    np.testing.assert_array_equal(read_vital(tmp_path / "theirs.vital").map_mmhg, values)


def test_every_place_of_a_cut_is_survived(tmp_path):
    seconds, values = course(1, minutes=2)
    write_vital(tmp_path / "whole.vital", {ART: (seconds, values, 0.0)}, 1.7e9)
    whole = gzip.decompress((tmp_path / "whole.vital").read_bytes())
    for size in [*range(0, 200, 7), *range(200, len(whole), 37)]:
        (tmp_path / "part.vital").write_bytes(gzip.compress(whole[:size]))
        try:
            assert len(read_vital(tmp_path / "part.vital").seconds) < len(seconds)
        except InputError as error:
            assert "part.vital" in str(error)


def test_descriptions_know_the_kinds_of_surgery_of_the_theatre():
    from clinfuse.ward.operating_theatre import SURGERY_EFFECTS

    assert set(SURGERY_EFFECTS) == set(SURGERIES)
    assert all("unknown" not in clinical_description(50, "F", kind) for kind in SURGERY_EFFECTS)


@pytest.mark.skipif(not (SHARED / "physionet-2009").exists(), reason="no PhysioNet 2009 here")
def test_the_challenge_of_2009_is_prepared_by_the_ordinary_command(tmp_path):
    words = [
        sys.executable,
        "-m",
        "clinfuse.use.command_line",
        "prepare",
        SHARED / "physionet-2009",
    ]
    words += [tmp_path / "out", "--task", "hypotension", "--quiet"]
    done = subprocess.run(words, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["labels"] == ["hypotension_60_min"]
    assert manifest["windows"]["rule"]["name"] == "acute-episode"
    samples = pd.read_parquet(tmp_path / "out/samples.parquet")
    at_end = samples[samples["seconds"] == 36_000]
    assert len(at_end) == 60
    labels = pd.read_csv(SHARED / "physionet-2009/labels.csv").set_index("record")
    recomputed = labels["ahe_recomputed"].loc[at_end["case_id"]]
    assert (at_end["hypotension_60_min"].to_numpy() == recomputed.to_numpy()).all()


def test_charted_pressures_are_refused_with_their_interval(mimic_demo, tmp_path):
    with pytest.raises(InputError, match="median interval is 60 minutes"):
        prepare_folder(open_source(mimic_demo), tmp_path / "out", "hypotension", quiet=True)


def test_a_recording_of_minutes_is_too_coarse_for_a_grid_of_seconds(tmp_path):
    folder = write_theatre(tmp_path / "coarse", cases=())
    rows = {"case_id": "a", "seconds": 60.0 * np.arange(200), "map_mmhg": 80 + np.arange(200) % 5}
    pd.DataFrame(rows).to_csv(folder / "pressure.csv", index=False)
    (folder / "cases.csv").write_text("case_id\na\n")
    with pytest.raises(InputError, match="a pressure every 60 s in the middle is too coarse"):
        hypotension_task(recognised(folder), SAFE)
    assert len(hypotension_task(recognised(folder), SAFE, 1 / 60).samples) > 100


def test_labels_and_windows_of_an_operation_take_milliseconds(theatre):
    operations = operations_of(open_source(theatre))
    recording = operations.read("1")
    begin = time.process_time()
    cut = cut_recording(recording, operations)
    assert time.process_time() - begin < 0.5
    labels, _ = window_labels(cut.segments[0], window_starts(cut.segments[0])[0], SURGICAL_PLAN)
    assert len(labels) == len(cut.windows[0])
