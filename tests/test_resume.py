"""A training that is killed, interrupted or out of disk goes on as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock

from clinfuse.conventions import InputError
from clinfuse.systems.batches import invented_patients
from clinfuse.systems.contract import SYSTEMS, NeuralSystem, build_system, system_class
from clinfuse.training.checkpoints import load_run, open_run, run_request
from clinfuse.training.devices import Hardware
from clinfuse.training.loop import train_system
from clinfuse.training.states import Checkpoints, newest_state
from clinfuse.use.recipes import train

EVERY_STEP = Hardware("cpu", checkpoint_seconds=0)
SHORT = {
    "lstm": {"stage.num_epochs": 3},
    "resnet34": {"stage.num_epochs": 5},
    "robust-fusion": {f"{part}stage.num_epochs": 2 for part in ("lstm.", "resnet34.", "")},
    "medfuse": {f"{part}stage.num_epochs": 2 for part in ("lstm.", "resnet34.", "")},
    "contrastive-fusion": {"pretraining.num_epochs": 2, "stage.num_epochs": 2},
    "card": {"stage.num_epochs": 2, "classifier.stage.num_epochs": 1}
    | {f"classifier.{part}.stage.num_epochs": 1 for part in ("lstm", "resnet34")},
    "m3t-lm": {"stage.num_epochs": 3},
    "vgg-1d": {"stage.num_epochs": 3},
    "cnn-1d": {"stage.num_epochs": 3},
}
NEURAL = [name for name in SYSTEMS if name in SHORT]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """System -> invented patients of the first task that it serves."""
    torch.set_num_threads(1)
    place, tasks = tmp_path_factory.mktemp("data"), {n: system_class(n).tasks[0] for n in SHORT}
    found = {t: invented_patients(place / t, num_samples=160, task=t) for t in {*tasks.values()}}
    return {name: found[task] for name, task in tasks.items()}


@pytest.fixture(scope="module")
def data(folders):
    return folders["lstm"]


def settings(name):
    return {"hardware.checkpoint_seconds": "0"} | {k: str(v) for k, v in SHORT[name].items()}


@pytest.fixture(scope="module")
def uninterrupted(folders, tmp_path_factory):
    """The runs that nobody disturbed, by name."""
    found = {}

    def get(name):
        if name not in found:
            folder = tmp_path_factory.mktemp("whole") / name
            place, options = folders[name].path, {"recipe": "quick", "set": settings(name)}
            train(name, place, folder, quiet=True, **options)
            found[name] = folder
        return found[name]

    return get


def assert_same_run(one, other):
    """Weights to the last bit, and the history but for its seconds."""
    a, b = (load_run(folder).state_dict() for folder in (one, other))
    assert [name for name, value in a.items() if not torch.equal(value, b[name])] == []
    tables = [
        pd.read_csv(folder / "history.csv").drop(columns="seconds") for folder in (one, other)
    ]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    assert not list((other / "checkpoints").glob("state-*"))


def command(name, data, run, *words):
    changes = [f"{key}={value}" for key, value in settings(name).items()]
    return [
        *(sys.executable, "-m", "clinfuse.use.command_line", "train", name, str(data.path)),
        *(str(run), "--recipe", "quick", "--quiet", "--set", *changes, *words),
    ]


def run_and_kill(words, folder, num_states):
    """Start a training and kill it with SIGKILL once it has written so many states."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    seen = set()
    while process.poll() is None and len(seen) < num_states:
        seen |= {path.name for path in folder.glob("checkpoints/state-*")}
        time.sleep(0.002)
    time.sleep(random.Random(num_states).random() * 0.01)
    process.kill()
    complaint = process.communicate()[1]
    assert process.returncode in (0, -signal.SIGKILL), complaint
    return process.returncode


@pytest.mark.parametrize(("name", "kills"), [("lstm", [4]), ("robust-fusion", [7])])
def test_killed_at_any_step_it_ends_with_the_same_bits(data, uninterrupted, tmp_path, name, kills):
    run = tmp_path / "run"
    for number, num_states in enumerate(kills):
        words = command(name, data, run, *(["--resume"] if number else []))
        assert run_and_kill(words, run, num_states) == -signal.SIGKILL
        with pytest.raises(InputError, match="unfinished run; train again with --resume"):
            load_run(run)
    train(name, data.path, run, recipe="quick", set=settings(name), resume=True, quiet=True)
    assert_same_run(uninterrupted(name), run)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lstm", "robust-fusion"])
