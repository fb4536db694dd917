"""Windows: the future cannot change the past, patients do not meet, and the fast way is the slow way."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_hospital import at, chart, hospital, laboratory, write_tables

from clinfuse.conventions import PROTOCOLS, PUBLISHED, SAFE
from clinfuse.data.channels import MIMIC_CHANNELS, column_names
from clinfuse.data.sources import open_source
from clinfuse.data.tasks import mortality_task
from clinfuse.data.windows import (
    Events,
    count_bins,
    last_in_bin,
    merge_simultaneous,
    series_from_cells,
    with_glasgow_totals,
)

every_protocol = pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda p: p.name)
SIZES = np.array([len(channel.categories) for channel in MIMIC_CHANNELS])
NORMAL = [c.categories.index(c.normal) if c.categories else c.normal for c in MIMIC_CHANNELS]


@st.composite
def charts(draw):
    """Random events of a few samples, with windows of different lengths and a time step."""
    step = draw(st.sampled_from([0.25, 1.0, 2.0, 5.0]))
    end = np.array(draw(st.lists(st.sampled_from([6.0, 7.5, 24.0, 47.9]), min_size=1, max_size=4)))
    number = draw(st.integers(0, 80))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sample = generator.integers(0, len(end), number)
    seconds = generator.choice(int(end.min() * 3600), number, replace=False)
    on_the_hour = generator.random(number) < 0.3
    seconds = np.where(on_the_hour, seconds // 3600 * 3600, seconds)
    channel = generator.integers(0, len(SIZES), number)
    keys = np.stack([sample, seconds, channel])
    _, first = np.unique(keys, axis=1, return_index=True)
    sample, seconds, channel = keys[:, first]
    value = generator.normal(80, 30, len(sample))
    value = np.where(
        SIZES[channel] > 0,
        generator.integers(0, 10**6, len(sample)) % np.maximum(SIZES[channel], 1),
        value,
    )
    order = generator.permutation(len(sample))
    arrays = [array[order] for array in (sample, seconds / 60 / 60, channel, value)]
    return arrays, count_bins(end, step), step


def fast(arrays, num_bins, step):
    return series_from_cells(last_in_bin(*arrays, step), num_bins, MIMIC_CHANNELS)


def slow(arrays, num_bins, step):
    """One sample, one bin, one channel at a time, as the recipe says it."""
    sample, hours, channel, value = arrays
    blocks = []
    for patient, bins in enumerate(num_bins):
        mine = sorted((hours[i], channel[i], value[i]) for i in np.flatnonzero(sample == patient))
        block = np.zeros((bins, len(column_names(MIMIC_CHANNELS))))
        for place, kind in enumerate(MIMIC_CHANNELS):
            start = sum(size or 1 for size in SIZES[:place])
            last = NORMAL[place]
            for k in range(bins):
                inside = [v for h, c, v in mine if c == place and int(h / step - 1e-6) == k]
                last = inside[-1] if inside else last
                if kind.categories:
                    block[k, start + int(last)] = 1
                else:
                    block[k, start] = last
                block[k, 59 + place] = bool(inside)
        blocks.append(block)
    return np.concatenate(blocks).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(charts())
def test_fast_is_slow(chart_of):
    assert fast(*chart_of).tobytes() == slow(*chart_of).tobytes()


@settings(max_examples=40, deadline=None)
@given(charts(), st.integers(0, 30))
def test_the_future_cannot_change_the_past(chart_of, border):
    arrays, num_bins, step = chart_of
    past = [array[arrays[1] <= border * step] for array in arrays]
    before, after = fast(arrays, num_bins, step), fast(past, num_bins, step)
    position = np.concatenate([np.arange(n) for n in num_bins])
    assert np.array_equal(before[position < border], after[position < border])


@settings(max_examples=40, deadline=None)
@given(charts(), st.randoms())
def test_patients_do_not_meet(chart_of, random):
    (sample, *rest), num_bins, step = chart_of
    order = list(range(len(num_bins)))
    random.shuffle(order)
    place = np.argsort(order)
    moved = fast([place[sample], *rest], num_bins[order], step)
    blocks = np.split(fast([sample, *rest], num_bins, step), np.cumsum(num_bins)[:-1])
    assert np.array_equal(moved, np.concatenate([blocks[i] for i in order]))


@settings(max_examples=40, deadline=None)
@given(charts())
def test_every_row_has_one_of_each_category(chart_of):
    series, column = fast(*chart_of), 0
    for size in SIZES:
        if size:
            assert (series[:, column : column + size].sum(axis=1) == 1).all()
        column += size or 1


def events_of(rows):
    """Events from (sample, channel, hours, available, value), sorted as the engine sorts them."""
    columns = np.array(sorted(rows), dtype=float).T
    return Events(columns[0].astype(int), columns[1].astype(int), *columns[2:])


def test_simultaneous_categories_keep_the_one_stored_last():
    eye = 3
    merged = merge_simultaneous(
        events_of(
            [
                (0, eye, 1.0, 5.0, 4),
                (0, eye, 1.0, 2.0, 6),
                (0, 8, 1.0, 1.0, 60),
                (0, 8, 1.0, 3.0, 70),
            ]
        )
    )
    assert list(merged.value) == [4.0, 65.0] and list(merged.available_hours) == [5.0, 3.0]


def test_totals_need_three_parts_of_one_sample_at_one_time():
    eye, motor, total, verbal = 3, 4, 5, 6
    rows = [(0, eye, 1.0, 1.0, 6), (0, motor, 1.0, 2.0, 7), (1, verbal, 1.0, 1.0, 4)]
    assert total not in with_glasgow_totals(events_of(rows)).channel
    whole = with_glasgow_totals(events_of([*rows, (0, verbal, 1.0, 1.5, 4)]))
    found = whole.take(whole.channel == total)
    assert list(found.sample) == [0] and list(found.available_hours) == [2.0]
    assert MIMIC_CHANNELS[total].categories[int(found.value[0])] == "15"
    assert np.array_equal(
        np.lexsort((whole.channel, whole.hours, whole.sample)), range(len(whole.sample))
    )
    empty = with_glasgow_totals(merge_simultaneous(events_of(rows).take(np.array([], dtype=int))))
    assert len(empty.sample) == 0


# The same of the whole way from tables to series


def task_of(folder, tables, protocol=SAFE):
    return mortality_task(open_source(write_tables(folder, tables)), protocol)


@every_protocol
def test_a_stay_without_events_is_dropped_and_counted(tmp_path, protocol):
    task = task_of(tmp_path, hospital(), protocol)
    assert list(task.samples["sample_id"]) == ["201", "202"]
    assert list(task.samples["series_start"]) == [0, 48]
    assert list(task.attrition["stays"])[-2:] == [3, 2]


@every_protocol
def test_what_happens_after_hour_48_is_not_seen(tmp_path, protocol):
    tables = hospital()
    before = task_of(tmp_path / "before", tables, protocol)
    tables["icu/chartevents"] += [chart(1, 48.01, 220045, 999), chart(2, 60, 220045, 1)]
    tables["hosp/labevents"] += [laboratory(1, 49, 50931, 777)]
    after = task_of(tmp_path / "after", tables, protocol)
    assert before.series.tobytes() == after.series.tobytes()
    assert before.events.equals(after.events)


def test_what_is_stored_after_hour_48_is_seen_only_as_published(tmp_path):
    glucose = column_names(MIMIC_CHANNELS).index("Glucose")
    for protocol, value in ((SAFE, 128.0), (PUBLISHED, 300.0)):
        task = task_of(tmp_path / protocol.name, hospital(), protocol)
        assert task.series[48 + 47, glucose] == value
        assert (task.events["available_hours"] > 48).sum() == (protocol is PUBLISHED)


@every_protocol
def test_order_of_rows_and_names_of_patients_do_not_matter(tmp_path, protocol):
    tables = hospital()
    one = task_of(tmp_path / "one", tables, protocol)
    other = task_of(
        tmp_path / "other", {name: rows[::-1] for name, rows in tables.items()}, protocol
    )
    assert one.series.tobytes() == other.series.tobytes()
    assert one.events.equals(other.events) and one.samples.equals(other.samples)
    renamed = {}
    for name, rows in tables.items():
        swap = {1: 2, 2: 1}
        renamed[name] = [
            {
                k: (v // 100 * 100 + swap.get(v % 100, v % 100))
                if k in ("subject_id", "hadm_id", "stay_id")
                else v
                for k, v in row.items()
            }
            for row in rows
        ]
    swapped = task_of(tmp_path / "swapped", renamed, protocol)
    assert np.array_equal(swapped.series, np.concatenate([one.series[48:], one.series[:48]]))


def test_safe_takes_laboratory_rows_without_admission(tmp_path):
    tables = hospital()
    tables["hosp/labevents"].append(laboratory(1, 10, 50820, 7.2, hadm_id=""))
    ph = column_names(MIMIC_CHANNELS).index("pH")
    assert task_of(tmp_path / "safe", tables).series[9, ph] == np.float32(7.2)
    assert task_of(tmp_path / "published", tables, PUBLISHED).series[9, ph] == np.float32(7.4)


def test_hour_48_needs_a_living_patient_in_the_unit(tmp_path):
    tables = hospital()
    tables["hosp/admissions"][1]["deathtime"] = at(48)
    assert list(task_of(tmp_path / "dead", tables).samples["sample_id"]) == ["201"]
    tables["hosp/admissions"][1]["deathtime"] = at(48.01)
    assert list(task_of(tmp_path / "alive", tables).samples["sample_id"]) == ["201", "202"]
    tables["icu/icustays"][1]["outtime"] = at(47.99)
    assert list(task_of(tmp_path / "left", tables).samples["sample_id"]) == ["201"]


def test_second_run_gives_the_same_bytes_on_the_demo(mimic_demo):
    one, other = (mortality_task(open_source(mimic_demo), SAFE, 2.0) for _ in range(2))
    assert one.series.tobytes() == other.series.tobytes()
    assert one.events.equals(other.events)
