"""How fast everything is. One command, from the root of the repository; it writes the record of this machine:

python -m pytest -n0 tests/benchmarks/bench_speed.py
"""

import measures
import pytest
import torch
from measures import BATCH_SIZES, NEURAL

from clinfuse.systems.contract import build_system


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("name", NEURAL)
def test_training_step(benchmark, data, found, name, batch_size):
    repeats = {1: 15, 16: 7}.get(batch_size, 3)
    parts = benchmark.pedantic(
        measures.step_parts, (name, data, batch_size, repeats), rounds=1, iterations=1
    )
    place = found.setdefault("systems", {}).setdefault(name, {})
    place.setdefault(str(batch_size), {})["train_ms"] = parts
    assert all(value >= 0 for value in parts.values())


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("name", NEURAL)
def test_prediction(benchmark, data, found, name, batch_size):
    system = build_system(name, data, measures.recipe()).to(measures.device()).eval()
    rows = measures.rows_for(data, batch_size)
    rounds = {1: 15, 16: 7}.get(batch_size, 3)
    benchmark.pedantic(system.predict, (data, rows), rounds=rounds, warmup_rounds=1)
    milliseconds = benchmark.stats.stats.median * 1000
    found["systems"][name][str(batch_size)]["predict_ms"] = milliseconds


@pytest.mark.parametrize("name", NEURAL)
def test_roofline(data, found, name):
    limits = found.setdefault("limits", measures.machine_limits())
    flops = measures.step_flops(name, data, 16)
    parts = found["systems"][name]["16"]["train_ms"]
    seconds = sum(parts[part] for part in ("forward", "backward")) / 1000
    found["systems"][name]["16"]["flops"] = flops
    found["systems"][name]["16"]["share_of_limit"] = flops / seconds / limits["flops_per_second"]


def test_loader(data, found):
    found["loader"] = rates = measures.loader_rates(data)
    assert rates["series"]["folder"] > 20_000 and rates["radiographs"]["folder"] > 3_000


@pytest.mark.parametrize("recipe", ["quick", "safe"])
def test_loop_beside_a_bare_loop(data, found, tmp_path, recipe):
    found.setdefault("overhead", {})[recipe] = measures.loop_overhead(data, tmp_path, recipe)


def test_checkpoints(data, found, tmp_path):
    found["checkpoint"] = measures.checkpoint_cost(data, tmp_path)
    assert found["checkpoint"]["share"] < 0.02


def test_prediction_of_one_and_of_many(data, found):
    found["prediction"] = measures.prediction_times(data)


@pytest.mark.parametrize("num_labels", [1, 25])
def test_draws_of_card(found, num_labels):
    """After encoding, on the schedule that is the default: 100 draws of 50 steps for 1,000 stays."""
    seconds = measures.card_seconds(num_labels)
    found.setdefault("card_draws", {})[str(num_labels)] = seconds
    assert seconds < 20


def test_memory(data, found):
    if not torch.cuda.is_available():
        pytest.skip("no card to measure")
    torch.cuda.reset_peak_memory_stats()
    measures.step_parts("robust-fusion", data, 256, 2)
    found["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
