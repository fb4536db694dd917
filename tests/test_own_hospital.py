"""A hospital's own export: any spelling of one hospital is the same hospital, and bad rows are named."""

import gzip

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinfuse.conventions import PUBLISHED, SAFE, InputError
from clinfuse.data.challenge_2012 import PHYSIONET_CHANNELS, challenge_task
from clinfuse.data.own_hospital import (
    open_own_hospital,
    own_hospital_task,
    own_radiographs,
    own_texts,
)
from clinfuse.data.radiographs import link_radiographs
from clinfuse.data.sources import Source

START = pd.Timestamp("2030-02-03 04:05:06")
CHANNELS = pd.DataFrame(
    [
        ("Pulse", "per minute", "continuous", "80", "10", "350", None),
        ("Temp", "degree Celsius", "continuous", "37", "25", "45", None),
        ("Mind", "", "categorical", "clear", None, None, "clear|drowsy|gone"),
    ],
    columns=["name", "unit", "kind", "normal", "low", "high", "categories"],
)


def made_up(seed, num_stays=4, num_events=30):
    """A small hospital on the clock of hours, with everything that can be wrong and is counted."""
    rng = np.random.default_rng(seed)
    stays = pd.DataFrame(
        {
            "stay_id": [f"s{i}" for i in range(num_stays)],
            "subject_id": rng.integers(1, 4, num_stays),
            "in_hospital_mortality": rng.choice([0, 1, None], num_stays),
            "length_of_stay_days": rng.choice([1.5, 9.0, None], num_stays),
            "prediction_hours": rng.choice([24.0, 48.0, 30.5], num_stays),
            "end_hours": rng.choice([20.0, 90.0], num_stays, p=[0.2, 0.8]),
            "attribute_age": rng.choice([50.0, 71.0, None], num_stays),
        }
    )
    channel = rng.choice([*CHANNELS["name"], "Smell"], num_events, p=[0.3, 0.3, 0.3, 0.1])
    number = np.round(rng.choice([20.0, 36.5, 90.0, 900.0], num_events) + rng.random(num_events), 3)
    category = rng.choice(["clear", "drowsy", "gone"], num_events)
    hours = np.round(rng.uniform(-2, 60, num_events) * 60) / 60
    events = pd.DataFrame(
        {
            "stay_id": rng.choice([*stays["stay_id"], "nobody"], num_events),
            "channel": channel,
            "hours": hours,
            "available_hours": np.where(rng.random(num_events) < 0.5, hours + 1.5, np.nan),
            "value": np.where(channel == "Mind", category, number.astype(str)),
        }
    )
    return stays, events


def write(folder, stays, events, channels=CHANNELS, kind="csv"):
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in (("stays", stays), ("events", events), ("channels", channels)):
        if kind == "parquet":
            table.to_parquet(folder / f"{name}.parquet", index=False)
        elif kind == "csv.gz" and name == "events":
            with gzip.open(folder / "events.csv.gz", "wt") as file:
                table.to_csv(file, index=False)
        else:
            table.to_csv(folder / f"{name}.csv", index=False)
    return open_own_hospital(folder)


def on_the_calendar(stays, events):
    """The same hospital with timestamps in place of hours."""
    stays = stays.assign(start_time=[START + pd.Timedelta(days=9 * i) for i in range(len(stays))])
    start = stays.set_index("stay_id")["start_time"]
    begin = events["stay_id"].map(start).fillna(START)
    for what in ("prediction", "end"):
        hours = pd.to_timedelta(stays.pop(f"{what}_hours"), unit="h")
        stays[f"{what}_time"] = stays["start_time"] + hours
    events = events.assign(
        time=begin + pd.to_timedelta(events["hours"], unit="h"),
        available_time=begin + pd.to_timedelta(events["available_hours"], unit="h"),
    )
    events["time"] = events["time"].dt.round("s")
    events["available_time"] = events["available_time"].dt.round("s")
    return stays, events.drop(columns=["hours", "available_hours"])


