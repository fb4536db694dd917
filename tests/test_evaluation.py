"""Metrics, calibration and resampling as properties: any weights are repeated rows, any order of rows is one table."""

import csv
import itertools
import json
import random
import warnings

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from clinfuse.conventions import InputError
from clinfuse.evaluation import calibration, decisions, discrimination, draws
from clinfuse.evaluation.conformal import fit_intervals, fit_sets, predict_intervals, predict_sets
from clinfuse.evaluation.discrimination import UndefinedMetric
from clinfuse.evaluation.recalibration import CURVES, fit_recalibration
from clinfuse.evaluation.resampling import (
    METRICS,
    REGRESSION_METRICS,
    Estimate,
    check_predictions,
    compare_pairs,
    evaluate_predictions,
    evaluate_runs,
    interval,
    join_targets,
    metrics_table,
    patient_weights,
    read_predictions,
    resample_metrics,
    write_metrics,
)
from clinfuse.evaluation.subgroups import subgroup_table, subgroup_text

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
REGRESSION = {"mae", "rmse", "r2", "explained_variance"}
ADDED = {"adaptive_ece", "calibration_slope", "calibration_intercept"}
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
    assert set(METRICS) - ADDED == CONTRACT and set(REGRESSION_METRICS) == REGRESSION
    assert set(METRICS) >= ADDED


@settings(max_examples=150, deadline=None)
@given(samples)
def test_whole_weights_are_repeated_rows(rows):
    targets, scores, weights = arrays(rows)
    repeated = np.repeat(targets, weights), np.repeat(scores, weights)
    metrics = METRICS | REGRESSION_METRICS
    del metrics["adaptive_ece"]  # the edges are those of the full sample
    for name, metric in metrics.items():
        weighted = quiet(metric, targets, scores, weights)
        assert isinstance(weighted, float)
        if weights.sum() == 0:
            assert np.isnan(weighted), name
        else:
            close = 1e-6 if name.startswith("calibration") else 1e-12
            np.testing.assert_allclose(weighted, quiet(metric, *repeated), atol=close, err_msg=name)


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
    assert {pair["metric"] for pair in pairs} == set(METRICS)
    for pair in pairs:
        assert pair.get("p_value", 1.0) == pair.get("p_holm", 1.0) == 1.0
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


@pytest.mark.slow
@pytest.mark.parametrize("label", range(25))
def test_every_resample_is_what_scikit_learn_says(label):
    rng = np.random.default_rng(label)
    targets = rng.random(11_914) < 0.17
    scores = 1 / (1 + np.exp(1.5 - targets - rng.normal(size=len(targets))))
    if label % 2:
        scores = scores.round(2)
    weights = patient_weights(rng.integers(9000, size=len(targets)))
    theirs = sklearn.metrics.roc_auc_score, sklearn.metrics.average_precision_score
    for ours, oracle in zip((discrimination.auroc, discrimination.auprc), theirs):
        expected = [oracle(targets, scores, sample_weight=row) for row in weights]
        np.testing.assert_allclose(ours(targets, scores, weights), expected, rtol=0, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(samples)
def test_errors_of_amounts_agree_with_scikit_learn(rows):
    _, predictions, weights = arrays(rows)
    targets = np.array([12 * tenth for _, tenth, _ in rows][::-1])
    if len(np.unique(targets[weights > 0])) < 2:
        return
    expected = {
        "mae": sklearn.metrics.mean_absolute_error,
        "rmse": sklearn.metrics.root_mean_squared_error,
        "r2": sklearn.metrics.r2_score,
        "explained_variance": sklearn.metrics.explained_variance_score,
    }
    for name, oracle in expected.items():
        np.testing.assert_allclose(
            REGRESSION_METRICS[name](targets, predictions, weights),
            oracle(targets, predictions, sample_weight=weights),
            atol=1e-9,
            err_msg=name,
        )


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_never_helps(p_values):
    adjusted = draws.holm(p_values)
    assert (adjusted >= p_values).all() and (
        adjusted <= np.minimum(1, len(p_values) * np.array(p_values))
    ).all()
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(adjusted[order]) >= 0).all()


def test_exchanged_systems_have_the_same_p_values():
    first, second = table(0, labels=("death", "sepsis")), table(1, labels=("death", "sepsis"))
    second["target"] = first["target"]
    found = evaluate_runs({"a": first, "b": second}, num_resamples=200)["pairs"]
    swapped = evaluate_runs({"b": second, "a": first}, num_resamples=200)["pairs"]
    tested = [pair for pair in found if "p_value" in pair]
    assert {(p["label"], p["metric"], p["comparisons"]) for p in tested} == {
        (label, metric, 1 if label == "macro" else 2)
        for label in ("death", "sepsis", "macro")
        for metric in ("auroc", "auprc")
    }
    for pair, other in zip(found, swapped):
        assert pair["difference"] == -other["difference"]
        assert pair.get("p_value") == other.get("p_value")


