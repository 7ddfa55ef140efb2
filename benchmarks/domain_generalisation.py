"""RSC and CrossNorm on PACS: train on three domains, test on the fourth, from ImageNet weights.

RSC is set as its release sets it for PACS, at the map before pooling; CrossNorm exchanges the statistics of
images, as its release does on ImageNet. The training is that of RSC's release at a smaller size: SGD at 0.01, a
tenth of that from 80 % on, crops, flips, jitter and grey (but not each batch beside its mirror image). A tenth of
each class of the training domains is kept for validation, to see whether training has converged; the weights are
those of the last epoch, and the held-out domain decides nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fxgraft
from benchmarks.loops.domains import Domain, leave_one_out
from benchmarks.loops.evaluation import evaluate
from benchmarks.loops.loading import load_domains
from benchmarks.pretrained import pretrained
from benchmarks.study import BARE, Claim, Job, Patches, Run, Study
from benchmarks.training import course_of, trained
from fxgraft.errors import ConfigError

DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
FILES = "*pacs*.tar"

RSC: dict[str, Any] = {"preset": "pacs", "epochs": 6}
IMAGE_CROSSNORM: dict[str, Any] = {"layers": "input", "crop": "both", "p": 0.5, "active": 1}

SHARED: dict[str, Any] = {
    "task": "PACS, leave one domain out, from ImageNet weights, weights of the last epoch",
    "size": 96,
    "validation": 0.1,
    "split_seed": 0,
    "augment": {"crop_padding": 8, "flip": 0.5, "jitter": 0.4, "gray": 0.1},
}
QUICK: dict[str, Any] = {
    **SHARED,
    "models": ["tf_efficientnet_lite0"],
    "held_out": ["sketch", "cartoon"],
    "variants": {BARE: None, "rsc": ["rsc", RSC], "crossnorm": ["crossnorm", IMAGE_CROSSNORM]},
    "limit_per_class": 50,
    "training": {
        "epochs": 6,
        "batch_size": 32,
        "lr": 0.01,
        "optimizer": "sgd",
        "weight_decay": 5e-4,
        "schedule": "step",
    },
}
LONG = {**RSC, "epochs": 20}
FULL: dict[str, Any] = {
    **SHARED,
    "models": ["tf_efficientnet_lite0", "tf_efficientnet_lite2"],
    "held_out": list(DOMAINS),
    "variants": {
        BARE: None,
        "rsc": ["rsc", LONG],
        **{f"rsc {name}": ["rsc", {**LONG, "strategy": name}] for name in ("random", "top_activation")},
        **{f"rsc {scope}": ["rsc", {**LONG, "scope": scope}] for scope in ("spatial", "channel")},
        "crossnorm": ["crossnorm", IMAGE_CROSSNORM],
    },
    "limit_per_class": None,
    "training": {
        **QUICK["training"],
        "epochs": 20,
        "batch_size": 64,
        "amp": True,
        "channels_last": True,
    },
}


def runs(protocol: dict[str, Any], seeds: Sequence[int]) -> list[Run]:
    """Every variant of a pair one after the other."""
    return [
        {"model": model, "seed": seed, "held_out": held_out, "variant": variant}
        for seed in seeds
        for model in protocol["models"]
        for held_out in protocol["held_out"]
        for variant in protocol["variants"]
    ]


@functools.cache
def read_pacs(data: Path, size: int, limit: int | None, seed: int) -> tuple[Domain, ...]:
    """The four domains; other tars may lie beside those of PACS."""
    domains = load_domains(data / FILES, size, limit=limit, seed=seed)
    if {domain.name for domain in domains} != set(DOMAINS):
        raise ConfigError(
            f"{data} holds {', '.join(d.name for d in domains)}; PACS has {', '.join(DOMAINS)}."
        )
    return domains


def patches(protocol: dict[str, Any], variant: str) -> Patches:
    """Say what a variant is patched with."""
    chosen = protocol["variants"][variant]
    return [] if chosen is None else [tuple(chosen)]


def carry_out(job: Job) -> dict[str, Any]:
    """Train one variant with one domain left out, and score it on the whole of that domain."""
    protocol, run = job.protocol, job.run
    size, seed = protocol["size"], protocol["split_seed"]
    domains = read_pacs(job.data, size, protocol["limit_per_class"], seed)
    seen, validation, _ = leave_one_out(
        domains, run["held_out"], validation=protocol["validation"], seed=seed
    )
    test = next(each for each in read_pacs(job.data, size, None, seed) if each.name == run["held_out"])
    torch.manual_seed(run["seed"])
    model = pretrained(run["model"], len(test.classes))
    for method, options in patches(protocol, run["variant"]):
        fxgraft.patch(model, method, input_size=(3, size, size), **options)
    history = trained(job, model, seen, validation=validation)
    amp = protocol["training"].get("amp", False)
    return {
        "scores": {"unseen domain": round(evaluate(model, test.images, test.labels, amp=amp), 5)},
        "images": {"train": len(seen[1]), "test": len(test)},
        **course_of(job, history),
        "validation": [round(accuracy, 5) for accuracy in history.validation],
    }


STUDY = Study(
    name="domain_generalisation",
    about="PACS, one domain left out, EfficientNet-Lite0 from ImageNet weights, 96 px",
    needs=(FILES,),
    protocols={"quick": QUICK, "full": FULL},
    key=("model", "seed", "held_out", "variant"),
    runs=runs,
    patches=patches,
    seeds={"quick": (0, 1, 2), "full": (0, 1, 2)},
    carry_out=carry_out,
    claims=(
        Claim(
            method="rsc",
            variant="rsc",
            score="unseen domain",
            paper="PACS, ResNet-18, mean of four unseen domains: 79.9 → 85.2 %",
        ),
        Claim(
            method="crossnorm",
            variant="crossnorm",
            score="unseen domain",
            paper="helps under distribution shift; PACS is not in the paper",
        ),
    ),
)
