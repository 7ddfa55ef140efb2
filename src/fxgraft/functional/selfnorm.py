"""Tensor functions of SelfNorm (Tang, Gao, Zhu, Zhang, Li, Metaxas, "CrossNorm and SelfNorm", ICCV 2021).

SelfNorm recalibrates the channel statistics of a feature map x (B, C, *S) by gates it derives from them: with
mean μ and deviation σ = √(unbiased variance + 1e-12) per instance and channel,

    g = sigmoid(BN(w_g · [μ, σ])),      y = x · g                                 (one gate)
    f = sigmoid(BN(w_f · [μ, σ])),      y = x · g + μ · (f − g)                   (two gates)

so that with two gates g scales the deviation and f the mean. w is one pair of numbers per channel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxgraft.functional.modulation import modulated

Gate = Callable[[Tensor, Tensor], Tensor]
"""From mean and deviation, (B, C) each, to a gate (B, C)."""

EPS = 1e-12


def selfnorm(x: Tensor, g: Gate, f: Gate | None = None, *, eps: float = EPS) -> Tensor:
    """Gate a map by its own statistics.

    Args:
        x: (B, C, *S), floating point.
        g: gate of the deviation, or, alone, of everything.
        f: gate of the mean.
        eps: added to the variance under the root.

    Returns:
        (B, C, *S).
    """

    def coefficients(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor | None]:
        std = (var + eps).sqrt()
        scale = g(mean, std)
        return scale, None if f is None else mean * (f(mean, std) - scale)

    return modulated(x, coefficients)


def gate_input(mean: Tensor, std: Tensor, mean_weight: Tensor, std_weight: Tensor) -> Tensor:
    """W · [μ, σ] for every instance and channel: (B, C) from weights (C,)."""
    return torch.addcmul(mean * mean_weight, std, std_weight)
