"""Dropout and norms on many rows at once, with the mask or the statistics of the vector that the rows average to.

An image has N rows (N, ...) with the average p. A norm y = a · x + b whose a and b are those of p is linear in the
rows, so their outputs average to the norm's output for p, exactly.

Rows are (B·N, ...), those of an image together; pooled vectors (B, ...).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def by_image(rows: Tensor, positions: int) -> Tensor:
    """View rows (B·N, ...) as (B, N, ...)."""
    return rows.unflatten(0, (-1, positions))


def average(rows: Tensor, positions: int) -> Tensor:
    """Return the pooled vectors (B, ...) of rows."""
    return by_image(rows, positions).mean(1)


def repeated(statistic: Any, positions: int) -> Any:
    """Give every position the statistic of its image."""
    if isinstance(statistic, (tuple, list)):
        return type(statistic)(repeated(part, positions) for part in statistic)
    return (
        statistic.repeat_interleave(positions, 0)
        if isinstance(statistic, Tensor) and statistic.ndim
        else statistic
    )


def around(pooled: Tensor, middle: Tensor, rows: Tensor, positions: int, scale: Tensor) -> Tensor:
    """Apply a norm with fixed statistics to rows: it is linear, and gives ``middle`` at the pooled vectors."""
    offset = by_image(rows, positions) - pooled.unsqueeze(1)
    return (middle.unsqueeze(1) + offset * scale.to(middle.dtype).unsqueeze(1)).flatten(0, 1)


def dropped_alike(
    name: str, pooled: Tensor | None, rows: Tensor, positions: int, *args: Any, **kwargs: Any
) -> tuple[Tensor | None, Tensor]:
    """Drop the same features in all rows of an image, for dropout written as a function."""
    training = kwargs.get("training", args[1] if len(args) > 1 else True)
    share = kwargs.get("p", args[0] if args else 0.5)
    if not training or not share:
        return pooled, rows
    grouped = by_image(rows, positions)
    mask = getattr(F, name)(torch.ones_like(grouped[:, 0], requires_grad=False), *args, **kwargs)
    return None if pooled is None else pooled * mask, (grouped * mask.unsqueeze(1)).flatten(0, 1)


def normed_alike(
    name: str, pooled: Tensor, rows: Tensor, positions: int, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Normalise rows with the statistics of their pooled vector, for norms written as functions."""
    function = getattr(F, name)
    middle = function(pooled, *args, **kwargs)
    bound = inspect.signature(NORMS[function]).bind(pooled, *args, **kwargs).arguments
    return middle, around(pooled, middle, rows, positions, NORMS[function](**bound))


def layer_scale(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float | None, centred: bool
) -> Tensor:
    """Return the factor by which layer or RMS normalisation with the statistics of ``x`` scales deviations."""
    dims = tuple(range(-len(shape), 0))
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    variance = (
        wide.var(dims, unbiased=False, keepdim=True) if centred else wide.square().mean(dims, keepdim=True)
    )
    scale = torch.rsqrt(variance + (torch.finfo(x.dtype).eps if eps is None else eps))
    return scale if weight is None else scale * weight


def group_scale(x: Tensor, groups: int, weight: Tensor | None, eps: float) -> Tensor:
    """Return the factor by which group normalisation with the statistics of ``x`` (B, C, ...) scales deviations."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    variance = wide.reshape(len(x), groups, -1).var(2, unbiased=False)
    scale = torch.rsqrt(variance + eps).repeat_interleave(x.shape[1] // groups, 1)
    scale = scale if weight is None else scale * weight
    return scale.view(*scale.shape, *[1] * (x.ndim - 2))


def _of_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return layer_scale(input, normalized_shape, weight, eps, True)


def _of_rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    return layer_scale(input, normalized_shape, weight, eps, False)


def _of_group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return group_scale(input, num_groups, weight, eps)


def _of_normalize(
    input: Tensor,
    p: float = 2.0,
    dim: int = 1,
    eps: float = 1e-12,
    out: None = None,
) -> Tensor:
    return input.norm(p, dim, keepdim=True).clamp_min(eps).reciprocal()


NORMS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.layer_norm: _of_layer_norm,
    F.rms_norm: _of_rms_norm,
    F.group_norm: _of_group_norm,
    F.normalize: _of_normalize,
}
"""Norms over channels, and what they multiply deviations by."""
