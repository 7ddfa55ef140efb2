"""CrossNorm and SelfNorm on CIFAR-10: accuracy on clean and on corrupted test images.

``quick`` fine-tunes an EfficientNet-Lite0 from its ImageNet weights on images brought to 96 px, with CrossNorm on the
image (as the release has it on ImageNet) and SelfNorm from its start as the identity. ``full`` is the paper's: a
WRN-40-2 from scratch with the released settings, weight decay on everything, with and without the consistency loss.
Nothing about the corruptions is seen in training; the weights are those of the last epoch.
"""

from __future__ import annotations

import functools
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxgraft
from benchmarks.corruptions import CORRUPTIONS, corrupt
from benchmarks.loops.domains import Domain
from benchmarks.loops.evaluation import evaluate
from benchmarks.loops.loading import load_domains
from benchmarks.pretrained import pretrained
from benchmarks.study import BARE, Claim, Job, Patches, Study
from benchmarks.training import course_of, runs_by_seed, trained
from benchmarks.wide import WideResNet

IMAGE: dict[str, Any] = {"layers": "input", "crop": "both", "p": 0.5, "active": 1}

SHARED: dict[str, Any] = {
    "task": "CIFAR-10, accuracy on clean and on corrupted test images, weights of the last epoch",
    "split_seed": 0,
    "corruptions": list(CORRUPTIONS),
}
QUICK: dict[str, Any] = {
    **SHARED,
    "model": "tf_efficientnet_lite0",
    "size": 96,
    "limit_per_class": 200,
    "test_per_class": 50,
    "severities": [1, 3, 5],
    "augment": {"crop_padding": 8, "flip": 0.5},
    "variants": {
        BARE: [],
        "crossnorm": [["crossnorm", IMAGE]],
        "selfnorm": [["selfnorm", {"init": "identity"}]],
        "both": [["crossnorm", IMAGE], ["selfnorm", {"init": "identity"}]],
    },
    "training": {
        "epochs": 5,
        "batch_size": 32,
        "lr": 0.01,
        "optimizer": "sgd",
        "weight_decay": 5e-4,
        "channels_last": True,  # on a CPU, twice the speed of this network
    },
}
FULL: dict[str, Any] = {
    **SHARED,
    "model": "wrn_40_2",
    "size": 32,
    "limit_per_class": None,
    "test_per_class": None,
    "severities": [1, 2, 3, 4, 5],
    "augment": {"crop_padding": 4, "flip": 0.5},
    "variants": {
        BARE: [],
        "crossnorm": [["crossnorm", {"position": "post", "active": 2, "p": 0.5}]],
        "selfnorm": [["selfnorm", {"position": "pre", "init": "authors"}]],
        "both": [
            ["crossnorm", {"position": "post", "crop": "both", "active": 2, "p": 0.25}],
            ["selfnorm", {"position": "post", "init": "authors"}],
        ],
        "both, consistency": [
            ["crossnorm", {"position": "post", "crop": "both", "active": 2, "p": 0.75, "consistency": 10.0}],
            ["selfnorm", {"position": "post", "init": "authors"}],
        ],
    },
    "training": {
        "epochs": 100,
        "batch_size": 128,
        "lr": 0.1,
        "optimizer": "sgd",
        "weight_decay": 5e-4,
        "decay_all": True,
        "amp": True,
        "channels_last": True,
    },
}


@functools.cache
def read_cifar10(data: Path, split: str, size: int, limit: int | None, seed: int) -> Domain:
    """Images and labels of "train" or "test"."""
    return load_domains(data / f"cifar10_{split}*", size, limit=limit, seed=seed)[0]


def build(model: str, classes: int) -> nn.Module:
    """Return the network of a protocol."""
    return WideResNet(40, 2, classes) if model == "wrn_40_2" else pretrained(model, classes)


def patches(protocol: dict[str, Any], variant: str) -> Patches:
    """Say what a variant is patched with."""
    return [tuple(each) for each in protocol["variants"][variant]]


def carry_out(job: Job) -> dict[str, Any]:
    """Train one variant and score it on every corruption."""
    protocol, run = job.protocol, job.run
    size, seed = protocol["size"], protocol["split_seed"]
    seen = read_cifar10(job.data, "train", size, protocol["limit_per_class"], seed)
    test = read_cifar10(job.data, "test", size, protocol["test_per_class"], seed)
    torch.manual_seed(run["seed"])
    model = build(protocol["model"], len(seen.classes))
    for method, options in patches(protocol, run["variant"]):
        fxgraft.patch(model, method, input_size=(3, size, size), **options)
    history = trained(job, model, (seen.images, seen.labels))
    amp = protocol["training"].get("amp", False)
    corrupted = {
        kind: round(
            statistics.fmean(
                evaluate(model, corrupt(test.images, kind, severity), test.labels, amp=amp)
                for severity in protocol["severities"]
            ),
            5,
        )
        for kind in CORRUPTIONS
    }
    return {
        "scores": {
            "clean": round(evaluate(model, test.images, test.labels, amp=amp), 5),
            "corrupted": round(statistics.fmean(corrupted.values()), 5),
        },
        "corrupted": corrupted,
        "images": {"train": len(seen), "test": len(test)},
        **course_of(job, history),
    }


PAPER = "CIFAR-10-C, mean corruption error about 12 points lower with both"
STUDY = Study(
    name="corruption",
    about="CIFAR-10 at 96 px, EfficientNet-Lite0 from ImageNet weights, mean of nine corruptions",
    needs=("cifar10_train*", "cifar10_test*"),
    protocols={"quick": QUICK, "full": FULL},
    key=("seed", "variant"),
    runs=runs_by_seed,
    patches=patches,
    seeds={"quick": (0, 1, 2), "full": (0, 1, 2)},
    carry_out=carry_out,
    claims=(
        *(
            Claim(method=method, variant=variant, score="corrupted", paper=PAPER)
            for method, variant in (
                ("crossnorm", "crossnorm"),
                ("selfnorm", "selfnorm"),
                ("crossnorm", "both"),
            )
        ),
        Claim(method="crossnorm", variant="crossnorm", score="clean", paper="what it costs on clean images"),
    ),
)
