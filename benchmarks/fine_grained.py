"""The diversification block and its loss on PACS's photographs and paintings, from ImageNet weights.

The classes are few: with seven, the loss that counts the k = 15 strongest wrong classes is cross-entropy itself, so it
is tested with k = 2 and k = 3 in ``full`` alone. ``quick`` tests the block, in pairs that share weights and batches. A
fifth of each class is the test set; the weights are those of the last epoch.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

import fxgraft
from benchmarks.domain_generalisation import FILES, read_pacs
from benchmarks.loops.evaluation import evaluate
from benchmarks.pretrained import pretrained
from benchmarks.study import BARE, Claim, Job, Patches, Study
from benchmarks.training import course_of, runs_by_seed, trained

SHARED: dict[str, Any] = {
    "task": "PACS, photographs and paintings, from ImageNet weights, weights of the last epoch",
    "model": "tf_efficientnet_lite0",
    # Maps of 6×6, so that patches of 3×3 are a quarter of them, about as on the paper's 14×14.
    "model_options": {"output_stride": 16},
    "size": 96,
    "domains": ["art_painting", "photo"],
    "test_share": 0.2,
    "split_seed": 0,
    "augment": {"crop_padding": 8, "flip": 0.5, "jitter": 0.2},
}
QUICK: dict[str, Any] = {
    **SHARED,
    "limit_per_class": 60,
    "variants": {BARE: None, "block": {}},
    "training": {
        "epochs": 10,
        "batch_size": 32,
        "lr": 0.01,
        "optimizer": "sgd",
        "weight_decay": 5e-4,
        "channels_last": True,
    },
}
FULL: dict[str, Any] = {
    **SHARED,
    "limit_per_class": None,
    "variants": {
        BARE: None,
        "block": {},
        # alpha=1 damps nothing: that variant trains the plain head with the other loss.
        **{f"loss, k={k}": {"alpha": 1.0, "loss": "gradient_boosting", "loss_k": k} for k in (2, 3)},
        **{f"both, k={k}": {"loss": "gradient_boosting", "loss_k": k} for k in (2, 3)},
    },
    "training": {
        **QUICK["training"],
        "epochs": 20,
        "batch_size": 64,
        "amp": True,
    },
}


@functools.cache
def read(data: Path, size: int, limit: int | None, share: float, names: tuple[str, ...], seed: int) -> Any:
    """Images and labels to train and to test on, and the classes."""
    parts = [
        domain.split(share, seed=seed)
        for domain in read_pacs(data, size, limit, seed)
        if domain.name in names
    ]
    sides = [
        (torch.cat([each.images for each in side]), torch.cat([each.labels for each in side]))
        for side in zip(*parts, strict=True)
    ]
    return sides[0], sides[1], parts[0][0].classes


def patches(protocol: dict[str, Any], variant: str) -> Patches:
    """Say what a variant is patched with."""
    options = protocol["variants"][variant]
    return [] if options is None else [("diversification", options)]


def carry_out(job: Job) -> dict[str, Any]:
    """Train one variant and score it on the test images."""
    protocol, run = job.protocol, job.run
    size = protocol["size"]
    seen, test, classes = read(
        job.data,
        size,
        protocol["limit_per_class"],
        protocol["test_share"],
        tuple(protocol["domains"]),
        protocol["split_seed"],
    )
    torch.manual_seed(run["seed"])
    model = pretrained(protocol["model"], len(classes), **protocol["model_options"])
    for method, options in patches(protocol, run["variant"]):
        fxgraft.patch(model, method, input_size=(3, size, size), **options)
    history = trained(job, model, seen)
    return {
        "scores": {
            "test images": round(evaluate(model, *test, amp=protocol["training"].get("amp", False)), 5)
        },
        "images": {"train": len(seen[1]), "test": len(test[1])},
        **course_of(job, history),
    }


STUDY = Study(
    name="fine_grained",
    about="PACS photo and art, EfficientNet-Lite0 (stride 16) from ImageNet weights, 96 px",
    needs=(FILES,),
    protocols={"quick": QUICK, "full": FULL},
    key=("seed", "variant"),
    runs=runs_by_seed,
    patches=patches,
    seeds={"quick": tuple(range(8)), "full": tuple(range(10))},
    carry_out=carry_out,
    claims=(
        Claim(
            method="diversification",
            variant="block",
            score="test images",
            paper="fine-grained, ResNet-50: the block adds 0.8 points",
        ),
    ),
)
