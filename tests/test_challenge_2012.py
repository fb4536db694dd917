"""The PhysioNet Challenge 2012: random sets, broken files, and set A itself."""

import io
import tarfile

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinfuse.conventions import PUBLISHED, SAFE, InputError
from clinfuse.data.challenge_2012 import (
    DESCRIPTORS,
    PHYSIONET_CHANNELS,
    challenge_task,
    clean_records,
    read_outcomes,
    read_records,
    read_stay_lengths,
    record_attributes,
    record_files,
)
from clinfuse.data.sources import open_source

NAMES = [channel.name for channel in PHYSIONET_CHANNELS]
HEADER = "Time,Parameter,Value\n"


def record_text(record, rows=(), age=60):
    static = f"00:00,RecordID,{record}\n00:00,Age,{age}\n00:00,Gender,1\n00:00,Height,-1\n00:00,ICUType,2\n00:00,Weight,-1\n"
    return HEADER + static + "".join(f"{row}\n" for row in rows)


def write_set(folder, texts, letter="a", died=None, days=5):
    place = folder / f"set-{letter}"
    place.mkdir(parents=True)
    for record, text in texts.items():
        (place / f"{record}.txt").write_bytes(text.encode())
    if died is not None:
        rows = "".join(f"{record},5,{days},{label}\n" for record, label in died.items())
        header = "RecordID,SOFA,Length_of_stay,In-hospital_death\n"
        (folder / f"Outcomes-{letter}.txt").write_text(header + rows)
    return folder


def pack(folder, name="set-a", mode="w:gz"):
    with tarfile.open(folder / f"{name}.tar.gz", mode) as archive:
        archive.add(folder / name, arcname=name)
    for file in (folder / name).iterdir():
        file.unlink()
    (folder / name).rmdir()
    return folder


measurement = st.tuples(
    st.integers(0, 48 * 60),
    st.sampled_from(NAMES),
    st.floats(-5, 400, width=32).map(lambda x: round(x, 2)),
)


@settings(deadline=None, max_examples=40)
@given(st.lists(measurement, max_size=40), st.sampled_from([0.5, 1.0, 2.0, 5.0]))
def test_no_measurement_is_lost_and_none_is_invented(tmp_path_factory, rows, step):
    folder = tmp_path_factory.mktemp("set")
    lines = [f"{m // 60:02d}:{m % 60:02d},{name},{value}" for m, name, value in rows]
    write_set(folder, {"7": record_text(7, lines), "8": record_text(8)})
    task = challenge_task(open_source(folder), PUBLISHED, step)
    assert len(task.events) == len(rows)
    assert sorted(task.events["value"]) == pytest.approx(sorted(value for _, _, value in rows))
    per_sample = task.samples["series_length"].to_numpy()
    assert set(per_sample) == {int(48 / step + 1 - 1e-6)} and len(task.series) == per_sample.sum()
    cells = {(name, max(0, int(m / 60 / step - 1e-6))) for m, name, _ in rows}
    masks = task.series[: per_sample[0], 37:]
    assert {(NAMES[c], t) for t, c in zip(*np.nonzero(masks))} == cells
    normal = np.array([channel.normal for channel in PHYSIONET_CHANNELS], dtype=np.float32)
    assert (task.series[per_sample[0] :, :37] == normal).all()


@settings(deadline=None, max_examples=30)
@given(st.lists(measurement, max_size=30))
def test_a_safe_grid_stays_inside_the_limits(tmp_path_factory, rows):
    lines = [f"{m // 60:02d}:{m % 60:02d},{name},{value}" for m, name, value in rows]
    folder = write_set(tmp_path_factory.mktemp("set"), {"7": record_text(7, lines)})
    task = challenge_task(open_source(folder), SAFE)
    counts = task.attrition.attrs["counts"]["rows by rule"]
    assert len(task.events) + sum(counts.get("impossible value", {}).values()) == len(rows)
    for column, channel in enumerate(PHYSIONET_CHANNELS):
        low, high = np.float32(channel.limits[0]), np.float32(channel.limits[-1])
        assert low <= task.series[:, column].min() and task.series[:, column].max() <= high


def test_the_future_cannot_change_the_past(tmp_path):
    early = [f"{hour:02d}:10,HR,{60 + hour}" for hour in range(24)]
    write_set(tmp_path / "one", {"7": record_text(7, early)})
    write_set(
        tmp_path / "two",
        {"7": record_text(7, [*early, "24:01,HR,200", "30:00,Na,120", "48:01,K,4"])},
    )
    one, two = (challenge_task(open_source(tmp_path / name), SAFE) for name in ("one", "two"))
    assert np.array_equal(one.series[:24], two.series[:24])
    assert not np.array_equal(one.series[24:], two.series[24:])
    assert "K" not in set(two.events["channel"])


