"""The command line as people use it: a process, its exit status, one line of complaint, and nothing half-written."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time

import pandas as pd
import pytest

from clinfuse.conventions import InputError
from clinfuse.use.recipes import audit, describe, evaluate, prepare, train, ward
from clinfuse.use.results import reachable_auroc

TASK = "--task=in-hospital-mortality"


def clinfuse(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "clinfuse.use.command_line", *map(str, words)],
        capture_output=True,
        text=True,
        **options,
    )


def complaint(done):
    """The one line on standard error of a command that failed."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("clinfuse: ")]
    assert done.returncode == 1 and len(lines) == 1, (done.returncode, done.stderr)
    return lines[0]


@pytest.fixture(scope="module")
def small_ward(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wards") / "ward"
    ward(folder, patients=90, seed=1, quiet=True)
    return folder


@pytest.fixture
def broken(small_ward, tmp_path):
    """A copy of the ward's tables to break."""
    shutil.copytree(small_ward / "mimic-iv", tmp_path / "mimic-iv")
    return tmp_path / "mimic-iv"


@pytest.fixture(scope="module")
def prepared(small_ward, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "data"
    prepare(small_ward, folder, task="in-hospital-mortality", quiet=True)
    return folder


def rewrite(file, change):
    table = pd.read_csv(file, dtype=str, keep_default_na=False)
    change(table).to_csv(file, index=False, compression="gzip")


def test_help_is_immediate():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert clinfuse("--help").returncode == 0
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5


def test_importing_the_package_is_immediate():
    code = "import time; t = time.perf_counter(); import clinfuse; print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert float(done.stdout) < 0.3


def test_importing_every_module_leaves_the_accelerator_alone():
    code = (
        "import importlib, pkgutil, sys, clinfuse\n"
        "for m in pkgutil.walk_packages(clinfuse.__path__, 'clinfuse.'): importlib.import_module(m.name)\n"
        "torch = sys.modules.get('torch')\n"
        "print(torch is not None and torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("words", [[], ["cure"], ["prepare", "ward"], ["demo", "--fast"]])
def test_senseless_calls_have_status_two(words):
    assert clinfuse(*words).returncode == 2


def test_missing_and_empty_folders_are_named(tmp_path):
    assert str(tmp_path / "nowhere") in complaint(clinfuse("check", tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in complaint(clinfuse("check", tmp_path / "empty"))


def test_existing_output_is_kept(small_ward, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("three years of work")
    assert str(out) in complaint(clinfuse("prepare", small_ward, out, TASK, "--quiet"))
    assert (out / "thesis.txt").read_text() == "three years of work"


def lose_table(folder):
    (folder / "icu/chartevents.csv.gz").unlink()


def lose_column(folder):
    rewrite(folder / "icu/icustays.csv.gz", lambda table: table.drop(columns="intime"))


def cut_off(folder):
    file = folder / "icu/chartevents.csv.gz"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def write_a_word(folder):
    def change(table):
        table.loc[3, "los"] = "three days"
        return table

    rewrite(folder / "icu/icustays.csv.gz", change)


def repeat_a_stay(folder):
    rewrite(folder / "icu/icustays.csv.gz", lambda table: pd.concat([table, table.iloc[[5]]]))


def turn_back_time(folder):
    def change(table):
        table.loc[2, "outtime"] = "2001-01-01 00:00:00"
        return table

    rewrite(folder / "icu/icustays.csv.gz", change)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lose_table, ["chartevents"]),
        (lose_column, ["icustays", "intime"]),
        (cut_off, ["chartevents"]),
        (write_a_word, ["icustays", "los", "three days"]),
        (repeat_a_stay, ["icustays", "stay_id"]),
        (turn_back_time, ["icustays", "outtime"]),
    ],
)
def test_bad_tables_are_named_and_leave_nothing(broken, tmp_path, spoil, words):
    spoil(broken)
    line = complaint(clinfuse("prepare", broken, tmp_path / "out", TASK, "--quiet"))
    assert all(word in line for word in words), line
    assert {path.name for path in tmp_path.iterdir()} <= {"mimic-iv", ".clinfuse-extracts"}
    assert not [path for path in tmp_path.glob(".clinfuse-extracts/*") if path.is_dir()]
    assert clinfuse("check", broken).returncode == 1


def test_a_task_that_a_source_cannot_serve_lists_those_it_can(small_ward, tmp_path):
    done = clinfuse("prepare", small_ward, tmp_path / "out", "--task", "hypotension")
    assert "in-hospital-mortality" in complaint(done)


def test_a_full_disk_leaves_nothing(small_ward, tmp_path):
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    place = tmp_path / "disk"
    place.mkdir()
    done = clinfuse("prepare", small_ward, place / "out", TASK, "--quiet", preexec_fn=small_files)
    assert str(place) in complaint(done) and "disk full" in complaint(done)
    left = [path for path in place.rglob("*") if path.is_file()]
    assert {path.suffix for path in left} <= {".lock", ".json"}


def test_a_bad_radiograph_is_reported_and_the_run_goes_on(small_ward, tmp_path):
    shutil.copytree(small_ward, tmp_path / "ward")
    for image in (tmp_path / "ward/mimic-cxr-jpg/files").rglob("*.jpg"):
        image.write_bytes(b"not an image")
    done = clinfuse("prepare", tmp_path / "ward", tmp_path / "out", TASK, "--quiet")
    assert done.returncode == 0, done.stderr
    samples = pd.read_parquet(tmp_path / "out/samples.parquet")
    assert (samples["radiograph"] == -1).all()
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert ".jpg" in json.dumps(manifest)


def test_from_prepared_folder_to_report_and_predictions(prepared, tmp_path):
    run, report, out = tmp_path / "run", tmp_path / "report", tmp_path / "predictions.csv"
    for words in (
        ["describe", prepared],
        ["train", "logistic-regression", prepared, run, "--quiet"],
        ["evaluate", run, "--data", prepared, "--out", report, "--quiet"],
        ["predict", run, prepared, out, "--quiet"],
    ):
        done = clinfuse(*words)
        assert done.returncode == 0, (words, done.stderr)
    predictions = pd.read_csv(out)
    assert list(predictions.columns) == ["sample_id", "label", "prediction"]
    assert len(predictions) == len(pd.read_parquet(prepared / "samples.parquet"))
    metrics = json.loads((report / "metrics.json").read_text())
    found = metrics["runs"]["run"]["labels"]["in_hospital_mortality"]["auroc"]
    assert found["low"] <= found["value"] <= found["high"]
    assert json.loads((run / "metrics.json").read_text())["runs"].keys() == {"run"}
    page = (report / "report.html").read_text()
    assert "<script" not in page and "http" not in page.replace("http://www.w3.org", "")
    assert str(out) in complaint(clinfuse("predict", run, prepared, out, "--quiet"))


def test_a_reader_may_stop_reading(prepared):
    words = f"{sys.executable} -m clinfuse.use.command_line describe {prepared} | head -n 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", words], capture_output=True, text=True, check=True
    )
    assert done.stderr == "" and len(done.stdout.splitlines()) == 1


def test_settings_are_checked_by_name(prepared, tmp_path):
    done = clinfuse("train", "lstm", prepared, tmp_path / "run", "--set", "speed=3", "--quiet")
    assert "speed" in complaint(done)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_demo_from_nothing(tmp_path):
    done = clinfuse("demo", "--quiet", cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr
    assert "robust-fusion" in done.stdout
    assert (tmp_path / "clinfuse-demo/report/report.html").exists()


def test_phenotypes_are_prepared_trained_and_scored(small_ward, tmp_path):
    data = prepare(small_ward, tmp_path / "data", task="phenotyping", quiet=True)
    assert len(data.labels) == 25 and audit(data.path).ok
    train("logistic-regression", data.path, tmp_path / "run", quiet=True)
    found = evaluate(
        [tmp_path / "run"], data=data.path, out=tmp_path / "report", truth=small_ward, quiet=True
    )
    assert set(found.metrics["runs"]["run"]["labels"]) <= set(data.labels)
    page = (tmp_path / "report/report.html").read_text()
    assert "The leak audit: nothing from the future" in page and "How much was not measured" in page
    best = reachable_auroc(small_ward, data, data.rows("train"))
    assert max(best["series"], best["radiograph"]) < best["series + radiograph"] < 1
    stay = prepare(small_ward, tmp_path / "stay", task="length-of-stay", quiet=True)
    with pytest.raises(InputError, match="no best score for length-of-stay"):
        reachable_auroc(small_ward, stay, stay.rows("train"))
    with pytest.raises(InputError, match="does not serve the task length-of-stay"):
        train("persistence", stay.path, tmp_path / "persistence", quiet=True)


def test_films_are_described_and_teach_an_encoder(small_ward, prepared, tmp_path):
    films = prepare(
        small_ward, tmp_path / "films", task="chest-findings", splits=prepared, quiet=True
    )
    assert "support_devices" in str(describe(films.path))
    changes = {"stage.num_epochs": "1"}
    done = train("resnet34", films.path, tmp_path / "run", recipe="quick", set=changes, quiet=True)
    assert len(done.history) == 1
