"""Activation matching (GAM) between MNIST and USPS, with a LeNet and a small ResNet; and on generated scenes.

    python benchmarks/adaptation.py --data DIR --quick
    python benchmarks/adaptation.py --data DIR --quick --scenes
    python benchmarks/adaptation.py --data DIR --full --device cuda

DIR holds ``digits.npz`` with ``mnist_train_x``, ``mnist_train_y``, ``mnist_test_x``, ... and the same for
``usps``: grey images, uint8. Both are brought to 28×28. A network is trained on the source domain's training
images, once per seed; every variant starts from it and sees the source and target training images without
labels. Scored are the test images of the target domain, with the weights after the last step.

Nothing was chosen by looking at labels of the target domain: layers, weights, optimiser and drift are those of
the authors' release (LeNet; fc3 at 0.1 and the logits at 1, Adam 2e-4 with β1 0.5, batch 128, λ = 1), the ResNet
takes its pooled vector and logits in their place. The paper reports 95 % for MNIST→USPS and 98 % for USPS→MNIST
after 10 000 steps. AdaBN needs BatchNorm, which the LeNet does not have.

``--quick`` makes hundreds of steps where the release makes 10 000, and one seed for the ResNet. ``--full`` is the
protocol to quote. ``--scenes`` runs a third, short part: segmentation of generated scenes in two styles with
a small torchvision FCN, four taps over the depth, a decision per position, least-squares GAN.

Finished runs are written at once, and the same command goes on where it stopped.
"""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

import fxgraft
import scenes
from common import Results, argument_parser, cell, part_of, result_path
from fxgraft.experiments.backbones import build_model
from fxgraft.experiments.evaluation import evaluate
from fxgraft.experiments.images import as_input
from fxgraft.experiments.training import train

NAME = "adaptation"
KEY = ("network", "pair", "seed", "variant")
SIDE = 28
PAIRS = ("mnist→usps", "usps→mnist")
REPORTED = {"mnist→usps": 95, "usps→mnist": 98}

# What each variant adds to GAM's adversarial loss; None is the network without GAM.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "source only": None,
    "AdaBN": None,
    "adversarial": {},
    "+ matching": {"matching": "gaussian"},
    "+ drift": {"drift": 1.0},
    "+ both": {"matching": "gaussian", "drift": 1.0},
}

SHARED: dict[str, Any] = {
    "task": "MNIST and USPS at 28×28, accuracy on the target domain's test images, weights of the last step",
    "variants": VARIANTS,
    "layers": {"lenet": ["fc3", "fc4"], "resnet18": ["global_pool", "fc"]},
    "gam": {"gan": "jsd", "weights": [0.1, 1.0], "invert": "both", "matching": None, "drift": 0.0},
    "adapt": {"lr": 2e-4, "betas": [0.5, 0.999]},
    "batch_size": 128,
    "source": {"batch_size": 128, "lr": 1e-3, "optimizer": "adamw", "weight_decay": 0.05},
    "scenes": scenes.PROTOCOL,
}
QUICK: dict[str, Any] = {
    **SHARED,
    "epochs": {"mnist": 1, "usps": 8},
    "steps": {"lenet": 500, "resnet18": 300},
    "resnet18": {"channels": [16, 32, 64, 128], "output_stride": 16},
}
FULL: dict[str, Any] = {
    **SHARED,
    "epochs": {"mnist": 20, "usps": 160},
    "steps": {"lenet": 10_000, "resnet18": 10_000},
    "resnet18": {"output_stride": 16},
}
SEEDS: dict[str, dict[str, list[int]]] = {
    "quick": {"lenet": [0, 1, 2], "resnet18": [0], "fcn": [0]},
    "full": {"lenet": [0, 1, 2], "resnet18": [0, 1, 2], "fcn": [0, 1, 2]},
}


