"""Devices, precisions, and several processes that learn together."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from clinfuse.conventions import InputError
from clinfuse.systems.batches import invented_patients
from clinfuse.systems.contract import build_system
from clinfuse.training.checkpoints import load_run
from clinfuse.training.devices import Hardware, split_batch, start_accelerator
from clinfuse.training.loop import StageTraining, train_system
from clinfuse.use.recipes import train

SETTINGS = {
    "encoder.dropout": "0",
    "stage.num_epochs": "3",
    "stage.batch_size": "20",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Patients with unknown labels, and a validation split that three processes cannot halve."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("data") / "data"
    invented_patients(folder, num_samples=155)
    samples = pd.read_parquet(folder / "samples.parquet")
    label = samples["in_hospital_mortality"].astype("Float64")
    label[np.random.default_rng(0).random(len(samples)) < 0.3] = pd.NA
    samples.assign(in_hospital_mortality=label).to_parquet(folder / "samples.parquet")
    assert (samples["split"] == "validation").sum() % 2 == 1
    return folder


def free_port():
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def launch(num_processes, *words, **options):
    return subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
            *("--num_processes", str(num_processes), "--num_machines", "1"),
            *("--mixed_precision", "no", "--dynamo_backend", "no"),
            *("--main_process_port", str(free_port()), "-m", "clinfuse.use.command_line"),
            *map(str, words),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **options,
    )


def test_two_processes_learn_what_one_learns(tmp_path):
    """Days and deaths, unknown here and there, so that the shares of the processes differ."""
    folder, one, two = (tmp_path / name for name in ("stays", "one", "two"))
    stays = invented_patients(folder, num_samples=155, task="mortality-and-stay").samples
    days = stays["length_of_stay_days"].where(np.random.default_rng(0).random(len(stays)) > 0.4)
    stays.assign(length_of_stay_days=days).to_parquet(folder / "samples.parquet")
    assert (stays["split"] == "validation").sum() % 2 == 1
    train("lstm", folder, one, recipe="quick", set=SETTINGS, device="cpu", quiet=True)
    words = ["train", "lstm", folder, two, "--recipe", "quick", "--device", "cpu", "--quiet"]
    done = launch(2, *words, "--set", *(f"{k}={v}" for k, v in SETTINGS.items()))
    assert done.returncode == 0, done.stderr[-2000:]
    histories = [pd.read_csv(run / "history.csv").drop(columns="seconds") for run in (one, two)]
    pd.testing.assert_frame_equal(*histories, rtol=1e-4)
    assert histories[0]["validation_mae"].notna().all()
    assert json.loads((two / "request.json").read_text())["hardware"]["processes"] == 2
    weights = [load_run(run).state_dict() for run in (one, two)]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_fused_system_learns_in_two_processes_and_is_taken_up_again(data, tmp_path):
    changes = [f"{part}stage.num_epochs=1" for part in ("lstm.", "resnet34.", "")]
    words = ["train", "robust-fusion", data, tmp_path / "run", "--recipe", "quick", "--device=cpu"]
    done = launch(2, *words, "--quiet", "--set", *changes)
    assert done.returncode == 0, done.stderr[-2000:]
    (tmp_path / "run/config.json").unlink()
    done = launch(2, *words, "--quiet", "--resume", "--set", *changes)
    assert done.returncode == 0, done.stderr[-2000:]
    with pytest.raises(InputError, match="processes was 2 and is 1"):
        changed = dict(change.split("=") for change in changes)
        train(
            "robust-fusion",
            data,
            tmp_path / "run",
            recipe="quick",
            set=changed,
            device="cpu",
            resume=True,
        )


@pytest.mark.slow
def test_a_notebook_launches_two_processes_after_the_import(data, tmp_path):
    code = (
        "import clinfuse.use.recipes as recipes\n"
        "from accelerate import notebook_launcher\n"
        "def learn():\n"
        f"    recipes.train('lstm', {str(data)!r}, {str(tmp_path / 'run')!r}, recipe='quick',\n"
        f"        set={SETTINGS!r}, device='cpu', quiet=True)\n"
        "if __name__ == '__main__':\n"
        f"    notebook_launcher(learn, num_processes=2, use_port='{free_port()}')\n"
    )
    (tmp_path / "cell.py").write_text(code)
    done = subprocess.run([sys.executable, tmp_path / "cell.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run/config.json").exists()


def learned(data, hardware, name="lstm", folder=None, **changes):
    from clinfuse.data.dataset import PreparedData

    prepared = PreparedData(data)
    system = build_system(name, prepared, "quick", changes=SETTINGS | changes)
    return system, train_system(system, prepared, folder, quiet=True, hardware=hardware)


def test_accumulation_changes_nothing_but_memory(data, tmp_path):
    _, whole = learned(data, Hardware("cpu"), folder=tmp_path / "a")
    _, parts = learned(data, Hardware("cpu", accumulation=3), folder=tmp_path / "b")
    columns = whole.columns.drop("seconds")
    pd.testing.assert_frame_equal(whole[columns], parts[columns], rtol=1e-4)


def test_reading_ahead_changes_nothing_at_all(data, tmp_path):
    _, ahead = learned(data, Hardware("cpu", prefetch=3), folder=tmp_path / "a")
    _, when_needed = learned(data, Hardware("cpu", prefetch=0), folder=tmp_path / "b")
    columns = ahead.columns.drop("seconds")
    pd.testing.assert_frame_equal(ahead[columns], when_needed[columns], check_exact=True)


def test_bf16_learns_about_the_same(data, tmp_path):
    _, fine = learned(data, Hardware("cpu"), folder=tmp_path / "a")
    _, coarse = learned(data, Hardware("cpu", "bf16"), folder=tmp_path / "b")
    np.testing.assert_allclose(fine["train_loss"], coarse["train_loss"], rtol=0.02)
    assert not np.array_equal(fine["train_loss"], coarse["train_loss"])
    assert start_accelerator(Hardware("cpu")).mixed_precision == "no"


def test_channels_last_keeps_the_images_numbers(data, tmp_path):
    from clinfuse.data.dataset import PreparedData

    prepared, losses = PreparedData(data), []
    for order in (False, True):
        system = build_system("resnet34", prepared, "quick", changes={"stage.num_epochs": 1})
        hardware = Hardware("cpu", channels_last=order)
        history = train_system(system, prepared, tmp_path, quiet=True, hardware=hardware)
        losses.append(history["train_loss"].iloc[0])
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.slow
def test_a_compiled_training_learns_the_same(data, tmp_path):
    _, plain = learned(data, Hardware("cpu"), folder=tmp_path / "a")
    _, compiled = learned(data, Hardware("cpu", compile=True), folder=tmp_path / "b")
    np.testing.assert_allclose(plain["train_loss"], compiled["train_loss"], rtol=1e-3)


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio"])
def test_a_tracker_writes_into_the_run_folder(data, tmp_path, tracker):
    pytest.importorskip(tracker)
    run = tmp_path / "run"
    words = ["train", "lstm", data, run, "--recipe", "quick", "--tracker", tracker, "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "clinfuse.use.command_line", *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | {"HOME": str(tmp_path / "home")},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    pattern = {"tensorboard": "**/events.out.tfevents*", "trackio": "trackio/**/*.db"}[tracker]
    assert list(run.glob(pattern)), sorted(run.rglob("*"))
    assert not (tmp_path / "home").exists()


def test_unknown_trackers_and_devices_are_named(data, tmp_path):
    from clinfuse.data.dataset import PreparedData

    system = build_system("lstm", PreparedData(data), "quick")
    with pytest.raises(InputError, match="unknown tracker 'wandb'; known: tensorboard, trackio"):
        train_system(system, PreparedData(data), tmp_path, tracker="wandb")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match=r"device .cuda. is not here; present: auto, .*cpu"):
            train("lstm", data, tmp_path / "run", device="cuda")
        assert not (tmp_path / "run").exists()


def test_more_hands_than_patients_are_refused(data, tmp_path):
    with pytest.raises(InputError, match="a batch of 20 samples cannot be shared by 1 processes"):
        learned(data, Hardware("cpu", accumulation=21), folder=tmp_path)
    with pytest.raises(InputError, match="a batch of 3 samples cannot be shared by 4 processes"):
        split_batch(np.arange(3), np.ones(3), 1, 0, 4)


def test_fewer_patients_than_a_batch_are_one_batch(tmp_path):
    few = invented_patients(tmp_path / "few", num_samples=20)
    system = build_system("lstm", few, "quick", changes={"stage.num_epochs": 2})
    history = train_system(system, few, tmp_path, quiet=True)
    assert len(few.rows("train")) < system.stages()[0].batch_size and len(history) == 2


def test_gradients_of_one_stage_do_not_reach_the_next(data):
    from clinfuse.data.dataset import PreparedData

    fused = build_system("robust-fusion", PreparedData(data), "quick")
    fused.lstm.head.weight.grad = torch.ones_like(fused.lstm.head.weight)
    StageTraining(fused, fused.stages()[-1], start_accelerator(Hardware("cpu")))
    assert all(weight.grad is None for weight in fused.parameters())


def test_importing_everything_leaves_the_cards_to_those_launched_later():
    code = (
        "import torch\n"
        "def refuse(*args, **kwargs): raise AssertionError('touched a card')\n"
        "torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = refuse\n"
        "import importlib, pkgutil, clinfuse\n"
        "for m in pkgutil.walk_packages(clinfuse.__path__, 'clinfuse.'): importlib.import_module(m.name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "touched a card" not in done.stderr, done.stderr[-2000:]
