"""The guard against patients: planted ones are found in every kind of output, and nothing else is."""

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from clinfuse.conventions import InputError
from clinfuse.data.privacy_guard import guard, is_film, scan, scan_file

ID = "30118103"
ROWS = pd.DataFrame({"stay_id": [int(ID), 30118104], "auroc": [0.5, 0.6]})
FILM = np.clip(
    np.linspace(10, 240, 96)[:, None] + np.random.default_rng(0).normal(0, 8, (96, 96)), 0, 255
).astype(np.uint8)


def picture(form="PNG"):
    stream = io.BytesIO()
    Image.fromarray(FILM).save(stream, form)
    return stream.getvalue()


def notebook(*outputs, source="", kind="code", **cell):
    cells = [{"cell_type": kind, "source": source, "outputs": list(outputs), **cell}]
    return json.dumps({"cells": cells, "nbformat": 4, "nbformat_minor": 5, "metadata": {}})


def shown(kind, content):
    return {"output_type": "display_data", "data": {kind: content}, "metadata": {}}


FILM_TEXT = base64.b64encode(picture()).decode()
PLANTED = {
    "stream.ipynb": (notebook({"output_type": "stream", "text": [f"stay {ID}\n"]}), "identifier"),
    "html.ipynb": (notebook(shown("text/html", ROWS.to_html().split("\n"))), "patient rows"),
    "plain.ipynb": (notebook(shown("text/plain", str(ROWS))), "patient rows"),
    "json.ipynb": (notebook(shown("application/json", {"hadm_id": 20000019})), "patient rows"),
    "image.ipynb": (notebook(shown("image/png", FILM_TEXT)), "image"),
    "error.ipynb": (
        notebook({"output_type": "error", "traceback": [f"KeyError: {ID}"]}),
        "identifier",
    ),
    "prose.ipynb": (notebook(source=f"We look at p1{ID[1:]}.", kind="markdown"), "identifier"),
    "attached.ipynb": (
        notebook(kind="markdown", attachments={"a.png": {"image/png": FILM_TEXT}}),
        "image",
    ),
    "report.html": (f"<p>Admitted 2157-03-01 10:05</p><b>{ID}</b>", "date"),
    "film.html": (f'<img src="data:image/png;base64,{FILM_TEXT}">', "image"),
    "table.html": (ROWS.to_html(), "patient rows"),
    "card.md": (f"| sample | risk |\n| {ID} | 0.9 |", "identifier"),
    "metrics.json": (json.dumps({"worst": [int(ID)]}), "identifier"),
    "config.json": (json.dumps({"vocabularies": {"notes": ["sepsis", ID]}}), "identifier"),
    "rows.json": (json.dumps([{"sample_id": "17", "risk": 0.4}]), "patient rows"),
    "history.csv": (ROWS.to_csv(index=False), "patient rows"),
    "hidden.csv": (
        pd.DataFrame({"a": [1.5], "b": [f"p1{ID[1:]}"]}).to_csv(index=False),
        "identifier",
    ),
    "notes.csv": (pd.DataFrame({"a": ["Chief Complaint: fall"]}).to_csv(), "note text"),
    "times.csv": (pd.DataFrame({"a": ["2157-03-01 10:05:00"]}).to_csv(), "date"),
    "run.log": (f"epoch 1\nfailed at {ID}\n", "identifier"),
    "events.out.tfevents.1.host": (f"\x00\x01loss of {ID}\x02", "identifier"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_patients_are_found_in_text(name, tmp_path):
    content, what = PLANTED[name]
    (tmp_path / name).write_text(content)
    found = scan([tmp_path])
    assert not found.ok and what in {finding.what for finding in found.findings}
    assert name in str(found) and ID not in str(found)


def arrays(place):
    pd.DataFrame({"who": ["a"], "stay_id": [3]}).to_parquet(place / "a.parquet")
    ROWS.to_csv(place / "b.csv.gz", index=False)
    np.save(place / "c.npy", FILM[None])
    np.save(place / "d.npy", np.zeros((7, 20), np.float32))
    np.savez(place / "e.npz", films=FILM)
    (place / "f.dcm").write_bytes(b"\0" * 128 + b"DICM")
    (place / "g.jpg").write_bytes(picture("JPEG"))
    (place / "h.png").write_bytes(picture())


def test_planted_patients_are_found_in_tables_arrays_and_images(tmp_path):
    arrays(tmp_path)
    found = {finding.file.rsplit("/", 1)[1][0] for finding in scan([tmp_path]).findings}
    assert found == set("abcdefgh")


def test_what_may_be_shared_is_not_held_back(tmp_path):
    import matplotlib.pyplot as plt

    drawn, axis = plt.subplots()
    axis.plot([0, 1], [0.7, 0.8])
    drawn.savefig(tmp_path / "curve.png")
    plt.close(drawn)
    metrics = {"auroc": 0.81234567, "num_parameters": 21284672, "bytes": 30118103, "seed": 4}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "history.csv").write_text("epoch,train_loss,seconds\n1,0.61,3.2\n2,0.52,3.1\n")
    (tmp_path / "card.md").write_text("AUROC 0.812 (0.780 to 0.844) on 1,912 samples, 21,284,672.")
    (tmp_path / "page.ipynb").write_text(notebook(shown("text/plain", "12 of 312 stays, 0.12345")))
    found = scan([tmp_path])
    assert found.ok and found.num_files == 5, str(found)


def test_only_the_manifest_of_the_ward_opens_a_folder(tmp_path):
    inner = tmp_path / "data"
    inner.mkdir()
    arrays(inner)
    for is_synthetic in (False, "true", 1, True):
        (inner / "manifest.json").write_text(json.dumps({"source": {"synthetic": is_synthetic}}))
        assert scan([tmp_path]).ok is (is_synthetic is True)
        assert scan([inner]).ok is (is_synthetic is True)
    assert set(scan([inner]).exempt.values()) == {"the synthetic ward"}
    (tmp_path / "beside.csv").write_text(ROWS.to_csv(index=False))
    assert not scan([tmp_path]).ok


def test_unreadable_files_are_not_cleared(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(InputError, match=r"a\.json: cannot be read, so not be cleared"):
        scan([tmp_path])
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 99)
    assert scan_file(tmp_path / "model.safetensors") is None


def test_the_pages_of_this_book_pass():
    pages = Path(__file__).parents[1] / "nbs"
    found = scan([pages])
    assert found.ok, str(found)
    searched = {path for path in pages.rglob("*.ipynb") if str(path) not in found.exempt}
    assert {"studies", "tutorials"} <= {path.parent.name for path in searched}


def test_colours_are_no_film():
    rng = np.random.default_rng(0)
    assert is_film(FILM) and not is_film(rng.integers(0, 255, (64, 64, 3)))
    assert not is_film(np.full((64, 64), 128))


def git(place, *words):
    known = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a"}
    path = f"{place}/bin:{os.environ['PATH']}"
    options = os.environ | known | {"GIT_COMMITTER_EMAIL": "a@b", "PATH": path}
    done = subprocess.run(
        ["git", *words], cwd=place / "work", env=options, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_git_refuses_a_commit_with_a_patient(tmp_path):
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin/clinfuse"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m clinfuse.use.command_line "$@"\n')
    command.chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    git(tmp_path, "init", "-q")
    guard([work], install_hook=True)
    (work / "rows.csv").write_text(ROWS.to_csv(index=False))
    git(tmp_path, "add", "rows.csv")
    (work / "rows.csv").write_text("cleaned,after staging\n")
    status, said = git(tmp_path, "commit", "-m", "results")
    assert status != 0 and "rows.csv, column stay_id: patient rows" in said, said
    git(tmp_path, "add", "rows.csv")
    status, said = git(tmp_path, "commit", "-m", "results")
    assert status == 0, said
