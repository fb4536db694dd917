"""The notebooks are the source: they run, and the package and README.md are what they say."""

import filecmp
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from nbdev.config import get_config
from nbdev.test import test_nb as run_notebook
from notebook_tools import NOTEBOOKS, ROOT, readme

CONFIG = get_config(path=ROOT)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: str(path.relative_to(ROOT / "nbs")))
def test_runs_top_to_bottom(path, monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")  # nbdev 2 sets it and never takes it back; monkeypatch does
    monkeypatch.setenv("MPLBACKEND", "agg")
    passed, _ = run_notebook(path, skip_flags=CONFIG.tst_flags.split(), basepath=ROOT)
    assert passed


def test_package_is_what_the_notebooks_export(tmp_path):
    shutil.copy(ROOT / "settings.ini", tmp_path)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs")
    subprocess.run([Path(sys.executable).parent / "nbdev_export"], cwd=tmp_path, check=True)
    exported, kept = tmp_path / CONFIG.lib_path.name, CONFIG.lib_path
    names = {p.relative_to(kept) for p in kept.rglob("*.py")}
    assert names == {p.relative_to(exported) for p in exported.rglob("*.py")}, (
        "stale or missing modules"
    )
    assert [n for n in names if not filecmp.cmp(exported / n, kept / n, shallow=False)] == []


def test_readme_is_index_notebook():
    text, figures = readme()
    assert (ROOT / "README.md").read_text(encoding="utf-8") == text
    assert all((ROOT / name).read_bytes() == data for name, data in figures.items())