def slow_task(stays, events, protocol, step=1.0):
    """One stay, one event at a time, as the page says it."""
    names = list(CHANNELS["name"])
    limits = {"Pulse": (10, 350), "Temp": (25, 45)}
    mind = ["clear", "drowsy", "gone"]
    blocks = []
    asked = stays[~(stays["end_hours"] < stays["prediction_hours"])]
    for stay in asked.itertuples():
        rows = int(stay.prediction_hours / step + 1 - 1e-6)
        block, now = np.zeros((rows, 8), np.float32), {"Pulse": 80, "Temp": 37, "Mind": "clear"}
        last = {}
        for event in events[events["stay_id"] == stay.stay_id].itertuples():
            known = event.hours
            if protocol.waits_for_storage and not np.isnan(event.available_hours):
                known = max(known, event.available_hours)
            if event.channel not in names or event.hours < 0 or known > stay.prediction_hours:
                continue
            if event.channel in limits and protocol.mends_values:
                low, high = limits[event.channel]
                if not low <= float(event.value) <= high:
                    continue
            cell = (int(event.hours / step - 1e-6), event.channel)
            if event.hours >= last.get(cell, (-1, 0))[0]:
                last[cell] = (event.hours, event.value)
        for row in range(rows):
            for place, name in enumerate(names):
                if (row, name) in last:
                    now[name] = last[row, name][1]
                    block[row, 5 + place] = 1
            block[row, :2] = float(now["Pulse"]), float(now["Temp"])
            block[row, 2 + mind.index(now["Mind"])] = 1
        blocks.append(block)
    return asked["stay_id"].tolist(), np.concatenate(blocks) if blocks else np.zeros((0, 8))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from([SAFE, PUBLISHED]), st.sampled_from([0.5, 1, 2]))
def test_the_fast_way_is_the_slow_way(tmp_path_factory, seed, protocol, step):
    stays, events = made_up(seed)
    if (stays["end_hours"] < stays["prediction_hours"]).all():
        stays.loc[0, "end_hours"] = 90.0
    events.loc[0, :] = (
        stays.loc[stays["end_hours"].idxmax(), "stay_id"],
        "Pulse",
        1.0,
        np.nan,
        "81.0",
    )
    names, series = slow_task(stays, events, protocol, step)
    source = write(tmp_path_factory.mktemp("own"), stays, events)
    task = own_hospital_task(source, protocol, float(step))
    assert task.samples["sample_id"].tolist() == names
    assert np.array_equal(task.series, series)
    dropped = task.attrition.attrs["counts"]["rows by rule"]
    assert len(task.events) + sum(sum(of.values()) for of in dropped.values()) == len(events)


@pytest.mark.parametrize("seed", range(3))
def test_every_spelling_of_a_hospital_is_the_same(tmp_path, seed):
    stays, events = made_up(seed, 6, 200)
    stays["end_hours"] = 90.0
    one = own_hospital_task(write(tmp_path / "plain", stays, events), SAFE)
    dated = on_the_calendar(stays, events)
    typed = events.assign(stay_id=events["stay_id"].astype("string"))
    for name, tables, kind in (
        ("zipped", (stays, events), "csv.gz"),
        ("parquet", (stays, typed), "parquet"),
        ("dated", dated, "csv"),
        ("dated parquet", dated, "parquet"),
    ):
        other = own_hospital_task(write(tmp_path / name, *tables, kind=kind), SAFE)
        assert np.array_equal(one.series, other.series), name
        labels = ["sample_id", "subject_id", "in_hospital_mortality", "age"]
        pd.testing.assert_frame_equal(one.samples[labels], other.samples[labels])
        pd.testing.assert_frame_equal(one.events, other.events, rtol=1e-12)
        assert (
            one.attrition.attrs["counts"]["rows by rule"]
            == (other.attrition.attrs["counts"]["rows by rule"])
        )
    hours = other.samples["prediction_time"] - other.samples["intime"]
    assert (hours == pd.to_timedelta(stays["prediction_hours"], unit="h")).all()


def test_the_future_cannot_change_the_past(tmp_path):
    stays, events = made_up(5, 3, 80)
    stays = stays.assign(prediction_hours=24.0, end_hours=90.0)
    is_late = (events["hours"] > 24) | (events["available_hours"] > 24)
    one = own_hospital_task(write(tmp_path / "one", stays, events), SAFE)
    other = own_hospital_task(write(tmp_path / "other", stays, events[~is_late]), SAFE)
    assert np.array_equal(one.series, other.series)
    pd.testing.assert_frame_equal(one.events, other.events)


