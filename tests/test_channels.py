"""Channels, items and cleaning, against the benchmark's own files and against arithmetic."""

import csv
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_hospital import chart, hospital, write_tables

from clinfuse.conventions import PUBLISHED, SAFE, convert_unit
from clinfuse.data.channels import (
    BODY_FLUIDS,
    ITEM_UNITS,
    MIMIC_CHANNELS,
    OVERLOOKED_ITEMS,
    QUANTITIES,
    category_table,
    channel_items,
    charted_rows,
    column_names,
    continuous_columns,
    mimic_channels,
    published_values,
    safe_values,
)
from clinfuse.data.sources import connect, open_source

TABLES = Path(__file__).parents[2] / "shared/tables"
needs_tables = pytest.mark.skipif(
    not TABLES.exists(), reason="the tables of facts are not beside the project"
)
POSITION = {channel.name: place for place, channel in enumerate(MIMIC_CHANNELS)}


def rows_of(name):
    with open(TABLES / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@needs_tables
def test_columns_are_those_of_the_benchmark():
    expected = []
    for row in rows_of("columns76.csv"):
        suffix = f"->{row['category_value']}" if row["kind"] == "onehot" else ""
        expected.append(("mask->" if row["kind"] == "mask" else "") + row["channel"] + suffix)
        if row["kind"] != "mask":
            normal = MIMIC_CHANNELS[POSITION[row["channel"]]].normal
            assert normal == row["impute_normal_value"] or float(normal) == float(
                row["impute_normal_value"]
            )
    assert column_names(MIMIC_CHANNELS) == expected
    normalised = [int(r["column"]) for r in rows_of("columns76.csv") if r["is_normalised"] == "1"]
    assert continuous_columns(MIMIC_CHANNELS) == normalised


@needs_tables
def test_items_are_those_of_the_benchmark():
    expected = {int(r["itemid"]): POSITION[r["variable"]] for r in rows_of("itemid_ready.csv")}
    assert channel_items(PUBLISHED) == expected
    current = {int(r["itemid"]) for r in rows_of("itemid_ready_mimic4.csv")}
    overlooked = {item for items in OVERLOOKED_ITEMS.values() for item in items}
    assert set(channel_items(SAFE)) == current - set(BODY_FLUIDS) | overlooked


@needs_tables
def test_limits_are_those_of_the_benchmark():
    names = {"Heart rate": "Heart Rate"}
    files = {
        names.get(row["LEVEL2"], row["LEVEL2"]): row for row in rows_of("raw/variable_ranges.csv")
    }
    columns = ("OUTLIER LOW", "VALID LOW", "VALID HIGH", "OUTLIER HIGH")
    for name, (_, _, limits) in QUANTITIES.items():
        assert limits == tuple(float(files[name][column]) for column in columns), name


@needs_tables
def test_spellings_are_those_of_the_benchmark():
    settings_file = json.loads((TABLES / "raw/discretizer_config.json").read_text())
    for channel in MIMIC_CHANNELS:
        assert list(channel.categories) == settings_file["possible_values"][channel.name]


def test_one_meaning_has_one_column_in_safe():
    for channel in mimic_channels(SAFE):
        if not channel.name.startswith("Glascow") or channel.name.endswith("total"):
            continue
        place = POSITION[channel.name]
        used = {
            row["category"] for row in category_table(SAFE).to_pylist() if row["channel"] == place
        }
        assert all(channel.categories[int(c)][0].isalpha() for c in used)
        scores = [channel.scores[int(c)] for c in used if "ETT" not in channel.categories[int(c)]]
        assert len(scores) == len(set(scores)) == max(channel.scores)
        assert channel.normal in {channel.categories[int(c)] for c in used}


def cleaned(folder, rows, protocol):
    tables = connect(open_source(write_tables(folder, hospital() | {"icu/chartevents": rows})))
    clean = safe_values if protocol is SAFE else published_values
    found = tables.fetch(clean(charted_rows(tables, channel_items(protocol)))).to_pandas()
    found = found[found["itemid"] >= 220_000]
    return found.set_index(["itemid", "value"])["number"]


numbers = st.floats(-1e7, 1e7, allow_nan=False).map(lambda x: round(x, 3)) | st.floats(
    -10, 500
).map(lambda x: round(x, 2))
numeric_items = [
    item
    for item, place in channel_items(SAFE).items()
    if item >= 220_000 and not MIMIC_CHANNELS[place].categories
]
quick = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quick
@given(
    st.lists(
        st.tuples(st.sampled_from(numeric_items), numbers), min_size=1, max_size=60, unique=True
    )
)
def test_safe_values_are_within_the_limits_and_in_the_unit(tmp_path_factory, pairs):
    rows = [chart(1, 1, item, value) for item, value in pairs]
    found = cleaned(tmp_path_factory.mktemp("chart"), rows, SAFE)
    for item, value in pairs:
        channel = MIMIC_CHANNELS[channel_items(SAFE)[item]]
        x = convert_unit(value, ITEM_UNITS[item]) if item in ITEM_UNITS else value
        if channel.name == "Fraction inspired oxygen" and x > 1:
            x /= 100
        if channel.name == "Oxygen saturation" and x <= 1:
            x *= 100
        low, valid_low, valid_high, high = channel.limits
        number = found[item, str(value)]
        if low <= x <= high:
            assert number == pytest.approx(min(max(x, valid_low), valid_high), rel=1e-12)
        else:
            assert number != number


def test_safe_reads_any_capital_letters_and_both_spellings(tmp_path):
    texts = ["Spontaneously", "to speech", "TO PAIN", "None", "4 Spontaneously", "3 to speech"]
    texts += ["asleep", " None "]
    rows = [chart(1, 1, 220739, text) for text in texts]
    found = cleaned(tmp_path, rows, SAFE)
    meaning = {"4 spontaneously": "spontaneously", "3 to speech": "to speech"}
    categories = [
        c.lower() for c in MIMIC_CHANNELS[POSITION["Glascow coma scale eye opening"]].categories
    ]
    for text in texts:
        word = meaning.get(text.strip().lower(), text.strip().lower())
        number = found[220739, text]
        assert number == categories.index(word) if word in categories else number != number


@pytest.mark.parametrize("text", ["Brisk", "Normal <3 Seconds", "Delayed", "Abnormal >3 Seconds"])
def test_capillary_refill_exists_only_in_safe(tmp_path, text):
    rows = [chart(1, 1, 223951, text), chart(1, 1, 220045, 80)]
    assert cleaned(tmp_path / "safe", rows, SAFE)[223951, text] == float(text[0] in "DA")
    assert 223951 not in cleaned(tmp_path / "published", rows, PUBLISHED).index.get_level_values(0)
