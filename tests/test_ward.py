"""The synthetic ward as its readers meet it: layouts, bytes, shares, and a truth that is one."""

import csv
import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinfuse.conventions import InputError
from clinfuse.ward.patients import (
    LATENTS,
    RISK,
    SUBSETS,
    RiskModel,
    draw_stays,
    mean_risk,
    radiograph_chance,
    subset_name,
    text_distribution,
    true_risks,
    truth_given,
)
from clinfuse.ward.synthetic_ward import CHUNK_STAYS, draw_ward, ward_truth, write_ward
from clinfuse.ward.tables import VERSIONS, table_columns

DATA = Path(__file__).parents[2] / "shared/data"
DEMO = DATA / "mimic-iv-demo"
numbers = st.floats(-3, 3)


def header(file):
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return next(csv.reader(lines))


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def ward(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place") / "ward"
    return write_ward(folder, num_stays=400, seed=5, images=False, quiet=True)


@pytest.fixture(scope="module")
def stays(ward):
    icu = pd.read_csv(ward.folder / "mimic-iv/icu/icustays.csv.gz")
    icu = icu.assign(intime=pd.to_datetime(icu["intime"]), outtime=pd.to_datetime(icu["outtime"]))
    truth = ward_truth(ward.folder).drop(columns=["subject_id", "hadm_id"])
    admissions = pd.read_csv(ward.folder / "mimic-iv/hosp/admissions.csv.gz")
    kept = admissions[["hadm_id", "hospital_expire_flag", "deathtime", "dischtime", "admittime"]]
    return icu.merge(truth, on="stay_id", validate="1:1").merge(kept, on="hadm_id", validate="m:1")


@pytest.mark.skipif(not DEMO.exists(), reason="the demo of MIMIC-IV is not beside the repository")
def test_headers_are_those_of_the_real_tables(ward):
    for table, columns in table_columns("2.2").items():
        ours = header(ward.folder / "mimic-iv" / f"{table}.csv.gz")
        assert ours == columns == header(DEMO / f"{table}.csv.gz"), table


@pytest.mark.skipif(not DEMO.exists(), reason="the demo of MIMIC-IV is not beside the repository")
def test_codes_and_items_mean_what_they_mean_in_the_real_dictionaries(ward):
    for table, keys, value in (
        ("hosp/d_icd_diagnoses", ["icd_code", "icd_version"], "long_title"),
        ("hosp/d_labitems", ["itemid"], "label"),
        ("icu/d_items", ["itemid"], "label"),
    ):
        ours = pd.read_csv(ward.folder / "mimic-iv" / f"{table}.csv.gz", dtype=str)
        real = pd.read_csv(DEMO / f"{table}.csv.gz", dtype=str)
        both = ours.merge(real, on=keys, how="left", suffixes=("", "_real"))
        assert (both[value] == both[f"{value}_real"]).all(), both[
            both[value] != both[f"{value}_real"]
        ]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_has_its_tables_and_nothing_else(version, tmp_path):
    write_ward(tmp_path / "ward", num_stays=20, version=version, images=False, quiet=True)
    written = tmp_path / "ward" / "mimic-iv"
    found = {str(path.relative_to(written))[: -len(".csv.gz")] for path in written.rglob("*.gz")}
    assert found == set(table_columns(version))
    for table, columns in table_columns(version).items():
        assert header(written / f"{table}.csv.gz") == columns
    about = json.loads((tmp_path / "ward" / "truth" / "ward.json").read_text())
    assert (about["version"], about["num_stays"], about["seed"]) == (version, 20, 0)


def test_same_seed_same_bytes_with_and_without_images(tmp_path):
    for name, options in {"a": {}, "b": {}, "c": {"images": False}, "d": {"seed": 1}}.items():
        write_ward(tmp_path / name, num_stays=12, quiet=True, **options)
    a, b, c, d = (digests(tmp_path / name) for name in "abcd")
    assert a == b
    assert c == {name: digest for name, digest in a.items() if "mimic-cxr-jpg" not in name}
    fixed = {"mimic-iv/icu/d_items.csv.gz", "mimic-iv/hosp/d_labitems.csv.gz"}
    fixed |= {f"mimic-iv/hosp/d_icd_{kind}.csv.gz" for kind in ("diagnoses", "procedures")}
    assert {name for name in a.keys() & d.keys() if a[name] == d[name]} == fixed


def test_pieces_of_a_ward_do_not_overlap():
    seeds = np.random.SeedSequence(0).spawn(2)
    first, second = (
        draw_ward(300, seed, serial=serial)
        for seed, serial in zip(seeds, (0, CHUNK_STAYS), strict=True)
    )
    for name in ("stay_id", "subject_id", "hadm_id"):
        assert not set(first.truth[name]) & set(second.truth[name])
    for name in ("dicom_id", "study_id"):
        assert not set(first.images[name]) & set(second.images[name])
    alone = draw_ward(300, np.random.SeedSequence(0).spawn(5)[0])
    pd.testing.assert_frame_equal(alone.truth, first.truth)


@pytest.mark.parametrize("options", [{"num_stays": 0}, {"num_stays": 100_001}, {"version": "2"}])
def test_what_cannot_be_written_leaves_nothing(options, tmp_path):
    with pytest.raises(InputError):
        write_ward(tmp_path / "ward", quiet=True, **options)
    assert not list(tmp_path.iterdir())


def test_one_stay_is_a_ward(tmp_path):
    write_ward(tmp_path / "ward", num_stays=1, quiet=True)
    assert len(ward_truth(tmp_path / "ward")) == 1


def test_shares(stays, ward):
    long = stays[stays["los"] >= 2]
    assert len(stays) == ward.num_stays == ward.counts["icu/icustays"]
    assert 0.58 < len(long) / len(stays) < 0.76
    assert 0.08 < long["label"].mean() < 0.21
    assert 0.2 < long["has_radiograph"].mean() < 0.35
    assert stays["subject_id"].nunique() < stays["hadm_id"].nunique() < len(stays)
    assert (stays["first_careunit"] != stays["last_careunit"]).any()


def test_the_calendar_holds_together(stays):
    admitted, discharged = pd.to_datetime(stays["admittime"]), pd.to_datetime(stays["dischtime"])
    assert ((admitted <= stays["intime"]) & (stays["outtime"] <= discharged)).all()
    assert (stays["label"] == stays["hospital_expire_flag"]).all()
    died = stays["deathtime"].notna()
    assert (died == (stays["label"] == 1)).all()
    assert (pd.to_datetime(stays["deathtime"])[died] <= discharged[died]).all()
    ordered = stays.sort_values("intime")
    apart = ordered["intime"] > ordered.groupby("subject_id")["outtime"].shift()
    assert (apart | ~ordered["subject_id"].duplicated()).all()


def test_nothing_is_measured_outside_its_stay(stays, ward):
    charts = pd.read_csv(
        ward.folder / "mimic-iv/icu/chartevents.csv.gz",
        usecols=["stay_id", "charttime", "storetime", "valuenum", "itemid"],
        parse_dates=["charttime", "storetime"],
    ).merge(stays[["stay_id", "intime", "outtime"]], on="stay_id", validate="m:1")
    assert (charts["charttime"] >= charts["intime"].dt.floor("min")).all()
    measured = charts[~charts["itemid"].isin([226531, 226512, 226707, 226730])]
    assert (measured["charttime"] <= measured["outtime"]).all()
    assert (charts["storetime"] >= charts["charttime"]).all()
    assert 0 < (~stays["stay_id"].isin(charts["stay_id"])).sum() <= 2


def test_what_is_stored_in_time_does_not_know_the_end(stays, ward):
    blood = pd.read_csv(
        ward.folder / "mimic-iv/hosp/labevents.csv.gz", parse_dates=["charttime", "storetime"]
    )
    blood = blood[(blood["itemid"] == 50931) & blood["hadm_id"].notna()]
    blood = blood.merge(
        stays[["hadm_id", "intime", "label"]].drop_duplicates("hadm_id"), on="hadm_id"
    )
    limit = blood["intime"] + pd.Timedelta(hours=48)
    late = blood[
        (blood["charttime"] < limit) & (blood["storetime"] > limit + pd.Timedelta(hours=12))
    ]
    assert late.groupby("label")["valuenum"].min()[1] > late.groupby("label")["valuenum"].max()[0]
    assert blood.loc[blood["storetime"] < limit, "valuenum"].max() < 400


@given(numbers, numbers, st.integers(0, 4), numbers)
@settings(max_examples=20, deadline=None)
def test_mean_risk_is_the_mean_over_any_split_of_one_unknown(severity, opacity, level, age_score):
    "Averaging the finer prediction over the text levels gives the coarser one."
    scores, shares = text_distribution()
    known = pd.DataFrame({"severity": [severity], "opacity": [opacity], "age_score": [age_score]})
    finer = [mean_risk(known.assign(text_risk=score))[0] for score in scores]
    np.testing.assert_allclose(mean_risk(known)[0], shares @ finer, rtol=1e-12)
    assert min(finer) <= finer[level] <= max(finer)


@given(st.floats(-5, 0), st.floats(0, 3), st.floats(0, 3), st.floats(0, 1), numbers)
@settings(max_examples=25, deadline=None)
def test_quadrature_agrees_with_a_fine_grid(intercept, severity, opacity, product, seen):
    model = RiskModel(intercept, severity, opacity, 0.0, 0.0, product)
    grid = np.linspace(-9, 9, 6001)
    density = np.exp(-(grid**2) / 2) / np.exp(-(grid**2) / 2).sum()
    by_grid = density @ model.risk(seen, grid, 0.0, 0.0)
    assert abs(mean_risk(pd.DataFrame({"severity": [seen]}), model=model)[0] - by_grid) < 1e-5
    absent = density * (1 - radiograph_chance(grid))
    by_grid = (absent / absent.sum()) @ model.risk(grid, seen, 0.0, 0.0)
    known = pd.DataFrame({"opacity": [seen]})
    assert abs(mean_risk(known, has_radiograph=False, model=model)[0] - by_grid) < 1e-5


def test_more_knowledge_never_hurts_on_average():
    "The mean squared error of the truth falls, or stays, with every modality added."
    stays = draw_stays(8000, np.random.default_rng(3))
    risks = true_risks(stays)
    error = {name: ((risks[name] - stays["risk"]) ** 2).mean() for name in risks}
    for subset in SUBSETS:
        for added in set(LATENTS) - set(subset):
            more = subset_name([*subset, added])
            assert error[f"risk_{more}"] <= error[f"risk_{subset_name(subset)}"] + 3e-4


def test_order_and_company_of_stays_do_not_change_their_truth():
    stays = draw_stays(300, np.random.default_rng(4))
    shuffled = stays.sample(frac=1, random_state=0)
    together = pd.Series(
        truth_given(RISK.risk, shuffled, ["radiograph", "text"]), index=shuffled.index
    )
    np.testing.assert_allclose(
        together.sort_index(), truth_given(RISK.risk, stays, ["radiograph", "text"])
    )
    alone = [truth_given(RISK.risk, stays.iloc[[i]], ["radiograph", "text"])[0] for i in range(5)]
    np.testing.assert_allclose(alone, together.sort_index().iloc[:5])
