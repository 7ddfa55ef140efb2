"""What labels must be like."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxgraft.errors import TargetError

LEFT_OUT = (255, -1, -100)
"""Indices that data sets and criteria take for no class at all."""


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
        mark = next((each for each in (int(target.max()), int(target.min())) if each in LEFT_OUT), None)
        hint = (
            ""
            if mark is None
            else f"\n{mark} often marks what is to be left out: {_leaving_out(mark, spatial)}"
        )
        raise TargetError(
            f"{graft!r} was given class indices from {int(target.min())} to {int(target.max())} "
            f"for {classes} classes.\n"
            f"Indices must lie in [0, {classes - 1}]. Check num_classes of the model and the labels of the data.{hint}"
        )


def _leaving_out(mark: int, spatial: int) -> str:
    if spatial:
        return f"pass ignore_index={mark} to the method and to the criterion."
    return f"in labels of pixels, ignore_index={mark} does so; a sample without a class belongs out of the batch."