def test_killed_twenty_times_it_ends_with_the_same_bits(data, uninterrupted, tmp_path, name):
    run, chance, finished = tmp_path / "run", random.Random(5), False
    for kill in range(20):
        words = command(name, data, run, *(["--resume"] if kill else []))
        finished = run_and_kill(words, run, 1 + chance.randrange(3)) == 0
        if finished:
            break
    train(name, data.path, run, recipe="quick", set=settings(name), resume=True, quiet=True)
    assert_same_run(uninterrupted(name), run)


def interrupt_after(monkeypatch, num_states):
    """Press Ctrl-C once so many states have been written."""
    write, written = Checkpoints.write, []

    def count(checkpoints, state):
        written.append(write(checkpoints, state))
        if len(written) == num_states:
            os.kill(os.getpid(), signal.SIGINT)
        return written[-1]

    monkeypatch.setattr(Checkpoints, "write", count)


@pytest.mark.parametrize("name", NEURAL)
@pytest.mark.parametrize("step", [1, 5])
def test_interrupted_it_goes_on(folders, uninterrupted, tmp_path, monkeypatch, capsys, name, step):
    run = tmp_path / "run"
    options = {"recipe": "quick", "set": settings(name), "quiet": True}
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt_after(patched, step)
        train(name, folders[name].path, run, **options)
    assert "resume=True, or --resume, goes on" in capsys.readouterr().err
    train(name, folders[name].path, run, resume=True, **options)
    assert_same_run(uninterrupted(name), run)


@pytest.mark.parametrize(
    ("name", "task"), [("lstm", "length-of-stay"), ("cnn-1d", "mortality-and-stay")]
)
def test_interrupted_while_learning_durations_it_goes_on(tmp_path, monkeypatch, name, task):
    stays = invented_patients(tmp_path / "stays", num_samples=80, task=task)
    options = {"recipe": "quick", "set": settings(name), "quiet": True}
    train(name, stays.path, tmp_path / "whole", **options)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt_after(patched, 3)
        train(name, stays.path, tmp_path / "run", **options)
    train(name, stays.path, tmp_path / "run", resume=True, **options)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert pd.read_csv(tmp_path / "run/history.csv")["validation_mae"].notna().all()


def test_every_neural_system_is_resumed_here():
    neural = {n for n in SYSTEMS if issubclass(system_class(n), NeuralSystem)}
    neural -= {n for n in neural if system_class(n).tasks == ("hypotension",)}  # test_iohfuselm
    assert neural == set(SHORT)


def stopped(data, folder, after=6):
    """A training of the LSTM that stopped after so many states."""
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt_after(patched, after)
        system = build_system("lstm", data, "quick", changes=SHORT["lstm"])
        train_system(system, data, folder, quiet=True, hardware=EVERY_STEP)
    return folder


