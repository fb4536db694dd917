"""Phenotypes: the three maps are the published ones, keyed by version and code, and nothing is dropped silently."""

import csv
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from notebook_tools import ROOT

from clinfuse.conventions import PUBLISHED, SAFE, InputError
from clinfuse.data.phenotypes import (
    ICD_MAPS,
    PHENOTYPES,
    admission_phenotypes,
    code_counts,
    icd_table,
    phenotype_groups,
    phenotype_labels,
)
from clinfuse.data.sources import connect, open_source

SHARED_DATA = Path(__file__).parents[2] / "shared/data"

TABLES = SHARED_DATA.parent / "tables"
FILES = {
    ("ahrq", 9): ("ccs25_icd9_hcup2015.csv", "icd9"),
    ("medfuse", 9): ("ccs25_icd9_hcup2015.csv", "icd9"),
    ("gem", 9): ("ccs25_icd9_hcup2015.csv", "icd9"),
    ("ahrq", 10): ("ccs25_icd10_ahrq2019.csv", "icd10cm"),
    ("medfuse", 10): ("ccs25_icd10_medfuse.csv", "icd10cm"),
    ("gem", 10): ("ccs25_icd10_gem_backward.csv", "icd10cm"),
}


def read(name):
    if not (TABLES / name).exists():
        pytest.skip(f"the published maps are not at {TABLES}")
    with open(TABLES / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("icd_map", "version"), FILES)
def test_maps_are_the_published_ones(icd_map, version):
    name, column = FILES[icd_map, version]
    expected = {row[column]: int(row["ccs_id"]) for row in read(name)}
    found = icd_table().loc[version, icd_map]
    assert found[found > 0].to_dict() == expected


@pytest.mark.parametrize(
    ("version", "name", "column"),
    [(9, "ccs_all_icd9cm_ahrq2015.csv", "icd9cm"), (10, "ccs_all_icd10cm_ahrq2019.csv", "icd10cm")],
)
def test_every_code_of_ahrq_is_known(version, name, column):
    groups = {row[column]: int(row["ccs_id"]) for row in read(name)}
    ours = {phenotype.ccs for phenotype in PHENOTYPES}
    found = icd_table().loc[version, "ahrq"].to_dict()
    assert found == {code: ccs if ccs in ours else 0 for code, ccs in groups.items()}


def test_groups_are_those_of_the_benchmark():
    rows = read("ccs25.csv")
    assert [(str(p.ccs), p.name, p.kind) for p in PHENOTYPES] == [
        (row["ccs_id"], row["name"], row["type_trainer"]) for row in rows
    ]
    assert PHENOTYPES[8].label == "congestive_heart_failure_nonhypertensive"
    assert all(p.label.isidentifier() for p in PHENOTYPES)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 85_000), min_size=1, max_size=40), st.sampled_from([*ICD_MAPS]))
def test_known_codes_are_themselves_and_their_children_theirs(places, icd_map):
    table = icd_table().iloc[places]
    codes = table.index.to_frame(index=False)
    found = phenotype_groups(codes, icd_map)
    assert (found["known_as"] == codes["icd_code"]).all()
    assert (found["group"].to_numpy() == table[icd_map].to_numpy()).all()
    spaced = codes.assign(icd_code=" " + codes["icd_code"].str.lower() + "  ")
    assert phenotype_groups(spaced, icd_map).equals(found)
    short = (codes["icd_code"].str.len() < 7).to_numpy()
    child = codes.assign(icd_code=codes["icd_code"] + "~")[short]
    assert phenotype_groups(child, icd_map).equals(found[short])


@pytest.mark.parametrize("code", ["U071", "I5A", "J1282", "", "XYZ", "9", "ZZZZZZZZ"])
def test_unknown_codes_are_listed(code):
    rows = pd.DataFrame({"icd_version": [10, 10, 10], "icd_code": [code, code, "I10"]})
    assert phenotype_groups(rows)["group"].tolist() == [0, 0, 98]
    counts = code_counts(rows)
    assert counts["codes unknown to AHRQ"] == {f"ICD-10 {code}": 2}
    assert counts["rows coded"] == 3 and counts["rows unknown to AHRQ"] == 2


def test_labels_are_a_naive_loop():
    rng = np.random.default_rng(0)
    table = icd_table()
    codes = table[table["ahrq"] > 0].sample(40, random_state=1).index.to_frame(index=False)
    rows = codes.iloc[rng.integers(0, 40, 300)].assign(hadm_id=rng.integers(0, 60, 300))
    rows = rows.reset_index(drop=True)
    asked = pd.Series(rng.permutation(70))
    for icd_map in ICD_MAPS:
        found = phenotype_labels(rows, asked, icd_map)
        for hadm_id, row in zip(asked, found.to_dict("records")):
            mine = rows.loc[rows["hadm_id"] == hadm_id, ["icd_version", "icd_code"]].to_numpy()
            groups = {int(table.loc[(version, code), icd_map]) for version, code in mine}
            assert row == {p.label: int(p.ccs in groups) for p in PHENOTYPES}


def test_the_version_is_ignored_only_as_published(mimic_demo):
    tables = connect(open_source(mimic_demo))
    coded = tables.fetch(tables.table("hosp/diagnoses_icd").select("hadm_id").distinct())
    asked = coded["hadm_id"].to_pandas().sort_values(ignore_index=True)
    safe, counts = admission_phenotypes(tables, asked, SAFE, "medfuse")
    published, _ = admission_phenotypes(tables, asked, PUBLISHED, "medfuse")
    assert safe.equals(published)  # no text of both versions is in that list
    assert counts["rows coded"] == 4506
    others = (
        "rows unknown to AHRQ",
        "external causes of ICD-9",
        "rows counted as their parent code",
    )
    assert sum(counts[name] for name in others) == 204  # those not in AHRQ's files as they are
    with pytest.raises(InputError, match="known: ahrq, medfuse, gem"):
        admission_phenotypes(tables, asked, SAFE, "icd11")


def test_the_table_travels_in_the_package():
    assert "*.csv.xz" in (ROOT / "setup.py").read_text(encoding="utf-8")
    assert (ROOT / "clinfuse/data/icd_to_ccs.csv.xz").stat().st_size < 100_000