def test_archive_folder_and_line_endings_agree(tmp_path):
    texts = {str(i): record_text(i, [f"01:00,HR,{i}"]) for i in (50, 41, 62)}
    plain = write_set(tmp_path / "plain", texts)
    windows = write_set(
        tmp_path / "windows", {k: t.replace("\n", "\r\n") for k, t in texts.items()}
    )
    unfinished = write_set(tmp_path / "unfinished", {k: t.rstrip("\n") for k, t in texts.items()})
    packed = pack(write_set(tmp_path / "packed", texts))
    expected = challenge_task(open_source(plain), SAFE)
    for folder in (windows, unfinished, packed):
        task = challenge_task(open_source(folder), SAFE)
        assert np.array_equal(task.series, expected.series)
        pd.testing.assert_frame_equal(task.samples, expected.samples)
        pd.testing.assert_frame_equal(task.events, expected.events)
    assert expected.samples["sample_id"].tolist() == ["41", "50", "62"]


def test_several_sets_are_put_together(tmp_path):
    write_set(tmp_path, {"20": record_text(20, ["01:00,HR,70"])}, "b", died={20: 1})
    write_set(tmp_path, {"30": record_text(30, ["01:00,Na,141"])}, "c")
    write_set(tmp_path, {"10": record_text(10, ["01:00,HR,80", "02:00,K,4"])}, "a", died={10: 0})
    task = challenge_task(open_source(tmp_path), SAFE)
    assert task.samples["sample_id"].tolist() == ["10", "20", "30"]
    assert task.samples["in_hospital_mortality"].tolist() == [0, 1, pd.NA]
    assert task.events["channel"].tolist() == ["HR", "K", "HR", "Na"]
    write_set(tmp_path / "twice", {"10": record_text(10)}, "a")
    write_set(tmp_path / "twice", {"10": record_text(10)}, "b")
    with pytest.raises(InputError, match="a record is in two of set-a, set-b"):
        challenge_task(open_source(tmp_path / "twice"), SAFE)


def test_stray_files_of_a_desktop_are_not_records(tmp_path):
    folder = write_set(tmp_path, {"7": record_text(7), "._7": "x", "notes": "y"})
    assert list(record_files(folder / "set-a")) == ["7"]


def test_rows_without_a_name_are_counted_as_unknown(tmp_path):
    folder = write_set(tmp_path, {"7": record_text(7, ["07:00,,-1", "08:00,Mood,3"])})
    _, counts = clean_records(read_records(folder / "set-a"), SAFE)
    unknown = counts[counts["rule"] == "unknown variable"]
    assert dict(zip(unknown["variable"], unknown["rows"])) == {"": 1, "Mood": 1}


@pytest.mark.parametrize("value", [0, 1, 1.8, 366])
def test_impossible_descriptors_are_missing(tmp_path, value):
    text = record_text(7).replace("Height,-1", f"Height,{value}").replace("Gender,1", "Gender,2")
    folder = write_set(tmp_path, {"7": text.replace("ICUType,2", "ICUType,5")})
    records = read_records(folder / "set-a")
    mended = record_attributes(clean_records(records, SAFE)[0]).loc["7"]
    assert (
        mended[["is_female", "height_cm", "icu_medical"]].isna().all() and mended["age_years"] == 60
    )
    kept = record_attributes(clean_records(records, PUBLISHED)[0]).loc["7"]
    assert kept["height_cm"] == value


@pytest.mark.parametrize(
    "row",
    [
        "1,HR,80",
        "01:00,HR",
        "01:00,HR,8o",
        "01:60,HR,80",
        "01:00;HR;80",
        "",
        "01:00,HR,80,",
        "01:00,HR,inf",
        "-1:00,HR,80",
    ],
)
def test_malformed_rows_are_named(tmp_path, row):
    folder = write_set(
        tmp_path, {"6": record_text(6), "7": record_text(7, ["01:00,HR,80", row, "02:00,HR,80"])}
    )
    with pytest.raises(InputError, match=r"7\.txt, row 9: ") as caught:
        read_records(folder / "set-a")
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_named(tmp_path):
    folder = write_set(tmp_path, {"7": record_text(7)})
    with open(folder / "set-a" / "7.txt", "ab") as file:
        file.write(b"01:00,H\xff\xfe,80\n")
    with pytest.raises(InputError, match=r"7\.txt, row 8"):
        read_records(folder / "set-a")


def test_damaged_archives_are_named(tmp_path):
    folder = pack(
        write_set(tmp_path, {str(i): record_text(i, ["01:00,HR,80"] * 50) for i in range(50)})
    )
    archive = folder / "set-a.tar.gz"
    whole = archive.read_bytes()
    for name, content in {
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"not an archive",
    }.items():
        archive.write_bytes(content)
        with pytest.raises(InputError, match=r"set-a\.tar\.gz") as caught:
            challenge_task(open_source(folder), SAFE)
        assert "\n" not in str(caught.value), name


def test_a_record_twice_in_an_archive(tmp_path):
    with tarfile.open(tmp_path / "set-a.tar.gz", "w:gz") as archive:
        for folder in ("set-a", "copy"):
            text = record_text(7).encode()
            entry = tarfile.TarInfo(f"{folder}/7.txt")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))
    with pytest.raises(InputError, match="record 7 is there twice"):
        record_files(tmp_path / "set-a.tar.gz")


