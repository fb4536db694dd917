"""Training, run folders and records, away from their pages."""

import json

import numpy as np
import pytest
import torch

from clinfuse.conventions import InputError
from clinfuse.data.dataset import PreparedData
from clinfuse.systems.batches import invented_patients
from clinfuse.systems.contract import Stage, build_system, change_config, save_tensors
from clinfuse.training.checkpoints import load_run, read_config, save_run
from clinfuse.training.loop import train_system, validation_scores
from clinfuse.training.records import read_record, write_record


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    torch.set_num_threads(1)
    return invented_patients(tmp_path_factory.mktemp("data") / "data", num_samples=60)


def train(data, folder, name="lstm", seed=0, **changes):
    system = build_system(name, data, "quick", changes=changes, seed=seed)
    return system, train_system(system, data, folder, seed=seed, quiet=True)


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_another_seed_is_another_run(data, tmp_path):
    one, _ = train(data, tmp_path / "0", **{"stage.num_epochs": 1})
    other, _ = train(data, tmp_path / "1", seed=1, **{"stage.num_epochs": 1})
    assert not same_weights(one, other)


def test_the_best_epoch_is_the_one_that_returns(data, tmp_path):
    from safetensors.torch import load_file

    changes = {"stage.num_epochs": 8, "stage.learning_rate": 0.03, "stage.patience": 8}
    system, history = train(data, tmp_path, **changes)
    kept = load_file(tmp_path / "checkpoints/best-series.safetensors")
    assert all(torch.equal(value, kept[key]) for key, value in system.state_dict().items())
    best = history[history["is_best"]].iloc[0]
    assert best["validation_loss"] == history["validation_loss"].min()
    rows = data.rows("validation")
    died = data.samples["in_hospital_mortality"].to_numpy(float)[rows][:, None]
    found = validation_scores(system.predict(data, rows), died)
    np.testing.assert_allclose(found["loss"], best["validation_loss"], rtol=1e-5)


def test_stops_when_patience_ends(data, tmp_path):
    changes = {"stage.num_epochs": 40, "stage.patience": 2, "stage.learning_rate": 0.1}
    _, history = train(data, tmp_path, **changes)
    best = int(history.loc[history["is_best"], "epoch"].iloc[0])
    assert len(history) == best + 2 < 40


def test_the_step_is_halved_on_a_plateau(data, tmp_path):
    changes = {"stage.num_epochs": 12, "stage.patience": 12, "stage.learning_rate": 0.3}
    _, history = train(data, tmp_path, **changes)
    ratios = history["learning_rate"].to_numpy()[1:] / history["learning_rate"].to_numpy()[:-1]
    assert set(np.round(ratios, 6)) <= {1.0, 0.5}


def test_a_stage_leaves_the_others_alone(data, tmp_path):
    changes = {f"{part}stage.num_epochs": 1 for part in ("lstm.", "resnet34.", "")}
    alone, _ = train(data, tmp_path / "lstm", **{"stage.num_epochs": 1})
    fused = build_system("robust-fusion", data, "quick", changes=changes)
    before = {key: value.clone() for key, value in fused.resnet34.head.state_dict().items()}
    joint_head = fused.head.weight.clone()
    train_system(fused, data, tmp_path, quiet=True)
    assert same_weights(fused.lstm.head, alone.head)
    assert not torch.equal(fused.resnet34.head.weight, before["weight"])
    assert not torch.equal(fused.head.weight, joint_head)
    assert all(weight.requires_grad for weight in fused.parameters())
    assert not fused.training


def test_a_single_class_is_no_obstacle(data, tmp_path):
    other = PreparedData(data.path)
    other.samples.loc[other.samples["split"] == "validation", "in_hospital_mortality"] = 0
    _, history = train(other, tmp_path, **{"stage.num_epochs": 2, "stage.select_by": "auroc"})
    assert history["validation_auroc"].isna().all()
    best = history.loc[history["is_best"], "validation_loss"].iloc[0]
    assert best == history["validation_loss"].min()


def test_a_bad_value_is_named_with_its_sample(data, tmp_path):
    other = PreparedData(data.path)
    series = np.array(other.series_array)
    row = other.rows("train")[4]
    series[other.samples["series_start"][row]] = np.nan
    other.series_array = series
    with pytest.raises(InputError, match="became nan at step"):
        train(other, tmp_path)


def test_no_bar_when_quiet(data, tmp_path, capsys):
    train(data, tmp_path, **{"stage.num_epochs": 1})
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == ""


def test_interrupted_writing_keeps_the_old_file(tmp_path, monkeypatch):
    path = save_tensors({"a": torch.ones(3)}, tmp_path / "w.safetensors")
    before = path.read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(InputError, match=r"could not write .*No space left"):
        save_tensors({"a": torch.zeros(3)}, path)
    assert path.read_bytes() == before


def test_a_run_names_its_data_and_settings(data, tmp_path):
    system, history = train(data, tmp_path, **{"stage.num_epochs": 1})
    save_run(system, tmp_path, data, recipe="quick", seed=0, history=history)
    config = read_config(tmp_path)
    assert config["system"] == "lstm" and config["config"]["stage"]["num_epochs"] == 1
    assert config["data"]["task"] == "in-hospital-mortality"
    assert str(data.path) not in json.dumps(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 9}, "this version of clinfuse reads 1"),
        ({"system": "oracle"}, "unknown system 'oracle'"),
        ({"config": {"encoder": {}, "stage": {}, "depth": 3}}, "damaged .unknown settings: depth"),
        ({"weights": {"model.safetensors": "0" * 64}}, "is damaged"),
    ],
)
def test_a_changed_run_is_refused(data, tmp_path, change, message):
    system, history = train(data, tmp_path, **{"stage.num_epochs": 1})
    save_run(system, tmp_path, data, recipe="quick", seed=0, history=history)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        load_run(tmp_path)


def test_records_are_stable(tmp_path):
    facts = {"name": "a", "metrics": {"x": 1}, "config": {}, "seeds": [0], "seconds": 1.0}
    write_record(tmp_path / "a.json", **facts)
    first = (tmp_path / "a.json").read_bytes()
    write_record(tmp_path / "a.json", **facts, overwrite=True)
    assert (tmp_path / "a.json").read_bytes() == first
    assert read_record(tmp_path / "a.json")["seeds"] == [0]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_stage_settings_are_checked():
    with pytest.raises(InputError, match="learning_rate must be a number, got 'fast'"):
        change_config(Stage("x"), {"learning_rate": "fast"})
