"""CrossNorm and SelfNorm on CIFAR-10: accuracy on clean and on corrupted images, a small ResNet from scratch.

    python benchmarks/corruption.py --data DIR --quick
    python benchmarks/corruption.py --data DIR --full --device cuda

DIR holds ``cifar10_train.tar`` and ``cifar10_test.tar`` (or folders of these names) with one folder per class.
Bare, CrossNorm, SelfNorm and both start from the same weights and see the same batches; the weights are those of
the last epoch. Test images are then corrupted in nine ways at five severities, with a fixed seed; nothing about
the corruptions is seen in training.

``--quick`` trains a narrow network for a few epochs with one seed: it shows that everything works end to end and
what a step costs; differences of a few points in its table are noise. ``--full`` is the protocol to quote.

Finished runs are written at once, and the same command goes on where it stopped.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

import fxgraft
from common import Results, argument_parser, cell, part_of, read_cifar10, result_path, step_ratio
from fxgraft.experiments.augment import Augment
from fxgraft.experiments.backbones import build_model
from fxgraft.experiments.domains import Domain
from fxgraft.experiments.evaluation import evaluate
from fxgraft.experiments.training import train

NAME = "corruption"
KEY = ("seed", "variant")
SEVERITIES = (1, 2, 3, 4, 5)

VARIANTS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "bare": [],
    "crossnorm": [("crossnorm", {"active": 2})],
    "selfnorm": [("selfnorm", {})],
    "both": [("crossnorm", {"active": 2}), ("selfnorm", {})],
}

SHARED: dict[str, Any] = {
    "task": "CIFAR-10 from scratch, weights of the last epoch, accuracy on corrupted test images",
    "model": "resnet18",
    "size": 32,
    "split_seed": 0,
    "variants": VARIANTS,
    "corruptions": "gaussian, shot, impulse, blur, pixelate, contrast, brightness, fog, saturation",
    "augment": {"crop_padding": 4, "flip": 0.5},
}
QUICK: dict[str, Any] = {
    **SHARED,
    # Without the stride of 16 the map of the last stage would be 1×1.
    "model_options": {"channels": [16, 32, 64, 128], "output_stride": 16},
    "limit_per_class": 500,
    "test_per_class": 100,
    "training": {"epochs": 24, "batch_size": 64, "lr": 1e-3, "optimizer": "adamw", "weight_decay": 0.05},
}
FULL: dict[str, Any] = {
    **SHARED,
    "model_options": {"output_stride": 8},
    "limit_per_class": None,
    "test_per_class": None,
    "training": {
        "epochs": 100,
        "batch_size": 128,
        "lr": 0.1,
        "optimizer": "sgd",
        "weight_decay": 5e-4,
        "amp": True,
        "channels_last": True,
    },
}
SEEDS = {"quick": [0], "full": [0, 1, 2]}


def _noise(x: Tensor, g: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=g)


def _gaussian(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    return x + (0.04, 0.06, 0.08, 0.09, 0.10)[s] * _noise(x, g)


def _shot(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    photons = (500, 250, 100, 75, 50)[s]
    return torch.poisson(x * photons, generator=g) / photons


def _impulse(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    share = (0.01, 0.02, 0.03, 0.05, 0.07)[s]
    drawn = torch.rand(x.shape, generator=g)
    return x.masked_fill(drawn < share / 2, 0.0).masked_fill(drawn > 1 - share / 2, 1.0)


def _blur(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    sigma = (0.4, 0.6, 0.8, 1.0, 1.3)[s]
    steps = torch.arange(-4, 5)
    kernel = (-(steps**2) / (2 * sigma**2)).exp()
    kernel = (kernel / kernel.sum()).repeat(3, 1, 1, 1)
    padded = F.pad(x, (4, 4, 4, 4), mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)


def _pixelate(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    side = round(x.shape[-1] * (0.95, 0.85, 0.75, 0.65, 0.55)[s])
    return F.interpolate(F.interpolate(x, size=(side, side), mode="area"), size=x.shape[-2:], mode="nearest")


def _contrast(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * (0.75, 0.5, 0.4, 0.3, 0.15)[s] + mean


def _brightness(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    return x + (0.05, 0.1, 0.15, 0.2, 0.3)[s]


def _fog(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    coarse = torch.rand(len(x), 1, 4, 4, generator=g)
    fog = F.interpolate(coarse, size=x.shape[-2:], mode="bicubic", align_corners=False).clamp(0, 1)
    strength = (0.2, 0.4, 0.6, 0.8, 1.0)[s]
    return (x + strength * fog) / (1 + strength)


def _saturation(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    gray = x.mean(1, keepdim=True)
    return gray + (x - gray) * (0.5, 0.25, 2.0, 4.0, 8.0)[s]


CORRUPTIONS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "gaussian": _gaussian,
    "shot": _shot,
    "impulse": _impulse,
    "blur": _blur,
    "pixelate": _pixelate,
    "contrast": _contrast,
    "brightness": _brightness,
    "fog": _fog,
    "saturation": _saturation,
}


def corrupt(images: Tensor, kind: str, severity: int) -> Tensor:
    """Corrupt uint8 images (N, 3, S, S), the same way each time; `severity` from 1 to 5."""
    generator = torch.Generator().manual_seed(1000 * list(CORRUPTIONS).index(kind) + severity)
    changed = CORRUPTIONS[kind](images.float() / 255, severity - 1, generator)
    return (changed.clamp(0, 1) * 255).round().to(torch.uint8)


def main(argv: list[str] | None = None) -> None:
    arguments = argument_parser(__doc__.splitlines()[0], NAME).parse_args(argv)
    protocol = QUICK if arguments.quick else FULL
    seeds = arguments.seeds or SEEDS["quick" if arguments.quick else "full"]
    path = result_path(arguments, NAME)
    results = Results(path, protocol, KEY, arguments.device, arguments.shard)
    # Variants innermost: bare and patched run one after the other, on a machine in the same mood.
    todo = [{"seed": seed, "variant": variant} for seed in seeds for variant in VARIANTS]
    data = functools.cache(functools.partial(read_cifar10, arguments.data, protocol))
    results.carry_out(
        part_of(todo, arguments.shard),
        lambda run: train_one(data(), protocol, run, arguments.device),
        mean_corrupted,
    )
    results.present(table, plot)


def train_one(
    domains: dict[str, Domain], protocol: dict[str, Any], run: dict[str, Any], device: str
) -> dict[str, Any]:
    """Train one variant and score it on every corruption; return what is to be recorded."""
    torch.manual_seed(run["seed"])
    model = build_model(protocol["model"], len(domains["train"].classes), **protocol["model_options"])
    size = protocol["size"]
    for method, options in VARIANTS[run["variant"]]:
        fxgraft.patch(model, method, input_size=(3, size, size), **options)
    history = train(
        model,
        (domains["train"].images, domains["train"].labels),
        augment=Augment(**protocol["augment"]),
        seed=run["seed"],
        device=device,
        **protocol["training"],
    )
    images, labels = domains["test"].images, domains["test"].labels
    amp = protocol["training"].get("amp", False)
    corrupted = {
        kind: [round(evaluate(model, corrupt(images, kind, s), labels, amp=amp), 5) for s in SEVERITIES]
        for kind in CORRUPTIONS
    }
    return {
        "clean": evaluate(model, images, labels, amp=amp),
        "corrupted": corrupted,
        "images": {"train": len(domains["train"].labels), "test": len(labels)},
        "steps": len(history.step_seconds),
        "step_seconds": history.median_step,
        "epoch_loss": [round(loss, 5) for loss in history.epoch_loss],
    }


def mean_corrupted(run: dict[str, Any]) -> float:
    """Mean accuracy over all corruptions and severities."""
    return statistics.fmean(value for values in run["corrupted"].values() for value in values)


def of(runs: list[dict[str, Any]], variant: str, score: Callable[[dict[str, Any]], float]) -> list[float]:
    """Scores of a variant in per cent, one per seed."""
    return [100 * score(run) for run in runs if run["variant"] == variant]


def table(runs: list[dict[str, Any]]) -> Table:
    """Accuracy clean, on each corruption and on average, and what a step cost."""
    drawn = Table(title="CIFAR-10, accuracy, % (± over seeds; corruptions: mean of five severities)")
    drawn.add_column("")
    for variant in VARIANTS:
        drawn.add_column(variant, justify="right")
    rows: dict[str, Callable[[dict[str, Any]], float]] = {"clean": lambda run: run["clean"]}
    for kind in CORRUPTIONS:
        rows[kind] = lambda run, kind=kind: statistics.fmean(run["corrupted"][kind])
    rows["mean corrupted"] = mean_corrupted
    for name, score in rows.items():
        drawn.add_row(name, *(cell(of(runs, variant, score)) for variant in VARIANTS))
    drawn.add_row("step ratio", *(f"{step_ratio(runs, variant):.2f}" for variant in VARIANTS))
    return drawn


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against severity, mean over corruptions and seeds; severity 0 is clean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for variant in VARIANTS:
        mine = [run for run in runs if run["variant"] == variant]
        if mine:
            points = [statistics.fmean(run["clean"] for run in mine)]
            points += [
                statistics.fmean(values[s - 1] for run in mine for values in run["corrupted"].values())
                for s in SEVERITIES
            ]
            axis.plot([0, *SEVERITIES], [100 * p for p in points], marker="o", label=variant)
    axis.set_xlabel("severity of the corruption (0: clean)")
    axis.set_ylabel("accuracy, %")
    axis.set_title("CIFAR-10, ResNet-18 from scratch, mean of nine corruptions")
    axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
