"""The study of IOHFuseLM by its command, on a theatre of ten operations and a coarse grid."""

import json
import subprocess
import sys

import numpy as np
import pytest

from clinfuse.conventions import InputError
from clinfuse.data.dataset import PreparedData
from clinfuse.evaluation.hypotension_events import watched_windows
from clinfuse.training.checkpoints import load_run
from clinfuse.training.records import read_record
from clinfuse.use.iohfuselm_tables import IOHFUSELM_METRICS, iohfuselm_study
from clinfuse.use.recipes import prepare, study, ward


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Windows of thirty samples, half a minute each."""
    place = tmp_path_factory.mktemp("study")
    ward(place / "ward", patients=0, surgeries=10, seed=1, quiet=True)
    return prepare(
        place / "ward", place / "data", task="hypotension", timestep_hours=30 / 3600, quiet=True
    ).path


@pytest.fixture(scope="module")
def done(prepared):
    """The quick study from the prompt: its folder and what it printed."""
    out = prepared.parent / "out"
    words = ["study", "iohfuselm", str(prepared), str(out), "--quick", "--seeds", "1", "--quiet"]
    command = [sys.executable, "-m", "clinfuse.use.command_line", *words]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return out, finished.stdout


def test_every_cell_has_its_run_and_its_record(done):
    out, _ = done
    for cell in iohfuselm_study().cells:
        record = read_record(out / "records" / f"{cell.name}.json")
        assert record["config"]["run"]["system"] == cell.system
        assert set(record["metrics"]["noise 0.00"]["macro"]) == set(IOHFUSELM_METRICS)
    stages = {
        name: json.loads((out / "runs" / name / "seed-0" / "config.json").read_text())["config"]
        for name in ("whole", "no-text", "no-alignment", "pure-noise", "no-pretraining")
    }
    assert stages["no-text"]["text"] == "none" and stages["whole"]["text"] == "description"
    assert not stages["no-alignment"]["network"]["alignment"]["is_used"]
    assert stages["pure-noise"]["diffusion"]["noised_steps"] == 50
    assert stages["no-pretraining"]["pretraining"]["num_epochs"] == 0


def test_tables_and_verdicts_are_printed_and_kept(done):
    out, printed = done
    kept, plan = read_record(out / "records" / "tables.json")["metrics"], iohfuselm_study()
    assert set(kept["tables"]) == set(plan.tables)
    assert [claim["claim"] for claim in kept["claims"]] == [claim.text for claim in plan.claims]
    assert "10 minutes: IOHFuseLM is above dlinear, AUROC" in printed
    assert "Parts, mean of the horizons" in (out / "report.html").read_text()


def test_a_printed_error_is_that_of_the_forecast(done, prepared):
    out, _ = done
    data = PreparedData(prepared)
    rows = data.rows("test")
    seen = watched_windows(data, rows)
    forecast = load_run(out / "runs" / "dlinear" / "seed-0").forecast(data, rows)
    steps = seen.plan.steps(600)
    error = np.abs(forecast[:, :steps] - seen.future[:, :steps])[seen.is_low[:, :steps]].mean()
    rows = read_record(out / "records" / "tables.json")["metrics"]["tables"]["10 minutes"]
    (found,) = (r for r in rows if (r["cell"], r["metric"]) == ("dlinear", "mae_hypotensive"))
    assert found["value"] == pytest.approx(error, rel=1e-4) and found["printed"] is None


def test_windows_of_other_horizons_are_refused_before_anything_is_trained(prepared, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for file in prepared.iterdir():
        (folder / file.name).symlink_to(file)
    manifest = json.loads((prepared / "manifest.json").read_text())
    manifest |= {"labels": ["hypotension_60_min"]}
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="asks for hypotension_5_min; found: hypotension_60_min"):
        study("iohfuselm", folder, tmp_path / "out", quick=True, quiet=True)
    assert not (tmp_path / "out").exists()
