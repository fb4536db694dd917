"""Evaluation of what another tool has predicted, and the evidence beside its metrics."""

import json

import numpy as np
import pandas as pd
import pytest

from clinfuse.conventions import InputError
from clinfuse.evaluation.decisions import alarm_table, threshold_for_sensitivity
from clinfuse.evaluation.draws import patient_weights
from clinfuse.evaluation.resampling import check_predictions, evaluate_runs, join_targets
from clinfuse.evaluation.subgroups import subgroup_table
from clinfuse.systems.batches import invented_patients
from clinfuse.training.checkpoints import load_run
from clinfuse.use.evidence import gather_evidence, recalibration_findings
from clinfuse.use.pretrained import load_pretrained
from clinfuse.use.recipes import evaluate, export, guard, train

ROBUST_EPOCHS = {f"{stage}.num_epochs": "1" for stage in ("lstm.stage", "resnet34.stage", "stage")}


def elsewhere(num=240, label="death", kind="binary", seed=0):
    rng = np.random.default_rng(seed)
    signal = rng.normal(size=num)
    died = (rng.random(num) < 1 / (1 + np.exp(0.5 - signal))).astype(int)
    days = np.round(np.exp(1 + 0.4 * signal), 2)
    return pd.DataFrame(
        {
            "sample_id": [f"s{i:04d}" for i in range(num)],
            "subject_id": [f"p{i // 2}" for i in range(num)],
            "label": label,
            "kind": kind,
            "prediction": 1 / (1 + np.exp(-2 * signal)) if kind == "binary" else days + 1,
            "target": died if kind == "binary" else days,
            "split": ["validation" if i < num // 2 else "test" for i in range(num)],
        }
    )


def judged(table, place, **options):
    table.to_csv(place / "theirs.csv", index=False)
    return evaluate([place / "theirs.csv"], out=place / "report", quiet=True, **options)


def test_a_table_from_elsewhere_gets_the_whole_report(tmp_path):
    found = judged(elsewhere(), tmp_path)
    stored = json.loads((tmp_path / "report/metrics.json").read_text())
    tables = {"subgroups", "alarms", "recalibration", "conformal"}
    assert {"runs", "pairs", "notes"} | tables == set(stored)
    (promised,) = stored["conformal"]
    assert promised["low"] < 0.9 < promised["high"] and promised["answers"] == "sets"
    assert stored["runs"]["theirs.csv"]["labels"]["death"]["calibration_slope"]["value"] < 1
    slopes = {
        row["method"]: row["value"]
        for row in stored["recalibration"]
        if row["metric"] == "calibration_slope"
    }
    assert abs(slopes["platt"] - 1) < abs(slopes["as it is"] - 1)
    page = (tmp_path / "report/report.html").read_text()
    headlines = "Alarms at a promised sensitivity", "Whether acting pays", "Answers with a promise"
    assert all(headline in page for headline in (*headlines, "validation"))
    assert {row["chosen_on"] for row in stored["alarms"]} == {"validation"}
    assert found.table.shape[0] == 1


def test_the_threshold_comes_from_validation_and_its_alarms_from_the_test():
    table = elsewhere()
    validation, test = (table[table["split"] == name] for name in ("validation", "test"))
    evidence = gather_evidence({"theirs": test}, None, {"theirs": validation}, 20)
    rows = evidence.alarms.query("sensitivity == 0.9").set_index("number")
    cutoff = threshold_for_sensitivity(validation["target"], validation["prediction"], 0.9)
    weights = patient_weights(test["subject_id"], 20)
    arrays = (test[name].to_numpy() for name in ("target", "prediction", "subject_id"))
    expected = alarm_table(*arrays, np.array([cutoff]), weights).loc[cutoff]
    for number in expected.index:
        assert rows.loc[number, "value"] == expected.loc[number, "value"]


def test_days_alone_are_judged_without_risks(tmp_path):
    found = judged(elsewhere(label="length_of_stay_days", kind="days"), tmp_path)
    assert found.metrics["runs"]["theirs.csv"]["labels"]["length_of_stay_days"]["mae"]["value"] == 1
    page = (tmp_path / "report/report.html").read_text()
    assert "comes closest to the length of stay days" in page and "Alarms at" not in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="target"), "lacks target; add the columns or give --data"),
        (lambda t: t.assign(split="train"), "no rows of split 'test'; it has train"),
        (lambda t: t.assign(prediction=t["prediction"] * 9), "prediction outside 0 to 1"),
        (lambda t: t.assign(prediction=np.nan), "prediction outside 0 to 1"),
        (lambda t: pd.concat([t, t.tail(1)]), "s0239, label 'death' appears twice"),
        (lambda t: t.assign(subject_id="p1"), "was used to fit the recalibration"),
        (lambda t: t.drop(columns="prediction"), "lack the column 'prediction'"),
    ],
)
def test_bad_tables_from_elsewhere_leave_no_report(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        judged(change(elsewhere()), tmp_path)
    assert not (tmp_path / "report").exists()


def test_a_run_folder_needs_its_data(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match="give the prepared folder with --data"):
        evaluate([tmp_path / "run"], out=tmp_path / "report", quiet=True)


def test_no_calibration_data_is_said_and_not_repaired():
    table = elsewhere()
    alone = gather_evidence({"theirs": table.drop(columns="split")}, None, None, 10)
    assert alone.notes == (
        "theirs: no calibration data, so thresholds are chosen on these samples",
    )
    validation, test = (table[table["split"] == name] for name in ("validation", "test"))
    _, notes = recalibration_findings(test, validation.assign(target=1), 5)
    assert [note.split(":")[0] for note in notes] == [
        f"not recalibrated by {method}" for method in ("temperature", "platt", "isotonic")
    ]


@pytest.mark.parametrize("system", ["logistic-regression", "lstm", "robust-fusion"])
def test_every_system_is_exported_without_its_patients(system, tmp_path):
    data = invented_patients(tmp_path / "data", 60)
    recipe = "safe" if system == "logistic-regression" else "quick"
    changes = {"lstm": {"stage.num_epochs": "1"}, "robust-fusion": ROBUST_EPOCHS}.get(system, {})
    run = tmp_path / "run"
    train(system, data.path, run, recipe=recipe, set=changes, quiet=True)
    evaluate([run], data=data.path, out=tmp_path / "report", quiet=True)
    exported = export(run, tmp_path / "shared")
    assert set(exported.files) == {"README.md", "config.json", "model.safetensors"}
    rows = data.rows("test")
    again = load_pretrained(tmp_path / "shared").predict(data, rows)
    assert np.array_equal(again, load_run(run).predict(data, rows))
    card = (tmp_path / "shared/README.md").read_text()
    assert "| 23a | performance with intervals | in hospital mortality AUROC" in card
    assert "| 17 | ethical approval | Open |" in card
    assert guard([tmp_path / "shared", tmp_path / "report", run / "card.md"]).ok


def test_one_class_in_a_subgroup_is_named_and_not_ranked():
    table = elsewhere()
    groups = table[["sample_id"]].assign(unit=np.where(table["target"] == 1, "a", "b"))
    found = subgroup_table(table.drop(columns="split"), groups, num_resamples=20)
    rows = found[found["metric"] == "auroc"]
    assert rows["is_small"].all() and rows["p_holm"].isna().all() and rows["value"].isna().all()
    assert rows["note"].str.contains("both classes").all()
    assert len(found) == 2 * found["metric"].nunique()


def test_predictions_and_labels_of_different_splits_are_named():
    table = elsewhere().assign(death=lambda t: t["target"])
    bare = table[["sample_id", "label", "prediction"]]
    with pytest.raises(InputError, match="sample s0000, which is not of split 'test'; 120 such"):
        join_targets(bare, table, "test")
    with pytest.raises(InputError, match="lack sample s0121 of split 'test'; 119 such rows"):
        join_targets(bare.iloc[[120]], table, "test")
    with pytest.raises(InputError, match="samples hold s0239 twice"):
        join_targets(bare.tail(120), pd.concat([table, table.tail(1)]), "test")
    with pytest.raises(InputError, match="is not of the split 'validation' like the first row"):
        check_predictions(table)
    with pytest.raises(InputError, match="run 'theirs' is of split 'validation', not 'test'"):
        evaluate_runs({"theirs": table.head(120)}, "test")


def test_one_class_in_a_resample_is_counted():
    table = elsewhere(num=12, seed=3).drop(columns="split")
    found = evaluate_runs({"theirs": table.assign(target=[1] + [0] * 11)}, num_resamples=50)
    note = found["runs"]["theirs"]["labels"]["death"]["auroc"]["note"]
    assert "of 50 resamples" in note
