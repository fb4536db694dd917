"""The benchmarks leave a record, and say what has become slower since the last one."""

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import measures
import torch

from clinfuse.training.records import read_record, write_record

RECORDS = Path(__file__).parents[2] / "nbs/studies/records"
SLOWER = 1.2  # times as long as in the last record is worth a line
FOUND: dict = {}
START = time.perf_counter()


def pytest_addoption(parser):
    parser.addoption("--record", default=str(RECORDS), help="folder of the records")
    parser.addoption("--shared-machine", action="store_true", help="say that others compute too")


@pytest.fixture(scope="session")
def found():
    return FOUND


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    torch.manual_seed(0)
    return measures.speed_folder(tmp_path_factory.mktemp("speed") / "data", 4096, 1024)


def times(metrics):
    """Every time in a record, by its name: milliseconds and seconds alike."""
    for name, by_batch in metrics.get("systems", {}).items():
        for batch, parts in by_batch.items():
            yield f"{name}, batch {batch}, training step", sum(parts["train_ms"].values())
            yield f"{name}, batch {batch}, prediction", parts["predict_ms"]
    for kind, rates in metrics.get("loader", {}).items():
        yield f"loading 1,000 {kind}", 1000 / rates["folder"]
    for name, seconds in metrics.get("prediction", {}).items():
        if name != "threads":
            yield f"prediction, {name}", seconds
    if "checkpoint" in metrics:
        yield "writing a state", metrics["checkpoint"]["seconds"]


def slowed(before, now):
    """What takes longer than it did, longest first, and by how much."""
    old = dict(times(before))
    ratios = {name: new / old[name] for name, new in times(now) if old.get(name)}
    worst = sorted(ratios.items(), key=lambda item: -item[1])
    return [f"{name}: {ratio:.2f} times as long" for name, ratio in worst if ratio > SLOWER]


def pytest_sessionfinish(session, exitstatus):
    if not FOUND or exitstatus or session.config.option.collectonly:
        return
    path = Path(session.config.getoption("record")) / f"speed_{measures.machine_name()}.json"
    before = read_record(path)["metrics"] if path.exists() else {}
    lines = slowed(before, FOUND) if before else ["no earlier record of this machine"]
    write_record(
        path,
        name="speed",
        metrics={**FOUND, "slowed": lines if before else []},
        config={
            "window": [measures.TIME_STEPS, measures.NUM_COLUMNS],
            "recipe": measures.recipe(),
            "device": measures.device().type,
            "machine_is_shared": session.config.getoption("shared_machine"),
        },
        seeds=[0],
        seconds=time.perf_counter() - START,
        overwrite=True,
    )
    words = lines or [f"nothing takes more than {SLOWER} times as long as in the last record"]
    print(f"\n{path.name}:", *words, sep="\n  ")
