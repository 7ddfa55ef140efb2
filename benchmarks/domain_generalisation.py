"""RSC on PACS: train on three domains, test on the fourth, ResNet-18 from scratch.

    python benchmarks/domain_generalisation.py --data DIR --quick
    python benchmarks/domain_generalisation.py --data DIR --full --device cuda

DIR holds PACS as folders ``domain/class/*.jpg`` or as one tar of class folders per domain. Every domain
is left out once; bare and the three rankings of the method's ablation (random, top activation, top
gradient) start from the same weights and see the same batches. A tenth of each class of the training
domains is kept out of training and scored, to see convergence; the weights are those of the last epoch,
and the held-out domain decides nothing.

``--quick`` makes do with 48-pixel images, at most 300 images per class and domain, 4 epochs and one seed:
about 600 steps from scratch. It shows that everything works end to end, and what a step costs;
differences of a few points in its table are noise. ``--full`` is the protocol to quote.

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
from fxgraft.experiments.domains import Domain, leave_one_out
from fxgraft.experiments.evaluation import evaluate
from fxgraft.experiments.loading import load_domains
from fxgraft.experiments.training import train

NAME = "domain_generalisation"
DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
KEY = ("seed", "held_out", "variant")

VARIANTS: dict[str, dict[str, Any] | None] = {
    "bare": None,
    "random": {"layer": "layer4", "strategy": "random"},
    "top_activation": {"layer": "layer4", "strategy": "top_activation"},
    "top_gradient": {"layer": "layer4", "strategy": "top_gradient"},
}

SHARED: dict[str, Any] = {
    "task": "PACS, leave one domain out, from scratch, weights of the last epoch",
    "model": "resnet18",
    "validation": 0.1,
    "split_seed": 0,
    "variants": VARIANTS,
}
QUICK: dict[str, Any] = {
    **SHARED,
    "size": 48,
    # Without it the map at layer4 would be 2×2.
    "model_options": {"output_stride": 16},
    "map": "3x3",
    "limit_per_class": 300,
    "augment": {"crop_padding": 4, "flip": 0.5, "jitter": 0.4, "gray": 0.1},
    "training": {"epochs": 4, "batch_size": 32, "lr": 1e-3, "optimizer": "adamw", "weight_decay": 0.05},
}
FULL: dict[str, Any] = {
    **SHARED,
    "size": 96,
    "model_options": {},
    "map": "3x3",
    "limit_per_class": None,
    "augment": {"crop_padding": 8, "flip": 0.5, "jitter": 0.4, "gray": 0.1},
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
    protocol = QUICK if arguments.quick else FULL
    seeds = arguments.seeds or SEEDS["quick" if arguments.quick else "full"]
    path = result_path(arguments, NAME)
    results = Results(path, protocol, KEY, arguments.device, arguments.shard)
    domains = read_pacs(arguments.data, protocol)
    pairs = [(seed, domain.name) for seed in seeds for domain in domains]
    # All variants of a pair in one process, one after the other: their step times are compared.
    todo = [
        {"seed": seed, "held_out": held_out, "variant": variant}
        for seed, held_out in part_of(pairs, arguments.shard)
        for variant in VARIANTS
    ]
    results.carry_out(
        todo,
        lambda run: train_one(domains, protocol, run, arguments.device),
        lambda outcome: outcome["accuracy"],
    )
    results.present(table, plot)


def read_pacs(data: Path, protocol: dict[str, Any]) -> list[Domain]:
    """The four domains; other tars may lie beside those of PACS."""
    source = data / "*pacs*.tar" if any(data.glob("*pacs*.tar")) else data
    limit, seed = protocol["limit_per_class"], protocol["split_seed"]
    domains = load_domains(source, protocol["size"], limit=limit, seed=seed)
    if {domain.name for domain in domains} != set(DOMAINS):
        raise SystemExit(f"{data} holds {', '.join(d.name for d in domains)}; PACS has {', '.join(DOMAINS)}.")
    return list(domains)


def train_one(
    domains: list[Domain], protocol: dict[str, Any], run: dict[str, Any], device: str
) -> dict[str, Any]:
    """Train one variant with one domain left out; return what is to be recorded."""
    train_set, validation, (images, labels) = leave_one_out(
        domains, run["held_out"], validation=protocol["validation"], seed=protocol["split_seed"]
    )
    torch.manual_seed(run["seed"])
    model = build_model(protocol["model"], len(domains[0].classes), **protocol["model_options"])
    options = VARIANTS[run["variant"]]
    if options is not None:
        fxgraft.patch(model, "rsc", **options)
    augment = Augment(**protocol["augment"])
    history = train(
        model,
        train_set,
        validation=validation,
        augment=augment,
        seed=run["seed"],
        device=device,
        **protocol["training"],
    )
    return {
        "accuracy": evaluate(model, images, labels, amp=protocol["training"].get("amp", False)),
        "images": {"train": len(train_set[1]), "test": len(labels)},
        "steps": len(history.step_seconds),
        "step_seconds": history.median_step,
        "epoch_loss": [round(loss, 5) for loss in history.epoch_loss],
        "validation": [round(accuracy, 5) for accuracy in history.validation],
    }


def accuracies(runs: list[dict[str, Any]], variant: str, held_out: str | None = None) -> list[float]:
    """Per cent, one per seed that has all it takes: on one domain, or the mean over all four."""
    by_seed: dict[int, list[float]] = {}
    for run in runs:
        if run["variant"] == variant and held_out in (None, run["held_out"]):
            by_seed.setdefault(run["seed"], []).append(100 * run["accuracy"])
    needed = len(DOMAINS) if held_out is None else 1
    return [statistics.fmean(values) for values in by_seed.values() if len(values) == needed]


def table(runs: list[dict[str, Any]]) -> Table:
    """Accuracy on the unseen domain, and what a step cost."""
    drawn = Table(title="PACS, accuracy on the domain never seen, % (± over seeds)")
    drawn.add_column("variant")
    for name in (*DOMAINS, "mean", "step ratio"):
        drawn.add_column(name, justify="right")
    for variant in VARIANTS:
        cells = [cell(accuracies(runs, variant, name)) for name in (*DOMAINS, None)]
        drawn.add_row(variant, *cells, f"{step_ratio(runs, variant, ('seed', 'held_out')):.2f}")
    return drawn


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Bars per held-out domain and for the mean, whiskers over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axis = figure.subplots()
    groups = (*DOMAINS, None)
    width = 0.8 / len(VARIANTS)
    for place, variant in enumerate(VARIANTS):
        values = [accuracies(runs, variant, name) for name in groups]
        axis.bar(
            [group + (place - (len(VARIANTS) - 1) / 2) * width for group in range(len(groups))],
            [statistics.fmean(v) if v else 0 for v in values],
            width,
            yerr=[statistics.stdev(v) if len(v) > 1 else 0 for v in values],
            label=variant,
        )
    axis.set_xticks(range(len(groups)), [name or "mean" for name in groups])
    axis.set_ylabel("accuracy on the unseen domain, %")
    axis.set_title("PACS, ResNet-18 from scratch, one domain left out")
    figure.legend(ncols=len(VARIANTS), loc="outside lower center", fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