class LeNet(nn.Module):
    """The release's LeNet, on the first channel of grey images (N, 3, 28, 28)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc3 = nn.Sequential(nn.Linear(800, 500), nn.ReLU())
        self.fc4 = nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, 10)."""
        x = F.max_pool2d(self.conv1(x[:, :1]).relu(), 2)
        x = F.max_pool2d(self.conv2(x).relu(), 2)
        return self.fc4(self.fc3(x.flatten(1)))


class Unlabelled(Dataset[Tensor]):
    """Images by lists of indices, as a network takes them."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: list[int]) -> Tensor:
        return as_input(self.images[index])


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser(__doc__.splitlines()[0], NAME)
    parser.add_argument("--scenes", action="store_true", help="the segmentation part, instead of the digits")
    parser.add_argument("--networks", nargs="+", default=["lenet", "resnet18"], choices=["lenet", "resnet18"])
    arguments = parser.parse_args(argv)
    size = "quick" if arguments.quick else "full"
    protocol = QUICK if arguments.quick else FULL
    path = result_path(arguments, NAME)
    results = Results(path, protocol, KEY, arguments.device, arguments.shard)
    networks = ["fcn"] if arguments.scenes else arguments.networks
    # Variants innermost: they share the network trained on the source domain.
    todo = [
        {"network": network, "pair": pair, "seed": seed, "variant": variant}
        for network in networks
        for seed in arguments.seeds or SEEDS[size][network]
        for pair in ([scenes.PAIR] if arguments.scenes else PAIRS)
        for variant in VARIANTS
        if variant in (scenes.VARIANTS if arguments.scenes else VARIANTS)
        and (network, variant) != ("lenet", "AdaBN")
    ]
    if arguments.scenes:
        run_one = scenes.runner(arguments.device, play)
    else:
        run_one = digit_runner(read_digits(arguments.data), protocol, arguments.device)
    results.carry_out(
        part_of(todo, arguments.shard),
        lambda run: run_one(run, VARIANTS[run["variant"]]),
        lambda outcome: outcome["score"],
    )
    results.present(table, plot)


def read_digits(data: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Images uint8 (N, 3, 28, 28) and labels of "mnist_train", "mnist_test", "usps_train", "usps_test"."""
    digits = {}
    with np.load(data / "digits.npz", allow_pickle=False) as found:
        for part in ("mnist_train", "mnist_test", "usps_train", "usps_test"):
            images = torch.from_numpy(found[f"{part}_x"])[:, None]
            if images.shape[-1] != SIDE:
                wide = F.interpolate(images.float(), size=(SIDE, SIDE), mode="bilinear", align_corners=False)
                images = wide.round().byte()
            labels = torch.from_numpy(found[f"{part}_y"]).long()
            digits[part] = images.expand(-1, 3, -1, -1), labels
    return digits


def loader_of(images: Tensor, batch_size: int) -> Iterable[Tensor]:
    """Batches in an order of their own each epoch, the last one dropped if it is not full."""
    data = Unlabelled(images)
    batches = BatchSampler(RandomSampler(data), batch_size, drop_last=True)
    return DataLoader(data, sampler=batches, batch_size=None)


