"""The leak audit: every planted leak is found, and nothing else."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinfuse.conventions import PUBLISHED, SAFE
from clinfuse.data.dataset import PreparedData
from clinfuse.data.leak_audit import LISTED, RETROSPECTIVE, audit_leaks, folder_channels
from clinfuse.data.preparation import prepare_folder
from clinfuse.data.sources import open_source
from clinfuse.ward.synthetic_ward import write_ward

HOUR = pd.Timedelta(hours=1)


@pytest.fixture(scope="module")
def wards(tmp_path_factory):
    """Two wards, prepared under both protocols; the times of images and texts all known."""
    place = tmp_path_factory.mktemp("wards")
    for seed, version in ((1, "2.2"), (2, "3.1")):
        write_ward(place / f"ward{seed}", num_stays=60, seed=seed, version=version, quiet=True)
        for protocol in (SAFE, PUBLISHED):
            prepare_folder(
                open_source(place / f"ward{seed}"),
                place / f"{protocol.name}{seed}",
                protocol=protocol,
                quiet=True,
            )
    return place


def time_columns(samples):
    texts = [name for name in samples if name.startswith("text_") and not name.endswith("_time")]
    return {"radiograph": samples["radiograph"] >= 0} | {
        name: samples[name].notna() for name in texts
    }


def with_known_times(samples):
    """Every image and text an hour before the question."""
    for name, is_there in time_columns(samples).items():
        before = samples["prediction_time"].dt.as_unit("us") - HOUR
        samples[f"{name}_time"] = before.where(is_there)
    return samples


def column_kinds(data):
    """Columns of one channel that stand for the same number count as one."""
    kinds = {}
    for channel in folder_channels(data.manifest):
        for category, score in zip(channel.categories, channel.scores):
            kinds[f"{channel.name}->{category}"] = f"{channel.name}={score}"
    return [kinds.get(name, name) for name in data.channels]


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 2),
    st.integers(0, 2**32 - 1),
    st.integers(0, 5),
    st.integers(0, 4),
    st.integers(0, 4),
    st.integers(0, 4),
)
def test_every_planted_leak_is_found_and_nothing_else(
    wards, tmp_path_factory, ward, seed, num_events, num_films, num_texts, num_cells
):
    rng = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("planted") / "folder"
    shutil.copytree(wards / f"safe{ward}", folder)
    samples = with_known_times(pd.read_parquet(folder / "samples.parquet"))
    planted = set()

    events = pd.read_parquet(folder / "events.parquet")
    for row in rng.choice(len(events), num_events, replace=False):
        events.loc[row, "available_hours"] = 48 + rng.choice([1e-3, 0.5, 3.0, 500.0])
        planted.add(("series", str(events.loc[row, "sample_id"])))
    events.to_parquet(folder / "events.parquet", index=False)

    there = time_columns(samples)
    numbers = dict.fromkeys(there, num_texts) | {"radiograph": num_films}
    for name, is_there in there.items():
        rows = np.flatnonzero(is_there)
        for row in rng.choice(rows, min(numbers[name], len(rows)), replace=False):
            late = samples.loc[row, "prediction_time"] + rng.choice([1e-3, 0.5, 90.0]) * HOUR
            samples.loc[row, f"{name}_time"] = late
            planted.add((name, str(samples.loc[row, "sample_id"])))
    samples.to_parquet(folder / "samples.parquet", index=False)

    data = PreparedData(folder)
    series = np.load(folder / "series.npy", mmap_mode="r+")
    kinds, cells = column_kinds(data), set()
    for cell in rng.choice(series.size, num_cells, replace=False):
        row, column = np.unravel_index(cell, series.shape)
        change = rng.choice(["nudge", "flip", "lose"])
        value = series[row, column]
        series[row, column] = {
            "nudge": np.nextafter(value, np.float32(np.inf)),
            "flip": 1 - value,
            "lose": np.nan,
        }[change]
        cells.add((str(samples["sample_id"][row // 48]), kinds[column], row % 48))
    series.flush()

    audit = audit_leaks(data)
    assert set(zip(audit.late["modality"], audit.late["sample_id"])) == planted
    assert audit.table.at["series", "late"] == num_events
    assert audit.table["late"].sum() == len(audit.late)
    assert (audit.late["minutes_after"] > 0).all()
    places = [kinds[data.channels.index(name)] for name in audit.altered["column"]]
    assert set(zip(audit.altered["sample_id"], places, audit.altered["step"])) == cells
    assert audit.num_altered == len(cells)
    assert audit.ok == (not planted and not cells) == ("FAILED" not in str(audit))


@pytest.mark.parametrize("ward", [1, 2])
def test_the_planted_leaks_of_a_ward(wards, ward):
    safe, published = (
        audit_leaks(PreparedData(wards / f"{name}{ward}")) for name in ("safe", "published")
    )
    assert safe.ok and "no item from the future" in str(safe)
    assert not published.ok and not published.num_altered
    samples = PreparedData(wards / f"published{ward}").samples
    labs = pd.read_csv(
        wards / f"ward{ward}/mimic-iv/hosp/labevents.csv.gz",
        parse_dates=["charttime", "storetime"],
    )
    labs = labs[labs["itemid"] == 50931].merge(samples, on="hadm_id")
    drawn = labs["charttime"].between(labs["intime"], labs["prediction_time"])
    late = labs[drawn & (labs["storetime"] > labs["prediction_time"])]
    found = published.late[published.late["item"] == "Glucose"]
    assert len(late) and set(late["sample_id"]) <= set(found["sample_id"])


@pytest.mark.parametrize("ward", [1, 2])
def test_films_and_titles_of_the_future(wards, ward):
    safe = audit_leaks(PreparedData(wards / f"safe{ward}"))
    data = PreparedData(wards / f"published{ward}")
    published = audit_leaks(data)
    if not {"radiograph_time", "text_titles_time"} <= set(data.samples):
        pytest.skip("the folder was prepared without the times of images and texts")
    assert safe.proven
    titled = data.samples["text_titles"].notna()
    assert published.table.at["text_titles", "late"] == titled.sum() > 0
    films = published.late[published.late["modality"] == "radiograph"]
    with_image = data.samples[data.samples["radiograph"] >= 0].set_index("sample_id")
    late = with_image["radiograph_time"] > with_image["prediction_time"]
    assert set(films["sample_id"]) == set(with_image.index[late]) and late.any()


@pytest.mark.parametrize(
    "task", ["phenotyping", "decompensation", "length-of-stay", "mortality-and-stay"]
)
def test_every_task_of_a_ward(wards, tmp_path, task):
    for protocol in (SAFE, PUBLISHED):
        out = tmp_path / protocol.name
        source = open_source(wards / "ward1")
        data = prepare_folder(source, out, task=task, protocol=protocol, quiet=True)
        audit = audit_leaks(data)
        assert audit.num_altered == 0 and audit.num_long == 0
        assert audit.ok == (protocol is SAFE)
        assert ("retrospective" in audit.title) == (task == "phenotyping")


def hourly_folder(place, rng, protocol, step):
    """A few long series, made one value at a time, and many samples that look at their beginnings."""
    channels = [
        {"name": "Heart Rate", "kind": "continuous", "unit": "", "normal": 80.0},
        {"name": "Eyes", "kind": "categorical", "unit": "", "normal": "open"}
        | {"categories": ["shut", "closed", "open"], "scores": [1, 1, 4]},
    ]
    columns = ["Heart Rate", "Eyes->shut", "Eyes->closed", "Eyes->open"]
    columns += ["mask->Heart Rate", "mask->Eyes"]
    blocks, events, samples, start = [], [], [], 0
    for stay in range(3):
        hours = int(rng.integers(5, 12))
        rows = int(hours / step)
        block = np.zeros((rows, 6), np.float32)
        measured = []
        for channel in range(2):
            when = rng.choice(hours * 60, int(rng.integers(0, 9)), replace=False) / 60
            delay = rng.choice([0.0, 0.3, 1.0, 2.5], len(when))
            value = (
                rng.normal(90, 9, len(when)) if channel == 0 else rng.choice([0, 1, 2], len(when))
            )
            measured += [(channel, w, w + d, v) for w, d, v in zip(when, delay, value)]
        for row in range(rows):
            end = (row + 1) * step
            for channel in range(2):
                clock = 2 if protocol.waits_for_storage else 1
                known = [m for m in measured if m[0] == channel and m[clock] <= end + 1e-9]
                latest = max(known, key=lambda m: (m[1], m[2])) if known else None
                entered = [m for m in known if m[clock] > end - step or (row == 0)]
                if protocol.waits_for_storage:
                    entered = [
                        m
                        for m in entered
                        if not any(o[1] > m[1] and o[2] <= m[2] and o != m for o in known)
                    ]
                value = latest[3] if latest else (80.0 if channel == 0 else 2)
                block[row, 4 + channel] = bool(entered)
                if channel == 0:
                    block[row, 0] = value
                else:
                    block[row, 1 + int(value)] = 1
        scores = {0: 1.0, 1: 1.0, 2: 4.0}
        events += [
            (str(stay), w, channels[c]["name"], v if c == 0 else scores[int(v)], a)
            for c, w, a, v in sorted(measured, key=lambda m: (m[1], m[0]))
        ]
        for hour in range(2, hours + 1):
            samples.append((f"{stay}_{hour:03d}", str(stay), float(hour), start, int(hour / step)))
        blocks.append(block)
        start += rows
    names = ["sample_id", "series_id", "prediction_hours", "series_start", "series_length"]
    samples = pd.DataFrame(samples, columns=names)
    samples["intime"] = pd.Timestamp("2150-01-01")
    samples["prediction_time"] = samples["intime"] + samples["prediction_hours"] * HOUR
    samples["radiograph"] = -1
    place.mkdir()
    samples.to_parquet(place / "samples.parquet")
    np.save(place / "series.npy", np.concatenate(blocks))
    manifest = {
        **{"format": 1, "task": "decompensation", "protocol": protocol.name, "labels": []},
        **{"timestep_hours": step, "attributes": [], "columns": columns, "continuous": [0]},
        **{"channels": channels, "source": {"kind": "own", "version": ""}},
    }
    (place / "manifest.json").write_text(json.dumps(manifest))
    names = ["series_id", "hours", "channel", "value", "available_hours"]
    return pd.DataFrame(events, columns=names), samples


def open_hourly(place, events):
    data = PreparedData(place)
    categories = [channel["name"] for channel in data.manifest["channels"]]
    events = events.sort_values(["series_id", "hours"], kind="stable", ignore_index=True)
    data.events_table = events.assign(
        series_id=pd.Categorical(events["series_id"], ["0", "1", "2"]),
        channel=pd.Categorical(events["channel"], categories),
    )
    return data


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from([0.5, 1.0]))
def test_shared_series_of_hourly_tasks(tmp_path_factory, seed, waits, step):
    place, rng = tmp_path_factory.mktemp("hourly") / "x", np.random.default_rng(seed)
    events, samples = hourly_folder(place, rng, SAFE if waits else PUBLISHED, step)
    audit = audit_leaks(open_hourly(place, events))
    assert audit.num_altered == 0 and audit.num_long == 0
    if waits:
        assert audit.ok
    else:
        late = 0
        for event in events.itertuples():
            mine = samples[samples["series_id"] == event.series_id]
            sees = mine[mine["series_length"] * step >= max(event.hours, 1e-9) - 1e-9]
            late += bool(len(sees) and event.available_hours > sees["prediction_hours"].min())
        assert audit.table.at["series", "late"] == late
    series = np.load(place / "series.npy", mmap_mode="r+")
    cell = rng.integers(series.shape[0]), rng.integers(series.shape[1])
    series[cell] += 1
    series.flush()
    found = audit_leaks(open_hourly(place, events)).num_altered
    assert 1 <= found <= 2, "one cell; two where the categories share a score and another is meant"


def test_what_is_unknown_is_not_proven(wards, tmp_path):
    shutil.copytree(wards / "safe1", tmp_path / "x")
    samples = with_known_times(pd.read_parquet(tmp_path / "x/samples.parquet"))
    row = np.flatnonzero(samples["radiograph"] >= 0)[0]
    samples.loc[row, "radiograph_time"] = pd.NaT
    samples.to_parquet(tmp_path / "x/samples.parquet", index=False)
    audit = audit_leaks(PreparedData(tmp_path / "x"))
    assert audit.ok and not audit.proven and audit.table.at["radiograph", "unknown"] == 1
    assert "radiograph not proven: the time of 1 items is unknown" in str(audit)
    events = pd.read_parquet(tmp_path / "x/events.parquet").drop(columns="available_hours")
    events.to_parquet(tmp_path / "x/events.parquet", index=False)
    audit = audit_leaks(PreparedData(tmp_path / "x"))
    assert audit.table.at["series", "unknown"] == len(events) and audit.num_altered == 0


def change_manifest(folder, **facts):
    manifest = json.loads((folder / "manifest.json").read_text()) | facts
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_folder_that_does_not_say_what_it_assumes(wards, tmp_path):
    shutil.copytree(wards / "safe1", tmp_path / "x")
    facts = json.loads((tmp_path / "x/manifest.json").read_text())
    bare = [{name: fact[name] for name in ("name", "kind", "unit")} for fact in facts["channels"]]
    source = facts["source"] | {"kind": "made by hand"}
    change_manifest(tmp_path / "x", channels=bare, source=source, task=RETROSPECTIVE[0])
    audit = audit_leaks(PreparedData(tmp_path / "x"))
    assert audit.num_altered is None and audit.ok and not audit.proven
    assert "series not proven" in str(audit) and "retrospective" in str(audit)
    assert "series not proven" in audit._repr_html_()


def test_a_series_that_outlasts_its_question(wards, tmp_path):
    shutil.copytree(wards / "safe1", tmp_path / "x")
    samples = pd.read_parquet(tmp_path / "x/samples.parquet")
    samples.loc[3, "prediction_time"] -= 2 * HOUR
    samples.to_parquet(tmp_path / "x/samples.parquet", index=False)
    audit = audit_leaks(PreparedData(tmp_path / "x"))
    assert audit.num_long == 1 and not audit.ok and "1 series go on" in str(audit)


def test_a_flood_of_findings_is_counted_and_cut(wards, tmp_path):
    shutil.copytree(wards / "safe1", tmp_path / "x")
    events = pd.read_parquet(tmp_path / "x/events.parquet")
    events.assign(available_hours=50.0).to_parquet(tmp_path / "x/events.parquet", index=False)
    series = np.load(tmp_path / "x/series.npy", mmap_mode="r+")
    series[:, 0] += 3
    series.flush()
    audit = audit_leaks(PreparedData(tmp_path / "x"))
    assert audit.table.at["series", "late"] == len(events) > LISTED == len(audit.late)
    assert audit.num_altered == len(series) > LISTED == len(audit.altered)
    assert sum(counts.sum() for counts in audit.histograms.values()) >= len(events)
    import matplotlib.pyplot as plt

    plt.close(audit.figure())