def broken(tmp_path, **changes):
    stays, events = made_up(1)
    tables = {"stays": stays, "events": events, "channels": CHANNELS}
    for place, value in changes.items():
        table, row, column = place.split("__")
        tables[table] = tables[table].astype(object)
        tables[table].loc[int(row), column] = value
    return write(tmp_path, *tables.values())


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("stays__2__stay_id", "s0", r"stays\.csv, row 4, column stay_id: 's0'"),
        ("stays__2__subject_id", None, r"row 4, column subject_id: empty"),
        ("stays__1__in_hospital_mortality", 7, r"row 3, column in_hospital_mortality: '7'"),
        ("stays__1__length_of_stay_days", "long", r"column length_of_stay_days: 'long'"),
        ("stays__1__attribute_age", "old", r"row 3, column attribute_age: 'old'"),
        ("stays__1__prediction_hours", -3, r"row 3, column prediction_hours: '-3.0'"),
        ("channels__0__normal", None, r"channels\.csv, row 2, column normal: empty"),
        ("channels__1__name", "Pulse", r"row 3, column name: 'Pulse'"),
        ("channels__1__low", "cold", r"row 3, column low: 'cold'"),
        ("channels__2__categories", "clear", r"row 4, column categories: 'clear'"),
        ("channels__2__kind", "ordinal", r"allowed: continuous, categorical"),
    ],
)
def test_bad_values_are_named(tmp_path, place, value, message):
    with pytest.raises(InputError, match=message) as caught:
        own_hospital_task(broken(tmp_path, **{place: value}), SAFE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "parquet"])
@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("value", "high", "column value: 'high'; needed: a number"),
        ("value", "nan", "column value: 'nan'"),
        ("hours", "noon", "column hours: 'noon'"),
        ("available_hours", "later", "column available_hours: 'later'"),
    ],
)
def test_bad_events_are_named(tmp_path, kind, column, value, message):
    stays, events = made_up(1)
    events = events.astype(object)
    events.loc[7, ["stay_id", "channel", "hours"]] = "s1", "Pulse", "3"
    events.loc[7, column] = value
    stays["end_hours"] = 90.0
    if kind == "parquet":
        events = events.astype("string")
    row = 8 if kind == "parquet" else 9
    with pytest.raises(InputError, match=f"events.{kind}, row {row}, {message}"):
        own_hospital_task(write(tmp_path, stays, events, kind=kind), SAFE)


def test_missing_columns_and_outcomes(tmp_path):
    stays, events = made_up(1)
    stays["end_hours"] = 90.0
    source = write(tmp_path / "a", stays.drop(columns="length_of_stay_days"), events)
    with pytest.raises(InputError, match=r"stays\.csv: column length_of_stay_days is missing"):
        own_hospital_task(source, SAFE, task="mortality-and-stay")
    bare = stays.drop(columns=["length_of_stay_days", "in_hospital_mortality"])
    task = own_hospital_task(write(tmp_path / "b", bare, events), SAFE)
    assert task.samples["in_hospital_mortality"].isna().all()
    with pytest.raises(InputError, match=r"events\.csv: a column hours or time is missing"):
        own_hospital_task(write(tmp_path / "c", stays, events.drop(columns="hours")), SAFE)
    with pytest.raises(InputError, match="column time needs start_time"):
        timed = events.rename(columns={"hours": "time"}).assign(time="2030-01-01")
        own_hospital_task(write(tmp_path / "d", stays, timed), SAFE)
    strangers = events.assign(stay_id="x" + events["stay_id"])
    with pytest.raises(InputError, match="no row is left; 30 of a stay that is not in the list"):
        own_hospital_task(write(tmp_path / "e", stays, strangers), SAFE)


def test_a_misspelt_outcome_is_no_input(tmp_path):
    stays, events = made_up(2)
    stays = stays.assign(end_hours=90.0, died=1, in_hospital_mortalty=0)
    task = own_hospital_task(write(tmp_path, stays, events), SAFE)
    assert task.attributes == ["age"] and not {"died", "in_hospital_mortalty"} & set(task.samples)
    not_read = task.attrition.attrs["counts"]["columns not read"]
    assert not_read == ["died", "in_hospital_mortalty"]


