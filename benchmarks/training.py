"""What the studies that train a classifier share: their runs, the training of one, and what is recorded of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from benchmarks.loops.augment import Augment
from benchmarks.loops.domains import ImagesAndLabels
from benchmarks.loops.training import History, train
from benchmarks.study import Job, Run


def runs_by_seed(protocol: dict[str, Any], seeds: Sequence[int]) -> list[Run]:
    """Every variant of a seed one after the other."""
    return [{"seed": seed, "variant": variant} for seed in seeds for variant in protocol["variants"]]


def trained(
    job: Job,
    model: nn.Module,
    seen: ImagesAndLabels,
    *,
    validation: ImagesAndLabels | None = None,
    training: dict[str, Any] | None = None,
) -> History:
    """Train a model as the protocol says, going on from where an earlier run of the job was cut off.

    Args:
        job: the run.
        model: trained in place.
        seen: images and labels.
        validation: images and labels to score after each epoch.
        training: in place of the protocol's own entry.
    """
    return train(
        model,
        seen,
        validation=validation,
        augment=Augment(**job.protocol["augment"]),
        seed=job.run["seed"],
        device=job.device,
        checkpoint=job.folder / "training.pt",
        progress=job.progress,
        **(job.protocol["training"] if training is None else training),
    )


def course_of(job: Job, history: History) -> dict[str, Any]:
    """Return what is recorded of every training: what a step took, and how the loss went."""
    return {
        "step_seconds": round(history.median_step, 5),
        "images_per_second": round(job.protocol["training"]["batch_size"] / history.median_step, 1),
        "epoch_loss": [round(loss, 5) for loss in history.epoch_loss],
    }