def digit_runner(digits: dict[str, tuple[Tensor, Tensor]], protocol: dict[str, Any], device: str) -> Any:
    """Return the function that carries out one run and returns what is to be recorded."""

    @functools.lru_cache(maxsize=1)
    def trained(network: str, domain: str, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = LeNet() if network == "lenet" else build_model(network, 10, **protocol[network])
        epochs = protocol["epochs"][domain]
        train(model, digits[f"{domain}_train"], epochs=epochs, seed=seed, device=device, **protocol["source"])
        return model.eval()

    def run_one(run: dict[str, Any], terms: dict[str, Any] | None) -> dict[str, Any]:
        source, target = run["pair"].split("→")
        network = trained(run["network"], source, run["seed"])
        model = copy.deepcopy(network)
        record: dict[str, Any] = {"source_score": evaluate(network, *digits[f"{source}_test"])}
        loaders = [loader_of(digits[f"{d}_train"][0], protocol["batch_size"]) for d in (source, target)]
        torch.manual_seed(run["seed"])
        if run["variant"] == "AdaBN":
            fxgraft.adapt_batchnorm(model, (batch.to(device) for batch in loaders[1]))
        elif terms is not None:
            options = {**protocol["gam"], **terms, "layers": protocol["layers"][run["network"]]}
            steps = protocol["steps"][run["network"]]
            record |= play(model, loaders, options, steps, protocol["adapt"], (3, SIDE, SIDE))
        return {"score": evaluate(model, *digits[f"{target}_test"]), **record}

    return run_one


def play(
    model: nn.Module,
    loaders: list[Iterable[Any]],
    options: dict[str, Any],
    steps: int,
    settings: dict[str, Any],
    input_size: tuple[int, int, int],
) -> dict[str, Any]:
    """Adapt a source network to what the second loader gives, in place; return how the game went, on its last steps."""
    fxgraft.patch(model, "gam", input_size=input_size, **options)
    began = time.perf_counter()
    history = fxgraft.adapt(model, *loaders, steps=steps, **settings)
    seconds = time.perf_counter() - began
    fxgraft.unpatch(model)
    last = {**history.losses, **{f"accuracy.{tap}": values for tap, values in history.accuracy.items()}}
    return {
        "steps": steps,
        "step_seconds": round(seconds / steps, 5),
        "last": {name: round(statistics.fmean(values[-50:]), 5) for name, values in last.items()},
    }


def scores(runs: list[dict[str, Any]], network: str, pair: str, variant: str) -> list[float]:
    """One per seed."""
    return [r["score"] for r in runs if (r["network"], r["pair"], r["variant"]) == (network, pair, variant)]


def columns(runs: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The (network, pair) that there are runs of, in a fixed order."""
    order = [(network, pair) for network in ("lenet", "resnet18") for pair in PAIRS]
    return [
        each
        for each in [*order, ("fcn", scenes.PAIR)]
        if any((r["network"], r["pair"]) == each for r in runs)
    ]


def table(runs: list[dict[str, Any]]) -> Table:
    """Score on the target domain, by variant."""
    drawn = Table(title="Target domain's test images, % (digits: accuracy; scenes: mean IoU; ± over seeds)")
    drawn.add_column("")
    for network, pair in columns(runs):
        count = len({r["seed"] for r in runs if (r["network"], r["pair"]) == (network, pair)})
        drawn.add_column(f"{network}\n{pair}\n{count} seed{'s' if count > 1 else ''}", justify="right")
    for variant in VARIANTS:
        drawn.add_row(
            variant, *(cell([100 * s for s in scores(runs, *each, variant)]) for each in columns(runs))
        )
    drawn.add_section()
    drawn.add_row("reported", *(f"{REPORTED[p]}" if n == "lenet" else "-" for n, p in columns(runs)))
    return drawn


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """A panel per network and pair, a bar per variant with whiskers over the seeds."""
    from matplotlib.figure import Figure

    panels = columns(runs)
    figure = Figure(figsize=(2.6 * len(panels) + 1.2, 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (network, pair) in zip(axes, panels, strict=True):
        for place, variant in enumerate(VARIANTS):
            values = [100 * score for score in scores(runs, network, pair, variant)]
            if values:
                whisker = statistics.stdev(values) if len(values) > 1 else 0
                axis.bar(place, statistics.fmean(values), yerr=whisker, color=f"C{place}")
        if network == "lenet":
            axis.axhline(REPORTED[pair], color="black", linestyle=":", label="reported, 10 000 steps")
            axis.legend(loc="lower right", fontsize="small")
        axis.set_title(f"{network}, {pair}", fontsize="medium")
        axis.set_xticks(range(len(VARIANTS)), list(VARIANTS), rotation=60, ha="right")
        axis.set_ylim(0, 100)
    axes[0].set_ylabel("target test images: accuracy\n(fcn: mean IoU), %")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
