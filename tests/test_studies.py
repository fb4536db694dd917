"""A study as its users run it: all tables of a paper from the prompt, broken off and resumed, a record for every cell."""

import json
import subprocess
import sys
import time

import pandas as pd
import pytest

from clinfuse.conventions import InputError
from clinfuse.training.records import read_record
from clinfuse.use import study_runs
from clinfuse.use.recipes import prepare, study, ward
from clinfuse.use.robust_fusion_tables import robust_fusion_study


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with mortality and phenotyping of a few patients."""
    place = tmp_path_factory.mktemp("study")
    ward(place / "ward", patients=110, seed=3, quiet=True)
    for task in ("in-hospital-mortality", "phenotyping"):
        options = {"task": task, "timestep_hours": 12.0, "quiet": True}
        prepare(place / "ward", place / "data" / task, **options)
    return place / "data"


@pytest.fixture(scope="module")
def done(prepared):
    """The quick study, killed after a few cells and started again."""
    out = prepared.parent / "out"
    words = ["study", "robust-fusion", str(prepared), str(out), "--quick", "--seeds", "1"]
    command = [sys.executable, "-m", "clinfuse.use.command_line", *words, "--quiet"]
    broken = subprocess.Popen(command)
    while broken.poll() is None and len(list(out.rglob("*.parquet"))) < 3:
        time.sleep(0.1)
    broken.kill()
    broken.wait()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return out, before, finished.stdout


def test_every_cell_has_its_runs_and_its_record(done):
    out, _, _ = done
    for cell in robust_fusion_study().cells:
        record = read_record(out / "records" / f"{cell.name}.json")
        assert record["config"]["run"]["system"] == cell.system
        assert len(record["metrics"]["seconds"]) == 1
        for noise in cell.test_noise:
            assert "auroc" in record["metrics"][f"noise {noise:.2f}"]["macro"]
    assert not list((out / "data").glob("*")), "noisy copies are left"


def test_what_was_done_before_the_kill_was_not_done_again(done):
    _, before, _ = done
    assert before and all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_tables_and_verdicts_are_printed_and_kept(done):
    out, _, printed = done
    tables = read_record(out / "records" / "tables.json")["metrics"]
    assert set(tables["tables"]) == set(robust_fusion_study().tables)
    assert len(tables["claims"]) == len(robust_fusion_study().claims)
    for title in tables["tables"]:
        assert title in printed
    page = (out / "report.html").read_text()
    assert "<table" in page and "src=" not in page


def test_predictions_of_noisy_patients_are_of_the_same_patients(done):
    out, _, _ = done
    folder = out / "predictions" / "phenotyping-medfuse"
    clean, noisy = (pd.read_parquet(folder / f"seed-0-noise-{n}.parquet") for n in ("0.00", "0.60"))
    keys = ["sample_id", "label", "target"]
    pd.testing.assert_frame_equal(clean[keys], noisy[keys])
    assert (clean["prediction"] != noisy["prediction"]).mean() > 0.9


def test_other_data_in_the_same_folder_is_refused(done, prepared):
    out, _, _ = done
    with pytest.raises(InputError, match="another study, or one of other data"):
        study("robust-fusion", prepared / "phenotyping", out, quick=True, seeds=1, quiet=True)


def test_two_folders_of_one_task_are_refused(prepared, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(prepared / "phenotyping")
    with pytest.raises(InputError, match="both prepared for phenotyping"):
        study_runs.prepared_by_task(tmp_path)


def test_a_folder_of_another_task_is_refused(prepared, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    manifest = json.loads((prepared / "phenotyping" / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"task": "decompensation"}))
    with pytest.raises(InputError, match="holds decompensation, which the study does not ask for"):
        study("robust-fusion", folder, tmp_path / "out", quick=True, quiet=True)