def test_bca_intervals_reach_every_number_of_the_table():
    rows = table(labels=("death", "sepsis"))
    runs = {"a": rows, "b": rows.assign(prediction=1 - rows["prediction"])}
    plain, bca = (
        evaluate_runs(runs, num_resamples=60, method=m, tested=()) for m in ("percentile", "bca")
    )
    weights, left = (
        patient_weights(np.arange(60) // 2, 60),
        draws.jackknife_weights(np.arange(60) // 2),
    )
    gap = [resample_metrics(t, weights, jackknife=left)["macro"]["brier"] for t in runs.values()]
    pair = next(p for p in bca["pairs"] if (p["label"], p["metric"]) == ("macro", "brier"))
    expected = draws.bca_interval(
        gap[0].resamples - gap[1].resamples,
        gap[0].value - gap[1].value,
        gap[0].jackknife - gap[1].jackknife,
    )
    np.testing.assert_allclose([pair["low"], pair["high"]], expected)
    changed = [
        (label, name)
        for label, of in bca["runs"]["a"]["labels"].items()
        for name in of
        if of[name]["low"] != plain["runs"]["a"]["labels"][label][name]["low"]
    ]
    assert len(changed) > 20
    with pytest.raises(InputError, match="method is 'basic'"):
        evaluate_runs(runs, method="basic")


def test_days_and_deaths_in_one_table(tmp_path):
    rows = table()
    stay = rows.assign(
        label="stay", kind="days", prediction=9 * rows["prediction"], target=rows.index / 7
    )
    mixed = pd.concat([rows.assign(kind="binary"), stay])
    found = evaluate_runs({"a": mixed, "b": mixed}, num_resamples=20)
    macro = found["runs"]["a"]["macro"]
    assert macro["mae"] == found["runs"]["a"]["labels"]["stay"]["mae"]
    assert macro["auroc"] == found["runs"]["a"]["labels"]["death"]["auroc"]
    assert {p["metric"] for p in found["pairs"] if p["label"] == "stay"} == set(REGRESSION_METRICS)
    write_metrics(found, tmp_path / "metrics.json")
    shown = metrics_table(found)
    assert shown.loc[("a", "stay"), "auroc"] == "" == shown.loc[("a", "death"), "mae"]


def test_a_table_made_elsewhere_is_judged_whole(tmp_path):
    """Written with the standard library alone, as another tool would."""
    random.seed(0)
    with open(tmp_path / "theirs.csv", "w", newline="") as stream:
        lines = csv.writer(stream)
        lines.writerow(
            ["sample_id", "subject_id", "label", "prediction", "target", "split", "remark"]
        )
        for i in range(240):
            risk = random.random()
            died = int(random.random() < risk)
            lines.writerow(
                [f"00{i}", f"0{i // 2}", "death", f"{risk:.3f}", died, "validation", "x"]
            )
    rows = read_predictions(tmp_path / "theirs.csv")
    assert rows["sample_id"].iloc[0] == "000" and set(rows["kind"]) == {"binary"}
    found = evaluate_predictions(rows, num_resamples=50)["labels"]["death"]
    assert found["auroc"]["low"] < found["auroc"]["value"] < found["auroc"]["high"]
    sides = pd.DataFrame({"sample_id": rows["sample_id"], "unit": ["east", "west"] * 120})
    groups = subgroup_table(rows, sides, num_resamples=20)
    assert len(subgroup_text(groups)) == 2 and not groups["is_small"].any()
    half = rows["subject_id"] < "06"
    answers = predict_sets(fit_sets(rows[half]), rows[~half])
    assert set(answers["answer"]) <= {"yes", "no", "either", "neither"}
    better = fit_recalibration(rows[half]).apply(rows[~half])
    assert better["prediction"].between(0, 1).all()
    with pytest.raises(InputError, match="is of split 'validation', not 'test'"):
        evaluate_runs({"theirs": rows})
    (tmp_path / "broken.csv").write_text("a,b\n1\n2,3,4,5\n")
    with pytest.raises(InputError, match="not a readable table"):
        read_predictions(tmp_path / "broken.csv")


def test_forecasts_without_outcomes_are_joined():
    rows = table(labels=("death", "sepsis"))
    wide = rows.pivot(
        index=["sample_id", "subject_id"], columns="label", values="target"
    ).reset_index()
    bare = rows[["sample_id", "label", "prediction"]].sample(frac=1, random_state=0)
    joined = join_targets(bare, wide.assign(split="test"))
    pd.testing.assert_frame_equal(
        joined.drop(columns="split"), check_predictions(rows), check_dtype=False
    )
    with pytest.raises(InputError, match="the name of the average"):
        check_predictions(rows.assign(label="macro").drop_duplicates("sample_id"))


@settings(max_examples=60, deadline=None)
@given(samples, st.floats(0.05, 0.95))
def test_acting_on_everybody_is_the_most_that_prevalence_pays(rows, threshold):
    targets, scores, weights = arrays(rows)
    if weights.sum() == 0:
        return
    share = (targets * weights).sum() / weights.sum()
    found = decisions.net_benefit(targets, scores, np.array([threshold]), weights)
    assert found <= share + 1e-12
    everybody = decisions.net_benefit(
        targets, np.ones(len(targets)), np.array([threshold]), weights
    )
    np.testing.assert_allclose(
        everybody, share - (1 - share) * threshold / (1 - threshold), atol=1e-12
    )


@settings(max_examples=60, deadline=None)
@given(samples, st.floats(0.05, 1.0))
def test_a_threshold_keeps_its_promise_and_no_higher_one_does(rows, sensitivity):
    targets, scores, weights = arrays(rows)
    if (targets * weights).sum() == 0:
        return
    cut = decisions.threshold_for_sensitivity(targets, scores, sensitivity, weights)

    def found(threshold):
        true, _, missed, _ = discrimination.confusion_counts(targets, scores, weights, threshold)
        return true / (true + missed)

    assert found(cut) >= sensitivity - 1e-9
    higher = [score for score in scores if score > cut]
    assert all(found(score) < sensitivity for score in higher)


def patients(num_patients, first=0, seed=0):
    rng = np.random.default_rng(seed)
    risk = rng.beta(1.2, 3, num_patients)
    ids = np.arange(first, first + num_patients)
    return pd.DataFrame(
        {
            "sample_id": ids,
            "subject_id": ids,
            "label": "death",
            "prediction": risk,
            "target": (rng.random(num_patients) < risk).astype(int),
        }
    )


@pytest.mark.parametrize("method", CURVES)
def test_recalibration_keeps_the_order_of_patients(method):
    new = patients(300, 1000, seed=1)
    better = fit_recalibration(patients(300), method).apply(new)
    pairs = pd.merge(new, better, on="sample_id").sort_values("prediction_x")
    assert (np.diff(pairs["prediction_y"]) >= -1e-12).all()


def test_groups_are_calibrated_as_if_alone():
    old, new = patients(200), patients(100, 1000, seed=1)
    side = {i: "odd" if i % 2 else "even" for i in range(2000)}
    together = predict_sets(fit_sets(old, groups=side), new, side).set_index("sample_id")
    for name in ("odd", "even"):
        of = [rows[rows["sample_id"].map(side) == name] for rows in (old, new)]
        alone = predict_sets(fit_sets(of[0]), of[1]).set_index("sample_id")
        pd.testing.assert_series_equal(alone["answer"], together.loc[alone.index, "answer"])


def test_higher_promises_give_larger_answers():
    old, new = patients(200), patients(100, 1000, seed=1)
    sizes = [predict_sets(fit_sets(old, level), new)["size"] for level in (0.5, 0.8, 0.95, 0.999)]
    for smaller, larger in itertools.pairwise(sizes):
        assert (smaller <= larger).all()
    assert (sizes[-1] == 2).all()


def test_mapie_gives_the_same_sets():
    mapie = pytest.importorskip("mapie.classification")
    from sklearn.base import BaseEstimator, ClassifierMixin

    class Given(ClassifierMixin, BaseEstimator):
        classes_, fitted_ = np.array([0, 1]), True

        def fit(self, X, y):
            return self

        def predict_proba(self, X):
            return np.stack([1 - X[:, 0], X[:, 0]], axis=1)

        def predict(self, X):
            return (X[:, 0] > 0.5).astype(int)

    old, new = patients(150), patients(200, 1000, seed=1)
    theirs = mapie.SplitConformalClassifier(Given(), confidence_level=0.85, prefit=True)
    theirs.conformalize(old[["prediction"]].to_numpy(), old["target"].to_numpy())
    _, sets = theirs.predict_set(new[["prediction"]].to_numpy())
    words = {
        (True, True): "either",
        (True, False): "no",
        (False, True): "yes",
        (False, False): "neither",
    }
    expected = [words[tuple(map(bool, row))] for row in sets[:, :, 0]]
    assert predict_sets(fit_sets(old, 0.85), new)["answer"].tolist() == expected


def test_mapie_gives_the_same_intervals():
    mapie = pytest.importorskip("mapie.regression")
    from sklearn.base import BaseEstimator, RegressorMixin

    class Column(RegressorMixin, BaseEstimator):
        fitted_ = True

        def __init__(self, place=0):
            self.place = place

        def fit(self, X, y):
            return self

        def predict(self, X):
            return X[:, self.place]

    rng = np.random.default_rng(0)
    tables = []
    for first in (0, 1000):
        rows = patients(150, first, first).assign(kind="days")
        rows["prediction"] = rng.uniform(20, 40, len(rows))
        rows["target"] = rows["prediction"] + rng.normal(0, 6, len(rows))
        tables.append(rows.assign(low=rows["prediction"] - 5, high=rows["prediction"] + 4))
    old, new = tables
    columns = ["low", "high", "prediction"]
    models = [Column(place) for place in range(3)]
    theirs = mapie.ConformalizedQuantileRegressor(models, confidence_level=0.9, prefit=True)
    theirs.conformalize(old[columns].to_numpy(), old["target"].to_numpy())
    _, ranges = theirs.predict_interval(new[columns].to_numpy(), symmetric_correction=True)
    ours = predict_intervals(fit_intervals(old, 0.9), new)
    np.testing.assert_allclose(ours[["low", "high"]], ranges[:, :, 0], atol=1e-9)
