"""Tensor functions of CrossNorm (Tang, Gao, Zhu, Zhang, Li, Metaxas, "CrossNorm and SelfNorm", ICCV 2021).

CrossNorm gives a feature map x (B, C, *S) the channel statistics of another: with mean μ and deviation
σ = √(unbiased variance + 1e-5) per instance and channel,

    x̂ = (x − μ) / σ · σ' + μ',        y = λ · x + (1 − λ) · x̂,

where (μ', σ') belong to a partner: another instance of the batch, another channel, or both. A crop takes the
statistics from a box of the partner's map ("style"), restyles only a box of the map ("content"), or both.

Draws are separate from arithmetic: `draw_box` draws, `crossnorm` computes. Only torch's generators are used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxgraft._torch import sample_dirichlet
from fxgraft.functional.modulation import affine, instance_moments, modulated

Box = Sequence[int] | Tensor
"""Row start, column start, row end, column end; of clips and volumes the frame or depth before the row, in both.

A tensor (4,) or (6,) where the numbers must stay on the device."""

EPS = 1e-5
TRIES = 64


def crossnorm(
    x: Tensor,
    permutation: Tensor | None = None,
    channels: Tensor | None = None,
    *,
    lam: float = 0.0,
    content_box: Box | None = None,
    style_box: Box | None = None,
    detach: bool = False,
    eps: float = EPS,
) -> Tensor:
    """Give every map the statistics of its partner.

    Args:
        x: (B, C, *S), floating point; (B, C, H, W) or (B, C, T, H, W) with boxes.
        permutation: (B,) indices: the partner of instance i is instance permutation[i]; None for itself.
        channels: (C,) indices: channel c takes the statistics of the partner's channel channels[c]; None
            for the same channel.
        lam: share of the original map that stays, in [0, 1].
        content_box: only this box of the map is restyled, by its own statistics.
        style_box: the partner's statistics are those of this box.
        detach: take the partner's statistics as constants. By default gradients flow through them too, as
            in the authors' code.
        eps: added to the variance under the root.

    Returns:
        (B, C, *S). With a lam of 1 it equals `x`.
    """
    given = None
    if style_box is not None or content_box is not None:
        # The partner's statistics are not those of the values that are restyled.
        given = _box_moments(x, style_box)

    def coefficients(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        style_mean, style_var = given if given is not None else (mean, var)
        if detach:
            style_mean, style_var = style_mean.detach(), style_var.detach()
        std, style_std = (var + eps).sqrt(), (style_var + eps).sqrt()
        style_mean, style_std = (
            _partner(moment, permutation, channels) for moment in (style_mean, style_std)
        )
        ratio = style_std / std
        return lam + (1 - lam) * ratio, (1 - lam) * (style_mean - mean * ratio)

    if content_box is None:
        return modulated(x, coefficients)
    if isinstance(content_box, Tensor):
        inside = _inside(x, content_box)
        return torch.where(inside, affine(x, *coefficients(*_masked_moments(x, inside))), x)
    cells = _cells(content_box)
    out = x.clone()
    out[cells] = modulated(x[cells], coefficients)
    return out


def _cells(box: Sequence[int]) -> tuple[Any, ...]:
    """Return the index of a box in a map."""
    half = len(box) // 2
    return (..., *(slice(*ends) for ends in zip(box[:half], box[half:], strict=True)))


def _partner(values: Tensor, permutation: Tensor | None, channels: Tensor | None) -> Tensor:
    values = values if permutation is None else values[permutation]
    return values if channels is None else values[:, channels]


def _box_moments(x: Tensor, box: Box | None) -> tuple[Tensor, Tensor]:
    if box is None:
        return instance_moments(x)
    if isinstance(box, Tensor):
        return _masked_moments(x, _inside(x, box))
    return instance_moments(x[_cells(box)])


def _inside(x: Tensor, box: Tensor) -> Tensor:
    """Mark the cells of a box, bool (*S), without reading it on the host."""
    starts, ends = box.chunk(2)
    inside = torch.ones((), dtype=torch.bool, device=x.device)
    for size, start, end in zip(x.shape[2:], starts.unbind(), ends.unbind(), strict=True):
        places = torch.arange(size, device=x.device)
        inside = inside.unsqueeze(-1) & ((places >= start) & (places < end))
    return inside


def _masked_moments(x: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    weight = inside.to(wide.dtype)
    count = weight.sum()
    dims = tuple(range(2, x.ndim))
    mean = (wide * weight).sum(dims, keepdim=True) / count
    centred = (wide - mean) * weight
    return mean.flatten(1), (centred * centred).sum(dims) / (count - 1).clamp(min=1)


def draw_box(
    *sizes: int,
    beta: float = 1.0,
    threshold: float = 0.1,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw a box whose share of the map follows Beta(beta, beta), from those that exceed the threshold.

    The sides are those of the map times the root of the share (the third root in a clip or volume), the centre is
    uniform, and what sticks out is cut off, as in the authors' code. Their loop repeats until the box is large enough,
    which on the smallest maps it never is; here the box is the whole map when no draw of 64 is accepted. A box
    has at least two cells, since the variance of one is undefined.

    Args:
        *sizes: (H, W) of the map, or (T, H, W); a volume of depth one is the map that it is.
        beta: both parameters of the Beta distribution.
        threshold: smallest share that is accepted.
        device: where to draw.

    Returns:
        (4,) or (6,) int64: the starts, then the ends, in the order of the sizes.
    """
    if len(sizes) > 2 and sizes[0] == 1:
        starts, ends = draw_box(*sizes[1:], beta=beta, threshold=threshold, device=device).chunk(2)
        return torch.cat((starts.new_zeros(1), starts, ends.new_ones(1), ends))
    if beta == 1:
        share = torch.rand(TRIES, device=device)
    else:
        parts = torch.full((TRIES, 2), float(beta), device=device)
        share = sample_dirichlet(parts)[:, 0]
    sides = torch.tensor(sizes, device=device)
    side = share.sqrt() if len(sizes) == 2 else share ** (1 / len(sizes))
    halves = (sides * side.unsqueeze(1)).long() // 2
    centres = (torch.rand(TRIES, len(sizes), device=device) * sides).long()
    start = (centres - halves).clamp(min=0)
    end = torch.minimum(centres + halves, sides)
    area = (end - start).prod(1)
    accepted = (area > threshold * math.prod(sizes)) & (area > 1)
    whole = torch.tensor([0] * len(sizes) + list(sizes), device=device)
    # Indexing by a tensor would read it on the host under torch.compile; index_select does not.
    first = accepted.long().argmax().unsqueeze(0)
    return torch.where(accepted.any(), torch.cat((start, end), 1).index_select(0, first).squeeze(0), whole)
