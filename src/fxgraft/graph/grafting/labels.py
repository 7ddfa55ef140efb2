"""Labels from outside a call, and the checks on labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from fxgraft.errors import TargetError

Batch = TypeVar("Batch")


class Labels:
    """Labels set from outside a call, by `targets` or `with_targets`.

    Attributes:
        value: class indices (B,) or soft targets (B, K).
        reusable: whether several training passes may read them. Labels that a loader sets belong to
            one batch and one pass; those of a ``with targets(y):`` block hold for the whole block.
        used: whether a training pass has read them.
    """

    def __init__(self, value: Tensor, reusable: bool) -> None:
        self.value = value
        self.reusable = reusable
        self.used = False


# The innermost label source is the last one. A plain list, since torch.compile reads it inside graphs.
_ambient: list[Labels] = []


@contextmanager
def targets(y: Tensor) -> Iterator[None]:
    """Give labels to every patched model called inside the block.

    For training loops that can only call ``model(x)``. The labels hold for the whole block, however
    many passes it makes.

    Args:
        y: class indices (B,), soft targets (B, K), or whatever the criterion takes.
    """
    labels = Labels(y, reusable=True)
    _ambient.append(labels)
    try:
        yield
    finally:
        _ambient.remove(labels)


def with_targets(loader: Iterable[Batch], index: int | str = 1) -> Iterator[Batch]:
    """Iterate over a loader and set each batch's labels for the patched models called on it.

    Each batch's labels serve one training pass. A second pass before the next batch raises
    `TargetError`, since nothing says that those are still the right labels; use `targets` for that.

    Args:
        loader: yields batches that hold their labels at ``batch[index]``.
        index: position or key of the labels in a batch.

    Yields:
        The loader's batches, unchanged.
    """
    for batch in loader:
        labels = Labels(batch[index], reusable=False)  # type: ignore[index]
        _ambient.append(labels)
        try:
            yield batch
        finally:
            _ambient.remove(labels)


def check_label_range(graft: str, target: Tensor, classes: int, spatial: int = 0) -> None:
    """Raise `TargetError` for labels of another shape or number of classes, and for indices out of range.

    ``spatial`` counts the dimensions of the logits after (B, K). Indices only where looking costs nothing:
    on the CPU the values are read. On an accelerator reading them would stall the queue and under
    torch.compile it would break the graph; there an out-of-range index fails in the lookup itself.
    """
    soft = target.is_floating_point()
    if target.ndim != spatial + (2 if soft else 1):
        per = "(B, K, ...)" if spatial else "(B, K)"
        raise TargetError(
            f"{graft!r} was given {'soft' if soft else 'integer'} labels of shape {tuple(target.shape)} "
            f"for logits {per}.\n"
            "Class indices have one dimension less than the logits, soft targets as many and floating point.\n"
            "Pass y.squeeze(1) for indices (B, 1), y.float() for one-hot labels (B, K)."
        )
    if soft and target.shape[1] != classes:
        raise TargetError(
            f"{graft!r} was given soft targets for {target.shape[1]} classes; the model has {classes}.\n"
            "Soft targets are (B, K), one weight per class of the model.\n"
            "Check num_classes of the model and of the data's mixing."
        )
    if soft or target.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if target.numel() and not (int(target.min()) >= 0 and int(target.max()) < classes):
        raise TargetError(
            f"{graft!r} was given class indices from {int(target.min())} to {int(target.max())} "
            f"for {classes} classes.\n"
            f"Indices must lie in [0, {classes - 1}]. Check num_classes of the model and the labels of the data."
        )
