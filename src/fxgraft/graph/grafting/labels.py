"""Labels from outside a call, and what labels must be like."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

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

    def __init__(self, value: Any, reusable: bool) -> None:
        self.value = value
        self.reusable = reusable
        self.used = False


# The innermost source is the last one. Of a thread or task alone: what one publishes no other one sees.
_published: ContextVar[tuple[Labels, ...]] = ContextVar("fxgraft_labels", default=())


@contextmanager
def _publish(value: Any, reusable: bool) -> Iterator[None]:
    labels = Labels(value, reusable)
    _published.set((*_published.get(), labels))
    try:
        yield
    finally:
        # Not reset by a token: a generator may be closed in another context than it was started in.
        _published.set(tuple(each for each in _published.get() if each is not labels))


def published() -> Labels | None:
    """Return the labels that were set last for this thread or task, and still hold."""
    every = _published.get()
    return every[-1] if every else None


@contextmanager
def targets(y: Tensor) -> Iterator[None]:
    """Give labels to every patched model called inside the block.

    For training loops that can only call ``model(x)``. The labels hold for the whole block, however
    many passes it makes, and for the thread or task that entered it.

    Args:
        y: class indices (B,), soft targets (B, K), or whatever the criterion takes.
    """
    with _publish(y, reusable=True):
        yield


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
        with _publish(batch[index], reusable=False):  # type: ignore[index]
            yield batch


def checked_labels(graft: str, target: Any, batch: int) -> Tensor:
    """Return labels if they can be those of a batch.

    Args:
        graft: name of the graft that needs them, for the message.
        target: the labels; None for none.
        batch: number of samples.

    Raises:
        TargetError: no labels, no tensor, another batch size, or one floating-point number per sample.
    """
    if target is None:
        raise TargetError(
            f"{graft!r} needs the labels of the batch in training, and none were given.\n"
            "Call model(x, target=y), or wrap the call in `with fxgraft.targets(y):`, or iterate over "
            "fxgraft.with_targets(loader); model.eval() needs none."
        )
    if not isinstance(target, Tensor):
        raise TargetError(
            f"{graft!r} was given labels of type {type(target).__name__}.\n"
            "It takes a tensor of class indices (B,) or of soft targets (B, K)."
        )
    if target.is_complex():
        raise TargetError(
            f"{graft!r} was given complex labels.\n"
            "It takes a tensor of class indices (B,) or of soft targets (B, K)."
        )
    if target.ndim == 0 or target.shape[0] != batch:
        raise TargetError(
            f"{graft!r} was given labels for {target.shape[0] if target.ndim else 'no'} "
            f"samples with a batch of {batch}.\n"
            "Labels and inputs must be of the same batch; labels set earlier may have been left over."
        )
    if target.is_floating_point() and target.ndim < 2:
        raise TargetError(
            f"{graft!r} was given one floating-point number per sample as labels.\n"
            "Class indices are integers (B,), soft targets are floating-point (B, K).\n"
            "Pass y.long() if these are indices."
        )
    # Narrow integers index as masks (uint8, bool) or not at all; cross-entropy takes them as indices.
    return target if target.is_floating_point() or target.dtype == torch.int64 else target.long()


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
