"""The operating theatre of the ward: its layout, its events, and a truth that is one."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinfuse.conventions import InputError
from clinfuse.data.hypotension_events import has_event
from clinfuse.data.preparation import prepare_folder
from clinfuse.data.pressure_sources import recognised
from clinfuse.data.sources import open_source
from clinfuse.evaluation.discrimination import auroc
from clinfuse.use import recipes
from clinfuse.ward.operating_theatre import (
    IS_LOW,
    STATES,
    STEP_SECONDS,
    THEATRE,
    draw_cases,
    draw_pressure,
    draw_states,
    event_risks,
    transitions,
    true_event_risks,
)


@pytest.fixture(scope="module")
def ward(tmp_path_factory):
    out = tmp_path_factory.mktemp("place") / "ward"
    recipes.ward(out, patients=0, surgeries=200, seed=3, quiet=True)
    return out


@pytest.fixture(scope="module")
def prepared(ward):
    return prepare_folder(open_source(ward), ward.parent / "data", "hypotension", quiet=True)


@settings(max_examples=20)
@given(st.floats(-2, 2), st.integers(0, len(STATES) - 1))
def test_risks_are_those_of_a_walk_through_every_path(log_hazard, state):
    """Two horizons so short that all paths can be counted by hand."""
    matrix = transitions(np.array([log_hazard]))[0]
    risk = event_risks(np.array([log_hazard]), [180], reaction_seconds=120)[0, 0, state]
    after = np.linalg.matrix_power(matrix, 4)[state]
    by_hand = sum(
        after[k] * matrix[k, j] for k in np.flatnonzero(IS_LOW) for j in np.flatnonzero(IS_LOW)
    )
    assert risk == pytest.approx(1 - (1 - by_hand))
    assert event_risks(np.array([log_hazard]))[0].min() >= -1e-12


def test_an_episode_of_the_states_is_an_event_of_the_pressure():
    generator = np.random.default_rng(1)
    cases = draw_cases(60, generator)
    states = draw_states(cases, generator)
    pressure = draw_pressure(cases, states, generator, interval_seconds=3.0)
    size = STEP_SECONDS // 3
    for step in (50, 100):
        first, last = step * size, (step + 30) * size
        low = IS_LOW[states[:, step + 4 : step + 30]]
        expected = (low[:, 1:] & low[:, :-1]).any(axis=1)
        assert (has_event(pressure[:, first:last], 3.0) == expected).all()


def test_truth_is_calibrated_on_the_prepared_samples_and_words_help(ward, prepared):
    samples = prepared.samples
    truth = true_event_risks(ward, samples)
    for label in prepared.labels:
        known = truth[f"{label}_risk_series_and_text"].to_numpy()
        seen = samples[label].to_numpy()
        by_case = pd.Series(seen - known).groupby(samples["case_id"].to_numpy()).sum()
        assert abs(by_case.sum()) < 4 * np.sqrt((by_case**2).sum()), label
    known = truth["hypotension_15_min_risk_series_and_text"].to_numpy()
    shape = truth["hypotension_15_min_risk_series"].to_numpy()
    assert auroc(seen, known) > auroc(seen, shape) + 0.02
    last = prepared.series_array[samples["target_start"] - 1, 0]
    assert auroc(seen, known) > auroc(seen, -last) + 0.05


def test_layout_is_read_like_any_vitaldb_folder(ward, prepared):
    source = recognised(ward)
    assert (source.kind, source.version, source.is_synthetic) == ("vitaldb", "csv", True)
    steps = {row["step"]: row["operations"] for row in prepared.manifest["attrition"]}
    assert steps["operations of the source"] == 200
    assert steps["with an arterial pressure"] < 0.93 * steps["with a readable recording"]
    assert prepared.manifest["counts"]["values refused: out of range"] > 0
    assert prepared.manifest["counts"]["values refused: flat line"] > 0
    cases = pd.read_csv(ward / "vitaldb/cases.csv", dtype=str)
    text = prepared.text(prepared.samples["sample_id"].iloc[0])["attributes"]
    first = cases.set_index("caseid").loc[prepared.samples["case_id"].iloc[0]]
    assert first["optype"].lower() in text


def test_ages_and_patients_of_the_table_are_those_of_the_truth(ward):
    cases = pd.read_csv(ward / "vitaldb/cases.csv", dtype=str)
    truth = pd.read_parquet(ward / "truth/surgeries.parquet")
    assert (cases["subjectid"].astype(int) == truth["subjectid"]).all()
    printed = np.where(truth["age"] > 89, ">89", truth["age"].astype(int).astype(str))
    assert (cases["age"] == printed).all()
    np.testing.assert_allclose(THEATRE.log_hazard(truth), truth["log_hazard"])


def test_a_ward_may_have_both_and_a_wrong_number_leaves_nothing(tmp_path):
    made = recipes.ward(tmp_path / "both", patients=20, surgeries=5, no_images=True, quiet=True)
    assert made.counts["surgeries"] == 5 and made.num_stays > 0
    assert open_source(tmp_path / "both").kind == "mimic-iv"
    assert (tmp_path / "both/vitaldb/cases.csv").exists()
    with pytest.raises(InputError, match="got -1"):
        recipes.ward(tmp_path / "none", patients=0, surgeries=-1, quiet=True)
    with pytest.raises(InputError, match="at least one patient"):
        recipes.ward(tmp_path / "none", patients=0, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["both"]
