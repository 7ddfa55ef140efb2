"""Instance statistics, and scaling and shifting a map by what they say.

CrossNorm and SelfNorm both compute y = x · scale + shift, one scale and one shift per instance and channel,
from the mean and variance of the very map they act on. `modulated` runs that in as few passes over memory
as eager PyTorch allows: forward, one pass for both sums and one fused multiply-add; backward, one pass for
both sums and one for the gradient that flows back through the map and through its statistics together.
Nothing but the map itself is kept for the backward pass.

Maps are (B, C, *S): channels second, any number of dimensions of space, in any memory order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxgraft.graph.runtime.recorders import recorded, transformed

_FAR = 4.0
"""How many deviations from zero a mean may lie before the variance is measured around it."""

Coefficients = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""From mean and variance, (B, C) each, to scale and shift, (B, C) each; a shift of None is none at all."""


def instance_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of every channel of every instance, (B, C) each.

    In float32 at least. A map of one position has variance 0, where the unbiased formula is undefined.
    Differentiable.
    """
    dims = tuple(range(2, x.ndim))
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.shape[0] == 0:  # where var_mean warns
        mean = x.mean(dims)
        return mean, mean
    var, mean = torch.var_mean(x, dim=dims, correction=1 if x.shape[2:].numel() > 1 else 0)
    return mean, var


def modulated(x: Tensor, coefficients: Coefficients) -> Tensor:
    """Scale and shift a map by its own statistics: y = x · scale + shift.

    Args:
        x: (B, C, *S), floating point.
        coefficients: a function, called once with mean and variance (B, C); gradients flow through what it does. Any
            tensor may take part in it.

    Returns:
        (B, C, *S) in the dtype and memory order of `x`. It can be differentiated more than once, then at the
        speed of plain operations.
    """
    if recorded() or transformed():
        mean, var = instance_moments(x)  # a compiler fuses this by itself, and TorchScript knows nothing else
        return affine(x, *coefficients(mean, var))
    if not torch.is_grad_enabled():
        return _scaled(x, *coefficients(*_moments(x)))
    link = _Link()
    same, mean, var = _Moments.apply(x, link)
    scale, shift = coefficients(mean, var)
    return _Affine.apply(same, scale, shift, link)  # type: ignore[no-any-return]


class _Link:
    """Carries the scale from `_Affine` to `_Moments`, so that one pass computes the whole gradient.

    Where the gradient will itself be differentiated (``create_graph=True``), it carries None: `_Affine` has then
    scaled what it hands on, and both backward passes are made of differentiable operations.
    """

    scale: Tensor | None = None


class _Moments(torch.autograd.Function):
    """x → (x, mean, variance). Its backward also finishes what `_Affine` leaves to it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, link: _Link) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = _moments(x)
        ctx.save_for_backward(x, mean)
        ctx.link = link
        ctx.set_materialize_grads(False)
        return x, mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # type: ignore[override]
        dy, dmean, dvar = grads
        x, mean = ctx.saved_tensors
        scale, count = ctx.link.scale, x.shape[2:].numel()
        if dmean is None and dvar is None:
            return (dy if dy is None or scale is None else _scaled(dy, scale, None)), None
        slope = torch.zeros_like(mean) if dvar is None else dvar * (2 / max(count - 1, 1))
        offset = -slope * mean
        if dmean is not None:
            offset = offset + dmean / count
        if scale is None:
            out = affine(x, slope, offset)
            return (out if dy is None else out + dy), None
        wide = torch.empty_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        out = _scaled(x, slope, offset, wide)
        if dy is not None:
            out.addcmul_(dy.to(out.dtype), _over(scale, out))
        return out.to(x.dtype), None


class _Affine(torch.autograd.Function):
    """x · scale + shift. Hands its gradient on unscaled: `_Moments` scales it in the pass it makes anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor | None, link: _Link) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.link = link
        ctx.dtypes = scale.dtype, None if shift is None else shift.dtype
        return _scaled(x, scale, shift)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # type: ignore[override]
        (dy,) = grads
        x, scale = ctx.saved_tensors
        again = torch.is_grad_enabled()
        ctx.link.scale = None if again else scale.detach()  # with its history it would keep itself alive
        _, for_scale, for_shift, _ = ctx.needs_input_grad
        dscale = dshift = None
        if for_scale or for_shift:
            total, dot = _plain_sums(dy, x) if again else _sums(dy, x)
            dscale = dot.to(ctx.dtypes[0]) if for_scale else None
            dshift = total.to(ctx.dtypes[1]) if for_shift else None
        return (affine(dy, scale, None) if again else dy), dscale, dshift, None


def _over(value: Tensor, x: Tensor) -> Tensor:
    """Bring (B, C) to the dimensions of `x` and to its dtype, or to float32 where that is narrower.

    Of a channel that hardly varies scale and shift are large and cancel: what they lose in half precision would be
    larger than the values.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return value.to(wide).reshape(*value.shape, *[1] * (x.ndim - 2))