def test_texts_and_radiographs_wait_for_the_question(tmp_path):
    stays, events = on_the_calendar(*made_up(3))
    stays["end_time"] = stays["start_time"] + pd.Timedelta(days=8)
    source = write(tmp_path, stays, events)
    asked = stays["prediction_time"][1]
    texts = pd.DataFrame(
        {
            "stay_id": ["s1", "s1", "s1", "nobody"],
            "kind": "nursing",
            "time": [asked - pd.Timedelta("2h"), asked - pd.Timedelta("3h")]
            + [asked + pd.Timedelta("1s")] * 2,
            "text": ["second", "first", "future", "stranger"],
        }
    )
    texts.to_csv(tmp_path / "texts.csv", index=False)
    (tmp_path / "a.jpg").write_bytes(b"x")
    film = pd.DataFrame({"stay_id": ["s1"], "time": [asked], "path": ["a.jpg"], "view": ["AP"]})
    film.to_csv(tmp_path / "radiographs.csv", index=False)
    source = open_own_hospital(tmp_path)
    samples = own_hospital_task(source, SAFE).samples
    found = own_texts(source, samples, SAFE).set_index("sample_id")
    assert found.loc["s1", "text_nursing"] == "first\n\nsecond"
    assert found.loc["s1", "text_nursing_time"] == asked - pd.Timedelta("2h")
    assert found["text_nursing"].notna().sum() == 1
    assert (
        "future" in own_texts(source, samples, PUBLISHED).set_index("sample_id").loc["s1"].iloc[0]
    )
    images = own_radiographs(source, samples)
    assert images["study_time"].tolist() == [asked] and images["view"].tolist() == ["AP"]
    links = link_radiographs(samples, images, SAFE)
    assert links["sample_id"].tolist() == ["s1"] and links["study_time"].tolist() == [asked]
    with pytest.raises(InputError, match="in whole numbers"):
        own_radiographs(source, samples.astype({"subject_id": "string"}))
    samples = samples.drop(columns="intime")
    with pytest.raises(InputError, match="start_time"):
        own_radiographs(source, samples)


def test_a_hospital_is_as_good_as_the_challenge(tmp_path):
    rng = np.random.default_rng(0)
    names = [channel.name for channel in PHYSIONET_CHANNELS]
    (tmp_path / "set-a").mkdir()
    events = []
    for record in range(200, 230):
        minutes = np.sort(rng.integers(0, 50 * 60, 60))
        rows = [
            (m, n, round(v, 2))
            for m, n, v in zip(minutes, rng.choice(names, 60), rng.random(60) * 150)
        ]
        text = "".join(f"{m // 60:02d}:{m % 60:02d},{n},{v}\n" for m, n, v in rows)
        head = f"Time,Parameter,Value\n00:00,RecordID,{record}\n00:00,ICUType,1\n"
        (tmp_path / "set-a" / f"{record}.txt").write_text(head + text)
        events += [(record, m / 60, n, v) for m, n, v in rows]
    challenge = Source("physionet-2012", "set-a", tmp_path, {"set-a": tmp_path / "set-a"})
    events = pd.DataFrame(events, columns=["stay_id", "hours", "channel", "value"])
    stays = pd.DataFrame({"stay_id": range(200, 230), "subject_id": range(200, 230)})
    channels = pd.DataFrame(
        [(c.name, c.unit, c.kind, c.normal, c.limits[0], c.limits[-1]) for c in PHYSIONET_CHANNELS],
        columns=["name", "unit", "kind", "normal", "low", "high"],
    )
    own = write(tmp_path / "own", stays, events, channels)
    for task in ("in-hospital-mortality",):
        one, other = (
            challenge_task(challenge, SAFE, 2.0, task),
            own_hospital_task(own, SAFE, 2.0, task),
        )
        assert np.array_equal(one.series, other.series)
        assert one.columns == other.columns and one.continuous == other.continuous
        assert one.events["value"].tolist() == other.events["value"].tolist()


@pytest.mark.parametrize("damage", ["cut", "ragged", "twice", "empty", "latin"])
def test_damaged_files_are_named_in_one_line(tmp_path, damage):
    stays, events = made_up(1, 4, 3000)
    stays["end_hours"] = 90.0
    source = write(tmp_path, stays, events, kind="csv.gz")
    file = source.files["events"]
    text = gzip.decompress(file.read_bytes())
    content = {
        "cut": file.read_bytes()[:-4000],
        "ragged": gzip.compress(text + b"s1,Pulse\n"),
        "twice": gzip.compress(text.replace(b"available_hours", b"hours", 1)),
        "empty": b"",
        "latin": gzip.compress(text + b"s1,Pulse,3,,\xff\xfe\n"),
    }[damage]
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"events\.csv\.gz") as caught:
        own_hospital_task(open_own_hospital(tmp_path), SAFE)
    assert "\n" not in str(caught.value)
