"""MixMo on CIFAR-10: one network with two inputs and outputs against one with one.

``quick`` starts from ImageNet weights; ``full`` trains a WRN-28-5 with a stem of stride 1 from scratch, each image
four times in a batch and augmented anew. The network is scored as it is evaluated, which is one forward pass for all
members, and by member: accuracy, likelihood as it comes and after temperature scaling, calibration. The loss of
the last epoch is in the result file: a member that has learnt less is also less sure. Weights of the last epoch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fxgraft
from benchmarks.corruption import read_cifar10
from benchmarks.loops.images import as_input
from benchmarks.pretrained import pretrained
from benchmarks.study import BARE, Claim, Job, Patches, Study
from benchmarks.training import course_of, runs_by_seed, trained
from benchmarks.wide import WideResNet

MEMBERS = 2
MIXINGS: dict[str, dict[str, Any]] = {
    "MIMO": {"mixing": "sum"},
    "Linear-MixMo": {"mixing": "linear"},
    "Cut-MixMo": {"mixing": "cut"},
}

SHARED: dict[str, Any] = {
    "task": "CIFAR-10, weights of the last epoch",
    "split_seed": 0,
    "calibration_bins": 15,
}
QUICK: dict[str, Any] = {
    **SHARED,
    "model": "tf_efficientnet_lite0",
    "size": 96,
    "limit_per_class": 200,
    "test_per_class": 100,
    "augment": {"crop_padding": 8, "flip": 0.5},
    "variants": {BARE: None, **MIXINGS},
    "training": {
        "epochs": 8,
        "batch_size": 32,
        "lr": 0.01,
        "optimizer": "sgd",
        "weight_decay": 5e-4,
        "channels_last": True,
    },
}
FULL: dict[str, Any] = {
    **SHARED,
    "model": "wrn_28_5",
    "size": 32,
    "limit_per_class": None,
    "test_per_class": None,
    "augment": {"crop_padding": 4, "flip": 0.5},
    "variants": {
        BARE: None,
        "bare, four times the steps": None,
        **{name: {**options, "init": "random"} for name, options in MIXINGS.items()},
    },
    "repetitions": 4,
    "training": {
        "epochs": 60,
        "batch_size": 64,
        "lr": 0.0125,
        "optimizer": "sgd",
        "weight_decay": 6e-4,
        "decay_all": True,
        "amp": True,
        "channels_last": True,
    },
}


def patches(protocol: dict[str, Any], variant: str) -> Patches:
    """Say what a variant is patched with."""
    options = protocol["variants"][variant]
    return [] if options is None else [("mixmo", {"members": MEMBERS, **options})]


def carry_out(job: Job) -> dict[str, Any]:
    """Train one variant and score it."""
    protocol, run = job.protocol, job.run
    size, seed = protocol["size"], protocol["split_seed"]
    seen = read_cifar10(job.data, "train", size, protocol["limit_per_class"], seed)
    test = read_cifar10(job.data, "test", size, protocol["test_per_class"], seed)
    torch.manual_seed(run["seed"])
    classes = len(seen.classes)
    model = (
        WideResNet(28, 5, classes)
        if protocol["model"] == "wrn_28_5"
        else pretrained(protocol["model"], classes)
    )
    chosen = patches(protocol, run["variant"])
    for method, options in chosen:
        fxgraft.patch(model, method, input_size=(3, size, size), **options)
    history = trained(job, model, (seen.images, seen.labels), training=training_of(protocol, run["variant"]))
    metrics = fxgraft.EnsembleMetrics(
        classes, MEMBERS if chosen else 1, n_bins=protocol["calibration_bins"], temperature="fit"
    )
    for part in torch.arange(len(test)).split(256):
        metrics.update(member_logits(model, as_input(test.images[part]).to(job.device)), test.labels[part])
    found = {name: round(value.item(), 5) for name, value in metrics.compute().items()}
    return {
        "scores": {score: found[name] for score, name in SCORES.items() if name in found},
        "metrics": found,
        "images": {"train": len(seen), "test": len(test)},
        **course_of(job, history),
    }


def training_of(protocol: dict[str, Any], variant: str) -> dict[str, Any]:
    """Return how a variant is trained; repetition belongs to the networks of several members."""
    training = dict(protocol["training"])
    repetitions = protocol.get("repetitions", 1)
    if protocol["variants"][variant] is not None:
        training["repetitions"] = repetitions
    elif variant != BARE:
        training["epochs"] *= repetitions
    return training


def member_logits(model: nn.Module, x: Tensor) -> Tensor:
    """Logits (M, B, K) of the members on the CPU; one member for a bare network."""
    with torch.no_grad():
        logits = fxgraft.member_logits(model, x).logits if fxgraft.grafts(model) else model.eval()(x)[None]
    return logits.float().cpu()


SCORES = {
    "accuracy": "ensemble/accuracy",
    "NLL": "ensemble/nll",
    "NLL, scaled": "ensemble/nll_scaled",
    "ECE": "ensemble/ece",
}
PAPER = "CIFAR-100, WRN-28-10: 81.8 → {} %"
STUDY = Study(
    name="ensembling",
    about="CIFAR-10 at 96 px, EfficientNet-Lite0 from ImageNet weights",
    needs=("cifar10_train*", "cifar10_test*"),
    protocols={"quick": QUICK, "full": FULL},
    key=("seed", "variant"),
    runs=runs_by_seed,
    patches=patches,
    seeds={"quick": (0, 1, 2), "full": (0, 1, 2)},
    carry_out=carry_out,
    lower_is_better=("NLL", "NLL, scaled", "ECE"),
    plain=("NLL", "NLL, scaled"),
    claims=(
        *(
            Claim(method="mixmo", variant=variant, score="accuracy", paper=PAPER.format(figure))
            for variant, figure in (("MIMO", 82.9), ("Linear-MixMo", 83.0), ("Cut-MixMo", 85.5))
        ),
        Claim(method="mixmo", variant="Linear-MixMo", score="NLL, scaled", paper="a better likelihood"),
    ),
)
