"""Deep activation matching: moments, Gaussian matching, the losses of the game, weight drift.

The steps of Huang, Huang and Krähenbühl, "Domain transfer through deep activation matching" (ECCV 2018), as
tensor functions. Activations are (B, C, *positions), or channels last with ``dim=-1``. Source is class 0 of a
discriminator and target class 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fxgraft._torch import foreach_mul, foreach_mul_, foreach_norm, foreach_sub
from fxgraft.errors import ConfigError

Gan = Literal["jsd", "lsgan"]
Invert = Literal["target", "both"]
DriftConvention = Literal["mean", "sum"]

"""The fused operations over lists of tensors, which torch's type hints leave out."""

OUTPUTS: dict[str, int] = {"jsd": 2, "lsgan": 1}
"""How many numbers a discriminator gives per decision."""


def channel_moments(
    x: Tensor, dim: int = 1, *, unbiased: bool = False, eps: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every channel over the batch and all positions.

    Args:
        x: activations; channels at ``dim``. Half precision is summed in float32.
        dim: the dimension of the channels, 1 or -1.
        unbiased: divide the variance by n − 1 instead of n, the number of values per channel.
        eps: added to the variance.

    Returns:
        Mean (C,) and deviation √(variance + eps) (C,). The gradient of a deviation of 0 is 0.

    Raises:
        ConfigError: a channel has one value only, which has no deviation.
    """
    count = x.numel() // max(x.shape[dim], 1)
    if count < 2:
        raise ConfigError(
            f"An activation of shape {tuple(x.shape)} has {count} value per channel, which has no deviation.\n"
            "Batch statistics need two or more values of every channel.\n"
            'Use larger batches, or running statistics: statistics="running".'
        )
    others = [i for i in range(x.ndim) if i != dim % x.ndim]
    variance, mean = torch.var_mean(_wide(x), others, correction=int(unbiased))
    return mean, _deviation(variance, eps)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _deviation(variance: Tensor, eps: float) -> Tensor:
    """Take the root, with gradient 0 instead of infinity at 0."""
    shifted = variance + eps
    positive = shifted > 0
    return torch.where(positive, torch.where(positive, shifted, 1).sqrt(), 0)


@torch.no_grad()
def update_moments(moments: Tensor, x: Tensor, weight: Tensor | float, dim: int = 1) -> Tensor:
    """Move running moments towards those of a batch.

    The variance is that of the weighted mixture of all batches so far: it counts how far the batches' means
    lie apart, so a batch of one, whose own variance is 0, counts for what it is.

    Args:
        moments: (2, C), mean and variance so far.
        x: activations; channels at ``dim``.
        weight: share of the new batch, in [0, 1]; 1 forgets what was before.
        dim: the dimension of the channels, 1 or -1.

    Returns:
        New moments (2, C), without gradient.
    """
    others = [i for i in range(x.ndim) if i != dim % x.ndim]
    variance, mean = torch.var_mean(_wide(x.detach()), others, correction=0)
    step = mean - moments[0]
    spread = (1 - weight) * (moments[1] + weight * step.square()) + weight * variance
    return torch.stack((moments[0] + weight * step, spread))


def gaussian_match(
    target: Tensor,
    source_mean: Tensor,
    source_std: Tensor,
    *,
    target_mean: Tensor | None = None,
    target_std: Tensor | None = None,
    dim: int = 1,
    unbiased: bool = False,
    eps: float = 1e-5,
    detach: bool = False,
) -> Tensor:
    """Shift and scale every target channel to the source channel's mean and deviation.

    y = (t − mean_t) / std_t · std_s + mean_s, per channel (section 3 of the paper).

    Args:
        target: activations; channels at ``dim``.
        source_mean: (C,).
        source_std: (C,), with the same ``eps`` inside the root as the target's.
        target_mean: (C,) statistics to use in place of the batch's own, such as running ones.
        target_std: (C,), given together with ``target_mean``.
        dim: the dimension of the channels, 1 or -1.
        unbiased: see `channel_moments`; for the batch's own statistics.
        eps: added to the batch's variance. With 0 the deviations agree exactly, and a channel whose deviation
            is 0 becomes the constant mean_s; with more, a channel is stretched by std_s/√eps at most.
        detach: take the target's statistics as constants instead of letting gradients flow through them.

    Returns:
        Shaped as ``target``, in its dtype; differentiable in all tensors.

    Raises:
        ConfigError: batch statistics of one value per channel, or only one of the two target statistics.
    """
    if (target_mean is None) != (target_std is None):
        raise ConfigError("gaussian_match takes target_mean and target_std together, or neither of them.")
    if target_mean is None or target_std is None:
        target_mean, target_std = channel_moments(target, dim, unbiased=unbiased, eps=eps)
    if detach:
        target_mean, target_std = target_mean.detach(), target_std.detach()
    shape = [1] * target.ndim
    shape[dim] = -1
    factor = source_std / torch.where(target_std > 0, target_std, 1)
    centred = _wide(target) - target_mean.view(shape)
    return torch.addcmul(source_mean.view(shape), centred, factor.view(shape)).to(target.dtype)


def _score(decisions: Tensor, gan: Gan) -> Tensor:
    """How much each decision leans to the source: log-odds, or the distance below one half."""
    decisions = _wide(decisions)
    return decisions[:, 0] - decisions[:, 1] if gan == "jsd" else 0.5 - decisions[:, 0]


def _penalty(decisions: Tensor, label: int, gan: Gan) -> Tensor:
    """Loss of each decision (N, 2 or 1, ...) for one label: cross-entropy, or the squared distance."""
    score = _score(decisions, gan)
    if gan == "jsd":
        return -F.logsigmoid(score if label == 0 else -score)
    return (0.5 - score - label).square()


def _pooled(*penalties: Tensor) -> Tensor:
    """Average over everything decided, so that every position of every sample counts the same."""
    total = torch.stack([penalty.sum() for penalty in penalties]).sum()
    return total / sum(penalty.numel() for penalty in penalties)


def discriminator_loss(source: Tensor, target: Tensor, gan: Gan = "jsd") -> Tensor:
    """Loss of a discriminator that tells source (0) from target (1): the mean over all its decisions.

    Args:
        source: decisions on source activations, (B, 2, ...) for "jsd", the two-way cross-entropy, or
            (B, 1, ...) for "lsgan", least squares. Positions behind are decisions of their own.
        target: decisions on target activations; batch and positions may differ.
        gan: which loss.

    Returns:
        A scalar, in float32 at least.
    """
    return _pooled(_penalty(source, 0, gan), _penalty(target, 1, gan))


def mapping_loss(
    target: Tensor, source: Tensor | None = None, *, gan: Gan = "jsd", invert: Invert = "target"
) -> Tensor:
    """Loss of the target network, on inverted labels: its activations should be taken for the source's.

    Args:
        target: decisions on target activations, as for `discriminator_loss`.
        source: decisions on source activations; needed for "both".
        gan: which loss.
        invert: "target" averages over target decisions alone; "both" over those of the two domains, as the
            authors' release does: the source's add a constant, and the gradient is scaled by the target's
            share of the decisions.

    Returns:
        A scalar, in float32 at least.

    Raises:
        ConfigError: "both" without source decisions.
    """
    penalties = [_penalty(target, 0, gan)]
    if invert == "both":
        if source is None:
            raise ConfigError('invert="both" averages over both domains; pass the source decisions too.')
        penalties.append(_penalty(source, 1, gan))
    return _pooled(*penalties)


def discriminator_accuracy(source: Tensor, target: Tensor, gan: Gan = "jsd") -> Tensor:
    """Share of right decisions, averaged over the two domains: 1 tells them apart, 0.5 is guessing.

    A tie counts half. Arguments as `discriminator_loss`; a scalar without gradient.
    """
    right = [
        (1 + sign * _score(decisions.detach(), gan).sign()).mean() / 2
        for sign, decisions in ((1, source), (-1, target))
    ]
    return (right[0] + right[1]) / 2


def weight_drift(
    source: Sequence[Tensor], target: Sequence[Tensor], convention: DriftConvention = "mean"
) -> Tensor:
    """How far the target's weights have drifted from the source's: Σ over tensors of mean((w_s − w_t)²).

    Args:
        source: weights of the source network, constants.
        target: those of the target network, in the same order; their gradient is computed in one pass.
        convention: "mean" within each tensor, as the release (small tensors weigh as much as large ones), or
            "sum": Σ (w_s − w_t)² over all entries.

    Returns:
        A scalar: exactly 0, with gradients of exactly 0, where the weights are equal.

    Raises:
        ConfigError: no tensors, or lists that do not match.
    """
    shapes = [tuple(tensor.shape) for tensor in target]
    if not shapes or shapes != [tuple(tensor.shape) for tensor in source]:
        raise ConfigError(
            f"Weight drift compares the same tensors of two networks; got {len(source)} and {len(target)}, "
            "which do not match in number and shape."
        )
    scales = [1.0 if convention == "sum" else 1.0 / max(tensor.numel(), 1) for tensor in target]
    return _Drift.apply(scales, [tensor.detach() for tensor in source], *target)  # type: ignore[return-value]


class _Drift(torch.autograd.Function):
    """Σ scale · ‖w_t − w_s‖², by the fused operations over lists in both directions."""

    @staticmethod
    def forward(ctx: Any, scales: list[float], source: list[Tensor], *target: Tensor) -> Tensor:
        difference = foreach_sub(target, source)
        wide = torch.promote_types(difference[0].dtype, torch.float32)
        norms = foreach_norm(difference, 2, wide)
        foreach_mul_(norms, [scale**0.5 for scale in scales])
        ctx.scales = scales
        ctx.save_for_backward(*difference)
        return torch.stack(norms).square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        slopes = foreach_mul(ctx.saved_tensors, [2 * scale for scale in ctx.scales])
        foreach_mul_(slopes, gradients[0])
        return (None, None, *slopes)
