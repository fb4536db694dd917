"""Runs from which something was taken, and runs in which nobody can be found."""

import math

import numpy as np
import pandas as pd
import pytest

from clinfuse.conventions import InputError
from clinfuse.encoders.channel_pruning import best_channels, find_joints, remove_channels
from clinfuse.systems.batches import invented_patients
from clinfuse.systems.contract import build_system
from clinfuse.training.checkpoints import load_run, save_run
from clinfuse.training.private_training import PrivacyConfig, train_privately
from clinfuse.training.pruning import prune_run
from clinfuse.use.recipes import evaluate, predict, train

SHORT = {"stage.num_epochs": "1"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Invented patients and a run of one epoch."""
    place = tmp_path_factory.mktemp("runs")
    data = invented_patients(place / "data", task="mortality-and-stay")
    train("m3t-lm", data.path, place / "run", recipe="quick", set=SHORT, quiet=True)
    return place, data


def test_a_pruned_run_is_a_run_like_any_other(trained):
    place, data = trained
    prune_run(place / "run", data, place / "pruned", 0.5, num_epochs=1)
    said = predict(place / "pruned", data.path, place / "said.csv", quiet=True)
    assert said["prediction"].notna().all()
    runs = [place / "run", place / "pruned"]
    evaluate(runs, data=data.path, out=place / "judged", quiet=True)
    sizes = [(run / "model.safetensors").stat().st_size for run in runs]
    assert sizes[1] < 0.5 * sizes[0]


def test_a_pruned_file_of_other_shapes_is_refused(trained):
    from safetensors.torch import load_file, save_file

    place, data = trained
    pruned = prune_run(place / "run", data, place / "damaged", 0.5)
    tensors = load_file(place / "damaged/model.safetensors")
    name = "network.trunk.3.weight"
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, place / "damaged/model.safetensors")
    with pytest.raises(InputError, match=r"of another system: network\.trunk\.3\.weight"):
        pruned.load_weights(place / "damaged")


def test_the_published_network_shrinks_inside_its_blocks(trained):
    _, data = trained
    system = build_system("m3t-lm", data, "published")
    rows = np.flatnonzero(data.samples["radiograph"] >= 0)[:2]
    before = sum(weight.numel() for weight in system.parameters())
    assert len(find_joints(system)) > 190
    remove_channels(system, best_channels(system, 0.5))
    after = sum(weight.numel() for weight in system.parameters())
    assert after < 0.55 * before and np.isfinite(system.predict(data, rows)).all()


def private(data, place, seed=0, **options):
    """Train privately for one epoch, and keep the run."""
    changes = {"objective": "equal"}
    system = build_system("m3t-lm", data, "quick", changes, seed)
    plan = PrivacyConfig(delta=1e-3, num_epochs=1, batch_size=16, **options)
    history = train_privately(system, data, plan, seed)
    place.mkdir()
    save_run(system, place, data, recipe="quick", seed=seed, history=history)
    return system, history


def test_a_private_run_keeps_its_promise_and_can_be_used(trained):
    pytest.importorskip("opacus", reason="the extra private is not installed")
    place, data = trained
    system, history = private(data, place / "private", epsilon=4.0)
    assert 0 < history["epsilon"].iloc[-1] <= 4
    rows = data.rows("test")
    assert np.array_equal(
        load_run(place / "private").predict(data, rows), system.predict(data, rows)
    )


def test_batch_normalisation_is_replaced_and_comes_back_from_the_file(trained):
    place, data = trained
    changes = {"objective": "equal", "network.inception.width": "0.03"}
    system = build_system("m3t-lm", data, "published", changes)
    plan = PrivacyConfig(math.inf, delta=1e-3, num_epochs=1, batch_size=4)
    history = train_privately(system, one_in(data, 8), plan)
    (place / "normed").mkdir()
    save_run(system, place / "normed", data, recipe="published", seed=0, history=history)
    again, rows = load_run(place / "normed"), data.rows("test")
    assert not [name for name in again.state_dict() if "running_mean" in name]
    assert np.array_equal(again.predict(data, rows), system.predict(data, rows))


def one_in(data, step):
    """The same folder with fewer training patients."""
    from copy import copy

    fewer = copy(data)
    is_left = (data.samples["split"] != "train") | (np.arange(len(data.samples)) % step == 0)
    fewer.samples = data.samples[is_left].reset_index(drop=True)
    return fewer


def test_one_patient_more_changes_a_step_by_no_more_than_promised(trained):
    from clinfuse.systems.batches import read_batch
    from clinfuse.training.private_training import cut_gradient, patients_of

    _, data = trained
    system = build_system("m3t-lm", data, "quick", {"objective": "equal"})
    read = system.stages()[0].modalities
    for patient in patients_of(data, data.rows("train"))[:6]:
        batch = read_batch(data, patient, system.description, read)
        parts = cut_gradient(system, batch, 0.5)
        assert sum(float(part.square().sum()) for part in parts) ** 0.5 <= 0.5 * 1.0001


def test_all_stays_of_a_patient_count_as_one(trained):
    from clinfuse.training.private_training import patients_of

    _, data = trained
    rows = np.arange(6)
    old = data.samples["subject_id"].copy()
    try:
        data.samples["subject_id"] = pd.Series([7, 7, 8, 7, 9, 8, *old[6:]])
        assert [p.tolist() for p in patients_of(data, rows)] == [[0, 1, 3], [2, 5], [4]]
    finally:
        data.samples["subject_id"] = old


def test_without_the_extra_one_line_says_what_to_install(trained, tmp_path, monkeypatch):
    import sys

    _, data = trained
    monkeypatch.setitem(sys.modules, "opacus.accountants.utils", None)
    with pytest.raises(InputError, match=r"pip install 'clinfuse\[private\]'"):
        private(data, tmp_path / "run", epsilon=4.0)
