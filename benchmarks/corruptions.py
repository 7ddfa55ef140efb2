"""Nine corruptions of small images at five severities, drawn the same way each time."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _noise(x: Tensor, g: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=g)


def _gaussian(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    return x + (0.04, 0.06, 0.08, 0.09, 0.10)[s] * _noise(x, g)


def _shot(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    photons = (500, 250, 100, 75, 50)[s]
    return torch.poisson(x * photons, generator=g) / photons


def _impulse(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    share = (0.01, 0.02, 0.03, 0.05, 0.07)[s]
    drawn = torch.rand(x.shape, generator=g)
    return x.masked_fill(drawn < share / 2, 0.0).masked_fill(drawn > 1 - share / 2, 1.0)


def _blur(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    sigma = (0.4, 0.6, 0.8, 1.0, 1.3)[s]
    steps = torch.arange(-4, 5)
    kernel = (-(steps**2) / (2 * sigma**2)).exp()
    kernel = (kernel / kernel.sum()).repeat(3, 1, 1, 1)
    padded = F.pad(x, (4, 4, 4, 4), mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)


def _pixelate(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    side = round(x.shape[-1] * (0.95, 0.85, 0.75, 0.65, 0.55)[s])
    return F.interpolate(F.interpolate(x, size=(side, side), mode="area"), size=x.shape[-2:], mode="nearest")


def _contrast(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * (0.75, 0.5, 0.4, 0.3, 0.15)[s] + mean


def _brightness(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    return x + (0.05, 0.1, 0.15, 0.2, 0.3)[s]


def _fog(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    coarse = torch.rand(len(x), 1, 4, 4, generator=g)
    fog = F.interpolate(coarse, size=x.shape[-2:], mode="bicubic", align_corners=False).clamp(0, 1)
    strength = (0.2, 0.4, 0.6, 0.8, 1.0)[s]
    return (x + strength * fog) / (1 + strength)


def _saturation(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    gray = x.mean(1, keepdim=True)
    return gray + (x - gray) * (0.5, 0.25, 2.0, 4.0, 8.0)[s]


CORRUPTIONS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "gaussian": _gaussian,
    "shot": _shot,
    "impulse": _impulse,
    "blur": _blur,
    "pixelate": _pixelate,
    "contrast": _contrast,
    "brightness": _brightness,
    "fog": _fog,
    "saturation": _saturation,
}


def corrupt(images: Tensor, kind: str, severity: int) -> Tensor:
    """Corrupt uint8 images (N, 3, S, S), the same way each time; `severity` from 1 to 5."""
    generator = torch.Generator().manual_seed(1000 * list(CORRUPTIONS).index(kind) + severity)
    changed = CORRUPTIONS[kind](images.float() / 255, severity - 1, generator)
    return (changed.clamp(0, 1) * 255).round().to(torch.uint8)
