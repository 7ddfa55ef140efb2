"""Gradient-boosting losses for any model, patched or bare."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxgraft.errors import ConfigError, TargetError
from fxgraft.extend import binary_labels, draws, is_count, is_number
from fxgraft.functional.binary import two_classes

Reduction = Literal["mean", "sum", "none"]


def gradient_boosting_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    k: int = 15,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy over the label and its k highest-scoring wrong classes.

    For logits s and label y: −s_y + log(e^{s_y} + Σ_{i ∈ top-k of the others} e^{s_i}). The wrong classes
    that the network takes for the right one get the whole of the gradient, instead of sharing it with many
    that it does not. With k ≥ K − 1 this is `torch.nn.functional.cross_entropy`, to which the call then goes.
    (Sun, Cholakkal, Khan, Khan, Shao, "Fine-grained Recognition: Accounting for Subtle Differences between
    Similar Classes", AAAI 2020.)

    One logit is a question of yes and no. Each answer has one wrong class, the other answer, so that the loss is binary
    cross-entropy with logits, whatever k. Several labels for each image are refused: none of the others is wrong.

    Args:
        logits: (B, K), or (B, K, ...) for dense predictions; (K,) for one sample.
        target: class indices (B,) or (B, ...), () for logits (K,); for one logit 0 and 1, or the probability of 1,
            (B, ...) or (B, 1, ...).
        k: how many wrong classes count, at least 1.
        weight: (K,) factor of each class, (2,) for the answers to one logit; applied as in cross-entropy.
        ignore_index: label of entries that do not count.
        reduction: "mean" (weighted, as in cross-entropy), "sum", or "none" for one value per label.
        label_smoothing: share of the label that is spread evenly over the classes that count, in [0, 1].

    Raises:
        ConfigError: k below 1, label smoothing outside [0, 1], no such reduction, another number of weights.
        TargetError: labels of another shape; soft targets or several labels for each image, which name no wrong
            classes; for one logit labels outside [0, 1]; labels of no class, on a CPU.
    """
    _check_options(k, label_smoothing, reduction)
    if not isinstance(target, Tensor):
        raise TargetError(
            f"The gradient-boosting loss takes labels as a tensor, and was given a {type(target).__name__}.\n"
            "Pass torch.tensor(labels)."
        )
    if logits.ndim < 2:  # one sample
        if not logits.ndim:
            raise TargetError(
                "The gradient-boosting loss takes logits (B, K, ...), and was given one number."
            )
        value = gradient_boosting_cross_entropy(
            logits.unsqueeze(0),
            target.unsqueeze(0),
            k=k,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
        return value.squeeze(0) if reduction == "none" else value
    if logits.shape[1] == 1:
        return _answered(logits, target, weight, ignore_index, reduction, label_smoothing)
    if target.is_floating_point():
        raise TargetError(
            "The gradient-boosting loss takes class indices, and was given soft targets "
            f"of shape {tuple(target.shape)}.\n"
            "It sets the label against its highest-scoring wrong classes; a mixture of labels, or several labels for "
            "one image, have none.\n"
            "Leave mixing (mixup, cutmix) out, or use torch.nn.functional.cross_entropy, for several labels "
            "binary_cross_entropy_with_logits."
        )
    classes = logits.shape[1]
    _check_weight(weight, classes, "classes")
    if target.shape != (own := logits.shape[:1] + logits.shape[2:]):
        raise TargetError(
            f"The gradient-boosting loss was given labels of shape {tuple(target.shape)} for logits of shape "
            f"{tuple(logits.shape)}.\n"
            f"There is one label for each row of {classes} logits, so that its labels have the shape {tuple(own)}.\n"
            "Pass y.squeeze(1) for indices (B, 1), or maps of labels with rows and columns as those of the logits."
        )
    target = target.long()  # cross-entropy takes bytes as well
    _check_range(target, classes, ignore_index)
    if k >= classes - 1:
        return F.cross_entropy(
            logits,
            target,
            None if weight is None else weight.to(logits.dtype),
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    if logits.ndim > 2:
        rows = logits.movedim(1, -1).reshape(-1, classes)
        value = _boosted(rows, target.reshape(-1), k, weight, ignore_index, reduction, label_smoothing)
        return value.reshape(target.shape) if reduction == "none" else value
    return _boosted(logits, target, k, weight, ignore_index, reduction, label_smoothing)


def _answered(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: Reduction,
    smoothing: float,
) -> Tensor:
    """Return the loss of one logit (B, 1, ...): cross-entropy between no and yes."""
    _check_weight(weight, 2, "answers to one logit")
    yes, counts = binary_labels("The gradient-boosting loss", target, logits.shape, ignore_index)
    scores = two_classes(logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits)
    factor = counts.to(scores.dtype)[:, 0]
    soft = torch.cat((1 - yes, yes), 1).to(scores.dtype)
    if weight is not None:
        weight = weight.to(scores.dtype)
        factor = factor * (weight.reshape(1, 2, *[1] * (logits.ndim - 2)) * soft).sum(1)
        scored = F.cross_entropy(scores, soft, weight, reduction="none", label_smoothing=smoothing)
    else:
        scored = F.cross_entropy(scores, soft, reduction="none", label_smoothing=smoothing)
    loss = scored * counts.to(scores.dtype)[:, 0]
    if reduction == "none":
        return loss.reshape(target.shape)
    return loss.sum() if reduction == "sum" else loss.sum() / factor.sum()


def _boosted(
    logits: Tensor,
    target: Tensor,
    k: int,
    weight: Tensor | None,
    ignore_index: int,
    reduction: Reduction,
    smoothing: float,
) -> Tensor:
    """Select the classes that count, (N, k + 1) with the label first, and hand them to cross-entropy."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    counts = target != ignore_index
    label = target.where(counts, torch.zeros_like(target)).unsqueeze(1)
    # Only the choice of classes is made here; the values are gathered with their gradient.
    others = logits.detach().scatter(1, label, float("-inf")).topk(k, dim=1, sorted=False).indices
    chosen = logits.gather(1, torch.cat((label, others), dim=1))
    scores = chosen.log_softmax(1)
    loss = -scores[:, 0]
    factor = counts.to(loss.dtype) if weight is None else weight.to(loss.dtype)[label.squeeze(1)] * counts
    if smoothing:
        # As cross-entropy does: the spread part carries the weights of the classes it falls on.
        spread = scores if weight is None else scores * weight.to(scores.dtype)[torch.cat((label, others), 1)]
        loss = (1 - smoothing) * loss * factor - smoothing * spread.mean(1) * counts
    else:
        loss = loss * factor
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / factor.sum()


def _check_range(target: Tensor, classes: int, ignore_index: int) -> None:
    if target.device.type != "cpu" or draws.as_data():  # another device isn't waited for
        return
    wrong = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
    if len(wrong):
        raise TargetError(
            f"The gradient-boosting loss was given the label {int(wrong[0])}, and there are {classes} classes.\n"
            f"Labels are 0 to {classes - 1}, or ignore_index ({ignore_index}).\nCheck num_classes of the model."
        )


def _check_weight(weight: Tensor | None, count: int, what: str) -> None:
    if weight is not None and not isinstance(weight, Tensor):
        raise ConfigError(f"weight is a tensor with one factor for each class, got {weight!r}.")
    if weight is not None and tuple(weight.shape) != (count,):
        raise ConfigError(
            f"weight has the shape {tuple(weight.shape)}, and there are {count} {what}.\nPass one factor for each."
        )


def _check_options(k: int, label_smoothing: float, reduction: str) -> None:
    if not is_count(k):
        raise ConfigError(
            f"The gradient-boosting loss compares the label with its k highest wrong classes; k is {k!r}.\n"
            "It must be a whole number of at least 1. The paper uses 15."
        )
    if not is_number(label_smoothing) or not 0 <= label_smoothing <= 1:
        raise ConfigError(f"label_smoothing must be a share in [0, 1], got {label_smoothing!r}.")
    if reduction not in ("mean", "sum", "none"):
        raise ConfigError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}.")


class GradientBoostingCrossEntropy(nn.Module):
    """`gradient_boosting_cross_entropy` as a module, in place of `torch.nn.CrossEntropyLoss`.

    Args:
        weight: (K,) factor of each class; a buffer, as in cross-entropy.
        ignore_index: label of entries that do not count.
        reduction: "mean", "sum" or "none".
        label_smoothing: share of the label that is spread over the classes that count.
        k: how many wrong classes count, at least 1. With K − 1 or more this is cross-entropy.

    Raises:
        ConfigError: k below 1, label smoothing outside [0, 1], no such reduction, weights that aren't (K,).
    """

    weight: Tensor | None

    def __init__(
        self,
        k: int = 15,
        *,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check_options(k, label_smoothing, reduction)
        if weight is not None:
            _check_weight(weight, weight.numel() if isinstance(weight, Tensor) else 0, "factors")
        self.k = k
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.register_buffer("weight", weight)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits (B, K, ...) for labels (B, ...)."""
        return gradient_boosting_cross_entropy(
            logits,
            target,
            k=self.k,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"k={self.k}, label_smoothing={self.label_smoothing}, reduction={self.reduction!r}"
