"""Metrics, calibration and resampling as properties: any weights are repeated rows, any order of rows is one table."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from clinfuse.conventions import InputError
from clinfuse.evaluation import calibration, discrimination
from clinfuse.evaluation.discrimination import UndefinedMetric
from clinfuse.evaluation.resampling import (
    METRICS,
    Estimate,
    check_predictions,
    compare_pairs,
    evaluate_predictions,
    evaluate_runs,
    interval,
    patient_weights,
    resample_metrics,
    write_metrics,
)

CONTRACT = {
    "auroc",
    "auprc",
    "f1_binary",
    "f1_macro",
    "accuracy",
    "precision",
    "recall",
    "specificity",
    "balanced_accuracy",
    "brier",
    "ece",
    "min_sensitivity_precision",
}
row = st.tuples(st.integers(0, 1), st.integers(0, 10), st.integers(0, 4))
samples = st.lists(row, min_size=2, max_size=40)


def arrays(rows):
    targets, tenths, weights = map(np.array, zip(*rows))
    return targets, tenths / 10, weights


def quiet(metric, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetric)
        return metric(*arguments)


def table(seed=0, num_samples=60, labels=("death",)):
    rng = np.random.default_rng(seed)
    parts = [
        pd.DataFrame(
            {
                "sample_id": [f"s{i:03d}" for i in range(num_samples)],
                "subject_id": np.arange(num_samples) // 2,
                "label": label,
                "prediction": rng.random(num_samples),
                "target": rng.integers(0, 2, num_samples),
            }
        )
        for label in labels
    ]
    return pd.concat(parts, ignore_index=True)


def test_metric_names_are_those_of_the_contract():
    assert set(METRICS) == CONTRACT


@settings(max_examples=150, deadline=None)
@given(samples)
def test_whole_weights_are_repeated_rows(rows):
    targets, scores, weights = arrays(rows)
    repeated = np.repeat(targets, weights), np.repeat(scores, weights)
    for name, metric in METRICS.items():
        weighted = quiet(metric, targets, scores, weights)
        assert isinstance(weighted, float)
        if weights.sum() == 0:
            assert np.isnan(weighted), name
        else:
            np.testing.assert_allclose(weighted, quiet(metric, *repeated), atol=1e-12, err_msg=name)


@settings(max_examples=150, deadline=None)
@given(samples)
def test_scikit_learn_agrees_wherever_it_is_defined(rows):
    targets, scores, weights = arrays(rows)
    alive = weights > 0
    if len(np.unique(targets[alive])) < 2:
        return
    calls = (scores >= 0.5).astype(int)
    given_weights = {"sample_weight": weights}
    expected = {
        "auroc": sklearn.metrics.roc_auc_score(targets, scores, **given_weights),
        "auprc": sklearn.metrics.average_precision_score(targets, scores, **given_weights),
        "balanced_accuracy": sklearn.metrics.balanced_accuracy_score(
            targets, calls, **given_weights
        ),
        "f1_binary": sklearn.metrics.f1_score(targets, calls, zero_division=0, **given_weights),
        "f1_macro": sklearn.metrics.f1_score(
            targets, calls, average="macro", zero_division=0, **given_weights
        ),
        "precision": sklearn.metrics.precision_score(
            targets, calls, zero_division=np.nan, **given_weights
        ),
        "brier": sklearn.metrics.brier_score_loss(targets, scores, **given_weights),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(
            quiet(METRICS[name], targets, scores, weights), value, atol=1e-12, err_msg=name
        )


@settings(max_examples=100, deadline=None)
@given(samples)
def test_best_threshold_is_the_best_of_all(rows):
    targets, scores, weights = arrays(rows)
    if (targets * weights).sum() == 0:
        return
    tried = []
    for threshold in np.unique(scores):
        true, false, missed, _ = discrimination.confusion_counts(
            targets, scores, weights, threshold
        )
        tried.append(min(true / (true + missed), true / (true + false) if true + false else 0))
    found = discrimination.min_sensitivity_precision(targets, scores, weights)
    np.testing.assert_allclose(found, max(tried), atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(samples)
def test_curves_are_monotone_and_integrate_to_the_area(rows):
    targets, scores, _ = arrays(rows)
    if len(np.unique(targets)) < 2:
        return
    num_negatives = int((1 - targets).sum())
    grid = (np.arange(4 * num_negatives) + 0.5) / (4 * num_negatives)
    curve = discrimination.sensitivity_at(targets, scores, grid)
    assert (np.diff(curve) >= -1e-12).all()
    np.testing.assert_allclose(curve.mean(), discrimination.auroc(targets, scores), atol=1e-12)
    precision = discrimination.precision_at(targets, scores, np.array([1.0]))
    lowest = scores[targets == 1].min()
    np.testing.assert_allclose(precision, targets[scores >= lowest].mean(), atol=1e-12)


def test_undefined_is_nan_and_says_why():
    for name in ("auroc", "auprc", "recall", "balanced_accuracy", "min_sensitivity_precision"):
        with pytest.warns(UndefinedMetric, match="1 of 2 resamples"):
            found = METRICS[name]([1, 0, 0], [0.9, 0.2, 0.1], [[1, 1, 1], [0, 1, 1]])
        assert np.isfinite(found[0]) and np.isnan(found[1]), name


def test_blocks_do_not_show():
    rng = np.random.default_rng(0)
    targets, scores = rng.integers(0, 2, 20_000), rng.random(20_000)
    weights = patient_weights(np.arange(20_000), 40)
    for name, metric in METRICS.items():
        rows = [metric(targets, scores, weights[r]) for r in (0, 17, 39)]
        np.testing.assert_allclose(
            metric(targets, scores, weights)[[0, 17, 39]], rows, err_msg=name
        )


@settings(max_examples=60, deadline=None)
@given(samples, st.integers(1, 12), st.booleans())
def test_brier_decomposition_is_an_identity(rows, num_bins, adaptive):
    targets, scores, _ = arrays(rows)
    part = calibration.brier_decomposition(targets, scores, num_bins, adaptive)
    whole = part["reliability"] - part["resolution"] + part["uncertainty"] + part["within"]
    np.testing.assert_allclose(whole, part["brier"], atol=1e-12)
    bins = calibration.calibration_bins(targets, scores, None, num_bins, adaptive)
    assert bins.weights.sum() == len(targets)


def test_patients_are_drawn_whole_and_reproducibly():
    subjects = np.array(["b", "a", "b", "c", "a", "b"])
    weights = patient_weights(subjects, 200, seed=3)
    assert (weights[:, 0] == weights[:, 2]).all() and (weights[:, 1] == weights[:, 4]).all()
    assert (weights[:, [1, 0, 3]].sum(axis=1) == 3).all()
    np.testing.assert_array_equal(weights, patient_weights(subjects, 200, seed=3))
    order = np.array([3, 5, 0, 1, 4, 2])
    np.testing.assert_array_equal(weights[:, order], patient_weights(subjects[order], 200, seed=3))
    assert (weights != patient_weights(subjects, 200, seed=4)).any()


def test_rows_in_any_order_are_one_table():
    rows = table(labels=("death", "sepsis"))
    shuffled = rows.sample(frac=1, random_state=1).sort_values("label", kind="stable")
    first = evaluate_predictions(rows, num_resamples=50)
    assert first == evaluate_predictions(shuffled, num_resamples=50)


def test_macro_is_averaged_within_every_draw():
    rows = table(labels=("death", "sepsis", "shock"))
    weights = patient_weights(np.arange(60) // 2, 80)
    found = resample_metrics(rows, weights, {"auroc": discrimination.auroc})
    labels = [found[label]["auroc"].resamples for label in ("death", "sepsis", "shock")]
    np.testing.assert_allclose(found["macro"]["auroc"].resamples, np.mean(labels, axis=0))
    summary = found["macro"]["auroc"].summary()
    spread = np.mean([interval(draws)[1] - interval(draws)[0] for draws in labels])
    assert summary["high"] - summary["low"] < spread


def test_a_run_does_not_differ_from_itself():
    rows = table()
    pairs = evaluate_runs({"a": rows, "b": rows.copy()}, num_resamples=30)["pairs"]
    assert {pair["metric"] for pair in pairs} == CONTRACT
    for pair in pairs:
        assert pair["difference"] == pair["low"] == pair["high"] == pair["share_above_zero"] == 0


def test_pairs_are_draw_by_draw():
    a, b = np.array([0.5, 0.7, np.nan]), np.array([0.4, 0.8, 0.1])
    runs = {
        name: {"death": {"auroc": Estimate(0.6, draws)}} for name, draws in (("a", a), ("b", b))
    }
    (pair,) = compare_pairs(runs, level=0.5)
    assert pair["share_above_zero"] == 0.5
    np.testing.assert_allclose([pair["low"], pair["high"]], [-0.05, 0.05])


def test_metrics_json_has_the_form_of_the_contract(tmp_path):
    rows = table(labels=("death", "gout"))
    rows.loc[rows["label"] == "gout", "target"] = 0
    found = evaluate_runs({"a": rows, "b": rows}, split="validation", num_resamples=20)
    text = write_metrics(found, tmp_path / "metrics.json").read_text()
    read = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    run = read["runs"]["a"]
    assert run["split"] == "validation" and set(run["labels"]) == {"death", "gout"}
    assert {"value", "low", "high"} <= set(run["labels"]["death"]["auroc"])
    assert run["labels"]["gout"]["auroc"]["value"] is None
    assert "both classes" in run["labels"]["gout"]["auroc"]["note"]
    keys = {"a", "b", "label", "metric", "difference", "low", "high"}
    assert keys <= set(read["pairs"][0])
    assert {pair["label"] for pair in read["pairs"]} == {"death", "gout", "macro"}
    with pytest.raises(InputError, match="could not write"):
        write_metrics(found, tmp_path / "missing" / "metrics.json")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.assign(prediction=t["prediction"].where(t.index != 7)), "sample s007"),
        (lambda t: t.assign(prediction=["high"] * len(t)), "sample s000"),
        (lambda t: t.assign(target=t["target"].where(t.index != 3)), "sample s003"),
        (lambda t: t.assign(target=t["target"] + 0.5), "neither 0 nor 1"),
        (lambda t: t.assign(subject_id=None), "has no subject_id"),
        (lambda t: pd.concat([t, t]), "60 such rows"),
        (lambda t: t.rename(columns={"prediction": "score"}), "lack the column 'prediction'"),
    ],
)
def test_bad_tables_are_refused_by_row(change, message):
    with pytest.raises(InputError, match=message):
        check_predictions(change(table()), "lstm")


@pytest.mark.parametrize("column", ["sample_id", "subject_id", "target"])
def test_runs_of_different_samples_are_refused(column):
    rows = table()
    other = rows.copy()
    other[column] = {"sample_id": "x" + rows["sample_id"], "target": 1 - rows["target"]}.get(
        column, rows["subject_id"] + 1
    )
    with pytest.raises(InputError, match="'lstm' and 'other' are not of the same samples"):
        evaluate_runs({"lstm": rows, "other": other})


def test_no_runs_and_wrong_weights_are_refused():
    with pytest.raises(InputError, match="no runs"):
        evaluate_runs({})
    with pytest.raises(InputError, match="weights are for 2 samples"):
        discrimination.auroc([0, 1, 1], [0.1, 0.2, 0.3], np.ones((5, 2)))
