"""What is measured, and on what: invented stays of the size of real ones, and steps taken apart."""

import statistics
import time
from pathlib import Path
from threading import Event

import cv2
import numpy as np
import pandas as pd
import torch

from clinfuse.conventions import SAFE
from clinfuse.data.dataset import PreparedData, write_prepared
from clinfuse.data.tasks import TaskData
from clinfuse.objectives.diffusion import Denoiser, draw_responses
from clinfuse.systems.batches import DataDescription, read_batch
from clinfuse.systems.card import CARD_RECIPES
from clinfuse.systems.contract import SYSTEMS, NeuralSystem, build_system, system_class
from clinfuse.training.devices import Hardware, start_accelerator
from clinfuse.training.loop import (
    GRADIENT_LENGTH,
    Session,
    StageObjective,
    StageTraining,
    train_epoch,
)
from clinfuse.training.records import describe_machine
from clinfuse.training.states import Checkpoints

TIME_STEPS, NUM_CONTINUOUS, NUM_COLUMNS = 48, 12, 76  # of an observation window of MIMIC
BATCH_SIZES = (1, 16, 256)
NUM_STEPS = 10  # of an epoch whose overhead is measured
PARTS = ("data", "transfer", "forward", "backward", "step")
NEURAL = [
    name
    for name in SYSTEMS
    if issubclass(system_class(name), NeuralSystem)
    and "hypotension" not in system_class(name).tasks
]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def recipe() -> str:
    """Full-size networks where there is a card for them."""
    return "safe" if device().type == "cuda" else "quick"


def machine_name() -> str:
    about = describe_machine()
    name = about["accelerator"] or f"{about['processor']} {about['cores']} cores"
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    return "_".join(words)