def test_a_damaged_state_is_named_and_the_one_before_serves(data, uninterrupted, tmp_path):
    newest = Checkpoints(stopped(data, tmp_path) / "checkpoints").files()[0]
    whole = newest.read_bytes()
    for spoilt in (whole[: len(whole) // 2], b"", whole[:-1] + bytes([whole[-1] ^ 4])):
        newest.write_bytes(spoilt)
        with pytest.warns(UserWarning, match=f"{newest.name} is damaged"):
            state = newest_state(Checkpoints(newest.parent))
        assert (state["progress"]["epoch"], state["progress"]["step"]) == (2, 1)
    system = build_system("lstm", data, "quick", changes=SHORT["lstm"], seed=7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train_system(system, data, tmp_path, quiet=True, resume=True)
    expected = load_run(uninterrupted("lstm")).state_dict()
    assert all(torch.equal(value, expected[n]) for n, value in system.state_dict().items())


def test_two_states_are_kept_and_nothing_half_written(data, tmp_path):
    folder = stopped(data, tmp_path) / "checkpoints"
    assert sorted(path.name.split("-")[0] for path in folder.iterdir()) == [
        "best",
        "state",
        "state",
    ]


def test_a_full_disk_costs_the_new_state_only(data, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    written = []

    def until_full(tensors, path, metadata=None):
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(path)
        return save_file(tensors, path, metadata)

    monkeypatch.setattr("safetensors.torch.save_file", until_full)
    system = build_system("lstm", data, "quick", changes=SHORT["lstm"])
    with pytest.raises(InputError, match=r"could not write .*: .*No space left on device"):
        train_system(system, data, tmp_path, quiet=True, hardware=EVERY_STEP)
    assert newest_state(Checkpoints(tmp_path / "checkpoints"))["progress"]["step"] == 3
    assert not list(tmp_path.rglob("*.partial"))


def test_a_small_quota_is_one_line(data, tmp_path):
    import resource

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))

    words = command("lstm", data, tmp_path / "run")
    done = subprocess.run(words, capture_output=True, text=True, preexec_fn=small_files)
    lines = [line for line in done.stderr.splitlines() if line.startswith("clinfuse: ")]
    assert done.returncode == 1 and len(lines) == 1 and "could not write" in lines[0], done.stderr


def test_a_loss_that_explodes_keeps_the_last_state(data, tmp_path, monkeypatch):
    from clinfuse.systems.robust_fusion import LSTM

    changes = {"stage.num_epochs": 40, "stage.patience": 40, "stage.batch_size": 8}
    known, steps = LSTM.training_loss, []

    def explode(self, stage, batch):
        steps.append(stage)
        loss = known(self, stage, batch)
        return loss * 1e4 if len(steps) > 45 else loss

    monkeypatch.setattr(LSTM, "training_loss", explode)
    system = build_system("lstm", data, "quick", changes=changes)
    with pytest.raises(InputError, match=r"at step \d+ of epoch \d+, stage series, on samples s0"):
        train_system(system, data, tmp_path, quiet=True, hardware=EVERY_STEP)
    assert len(steps) == 55
    assert len(newest_state(Checkpoints(tmp_path / "checkpoints"))["progress"]["recent"]) == 54
    assert (tmp_path / "checkpoints/best-series.safetensors").exists()


def test_a_nan_on_a_card_names_its_own_step(data, tmp_path):
    from clinfuse.training.states import Progress, check_losses

    ids = np.array([f"s{number}" for number in range(40)], dtype=object)
    losses = [(torch.tensor(0.5 if n != 11 else np.nan), np.array([n])) for n in range(16)]
    with pytest.raises(InputError, match="at step 11 of epoch 1, stage x, on samples s11;"):
        check_losses(Progress("x"), losses, ids)


def test_resume_with_other_settings_names_the_difference(data, tmp_path):
    system = build_system("lstm", data, "quick")
    request = run_request(system, data, "quick", 0, Hardware("cpu"))
    with open_run(tmp_path / "run", request):
        pass
    other = build_system("lstm", data, "quick", changes={"encoder.dim": 32, "stage.beta_2": 0.9})
    for now, difference in (
        (
            run_request(other, data, "quick", 0, Hardware("cpu")),
            "encoder.dim was 64 and is 32; stage",
        ),
        (run_request(system, data, "quick", 1, Hardware("cpu")), "seed was 0 and is 1"),
        (request | {"data": "0" * 64}, "data was"),
        (request | {"clinfuse": "9.9"}, "clinfuse was .* and is 9.9"),
        (request | {"torch": "9.9"}, "torch was .* and is 9.9"),
        (
            run_request(system, data, "quick", 0, Hardware("cpu", "bf16")),
            "hardware.precision was fp32 and is bf16",
        ),
    ):
        with (
            pytest.raises(InputError, match=f"cannot go on: {difference}"),
            open_run(tmp_path / "run", now, resume=True),
        ):
            pass


def test_a_folder_in_use_is_refused(data, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with FileLock(run / "checkpoints/lock"):
        done = subprocess.run(command("lstm", data, run), capture_output=True, text=True)
    assert done.returncode == 1 and "is in use by another process" in done.stderr


def test_a_finished_run_is_returned_as_it_is(data, uninterrupted):
    run = uninterrupted("lstm")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    options = {"recipe": "quick", "set": settings("lstm"), "quiet": True}
    again = train("lstm", data.path, run, resume=True, **options)
    assert len(again.history) == len(pd.read_csv(run / "history.csv"))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    with pytest.raises(InputError, match="exists already; choose another name"):
        train("lstm", data.path, run, **options)
    assert json.loads((run / "request.json").read_text())["system"] == "lstm"


def test_the_history_can_be_read_while_it_grows(data, tmp_path):
    lengths = []

    def look(history):
        lengths.append(len(pd.read_csv(tmp_path / "history.csv")))

    system = build_system("lstm", data, "quick", changes=SHORT["lstm"])
    train_system(system, data, tmp_path, quiet=True, on_epoch=look)
    assert lengths == [1, 2, 3]