def affine(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """Return x · scale + shift in the dtype of `x`, from (B, C) each, by plain operations; see `_over`."""
    out = x * _over(scale, x) if shift is None else torch.addcmul(_over(shift, x), x, _over(scale, x))
    return out.to(x.dtype)


def _scaled(x: Tensor, scale: Tensor, shift: Tensor | None, out: Tensor | None = None) -> Tensor:
    """What `affine` gives, in vector instructions on the CPU, and rounded once; not differentiable.

    The kernel of addcmul falls back to single numbers where a factor stays the same along a row. The one of
    batch normalisation, which with mean 0 and deviation 1 is this very arithmetic, does not.
    """
    # Into a tensor of its own: a view of another may not leave a custom function for in-place operators.
    out = torch.empty_like(x) if out is None else out
    if shift is None:
        return torch.mul(x, _over(scale, x), out=out)
    if not (_fast(x) and x.is_contiguous()):
        return torch.addcmul(_over(shift, x), x, _over(scale, x), out=out)
    scale, shift = (vector.to(x.dtype).reshape(-1) for vector in (scale, shift))
    zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
    rows = (1, scale.numel(), 1, -1)
    torch.ops.aten.native_batch_norm.out(
        x.view(rows),
        scale,
        shift,
        zeros,
        ones,
        False,
        0.0,
        0.0,
        out=out.view(rows),
        save_mean=x.new_empty(0),
        save_invstd=x.new_empty(0),
    )
    return out


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """What `instance_moments` gives, in one pass on the CPU; not differentiable."""
    if not _fast(x):
        return instance_moments(x)
    count = x.shape[2:].numel()
    total, squares = _reduced(x, x)
    mean = total / count
    var = (squares - total * mean).clamp_(min=0).div_(max(count - 1, 1))
    # The difference of the two sums cancels where the mean is far from zero. Such rows are rare behind a
    # normalisation, and measured again.
    cancelled = var * _FAR**2 < mean * mean
    if bool(cancelled.any()):
        rows = x[cancelled].unsqueeze(0)
        mean[cancelled], var[cancelled] = (moment.squeeze(0) for moment in instance_moments(rows))
    return mean, var


def _sums(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Σ dy and Σ dy · x over space, (B, C) each."""
    if dy.stride() == x.stride() and dy.dtype == x.dtype and _fast(x):
        return _reduced(dy, x)
    return _plain_sums(dy, x)


def _plain_sums(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """What `_sums` gives; differentiable."""
    dims = tuple(range(2, x.ndim))
    wide = torch.promote_types(x.dtype, torch.float32)
    return dy.sum(dims, dtype=wide), (dy.to(wide) * x).sum(dims)


def _fast(x: Tensor) -> bool:
    """Say whether `_reduced` takes this map: on the CPU, full precision, rows or channels innermost."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or type(x) is not Tensor:
        return False
    return x.numel() > 0 and (x.is_contiguous() or x.movedim(1, -1).is_contiguous())


def _reduced(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Σ dy and Σ dy · x over space, in one pass and without a temporary.

    PyTorch has no such reduction under a name of its own, but the backward pass of batch normalisation
    is made of it: with mean 0 and deviation 1 its gradients of bias and weight are these two sums.
    """
    batch, channels = x.shape[:2]
    if x.is_contiguous():
        rows = (1, batch * channels, 1, -1)
        total, dot = _channel_sums(dy.view(rows), x.view(rows))
        return total.view(batch, channels), dot.view(batch, channels)
    # Channels innermost: the kernel sums over its whole batch, so it is called once per instance.
    columns = (batch, -1, 1, channels)
    dy, x = (tensor.movedim(1, -1).reshape(columns).permute(0, 3, 1, 2) for tensor in (dy, x))
    parts = [_channel_sums(dy[i : i + 1], x[i : i + 1]) for i in range(batch)]
    return torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])


def _channel_sums(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    mean, deviation = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
    _, dot, total = torch.ops.aten.native_batch_norm_backward(
        dy, x, None, None, None, mean, deviation, True, 0.0, [False, True, True]
    )
    return total, dot
