"""Diversification block and gradient-boosting loss on classes that are easy to confuse, from scratch.

    python benchmarks/fine_grained.py --data DIR --quick
    python benchmarks/fine_grained.py --data DIR --full --device cuda

DIR holds CIFAR-10 as ``cifar10_train.tar`` and ``cifar10_test.tar`` (tars of class folders), of which the six
animals are used, or any image folder ``train/class/*.jpg`` with ``test`` or ``val`` beside ``train``. Bare,
block, loss and both start from the same weights and see the same batches. A tenth of the training images of
each class is kept out of training and scored, to see convergence; the weights are those of the last epoch,
and the test images decide nothing.

The loss counts k wrong classes: 15, as in the paper, from 45 classes on, else a third of the classes (2 of
the 6 animals), since k of all of them is cross-entropy.

``--quick`` makes do with 500 images per class, 8 epochs, one seed and a narrow network: some 330 steps. It
shows that everything works end to end, and what a step costs; differences of a point or two in its table
are noise. ``--full`` is the protocol to quote.

Finished runs are written at once, and the same command goes on where it stopped.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import fxgraft
from common import Results, argument_parser, cell, part_of, result_path, step_ratio
from fxgraft.experiments.augment import Augment
from fxgraft.experiments.backbones import build_model
from fxgraft.experiments.domains import Domain
from fxgraft.experiments.evaluation import evaluate
from fxgraft.experiments.loading import load_domains
from fxgraft.experiments.training import train

NAME = "fine_grained"
KEY = ("seed", "variant")
ANIMALS = ("bird", "cat", "deer", "dog", "frog", "horse")

# alpha=1 damps nothing: that variant trains the plain head with the other loss.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "bare": None,
    "block": {},
    "loss": {"alpha": 1.0, "loss": "gradient_boosting"},
    "both": {"loss": "gradient_boosting"},
}

SHARED: dict[str, Any] = {
    "task": "classes easy to confuse, from scratch, weights of the last epoch",
    "model": "resnet18",
    "validation": 0.1,
    "split_seed": 0,
    "variants": VARIANTS,
}
QUICK: dict[str, Any] = {
    **SHARED,
    # Maps of 6×6, so that patches of 3×3 are a quarter of them, about as on the paper's 14×14.
    "size": 48,
    "model_options": {"output_stride": 8, "channels": (16, 32, 64, 128)},
    "limit_per_class": 500,
    "augment": {"crop_padding": 4, "flip": 0.5},
    "training": {"epochs": 8, "batch_size": 64, "lr": 2e-3, "optimizer": "adamw", "weight_decay": 0.05},
}
FULL: dict[str, Any] = {
    **SHARED,
    "size": 96,
    "model_options": {"output_stride": 8},
    "limit_per_class": None,
    "augment": {"crop_padding": 8, "flip": 0.5, "jitter": 0.2},
    "training": {
        "epochs": 60,
        "batch_size": 128,
        "lr": 0.05,
        "optimizer": "sgd",
        "weight_decay": 5e-4,
        "amp": True,
        "channels_last": True,
    },
}
SEEDS = {"quick": [0], "full": [0, 1, 2]}


def main(argv: list[str] | None = None) -> None:
    arguments = argument_parser(__doc__.splitlines()[0], NAME).parse_args(argv)
    settings = QUICK if arguments.quick else FULL
    seeds = arguments.seeds or SEEDS["quick" if arguments.quick else "full"]
    train_set, test_set = read_images(arguments.data, settings)
    protocol = {**settings, "classes": list(train_set.classes), "loss_k": loss_k(len(train_set.classes))}
    path = result_path(arguments, NAME)
    results = Results(path, protocol, KEY, arguments.device, arguments.shard)
    # Variants innermost: bare and patched of a pair run one after the other, on a machine in the same mood.
    todo = [{"seed": seed, "variant": variant} for seed in seeds for variant in VARIANTS]
    results.carry_out(
        part_of(todo, arguments.shard),
        lambda run: train_one(train_set, test_set, protocol, run, arguments.device),
        lambda outcome: outcome["accuracy"],
    )
    results.present(table, plot)


def loss_k(classes: int) -> int:
    """How many wrong classes the loss counts."""
    return min(15, max(1, classes // 3))


def read_images(data: Path, protocol: dict[str, Any]) -> tuple[Domain, Domain]:
    """Training and test images; of CIFAR-10 the animals."""
    cifar = any(data.glob("cifar10_*.tar"))
    source = data / "cifar10_*.tar" if cifar else data
    parts = load_domains(
        source, protocol["size"], limit=protocol["limit_per_class"], seed=protocol["split_seed"]
    )
    by_name = {part.name: part for part in parts}
    test = by_name.get("test") or by_name.get("val")
    if "train" not in by_name or test is None:
        raise SystemExit(f"{data} holds {', '.join(by_name)}; train and test (or val) are needed.")
    chosen = ANIMALS if cifar else by_name["train"].classes
    return only(by_name["train"], chosen), only(test, chosen)


def only(part: Domain, classes: tuple[str, ...]) -> Domain:
    """The images of some classes, numbered anew in the order given."""
    place = torch.full((len(part.classes),), -1)
    for number, name in enumerate(classes):
        place[part.classes.index(name)] = number
    labels = place[part.labels]
    return Domain(part.name, part.images[labels >= 0], labels[labels >= 0], classes)


def train_one(
    train_set: Domain, test_set: Domain, protocol: dict[str, Any], run: dict[str, Any], device: str
) -> dict[str, Any]:
    """Train one variant; return what is to be recorded."""
    kept, validation = train_set.split(protocol["validation"], seed=protocol["split_seed"])
    torch.manual_seed(run["seed"])
    model = build_model(protocol["model"], len(train_set.classes), **protocol["model_options"])
    options = VARIANTS[run["variant"]]
    if options is not None:
        if "loss" in options:
            options = {**options, "loss_k": protocol["loss_k"]}
        size = protocol["size"]
        fxgraft.patch(model, "diversification", input_size=(3, size, size), **options)
    history = train(
        model,
        (kept.images, kept.labels),
        validation=(validation.images, validation.labels),
        augment=Augment(**protocol["augment"]),
        seed=run["seed"],
        device=device,
        **protocol["training"],
    )
    amp = protocol["training"].get("amp", False)
    return {
        "accuracy": evaluate(model, test_set.images, test_set.labels, amp=amp),
        "images": {"train": len(kept), "test": len(test_set)},
        "steps": len(history.step_seconds),
        "step_seconds": history.median_step,
        "epoch_loss": [round(loss, 5) for loss in history.epoch_loss],
        "validation": [round(accuracy, 5) for accuracy in history.validation],
    }


def accuracies(runs: list[dict[str, Any]], variant: str) -> list[float]:
    """Per cent, one per seed."""
    return [100 * run["accuracy"] for run in runs if run["variant"] == variant]


def table(runs: list[dict[str, Any]]) -> Table:
    """Accuracy on the test images, and what a step cost."""
    drawn = Table(title="Accuracy on the test images, % (± over seeds)")
    drawn.add_column("variant")
    for name in ("accuracy", "seeds", "step ratio"):
        drawn.add_column(name, justify="right")
    for variant in VARIANTS:
        values = accuracies(runs, variant)
        drawn.add_row(variant, cell(values), str(len(values)), f"{step_ratio(runs, variant):.2f}")
    return drawn


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """A bar per variant with whiskers over the seeds, and how validation went."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    bars, curves = figure.subplots(1, 2)
    for place, variant in enumerate(VARIANTS):
        values = accuracies(runs, variant)
        if not values:
            continue
        spread = statistics.stdev(values) if len(values) > 1 else 0
        bars.bar(place, statistics.fmean(values), yerr=spread)
        series = zip(*(run["validation"] for run in runs if run["variant"] == variant), strict=True)
        means = [100 * statistics.fmean(epoch) for epoch in series]
        curves.plot(range(1, len(means) + 1), means, label=variant)
    bars.set_xticks(range(len(VARIANTS)), list(VARIANTS))
    bars.set_ylabel("accuracy on the test images, %")
    curves.set_xlabel("epoch")
    curves.set_ylabel("validation accuracy, %")
    curves.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