def test_a_set_without_records(tmp_path):
    (tmp_path / "set-a").mkdir()
    with pytest.raises(InputError, match="holds no record"):
        read_records(tmp_path / "set-a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a readable CSV"),
        ("In-hospital_death\n1\n", "column 'RecordID' is missing"),
        ("RecordID,In-hospital_death\n7,yes\n", "row 2: In-hospital_death is 'yes', allowed: 0, 1"),
        ("RecordID,In-hospital_death\n7,1\n7,1\n", "row 3: RecordID 7"),
    ],
)
def test_doubtful_outcomes_are_refused(tmp_path, text, message):
    path = tmp_path / "Outcomes-a.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_outcomes(path)


def test_everything_bad_at_once_is_counted(tmp_path):
    """Only static values, a variable nobody has, impossible values, one minute twice, no outcomes."""
    bad = ["01:00,HR,900", "01:00,Temp,0", "02:00,Na,140", "02:00,Na,141", "03:00,Mood,3"]
    folder = write_set(tmp_path, {"7": record_text(7), "8": record_text(8, bad)})
    task = challenge_task(open_source(folder), SAFE)
    counts = task.attrition.attrs["counts"]
    assert counts["records without a measurement"] == 1
    assert counts["rows by rule"]["impossible value"] == {"HR": 1, "Temp": 1}
    assert counts["rows by rule"]["unknown variable"] == {"Mood": 1}
    assert counts["rows by rule"]["measured twice in a minute"] == {"Na": 1}
    assert set(NAMES) - set(counts["channels never measured"]) == {"Na"}
    assert task.samples["in_hospital_mortality"].isna().all() and len(task.samples) == 2
    assert task.series[48 + 1, NAMES.index("Na")] == 141 and np.isfinite(task.series).all()


def test_mortality_and_stay_asks_a_day_earlier(tmp_path):
    rows = ["10:00,HR,80", "24:00,HR,90", "24:01,HR,100", "40:00,Na,150"]
    write_set(tmp_path, {"7": record_text(7, rows)}, "a", died={7: 1}, days=3)
    write_set(tmp_path, {"8": record_text(8, rows)}, "b", died={8: 0}, days=-1)
    write_set(tmp_path, {"9": record_text(9, rows)}, "c")
    day = challenge_task(open_source(tmp_path), SAFE, task="mortality-and-stay")
    two = challenge_task(open_source(tmp_path), SAFE)
    assert day.labels == ["in_hospital_mortality", "length_of_stay_days"]
    assert day.label_kinds == {"in_hospital_mortality": "binary", "length_of_stay_days": "days"}
    assert day.samples["length_of_stay_days"].fillna(-9).tolist() == [3, -9, -9]
    assert day.samples["in_hospital_mortality"].fillna(-9).tolist() == [1, 0, -9]
    assert day.events["hours"].max() == 24
    assert np.array_equal(day.series[:24], two.series[:24])
    assert sum(day.attrition.attrs["counts"]["rows by rule"]["after hour 24"].values()) == 6
    with pytest.raises(InputError, match="it serves: in-hospital-mortality, mortality-and-stay"):
        challenge_task(open_source(tmp_path), SAFE, task="decompensation")
    (tmp_path / "Outcomes-a.txt").write_text("RecordID,In-hospital_death\n7,1\n")
    with pytest.raises(InputError, match="column 'Length_of_stay' is missing"):
        read_stay_lengths(tmp_path / "Outcomes-a.txt")


def test_descriptors_are_no_channels():
    assert set(NAMES) & set(DESCRIPTORS) == {"Weight"}
    assert sorted(NAMES, key=str.lower) == NAMES and len(set(NAMES)) == 37


def test_set_a_against_a_plain_reader(challenge_2012):
    """Every row of a hundred real records, read one file at a time with pandas."""
    records = read_records(challenge_2012 / "set-a.tar.gz")
    kept, counts = clean_records(records, SAFE)
    assert (len(records), records["record"].cat.categories.size) == (1_757_980, 4_000)
    assert set(counts["rule"]) == {
        "marked missing",
        "impossible value",
        "measured twice in a minute",
    }
    assert counts.set_index(["rule", "variable"]).loc[("impossible value", "pH"), "rows"] == 11
    by_record = records.groupby("record", observed=True)
    for record, file in list(record_files(challenge_2012 / "set-a.tar.gz").items())[::40]:
        plain = pd.read_csv(io.BytesIO(file))
        mine = by_record.get_group(record)
        assert mine["variable"].tolist() == plain["Parameter"].tolist()
        assert mine["value"].tolist() == plain["Value"].tolist()
        clock = plain["Time"].str.split(":", expand=True).astype(int)
        assert mine["hours"].tolist() == ((clock[0] * 60 + clock[1]) / 60).tolist()
    attributes = record_attributes(kept)
    assert attributes["is_female"].isna().sum() == 3
    assert attributes["height_cm"].min() >= 100 and attributes["height_cm"].max() <= 250
