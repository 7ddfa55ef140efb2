"""Tensor functions of CrossNorm (Tang, Gao, Zhu, Zhang, Li, Metaxas, "CrossNorm and SelfNorm", ICCV 2021).

CrossNorm gives a feature map x (B, C, *S) the channel statistics of another: with mean μ and deviation
σ = √(unbiased variance + 1e-5) per instance and channel,

    x̂ = (x − μ) / σ · σ' + μ',        y = λ · x + (1 − λ) · x̂,

where (μ', σ') belong to a partner: another instance of the batch, another channel, or both. A crop takes the
statistics from a box of the partner's map ("style"), restyles only a box of the map ("content"), or both.

Draws are separate from arithmetic: `draw_box` draws, `crossnorm` computes. Only torch's generators are used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxgraft._torch import sample_dirichlet
from fxgraft.functional.modulation import instance_moments, modulated

Box = Sequence[int] | Tensor
"""Row start, column start, row end, column end; as a tensor (4,) where the numbers must stay on the device."""

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
        x: (B, C, *S), floating point; (B, C, H, W) with boxes.
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
        style_mean, style_std = (_partner(each, permutation, channels) for each in (style_mean, style_std))
        ratio = style_std / std
        return lam + (1 - lam) * ratio, (1 - lam) * (style_mean - mean * ratio)

    if content_box is None:
        return modulated(x, coefficients)
    if isinstance(content_box, Tensor):
        inside = _inside(x, content_box)
        scale, shift = coefficients(*_masked_moments(x, inside))
        restyled = torch.addcmul(shift[..., None, None].to(x.dtype), x, scale[..., None, None].to(x.dtype))
        return torch.where(inside, restyled, x)
    top, left, bottom, right = content_box
    out = x.clone()
    out[..., top:bottom, left:right] = modulated(x[..., top:bottom, left:right], coefficients)
    return out


def _partner(values: Tensor, permutation: Tensor | None, channels: Tensor | None) -> Tensor:
    values = values if permutation is None else values[permutation]
    return values if channels is None else values[:, channels]


def _box_moments(x: Tensor, box: Box | None) -> tuple[Tensor, Tensor]:
    if box is None:
        return instance_moments(x)
    if isinstance(box, Tensor):
        return _masked_moments(x, _inside(x, box))
    top, left, bottom, right = box
    return instance_moments(x[..., top:bottom, left:right])


def _inside(x: Tensor, box: Tensor) -> Tensor:
    """Mark the cells of a box, (H, W) bool, without reading it on the host."""
    rows = torch.arange(x.shape[-2], device=x.device)
    columns = torch.arange(x.shape[-1], device=x.device)
    top, left, bottom, right = box.unbind()
    return ((rows >= top) & (rows < bottom)).unsqueeze(1) & ((columns >= left) & (columns < right))


def _masked_moments(x: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    weight = inside.to(wide.dtype)
    count = weight.sum()
    mean = (wide * weight).sum((2, 3)) / count
    centred = (wide - mean[..., None, None]) * weight
    return mean, (centred * centred).sum((2, 3)) / (count - 1).clamp(min=1)


def draw_box(
    height: int,
    width: int,
    beta: float = 1.0,
    threshold: float = 0.1,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw a box whose area share follows Beta(beta, beta), from those that exceed the threshold.

    The sides are those of the map times the root of the share, the centre is uniform, and what sticks out is
    cut off, as in the authors' code. Their loop repeats until the area is large enough, which on the smallest
    maps it never is; here the box is the whole map when no draw of 64 is accepted. A box has at least two
    cells, since the variance of one is undefined.

    Returns:
        (4,) int64: row start, column start, row end, column end.
    """
    if beta == 1:
        share = torch.rand(TRIES, device=device)
    else:
        parts = torch.full((TRIES, 2), float(beta), device=device)
        share = sample_dirichlet(parts)[:, 0]
    sizes = torch.tensor([height, width], device=device)
    halves = (sizes * share.sqrt().unsqueeze(1)).long() // 2
    centres = (torch.rand(TRIES, 2, device=device) * sizes).long()
    start = (centres - halves).clamp(min=0)
    end = torch.minimum(centres + halves, sizes)
    area = (end - start).prod(1)
    accepted = (area > threshold * height * width) & (area > 1)
    whole = torch.tensor([0, 0, height, width], device=device)
    # Indexing by a tensor would read it on the host under torch.compile; index_select does not.
    first = accepted.long().argmax().unsqueeze(0)
    return torch.where(accepted.any(), torch.cat((start, end), 1).index_select(0, first).squeeze(0), whole)
