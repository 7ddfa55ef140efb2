"""MixMo on CIFAR-10: one network with two inputs and outputs against one with one, a small wide ResNet from scratch.

    python benchmarks/ensembling.py --data DIR --quick
    python benchmarks/ensembling.py --data DIR --full --device cuda

DIR holds ``cifar10_train.tar`` and ``cifar10_test.tar`` (or folders of these names) with one folder per class.
Bare, MIMO (the members' encodings summed), Linear-MixMo and Cut-MixMo see the same images in the same order; the
weights are those of the last epoch. Reported on the test images: accuracy, negative log-likelihood (nats) and
calibration error of the network as it is evaluated, which is one forward pass for all of them, and of its members,
with the share of images on which two members disagree.

``--quick`` trains a narrow network for a few epochs with one seed: it shows that everything works end to end and
what a step costs; differences of a point or two in its table are noise. ``--full`` is the protocol to quote.

Finished runs are written at once, and the same command goes on where it stopped.
"""

from __future__ import annotations

import functools
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import fxgraft
from common import Results, argument_parser, cell, part_of, read_cifar10, result_path, step_ratio
from fxgraft.experiments.augment import Augment
from fxgraft.experiments.backbones import build_model
from fxgraft.experiments.domains import Domain
from fxgraft.experiments.images import as_input
from fxgraft.experiments.training import train
from fxgraft.patches.mixmo.ensemble import EnsembleMetrics

NAME = "ensembling"
KEY = ("seed", "variant")

VARIANTS: dict[str, dict[str, Any] | None] = {
    "bare": None,
    "MIMO": {"mixing": "sum"},
    "Linear-MixMo": {"mixing": "linear"},
    "Cut-MixMo": {"mixing": "cut"},
}

SHARED: dict[str, Any] = {
    "task": "CIFAR-10 from scratch, weights of the last epoch",
    "model": "resnet18",
    "size": 32,
    "split_seed": 0,
    "variants": VARIANTS,
    "calibration_bins": 15,
    "augment": {"crop_padding": 4, "flip": 0.5},
}
QUICK: dict[str, Any] = {
    **SHARED,
    # Without the stride of 16 the map of the last stage would be 1×1.
    "model_options": {"channels": [32, 64, 128, 256], "output_stride": 16},
    "mixmo": {"members": 2, "init": "random"},
    "limit_per_class": 500,
    "test_per_class": 200,
    "training": {"epochs": 60, "batch_size": 64, "lr": 1e-3, "optimizer": "adamw", "weight_decay": 0.05},
}
FULL: dict[str, Any] = {
    **SHARED,
    "model_options": {"channels": [128, 256, 512, 1024], "output_stride": 8},
    "mixmo": {"members": 2, "init": "random", "repetitions": 4},
    "limit_per_class": None,
    "test_per_class": None,
    "training": {
        "epochs": 100,
        "batch_size": 64,
        "lr": 0.1,
        "optimizer": "sgd",
        "weight_decay": 5e-4,
        "amp": True,
        "channels_last": True,
    },
}
SEEDS = {"quick": [0], "full": [0, 1, 2]}


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
        lambda outcome: outcome["metrics"]["ensemble/accuracy"],
    )
    results.present(table, plot)


def train_one(
    domains: dict[str, Domain], protocol: dict[str, Any], run: dict[str, Any], device: str
) -> dict[str, Any]:
    """Train one variant and score it; return what is to be recorded."""
    torch.manual_seed(run["seed"])
    train_set, test_set = domains["train"], domains["test"]
    size = protocol["size"]
    model = build_model(protocol["model"], len(train_set.classes), **protocol["model_options"])
    options = VARIANTS[run["variant"]]
    if options is not None:
        fxgraft.patch(model, "mixmo", input_size=(3, size, size), **protocol["mixmo"], **options)
    history = train(
        model,
        (train_set.images, train_set.labels),
        augment=Augment(**protocol["augment"]),
        seed=run["seed"],
        device=device,
        **protocol["training"],
    )
    members = 1 if options is None else protocol["mixmo"]["members"]
    metrics = EnsembleMetrics(len(train_set.classes), members, n_bins=protocol["calibration_bins"])
    for part in torch.arange(len(test_set.labels)).split(256):
        metrics.update(
            member_logits(model, as_input(test_set.images[part]).to(device)), test_set.labels[part]
        )
    return {
        "metrics": {name: round(value.item(), 5) for name, value in metrics.compute().items()},
        "images": {"train": len(train_set.labels), "test": len(test_set.labels)},
        "steps": len(history.step_seconds),
        "step_seconds": history.median_step,
        "epoch_loss": [round(loss, 5) for loss in history.epoch_loss],
    }


def member_logits(model: nn.Module, x: Tensor) -> Tensor:
    """Logits (M, B, K) of the members on the CPU; one member for a bare network."""
    with torch.no_grad():
        logits = fxgraft.member_logits(model, x).logits if fxgraft.grafts(model) else model.eval()(x)[None]
    return logits.float().cpu()


def values(runs: list[dict[str, Any]], variant: str, name: str) -> list[float]:
    """A metric of a variant, one value per seed; of the members ("member/...") their mean."""
    mine = [run["metrics"] for run in runs if run["variant"] == variant]
    if not name.startswith("member/"):
        return [metrics[name] for metrics in mine if name in metrics]
    kind = name.partition("/")[2]
    own = [
        [v for key, v in metrics.items() if key.startswith("member_") and key.endswith(kind)]
        for metrics in mine
    ]
    return [statistics.fmean(each) for each in own if each]


ROWS = {
    "accuracy, %": ("ensemble/accuracy", 100.0),
    "accuracy of a member, %": ("member/accuracy", 100.0),
    "NLL, nats": ("ensemble/nll", 1.0),
    "NLL of a member, nats": ("member/nll", 1.0),
    "ECE, %": ("ensemble/ece", 100.0),
    "ECE of a member, %": ("member/ece", 100.0),
    "disagreement, %": ("disagreement", 100.0),
}


def table(runs: list[dict[str, Any]]) -> Table:
    """Every metric of every variant, and what a step cost."""
    drawn = Table(title="CIFAR-10, test images (± over seeds)")
    drawn.add_column("")
    for variant in VARIANTS:
        drawn.add_column(variant, justify="right")
    for title, (name, factor) in ROWS.items():
        drawn.add_row(title, *(_cell(values(runs, variant, name), factor) for variant in VARIANTS))
    drawn.add_row("step ratio", *(f"{step_ratio(runs, variant):.2f}" for variant in VARIANTS))
    return drawn


def _cell(found: list[float], factor: float) -> str:
    return cell([factor * value for value in found], 1 if factor == 100 else 3)


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Accuracy, likelihood and calibration of the ensemble (bars) and of its members (dots)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.5), layout="constrained")
    for axis, (title, kind, factor) in zip(
        figure.subplots(1, 3),
        (("accuracy, %", "accuracy", 100), ("NLL, nats", "nll", 1), ("ECE, %", "ece", 100)),
        strict=True,
    ):
        for index, variant in enumerate(VARIANTS):
            whole = [factor * v for v in values(runs, variant, f"ensemble/{kind}")]
            single = [factor * v for v in values(runs, variant, f"member/{kind}")]
            axis.bar(index, statistics.fmean(whole) if whole else 0, color=f"C{index}", alpha=0.7)
            axis.plot([index] * len(single), single, "k.", label="mean member" if index == 0 else None)
        axis.set_xticks(range(len(VARIANTS)), list(VARIANTS), rotation=20)
        axis.set_title(title)
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
