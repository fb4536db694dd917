"""On a machine with a card: how busy an epoch of robust-fusion keeps it, what bf16 brings, how much memory it takes, how long M3T-LM learns, and how many windows IOHFuseLM reads.

python tests/benchmarks/gpu_speed.py nbs/studies/records [PREPARED]   # PREPARED: a folder of the task hypotension
"""

import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import measures
import torch

from clinfuse.data.dataset import PreparedData
from clinfuse.encoders.residual_network import ResidualEncoder
from clinfuse.systems.batches import invented_patients
from clinfuse.systems.contract import build_system
from clinfuse.training.devices import Hardware
from clinfuse.training.loop import train_system
from clinfuse.training.records import write_record

NUM_SAMPLES, NUM_IMAGES = 20_000, 8_000
CHANGES = {
    **{f"{part}stage.num_epochs": 1 for part in ("lstm.", "resnet34.")},
    "stage.num_epochs": 2,
    "stage.batch_size": 256,
}


class BusyMeter(threading.Thread):
    """Ask the driver ten times a second how busy the card is."""

    def __init__(self):
        super().__init__(daemon=True)
        self.samples, self.is_over = [], threading.Event()

    def run(self):
        while not self.is_over.wait(0.1):
            self.samples.append((time.time(), torch.cuda.utilization() / 100))

    def share(self, begin, end):
        return statistics.mean(busy for when, busy in self.samples if begin <= when <= end)


def milliseconds(work, repeats=20):
    """Median time of a piece of work on the card."""
    times = []
    for _ in range(repeats + 5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[5:])


def image_encoder_times(batch_size=256):
    """Forward and backward of ResNet-34 at 224 pixels, milliseconds, in both precisions."""
    encoder = ResidualEncoder().cuda().to(memory_format=torch.channels_last).train()
    images = torch.rand(batch_size, 224, 224, device="cuda")

    def step(precision):
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            loss = encoder(images).float().square().mean()
        loss.backward()

    allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        return {name: milliseconds(lambda name=name: step(name)) for name in ("fp32", "bf16")}
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed


def epoch_facts(folder, precision="bf16"):
    """The second epoch of the joint stage, when everything is warm."""
    data = measures.speed_folder(folder / "data", NUM_SAMPLES, NUM_IMAGES)
    system = build_system("robust-fusion", data, "safe", CHANGES)
    ends = []

    def note(history):
        ends.append((time.time(), history[-1]))

    torch.cuda.reset_peak_memory_stats()
    meter = BusyMeter()
    meter.start()
    hardware = Hardware(device="cuda", precision=precision, channels_last=True, prefetch=4)
    train_system(system, data, folder / "run", quiet=True, hardware=hardware, on_epoch=note)
    meter.is_over.set()
    meter.join()
    (begin, _), (end, last) = ends[-2:]
    return {
        "busy_share": meter.share(begin, end),
        "epoch_seconds": last["seconds"],
        "samples_per_second": len(data.rows("train")) / last["seconds"],
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def m3t_lm_seconds(folder, device="cuda", num_samples=4144 * 10 // 6, **changes):
    """All epochs of the published recipe, with images and without; six tenths of the stays are learned from."""
    data = invented_patients(folder / "stays", num_samples, task="mortality-and-stay")
    found = {"training_stays": len(data.rows("train"))}
    for name, image in {"seconds": "inception", "seconds_without_images": "none"}.items():
        asked = {"network.image": image, "num_neighbours": 0, **changes}
        system = build_system("m3t-lm", data, "published", asked)
        start = time.perf_counter()
        train_system(system, data, folder / name, quiet=True, hardware=Hardware(device=device))
        found[name] = time.perf_counter() - start
    return found


def window_rates(folder, prepared, device="cuda", recipe="published"):
    """Windows a second of the last stage of IOHFuseLM, in the second epoch: small and exact, large and rounded."""
    data, found = PreparedData(prepared), {}
    for precision, batch_size in (("fp32", 8), ("bf16", 256)):
        skipped = {"num_copies": 0, "pretraining.num_epochs": 0}
        changes = {**skipped, "stage.num_epochs": 2, "stage.batch_size": batch_size}
        system = build_system("iohfuselm", data, recipe, changes)
        hardware = Hardware(device=device, precision=precision)
        history = train_system(system, data, folder / precision, quiet=True, hardware=hardware)
        seconds = history["seconds"].iloc[-1]
        found[f"{precision}, batch {batch_size}"] = len(data.rows("train")) / float(seconds)
    return found


def write_gpu_record(folder, prepared=None):
    """Measure, and keep what was found."""
    start = time.perf_counter()
    torch.cuda.init()
    with tempfile.TemporaryDirectory() as place:
        facts = epoch_facts(Path(place))
        facts["m3t_lm"] = m3t_lm_seconds(Path(place))
        if prepared:
            facts["windows_per_second"] = window_rates(Path(place), prepared)
    times = image_encoder_times()
    speedup = times["fp32"] / times["bf16"]
    write_record(
        Path(folder) / f"gpu_speed_{measures.machine_name()}.json",
        name="speed on a card",
        metrics={**facts, "image_encoder_ms": times, "bf16_speedup": speedup},
        config={"samples": NUM_SAMPLES, "images": NUM_IMAGES, "changes": CHANGES},
        seeds=[0],
        seconds=time.perf_counter() - start,
        overwrite=True,
    )


if __name__ == "__main__":
    write_gpu_record(*sys.argv[1:])
