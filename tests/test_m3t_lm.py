"""M3T-LM from the command line: two questions of different kinds, on a ward and on sources that lack something."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest

from clinfuse.conventions import InputError
from clinfuse.data.dataset import PreparedData
from clinfuse.systems.batches import invented_patients
from clinfuse.systems.contract import build_system
from clinfuse.training.checkpoints import load_run
from clinfuse.training.loop import train_system
from clinfuse.use.command_line import COMMANDS, run_command
from clinfuse.use.recipes import evaluate, predict, prepare, train, ward

ONE_EPOCH = {"stage.num_epochs": "1"}


def command(*words):
    assert run_command(COMMANDS, [*map(str, words), "--quiet"]) == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A small ward, prepared, with a run of one epoch; every step a command."""
    folder = tmp_path_factory.mktemp("stays")
    ward(folder / "ward", patients=60, quiet=True)
    command("prepare", folder / "ward", folder / "data", "--task", "mortality-and-stay")
    short = ("--recipe", "quick", "--set", "stage.num_epochs=1")
    command("train", "m3t-lm", folder / "data", folder / "run", *short)
    return folder


def test_both_answers_are_told_and_judged_in_their_own_kind(place):
    command("predict", place / "run", place / "data", place / "said.csv")
    data, said = PreparedData(place / "data"), pd.read_csv(place / "said.csv")
    by_label = dict(list(said.groupby("label")["prediction"]))
    assert {name: len(v) for name, v in by_label.items()} == dict.fromkeys(
        data.labels, len(data.samples)
    )
    assert by_label["in_hospital_mortality"].between(0, 1).all()
    assert by_label["length_of_stay_days"].between(1, 30).any()
    command("evaluate", place / "run", "--data", place / "data", "--out", place / "judged")
    found = json.loads((place / "judged/metrics.json").read_text())["runs"]["run"]["labels"]
    assert {"mae", "rmse", "r2"} <= set(found["length_of_stay_days"])
    assert "auroc" in found["in_hospital_mortality"]
    report = (place / "judged/report.html").read_text()
    assert "run comes closest to the length of stay days" in report
    figures = {path.stem for path in (place / "judged/figures").iterdir()}
    assert figures == {"curves", "decisions", "reliability", "subgroups"}


def test_a_run_predicts_without_its_training_data_and_without_texts_and_images(place):
    system, data = load_run(place / "run"), PreparedData(place / "data")
    assert set(system.description.vocabularies) == {"titles", "procedures"}
    rows, bare = data.rows("test"), PreparedData(place / "data")
    texts = [name for name in bare.samples if name.startswith("text_")]
    bare.samples = data.samples.drop(columns=texts).assign(radiograph=-1)
    bare.samples = bare.samples[bare.samples["split"] == "test"].reset_index(drop=True)
    assert np.isfinite(system.predict(bare, np.arange(len(rows)))).all()


@pytest.mark.parametrize(
    ("setting", "gone"),
    [
        ("network.image=none", "encoders.image"),
        ("network.titles=false", "encoders.titles"),
        ("network.numbers.attention=false", "attention"),
        ("objective=equal", "balance"),
    ],
)
def test_a_part_can_be_switched_off(place, tmp_path, setting, gone):
    name, _, value = setting.partition("=")
    changes = ONE_EPOCH | {name: value, "stage.batch_size": "32", "stage.learning_rate": "0.002"}
    train("m3t-lm", place / "data", tmp_path / "run", recipe="quick", set=changes, quiet=True)
    without, whole = load_run(tmp_path / "run"), load_run(place / "run")
    assert any(gone in weight for weight in whole.state_dict())
    assert not any(gone in weight for weight in without.state_dict())
    assert without.stages()[0].learning_rate == 0.002


def test_another_recipe_reads_a_whole_image(place):
    data = PreparedData(place / "data")
    for recipe in ("safe", "published"):
        system = build_system("m3t-lm", data, recipe)
        rows = np.flatnonzero(data.samples["radiograph"] >= 0)[:2]
        assert np.isfinite(system.predict(data, rows)).all()


def test_the_demo_of_mimic_has_no_images(mimic_demo, tmp_path):
    prepare(mimic_demo, tmp_path / "data", task="mortality-and-stay", quiet=True)
    train("m3t-lm", tmp_path / "data", tmp_path / "run", set=ONE_EPOCH, quiet=True)
    assert load_run(tmp_path / "run").config.network.image == "none"
    said = predict(tmp_path / "run", tmp_path / "data", tmp_path / "said.csv", quiet=True)
    assert said["prediction"].notna().all()


def test_samples_without_a_stay_are_learned_from_and_left_out_of_the_judgement(tmp_path):
    data = invented_patients(tmp_path / "data", task="mortality-and-stay")
    file = tmp_path / "data/samples.parquet"
    unknown = np.concatenate([data.rows("train")[:9], data.rows("test")[:2]])
    samples = pd.read_parquet(file)
    samples.loc[unknown, "length_of_stay_days"] = np.nan
    samples.to_parquet(file)
    train("m3t-lm", data.path, tmp_path / "run", recipe="quick", set=ONE_EPOCH, quiet=True)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        evaluate([tmp_path / "run"], data=data.path, out=tmp_path / "judged", quiet=True)
    assert [w for w in heard if "2 of 16 test samples lack an outcome" in str(w.message)]


