"""What `fxgraft.compare` costs beside a training loop (steps, reading, memory), and what a second worker gains.

    python -m benchmarks engine

Times are CPU seconds of this process, measured in turns, so that other work beside it counts little; those of workers
are seconds of the clock, on a machine with nothing else to do.
"""

from __future__ import annotations

import gc
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.transforms_factory import create_transform
from timm.optim import create_optimizer_v2
from timm.scheduler.scheduler_factory import create_scheduler_v2
from torch.utils.data import DataLoader, Dataset

import fxgraft
from fxgraft.comparison import training
from fxgraft.comparison.data import Items
from fxgraft.comparison.training import Images, Training, fit, transform_of
from fxgraft.environment import environment
from fxgraft.io.images import Item, open_image

MODEL, SIZE, BATCH, COUNT, CLASSES = "resnet18", 64, 16, 160, 4


class Plain(Dataset[Any]):
    """Decoded images, with a transform and nothing else."""

    def __init__(self, items: Items, transform: Any) -> None:
        self.images = [(open_image(item), item.label) for item in items]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        image, label = self.images[index]
        return self.transform(image), label


def write_images(folder: Path, count: int, size: tuple[int, int]) -> Items:
    """Write JPEGs of noise and return them."""
    items = []
    for index in range(count):
        path = folder / f"{index}.jpg"
        Image.effect_noise(size, 60).convert("RGB").save(path, quality=90)
        items.append(Item(str(path), "", index % CLASSES))
    return tuple(items)


def bare_epoch(data: Plain, settings: Training) -> float:
    """Train an epoch as one would with timm's parts, and return the CPU seconds of loop and loading."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=CLASSES).train()
    loader: Any = DataLoader(data, settings.batch_size, shuffle=True, drop_last=True)
    optimizer = create_optimizer_v2(
        model, opt=settings.opt, lr=settings.lr, weight_decay=settings.weight_decay
    )
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=1, step_on_epochs=False, updates_per_epoch=len(loader)
    )
    began = time.process_time()
    for step, (x, y) in enumerate(loader):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step_update(step + 1)
    return time.process_time() - began


def engine_epoch(items: Items, settings: Training) -> float:
    """Train the same epoch by `comparison.training.fit`, with all that it does."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=CLASSES).train()
    began = time.process_time()
    fit(model, items, (), settings, size=SIZE)
    return time.process_time() - began


def step_cost(folder: Path, rounds: int) -> dict[str, Any]:
    """Measure an epoch of either loop in turns; images are decoded before."""
    items = write_images(folder, COUNT, (73, 73))
    settings = Training(epochs=1, batch_size=BATCH)
    shared = {"input_size": SIZE, "is_training": True, "scale": (0.8, 1.0), "color_jitter": 0.4}
    plain = Plain(items, create_transform(**shared, grayscale_prob=0.1, interpolation="bicubic"))
    bare_epoch(plain, settings), engine_epoch(items, settings)
    pairs = [(bare_epoch(plain, settings), engine_epoch(items, settings)) for _ in range(rounds)]
    ratios = sorted(engine / bare for bare, engine in pairs)
    return {
        "model": MODEL,
        "size": SIZE,
        "batch": BATCH,
        "rounds": rounds,
        "bare_seconds": round(statistics.median(bare for bare, _ in pairs), 4),
        "engine_seconds": round(statistics.median(engine for _, engine in pairs), 4),
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(each, 4) for each in ratios],
    }


def reading_cost(folder: Path, count: int = 40) -> dict[str, Any]:
    """Measure reading and transforming a photo from disk for the first time, and training on it, at 224 pixels."""
    items = write_images(folder, count, (500, 375))
    model = timm.create_model("resnet18", num_classes=CLASSES).train()
    images = Images(items, transform_of(model, Training(), 224, training=True), 224)
    training._cache.clear()
    began = time.process_time()
    batch = [images[index] for index in range(count)]
    reading = (time.process_time() - began) / count
    x, y = torch.stack([image for image, _ in batch[:8]]), torch.tensor([label for _, label in batch[:8]])
    F.cross_entropy(model(x), y).backward()
    began = time.process_time()
    F.cross_entropy(model(x), y).backward()
    step = (time.process_time() - began) / 8
    return {
        "model": "resnet18",
        "size": 224,
        "photo": "500×375 JPEG",
        "read_ms": round(1000 * reading, 2),
        "train_ms": round(1000 * step, 2),
        "reading_share": round(reading / (reading + step), 4),
    }


def memory_of_runs(folder: Path, runs: int = 40) -> dict[str, Any]:
    """Return the resident megabytes after each quarter of so many small runs in one process."""
    items = write_images(folder, 32, (40, 40))
    settings = Training(epochs=1, batch_size=16)
    found = []
    for index in range(runs):
        model = timm.create_model("test_resnet", num_classes=CLASSES)
        fit(model, items, items[:8], settings, size=32, seed=index)
        if (index + 1) % (runs // 4) == 0:
            gc.collect()
            found.append(round(_resident(), 1))
    return {"runs": runs, "megabytes": found}


def gain_of_workers(folder: Path, pairs: int = 4, rounds: int = 1, epochs: int = 16) -> dict[str, Any]:
    """Compare on photographs that are read from disk, with one worker and with two in turns; return pairs per hour.

    "gain" counts the start of the two processes, which a short comparison feels; "gain_started" doesn't, nor their
    first runs: it is what a long one gains.
    """
    images = folder / "images"
    for label in range(CLASSES):
        (images / str(label)).mkdir(parents=True)
    for item in write_images(folder, COUNT, (500, 375)):
        path = Path(item.path)
        path.rename(images / str(item.label) / path.name)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    runs: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(rounds):
        for workers, found in seconds.items():
            began = time.perf_counter()
            result = fxgraft.compare(
                images,
                model=MODEL,
                grafts="rsc",
                seeds=pairs,
                size=SIZE,
                training={"epochs": epochs, "batch_size": BATCH},
                workers=workers,
                out=folder / f"{workers}-{turn}",
            )
            found.append(time.perf_counter() - began)
            runs[workers] += [record["seconds"] for record in result.records[2 * workers :]]
    alone, beside = (statistics.mean(each) for each in runs.values())
    one, two = (pairs * 3600 / statistics.median(found) for found in seconds.values())
    return {
        "model": MODEL,
        "size": SIZE,
        "pairs": pairs,
        "epochs": epochs,
        "rounds": rounds,
        "cores": os.cpu_count(),
        "seconds": {str(workers): [round(each, 2) for each in found] for workers, found in seconds.items()},
        "pairs_per_hour": {"1": round(one, 1), "2": round(two, 1)},
        "gain": round(two / one, 3),
        "run_seconds": {"1": round(alone, 2), "2": round(beside, 2)},
        "gain_started": round(2 * alone / beside, 3),
    }


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize() / 2**20


def measure(rounds: int = 7) -> dict[str, Any]:
    """Measure all four, on one thread."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        parts = [Path(name, part) for part in ("steps", "reading", "memory", "workers")]
        for part in parts:
            part.mkdir()
        return {
            "environment": environment("cpu"),
            "step": step_cost(parts[0], rounds),
            "reading": reading_cost(parts[1]),
            "memory": memory_of_runs(parts[2]),
            "workers": gain_of_workers(parts[3]),
        }
