"""Activation matching (GAM) between MNIST and USPS.

Everything is the release's: LeNet; its last two layers at 0.1 and 1, Jensen-Shannon GAN, drift 1, Adam 2e-4 with
β1 0.5, batch 128. A network is trained on the source domain's training images, once per seed and pair; the
variants start from it and see the training images of both domains without labels. Scored are the target domain's
test images, and its training images as the release has it, with the weights after the last step. AdaBN needs
BatchNorm, which the LeNet does not have; `benchmarks.scenes` has it.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

import fxgraft
from benchmarks.loops.evaluation import evaluate
from benchmarks.loops.images import as_input
from benchmarks.loops.training import train
from benchmarks.study import BARE, Claim, Job, Patches, Run, Study

SIDE = 28
PAIRS = ("mnist→usps", "usps→mnist")

# What each variant sets beside `gam`; None is the source network as it is.
VARIANTS: dict[str, dict[str, Any] | None] = {
    BARE: None,
    "gam": {},
    "gam, matching": {"matching": "gaussian"},
}

SHARED: dict[str, Any] = {
    "task": "MNIST and USPS at 28×28, accuracy on the target domain, weights of the last step",
    "pairs": list(PAIRS),
    "variants": VARIANTS,
    "gam": {
        "layers": ["fc3", "fc4"],
        "gan": "jsd",
        "weights": [0.1, 1.0],
        "invert": "both",
        "matching": None,
        "drift": 1.0,
    },
    "adapt": {"lr": 2e-4, "betas": [0.5, 0.999]},
    "batch_size": 128,
    "steps": 10_000,
}
QUICK: dict[str, Any] = {
    **SHARED,
    "variants": {name: VARIANTS[name] for name in (BARE, "gam")},
    "source": {"epochs": {"mnist": 3, "usps": 24}, "batch_size": 128, "lr": 1e-3, "optimizer": "adamw"},
}
FULL: dict[str, Any] = {
    **SHARED,
    "source": {"epochs": {"mnist": 20, "usps": 160}, "batch_size": 128, "lr": 1e-3, "optimizer": "adamw"},
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


def runs(protocol: dict[str, Any], seeds: Sequence[int]) -> list[Run]:
    """Every variant of a pair one after the other."""
    return [
        {"pair": pair, "seed": seed, "variant": variant}
        for seed in seeds
        for pair in protocol["pairs"]
        for variant in protocol["variants"]
    ]


@functools.cache
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


def patches(protocol: dict[str, Any], variant: str) -> Patches:
    """Say what a variant is patched with."""
    terms = protocol["variants"][variant]
    return [] if terms is None else [("gam", {**protocol["gam"], **terms})]


def carry_out(job: Job) -> dict[str, Any]:
    """Train the source network, adapt it to the target domain and score it there."""
    protocol, run = job.protocol, job.run
    digits = read_digits(job.data)
    source, target = run["pair"].split("→")
    torch.manual_seed(run["seed"])
    model = LeNet()
    settings = {**protocol["source"], "epochs": protocol["source"]["epochs"][source]}
    train(
        model,
        digits[f"{source}_train"],
        seed=run["seed"],
        device=job.device,
        checkpoint=job.folder / "training.pt",
        progress=job.progress,
        **settings,
    )
    record: dict[str, Any] = {"source_score": round(evaluate(model, *digits[f"{source}_test"]), 5)}
    for method, options in patches(protocol, run["variant"]):
        torch.manual_seed(run["seed"])
        loaders = [loader_of(digits[f"{name}_train"][0], protocol["batch_size"]) for name in (source, target)]
        fxgraft.patch(model, method, input_size=(3, SIDE, SIDE), **options)
        history = fxgraft.adapt(
            model,
            *loaders,
            steps=protocol["steps"],
            device=job.device,
            checkpoint=job.folder / "adaptation.pt",
            callback=lambda step, _: job.progress(step, protocol["steps"]),
            **protocol["adapt"],
        )
        record["last"] = last_of(history)
    return {
        "scores": {
            "target's test images": round(evaluate(model, *digits[f"{target}_test"]), 5),
            "target's training images": round(evaluate(model, *digits[f"{target}_train"]), 5),
        },
        **record,
    }


def last_of(history: fxgraft.AdaptationHistory, steps: int = 50) -> dict[str, float]:
    """Return how the game went on its last steps: losses, and accuracies of the discriminators."""
    found = {**history.losses, **{f"accuracy.{tap}": values for tap, values in history.accuracy.items()}}
    return {name: round(statistics.fmean(values[-steps:]), 5) for name, values in found.items()}


STUDY = Study(
    name="adaptation",
    about="LeNet, digits of another source, 10 000 steps",
    needs=("digits.npz",),
    protocols={"quick": QUICK, "full": FULL},
    key=("pair", "seed", "variant"),
    runs=runs,
    patches=patches,
    seeds={"quick": (0, 1, 2), "full": (0, 1, 2)},
    carry_out=carry_out,
    claims=tuple(
        Claim(
            method="gam",
            variant="gam",
            score=score,
            paper=paper.format(reported),
            only={"pair": pair},
        )
        for pair, reported in zip(PAIRS, (95, 98), strict=True)
        for score, paper in (
            ("target's training images", "{} % after 10 000 steps, on training images as the release scores"),
            ("target's test images", "not reported"),
        )
    ),
)