def speed_folder(out: Path, num_samples: int, num_images: int, seed: int = 0) -> PreparedData:
    """A prepared folder of windows of 48 x 76 and radiographs of 256 x 256, all noise."""
    random = np.random.default_rng(seed)
    values = [f"value {column}" for column in range(NUM_CONTINUOUS)]
    flags = [f"flag {column}" for column in range(NUM_COLUMNS - NUM_CONTINUOUS)]
    sample_id = np.array([f"s{row:06d}" for row in range(num_samples)])
    nobody = pd.array([None] * num_samples, dtype="Int64")
    samples = pd.DataFrame(
        {
            "sample_id": sample_id,
            "subject_id": np.arange(num_samples),
            "hadm_id": nobody,
            "stay_id": nobody,
            "prediction_time": pd.Series(pd.NaT, index=range(num_samples)),
            "in_hospital_mortality": (random.random(num_samples) < 0.12).astype(int),
            "age_years": random.normal(65, 10, num_samples).round(1),
            "series_start": np.arange(num_samples) * TIME_STEPS,
            "series_length": TIME_STEPS,
        }
    )
    hours = np.tile(np.arange(TIME_STEPS) + 0.5, NUM_CONTINUOUS)
    events = pd.DataFrame(
        {
            "sample_id": np.repeat(sample_id[:200], len(hours)),
            "hours": np.tile(hours, 200),
            "channel": np.tile(np.repeat(values, TIME_STEPS), 200),
            "value": random.normal(size=200 * len(hours)),
        }
    )
    size = (num_samples * TIME_STEPS, NUM_COLUMNS)
    task_data = TaskData(
        samples=samples,
        labels=["in_hospital_mortality"],
        attributes=["age_years"],
        series=random.normal(size=size).astype(np.float32),
        columns=values + flags,
        channels=[{"name": name, "kind": "continuous", "unit": "none"} for name in values],
        continuous=list(range(NUM_CONTINUOUS)),
        events=events,
        attrition=pd.DataFrame({"step": ["invented"], "stays": [num_samples]}),
    )
    place = np.arange(num_samples) % 5
    splits = pd.Series(np.where(place == 3, "validation", np.where(place == 4, "test", "train")))
    images = random.integers(0, 256, (num_images, 32, 32), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    radiographs = dict(zip(random.permutation(sample_id)[:num_images], images, strict=True))
    return write_prepared(out, None, task_data, SAFE, splits, radiographs)


def without_images(data: PreparedData) -> PreparedData:
    other = PreparedData(data.path)
    other.samples = data.samples.assign(radiograph=-1)
    return other


def interleaved(ways: dict, repeats: int = 5) -> dict[str, float]:
    """Median seconds of several ways to do a thing, in turn, so that a busy machine hits all."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}


def loader_rates(data: PreparedData, batch_size: int = 64) -> dict[str, dict[str, float]]:
    """Samples a second from the folder, and made anew each time."""
    description, random = DataDescription.of(data), np.random.default_rng(0)
    rows = random.permutation(len(data.samples))[:2048]
    seen = random.permutation(np.flatnonzero(data.samples["radiograph"] >= 0))[:1024]
    few = data.samples["sample_id"].to_numpy()[:32]
    large = cv2.resize(np.array(data.radiograph_array()[0]), (2500, 3000))
    jpeg = cv2.imencode(".jpg", large, [cv2.IMWRITE_JPEG_QUALITY, 95])[1]

    def from_folder(chosen, modality):
        for start in range(0, len(chosen), batch_size):
            read_batch(data, chosen[start : start + batch_size], description, [modality])

    def discretise():
        for sample_id in few:
            events = data.events(sample_id)
            events = events.assign(hours=events["hours"].astype(int))
            cells = events.groupby(["hours", "channel"], observed=True)["value"].last()
            cells.unstack().ffill().to_numpy(np.float32)

    def decode():
        cv2.resize(cv2.imdecode(jpeg, cv2.IMREAD_GRAYSCALE), (256, 256))

    ways = {
        "series": (len(rows), lambda: from_folder(rows, "series")),
        "series, naive": (len(few), discretise),
        "radiographs": (len(seen), lambda: from_folder(seen, "radiograph")),
        "radiographs, naive": (1, decode),
    }
    seconds = interleaved({name: way for name, (_, way) in ways.items()}, 7)
    rates = {name: ways[name][0] / seconds[name] for name in ways}
    return {
        kind: {"folder": rates[kind], "naive": rates[f"{kind}, naive"]}
        for kind in ("series", "radiographs")
    }


def wait_for(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize()


def rows_for(data: PreparedData, batch_size: int) -> np.ndarray:
    """Half of them with a radiograph."""
    has_image = data.samples["radiograph"].to_numpy() >= 0
    seen, other = np.flatnonzero(has_image), np.flatnonzero(~has_image)
    half = (batch_size + 1) // 2
    return np.concatenate([seen[:half], other[: batch_size - half]])


def step_parts(name: str, data: PreparedData, batch_size: int, repeats: int) -> dict[str, float]:
    """One training step of the stage that predicts, taken apart: median milliseconds a part."""
    place, rows = device(), rows_for(data, batch_size)
    system = build_system(name, data, recipe()).to(place).train()
    stage = system.stages()[-1]
    optimiser = torch.optim.Adam(system.parameters(), stage.learning_rate)
    found: dict[str, list[float]] = {part: [] for part in PARTS}

    def timed(part, work):
        wait_for(place)
        start = time.perf_counter()
        result = work()
        wait_for(place)
        found[part].append((time.perf_counter() - start) * 1000)
        return result

    for _ in range(repeats + 1):
        read = (data, rows, system.description, stage.modalities, system.clahe)
        batch = timed("data", lambda read=read: read_batch(*read))
        batch = timed("transfer", lambda batch=batch: batch.to(place))
        loss = timed("forward", lambda batch=batch: system.training_loss(stage.name, batch))
        optimiser.zero_grad()
        timed("backward", loss.backward)
        timed("step", optimiser.step)
    return {part: statistics.median(times[1:]) for part, times in found.items()}


def step_flops(name: str, data: PreparedData, batch_size: int) -> float:
    """Floating-point operations of one step, counted; torch counts none of a fused LSTM."""
    from torch.utils.flop_counter import FlopCounterMode

    place = device()
    system = build_system(name, data, recipe()).to(place).train()
    stage = system.stages()[-1]
    read = (data, rows_for(data, batch_size), system.description, stage.modalities, system.clahe)
    batch = read_batch(*read).to(place)
    lstm = 0

    def count(module, inputs, _):
        nonlocal lstm
        samples, steps = inputs[0].shape[:2]
        weights = sum(w.numel() for n, w in module.named_parameters() if "weight" in n)
        lstm += 3 * 2 * samples * steps * weights

    handles = [
        module.register_forward_hook(count)
        for module in system.modules()
        if isinstance(module, torch.nn.LSTM)
    ]
    with FlopCounterMode(display=False) as counter:
        system.training_loss(stage.name, batch).backward()
    for handle in handles:
        handle.remove()
    by_operator = counter.get_flop_counts().get("Global", {})
    counted = sum(n for operator, n in by_operator.items() if "lstm" not in str(operator).lower())
    return float(counted + lstm)


def machine_limits() -> dict[str, float]:
    """What the machine can do here and now: operations a second of a product, bytes of a copy."""
    place = device()
    size = 8192 if place.type == "cuda" else 1024
    left, right = torch.rand(2, size, size, device=place)
    source = torch.rand(2**26 if place.type == "cuda" else 2**24, device=place)
    target = torch.empty_like(source)

    def product():
        left @ right
        wait_for(place)

    def copy():
        target.copy_(source)
        wait_for(place)

    seconds = interleaved({"product": product, "copy": copy}, 9)
    return {
        "flops_per_second": 2 * size**3 / seconds["product"],
        "bytes_per_second": 2 * source.nbytes / seconds["copy"],
    }


def loop_overhead(data: PreparedData, folder: Path, which: str, repeats: int = 9) -> dict:
    """An epoch of our loop beside the barest loop that does the same arithmetic, in turn."""
    place = device()
    changes = {"stage.batch_size": 64}
    other = PreparedData(data.path)
    is_train = (data.samples["split"] == "train").to_numpy()
    surplus = is_train & (is_train.cumsum() > NUM_STEPS * 64)
    other.samples = data.samples.assign(split=data.samples["split"].mask(surplus, "test"))
    data, rows = other, other.rows("train")

    def build():
        return build_system("lstm", data, which, changes).to(place).train()

    ours = build()
    stage = ours.stages()[-1]
    hardware = Hardware(device=place.type, checkpoint_seconds=1e9)
    accelerator = start_accelerator(hardware)
    training = StageTraining(ours, stage, accelerator, hardware)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(folder / "checkpoints", hardware.checkpoint_seconds)
    session = Session(data, accelerator, hardware, checkpoints, Event(), 0, True)

    def our_epoch():
        training.progress.step, training.progress.losses = 0, []
        train_epoch(training, session)
        training.progress.epoch += 1

    bare = StageObjective(build(), stage).train()
    weights = [weight for weight in bare.parameters() if weight.requires_grad]
    optimiser = torch.optim.Adam(weights, stage.learning_rate, betas=(0.9, stage.beta_2))
    random = np.random.default_rng(0)

    def bare_epoch():
        order = random.permutation(rows)
        for start in range(0, len(order) - 63, 64):
            part = order[start : start + 64]
            batch = read_batch(data, part, bare.system.description, stage.modalities)
            loss = bare(batch.to(place))
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, GRADIENT_LENGTH)
            optimiser.step()
            loss.item()

    found: dict[str, list[float]] = {"loop": [], "bare": [], "loop cpu": [], "bare cpu": []}
    for repeat in range(repeats + 1):
        for name, epoch in (("loop", our_epoch), ("bare", bare_epoch)):
            start = time.perf_counter(), time.process_time()
            epoch()
            if repeat:
                found[name].append(time.perf_counter() - start[0])
                found[f"{name} cpu"].append(time.process_time() - start[1])
    medians = {name.replace(" ", "_"): statistics.median(times) for name, times in found.items()}
    pairs = [ours / bare - 1 for ours, bare in zip(found["loop cpu"], found["bare cpu"])]
    return {**medians, "steps": len(rows) // 64, "overhead": statistics.median(pairs)}


def checkpoint_cost(data: PreparedData, folder: Path) -> dict[str, float]:
    """Seconds to write one state of the largest system, and the share of a long training."""
    hardware = Hardware(device=device().type)
    system = build_system("robust-fusion", data, "safe").to(device())
    accelerator = start_accelerator(hardware)
    training = StageTraining(system, system.stages()[-1], accelerator, hardware)
    for weight in system.parameters():
        weight.grad = torch.zeros_like(weight)
    training.optimiser.step()
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(folder, hardware.checkpoint_seconds)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        path = checkpoints.write(training.state_dict())
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    between = max(hardware.checkpoint_seconds, 100 * seconds)
    return {"seconds": seconds, "bytes": path.stat().st_size, "share": seconds / between}


def prediction_times(data: PreparedData) -> dict[str, float]:
    """One stay with its radiograph, and many without; full-size robust-fusion on the CPU."""
    system = build_system("robust-fusion", data, "safe").eval()
    seen, bare = rows_for(data, 2)[:1], without_images(data)
    rows = np.arange(min(2048, len(data.samples)))
    system.predict(data, seen)
    one, one_cpu = [], []
    for _ in range(15):
        start = time.perf_counter(), time.process_time()
        system.predict(data, seen)
        one.append((time.perf_counter() - start[0]) * 1000)
        one_cpu.append((time.process_time() - start[1]) * 1000)
    system.predict(bare, rows[:64])
    start = time.perf_counter(), time.process_time()
    system.predict(bare, rows)
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    scale = 10_000 / len(rows)
    return {
        "one_stay_ms": statistics.median(one),
        "one_stay_fastest_ms": min(one),
        "one_stay_cpu_ms": statistics.median(one_cpu),
        "seconds_for_10000_stays": wall * scale,
        "cpu_seconds_for_10000_stays": cpu * scale,
        "threads": torch.get_num_threads(),
    }


def card_seconds(num_labels: int, num_stays: int = 1000, batch_size: int = 64) -> float:
    """What the reverse process of CARD takes for stays that are encoded already."""
    config = CARD_RECIPES["safe"].diffusion
    denoiser = Denoiser(768, num_labels, config).to(device()).eval()
    start = time.perf_counter()
    with torch.no_grad():
        for embedding in torch.randn(num_stays, 768, device=device()).split(batch_size):
            prior = torch.rand(len(embedding), num_labels, device=device())
            draws = draw_responses(denoiser, denoiser.patient(embedding), prior, config)
    assert draws.shape[1:] == (config.num_draws, num_labels)
    wait_for(device())
    return time.perf_counter() - start
