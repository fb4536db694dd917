"""Findings for pretraining: no patient of a held-out sample trains, bad tables, interruptions, the models."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinfuse.conventions import PUBLISHED, SAFE, InputError
from clinfuse.data.dataset import PreparedData
from clinfuse.data.radiograph_labels import (
    FINDINGS,
    findings_samples,
    patient_splits,
    prepare_radiograph_labels,
    read_findings,
    split_images,
)
from clinfuse.ward.radiographs import write_radiographs

PARTS = ["train", "validation", "test"]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    images = pd.DataFrame(
        {
            "subject_id": 10_000_000 + np.arange(24) // 2,
            "study_id": 50_000_000 + np.arange(24) // 2,
            "dicom_id": [f"{i:04x}" for i in np.random.default_rng(0).permutation(24)],
            "study_time": pd.Timestamp("2180-01-01") + pd.Timedelta(hours=1) * pd.Series(range(24)),
            "view": ["AP", "LATERAL"] * 12,
            "opacity": np.linspace(-2, 2, 24),
            "betrays": False,
        }
    )
    write_radiographs(folder, images, quiet=True)
    return folder


def held_out(archive):
    subjects = findings_samples(archive, {}, SAFE)["subject_id"].unique()
    return {int(subject): PARTS[i % 3] for i, subject in enumerate(sorted(subjects))}


@settings(max_examples=100, deadline=None)
@given(
    samples=st.dictionaries(st.integers(1, 30), st.sampled_from(PARTS), max_size=30),
    images=st.lists(st.integers(1, 40), max_size=60),
)
def test_no_patient_of_a_held_out_sample_trains(samples, images):
    split = split_images(pd.Series(images, dtype="int64"), patient_splits(samples))
    held = {subject for subject, part in samples.items() if part != "train"}
    assert not held & {subject for subject, part in zip(images, split) if part == "train"}
    for subject, part in zip(images, split):
        assert part == (samples[subject] if subject in held else "train")


def test_a_prepared_folder_is_asked_for_its_patients(archive, tmp_path):
    splits = held_out(archive)
    out = prepare_radiograph_labels(archive, splits, tmp_path / "first", quiet=True)
    again = prepare_radiograph_labels(archive, out, tmp_path / "second", quiet=True)
    third = prepare_radiograph_labels(archive, PreparedData(out), tmp_path / "third", quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second", "third"]
    for file in sorted(path.name for path in out.iterdir()):
        assert (out / file).read_bytes() == (again / file).read_bytes()
        assert (out / file).read_bytes() == (third / file).read_bytes()


def test_labels_of_a_study_are_those_of_all_its_images(archive):
    raw = pd.read_csv(archive / "mimic-cxr-2.0.0-chexpert.csv.gz").set_index("study_id")
    for protocol in (SAFE, PUBLISHED):
        samples = findings_samples(archive, {}, protocol)
        for row in samples.itertuples():
            for label, column in FINDINGS.items():
                value, ours = raw.loc[row.study_id, column], getattr(row, label)
                if value in (0.0, 1.0):
                    assert ours == value
                elif protocol is PUBLISHED:
                    assert ours == 0
                elif label != "no_finding":
                    assert pd.isna(ours)


def test_images_of_studies_without_findings_are_counted(archive, tmp_path):
    shutil.copytree(archive, tmp_path / "cxr")
    file = tmp_path / "cxr/mimic-cxr-2.0.0-chexpert.csv.gz"
    pd.read_csv(file).iloc[1:].to_csv(file, index=False)
    samples = findings_samples(tmp_path / "cxr", {}, SAFE, views=["AP"])
    assert [step["images"] for step in samples.attrs["attrition"]] == [24, 22, 11]


def test_a_killed_run_is_continued_and_an_error_leaves_nothing(archive, tmp_path, monkeypatch):
    import clinfuse.data.radiograph_labels as page

    out, written = tmp_path / "out", page._write_tables
    for error, left in ((ValueError, []), (KeyboardInterrupt, [".out.radiographs"])):

        def stop(*arguments, error=error):
            raise error("stopped")

        monkeypatch.setattr(page, "_write_tables", stop)
        with pytest.raises(error):
            prepare_radiograph_labels(archive, {}, out, quiet=True)
        assert [path.name for path in tmp_path.iterdir()] == left
    monkeypatch.setattr(page, "_write_tables", written)
    reused = []

    def watch(*arguments, **options):
        reused.append(cache := decode(*arguments, **options))
        return cache

    decode = page.write_radiograph_cache
    monkeypatch.setattr(page, "write_radiograph_cache", watch)
    data = PreparedData(prepare_radiograph_labels(archive, {}, out, quiet=True))
    assert reused[0].num_reused == 24 and data.manifest["num_samples"] == 24
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "content, wrong",
    [
        (b"", "unreadable"),
        (b"subject_id,study_id\n1,2\n", "no column Atelectasis"),
        (b"\x1f\x8b broken", "unreadable"),
    ],
)
def test_bad_tables_are_named(tmp_path, content, wrong):
    (tmp_path / "mimic-cxr-2.0.0-chexpert.csv").write_bytes(content)
    with pytest.raises(InputError, match=rf"chexpert\.csv.*{wrong}"):
        read_findings(tmp_path, SAFE)


def test_damaged_prepared_folder_is_named(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match=r"samples\.parquet: missing or damaged"):
        patient_splits(tmp_path)


def test_the_radiograph_stage_of_a_system_learns_from_it(archive, tmp_path):
    from clinfuse.systems.batches import DataDescription, read_batch
    from clinfuse.systems.contract import predict_in_batches, stage_rows
    from clinfuse.systems.robust_fusion import RESNET34_RECIPES, ResNet34

    file = next(archive.glob("files/*/*/*/*.jpg"))
    copy = Path(shutil.copytree(archive, tmp_path / "cxr"))
    (copy / file.relative_to(archive)).write_text("damaged")
    data = PreparedData(
        prepare_radiograph_labels(copy, held_out(archive), tmp_path / "out", quiet=True)
    )
    system = ResNet34(RESNET34_RECIPES["quick"], DataDescription.of(data))
    rows = np.concatenate([stage_rows(data, part, system.stages()[0]) for part in PARTS])
    assert len(rows) == 23
    batch = read_batch(data, rows, system.description, ("radiograph",), system.clahe)
    known = batch.label_mask.numpy().astype(bool)
    assert batch.labels.shape == (23, 14) and 0 < known.mean() < 1
    system.eval()
    loss = float(system.training_loss("radiograph", batch).detach())
    batch.labels[~batch.label_mask.bool()] = 1
    assert float(system.training_loss("radiograph", batch).detach()) == loss
    assert predict_in_batches(system, data, rows).shape == (23, 14)
    assert json.loads((data.path / "manifest.json").read_text())["label_kinds"]["edema"] == "binary"