def test_stays_are_learned_about_as_well_as_a_regression_learns_them(tmp_path):
    data = invented_patients(tmp_path / "data", num_samples=400, task="mortality-and-stay")
    rows, label = data.rows("test"), "length_of_stay_days"
    actual, place = data.samples[label].to_numpy()[rows], data.labels.index(label)
    patient = {"network.image": "none", "stage.num_epochs": "40", "stage.patience": "10"}
    errors = {"median": np.abs(data.samples[label].iloc[data.rows("train")].median() - actual)}
    for name, changes in (
        ("m3t-lm", patient),
        ("logistic-regression", {"columns": "stay"}),
    ):
        train(name, data.path, tmp_path / name, recipe="quick", set=changes, quiet=True)
        told = load_run(tmp_path / name).predict(data, rows)[:, place]
        errors[name] = np.abs(told - actual)
    mean = {name: error.mean() for name, error in errors.items()}
    assert mean["m3t-lm"] < 0.8 * mean["median"]
    assert mean["m3t-lm"] < 1.15 * mean["logistic-regression"]


def test_invented_stays_are_for_training_alone_and_repeatable(tmp_path):
    data = invented_patients(tmp_path / "data", task="mortality-and-stay")
    changes = ONE_EPOCH | {"balance.num_neighbours": "3", "balance.optimiser": "rmsprop"}
    runs = [tmp_path / name for name in ("a", "b")]
    for run in runs:
        train("m3t-lm", data.path, run, recipe="quick", set=changes, quiet=True)
    told = [load_run(run).predict(data, data.rows("test")) for run in runs]
    assert np.array_equal(*told)
    assert load_run(runs[0]).config.balance.num_neighbours == 3
    stored = pd.read_parquet(tmp_path / "data/samples.parquet")
    assert len(stored) == len(data.samples) and not stored["sample_id"].str.contains(",").any()


def test_too_few_deaths_for_so_many_neighbours_are_told_before_an_epoch(tmp_path):
    data = invented_patients(tmp_path / "data", num_samples=30, task="mortality-and-stay")
    changes = ONE_EPOCH | {"balance.num_neighbours": "25"}
    with pytest.raises(InputError, match="25 neighbours of each need at least 26"):
        train("m3t-lm", data.path, tmp_path / "run", recipe="quick", set=changes, quiet=True)


def test_the_challenge_has_numbers_and_nothing_else(challenge_2012, tmp_path):
    data = prepare(challenge_2012, tmp_path / "data", task="mortality-and-stay", quiet=True)
    train("m3t-lm", data.path, tmp_path / "run", recipe="quick", set=ONE_EPOCH, quiet=True)
    system = load_run(tmp_path / "run")
    assert system.config.network.image == "none" and not system.description.vocabularies
    said = predict(tmp_path / "run", data.path, tmp_path / "said.csv", quiet=True)
    assert len(said) == 2 * len(data.samples) and np.isfinite(said["prediction"]).all()


def test_titles_that_are_all_empty_are_no_obstacle(tmp_path):
    data = invented_patients(tmp_path / "data", task="mortality-and-stay")
    data.samples["text_diagnoses"] = None
    texts = {"titles": ("diagnoses",), "num_words": (50,), "num_tokens": (9,)}
    system = build_system("m3t-lm", data, "quick", texts | ONE_EPOCH)
    train_system(system, data, tmp_path, quiet=True)
    assert system.description.vocabularies == {"diagnoses": ()}
    blank = PreparedData(data.path)
    blank.samples = data.samples.assign(text_diagnoses="   ")
    rows = data.rows("test")
    assert np.array_equal(system.predict(blank, rows), system.predict(data, rows))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_one_outcome_in_a_split_is_learned_from_and_not_judged(tmp_path, split):
    invented_patients(tmp_path / "data", task="mortality-and-stay")
    file = tmp_path / "data/samples.parquet"
    samples = pd.read_parquet(file)
    samples.loc[samples["split"] == split, "in_hospital_mortality"] = 0
    samples.to_parquet(file)
    options = {"recipe": "quick", "quiet": True}
    run = train("m3t-lm", tmp_path / "data", tmp_path / "run", set=ONE_EPOCH, **options)
    assert run.history["validation_auroc"].isna().all() == (split == "validation")
    judged = evaluate([tmp_path / "run"], data=tmp_path / "data", out=tmp_path / "out", quiet=True)
    found = judged.metrics["runs"]["run"]["labels"]["in_hospital_mortality"]["auroc"]
    assert np.isnan(found["value"]) == (split == "test")
    if split == "train":
        with pytest.raises(InputError, match="have the same outcome; there is nothing to balance"):
            more = ONE_EPOCH | {"balance.num_neighbours": "3"}
            train("m3t-lm", tmp_path / "data", tmp_path / "balanced", set=more, **options)
