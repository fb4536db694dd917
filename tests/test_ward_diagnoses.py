"""Codes after discharge: real codes, in the right group, with the chance that the truth says."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinfuse.ward.diagnoses import (
    GROUP_NAMES,
    NEW_CODES,
    PHENOTYPE_SUBSETS,
    PHENOTYPES,
    SERIES_TRAITS,
    diagnosis_titles,
    draw_phenotypes,
    group_codes,
    phenotype_risk,
    procedure_titles,
    rest_rule,
    true_phenotype_risks,
)
from clinfuse.ward.patients import TRAITS, draw_stays, missing_groups, subset_name
from clinfuse.ward.synthetic_ward import phenotype_truth, write_ward

SHARED = Path(__file__).parents[2] / "shared"
TABLES, DEMO = SHARED / "tables", SHARED / "data/mimic-iv-demo/hosp"
needs_tables = pytest.mark.skipif(
    not TABLES.exists(), reason="the tables of codes are not beside the repository"
)
needs_demo = pytest.mark.skipif(
    not DEMO.exists(), reason="the demo of MIMIC-IV is not beside the repository"
)


@pytest.fixture(scope="module")
def published():
    nine = pd.read_csv(TABLES / "ccs25_icd9_hcup2015.csv", dtype=str)
    ten = pd.read_csv(TABLES / "ccs25_icd10_ahrq2019.csv", dtype=str)
    return {9: dict(zip(nine["icd9"], nine["name"])), 10: dict(zip(ten["icd10cm"], ten["name"]))}


@pytest.fixture(scope="module", params=["2.2", "3.1"])
def ward(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("place") / "ward"
    write_ward(folder, 1500, seed=2, version=request.param, images=False, quiet=True)
    return request.param, folder


def table(folder, name):
    columns = {"icd_code": str, "chartdate": str}
    return pd.read_csv(folder / f"mimic-iv/hosp/{name}.csv.gz", dtype=columns)


@needs_tables
def test_every_code_stands_in_the_group_that_the_published_map_gives_it(published):
    names = pd.read_csv(TABLES / "ccs25.csv")["name"].tolist()
    assert list(GROUP_NAMES) == names
    assert list(PHENOTYPES) == [re.sub(r"[^a-z0-9]+", "_", n.lower()).strip("_") for n in names]
    for i, pair in enumerate(group_codes()):
        for kind, codes in zip((9, 10), pair, strict=True):
            for code in codes:
                expected = names[i] if i < 25 else None
                assert published[kind].get(code) == expected, (kind, code)


@needs_tables
def test_a_popular_copy_of_the_map_misses_some(published):
    copy = set(pd.read_csv(TABLES / "ccs25_icd10_medfuse.csv", dtype=str)["icd10cm"])
    ours = {code for pair in group_codes()[:25] for code in pair[1]}
    assert {"J9601", "I480", "I639", "J90", "J9811", "E1122"} <= ours - copy
    assert set(NEW_CODES) & (set(published[10]) | copy) == set()


@needs_demo
def test_titles_are_those_of_the_real_dictionaries():
    for name, ours in (
        ("d_icd_diagnoses", diagnosis_titles()),
        ("d_icd_procedures", procedure_titles()),
    ):
        real = pd.read_csv(DEMO / f"{name}.csv.gz", dtype={"icd_code": str})
        both = ours.merge(real, on=["icd_code", "icd_version"], how="left", suffixes=("", "_real"))
        wrong = both[both["long_title"] != both["long_title_real"]]
        assert wrong.empty, wrong


@needs_tables
def test_codes_of_a_ward_lead_back_to_its_phenotypes(ward, published):
    _, folder = ward
    codes = table(folder, "diagnoses_icd")
    truth = phenotype_truth(folder)
    stays = pd.read_csv(folder / "mimic-iv/icu/icustays.csv.gz")
    label_of = dict(zip(GROUP_NAMES, PHENOTYPES))
    codes["label"] = [
        label_of.get(published[kind].get(code))
        for kind, code in zip(codes["icd_version"], codes["icd_code"])
    ]
    read = pd.crosstab(codes["hadm_id"], codes["label"]).gt(0).astype(int)
    hadm = stays.set_index("stay_id").loc[truth["stay_id"], "hadm_id"].to_numpy()
    is_coded = np.isin(hadm, codes["hadm_id"])
    assert 0.97 < is_coded.mean() < 1
    read = read.reindex(hadm[is_coded], fill_value=0)[list(PHENOTYPES)]
    np.testing.assert_array_equal(read.to_numpy(), truth.loc[is_coded, list(PHENOTYPES)].to_numpy())
    joined = codes.merge(table(folder, "d_icd_diagnoses"), on=["icd_code", "icd_version"])
    assert len(joined) == len(codes)
    assert codes.groupby("icd_version").size().min() > 500
    assert not codes.duplicated(["hadm_id", "seq_num"]).any()


def test_codes_new_since_2020_are_in_version_three_alone(ward):
    version, folder = ward
    codes = table(folder, "diagnoses_icd")
    new = codes[(codes["icd_version"] == 10) & codes["icd_code"].isin(NEW_CODES)]
    assert len(new) == 0 if version == "2.2" else {"U071", "I5A"} <= set(new["icd_code"])


def test_procedures_lie_in_their_admission(ward):
    _, folder = ward
    done = table(folder, "procedures_icd").merge(table(folder, "admissions"), on="hadm_id")
    assert len(done) > 200 and set(done["icd_version"]) == {9, 10}
    day = pd.to_datetime(done["chartdate"])
    assert (day >= pd.to_datetime(done["admittime"]).dt.floor("D")).all()
    assert (day <= pd.to_datetime(done["dischtime"])).all()
    known = done.merge(table(folder, "d_icd_procedures"), on=["icd_code", "icd_version"])
    assert len(known) == len(done)


def test_phenotypes_of_the_truth_are_foreseen_for_every_subset():
    stays = draw_stays(20_000, np.random.default_rng(11))
    has = draw_phenotypes(stays, np.random.default_rng(12))
    risks = true_phenotype_risks(stays)
    rows = {
        "all": slice(None),
        "radiograph": stays["has_radiograph"],
        "none": ~stays["has_radiograph"],
    }
    for subset in PHENOTYPE_SUBSETS:
        for name, kept in rows.items():
            if name != "all" and "radiograph" not in subset:
                continue
            risk = risks.filter(regex=f"_risk_{subset_name(subset)}$")[kept].to_numpy()
            surplus = has[kept].sum(0) - risk.sum(0)
            assert (abs(surplus) < 4.2 * np.sqrt((risk * (1 - risk)).sum(0))).all(), (subset, name)


@given(st.sampled_from(list(PHENOTYPES)), st.sampled_from(PHENOTYPE_SUBSETS), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_risk_is_the_mean_over_what_is_hidden(label, subset, seed):
    "Against a plain average over many strangers who show the same."
    stay = draw_stays(1, np.random.default_rng(seed)).assign(has_radiograph=True)
    strangers = draw_stays(20_000, np.random.default_rng(1000 + seed))
    if "radiograph" in subset and "series" not in subset:
        strangers = strangers[strangers["has_radiograph"]]
    seen = ["severity", *SERIES_TRAITS] if "series" in subset else []
    seen += ["opacity"] if "radiograph" in subset else []
    alike = strangers.assign(**{name: stay[name].iloc[0] for name in seen})
    risk = phenotype_risk(alike, label)
    error = abs(risk.mean() - phenotype_risk(stay, label, subset)[0])
    assert error < 4.5 * risk.std() / np.sqrt(len(risk)) + 1e-5


@given(st.sampled_from(list(PHENOTYPES)), st.sampled_from([None, True, False]))
@settings(max_examples=30, deadline=None)
def test_rules_have_weights_that_sum_to_one(label, has_radiograph):
    nodes, weights = rest_rule(label, (), has_radiograph)
    assert abs(weights.sum() - 1) < 1e-9 and (weights > -1e-12).all()
    spread = np.sqrt(sum(w**2 for w in PHENOTYPES[label][1].values()))
    if has_radiograph is None:
        assert abs(weights @ nodes) < 1e-6 and abs(weights @ nodes**2 - spread**2) < 1e-6


def test_groups_of_stays_cover_everybody_once():
    stays = draw_stays(500, np.random.default_rng(0))
    for subset in ((), ("radiograph",), ("text", "age"), ("series", "radiograph", "text")):
        rows = np.concatenate([rows for rows, _, _ in missing_groups(stays, subset)])
        assert sorted(rows) == list(range(500))


def test_weights_name_quantities_that_are_drawn():
    drawn = set(draw_stays(3, np.random.default_rng(0)))
    assert {name for _, weights in PHENOTYPES.values() for name in weights} <= drawn
    assert set(SERIES_TRAITS) < {f"own_{trait}" for trait in TRAITS}
