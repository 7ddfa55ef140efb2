"""Augmentation of whole batches of images, drawn ahead and applied on the device that trains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fxgraft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Augmentation of whole batches, on the device that trains.

    Attributes:
        crop_padding: pixels added on each side (reflected) before a random crop back to size; 0 is off.
        flip: probability of a horizontal flip.
        jitter: brightness, contrast and saturation are each scaled by 1 ± up to this; 0 is off.
        gray: probability of losing the colours.
    """

    crop_padding: int = 0
    flip: float = 0.0
    jitter: float = 0.0
    gray: float = 0.0

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise ConfigError(f"crop_padding must be 0 or more pixels, got {self.crop_padding}.")
        for name in ("flip", "jitter", "gray"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in [0, 1], got {getattr(self, name)}.")

    def draw(self, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Draw what `apply` needs for `count` images; the draws do not depend on which parts are on."""
        return {
            "shift": torch.randint(0, 2 * self.crop_padding + 1, (count, 2), generator=generator),
            "flip": torch.rand(count, generator=generator) < self.flip,
            "jitter": 1 + self.jitter * (2 * torch.rand(count, 3, generator=generator) - 1),
            "gray": torch.rand(count, generator=generator) < self.gray,
        }

    def apply(self, images: torch.Tensor, drawn: dict[str, torch.Tensor]) -> torch.Tensor:
        """Augment images (B, 3, S, S), float in [0, 1]; `drawn` holds B rows on the same device."""
        if self.crop_padding:
            images = _crop(images, drawn["shift"], self.crop_padding)
        if self.flip:
            images = torch.where(drawn["flip"].view(-1, 1, 1, 1), images.flip(-1), images)
        if self.gray:
            images = torch.where(drawn["gray"].view(-1, 1, 1, 1), _luma(images).expand_as(images), images)
        if self.jitter:
            bright, contrast, colour = drawn["jitter"].to(images.dtype).view(-1, 3, 1, 1, 1).unbind(1)
            images = images * bright
            images = torch.lerp(_luma(images).mean((2, 3), keepdim=True), images, contrast)
            images = torch.lerp(_luma(images), images, colour).clamp(0, 1)
        return images


def _luma(images: torch.Tensor) -> torch.Tensor:
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=images.dtype, device=images.device)
    return (images * weights.view(1, 3, 1, 1)).sum(1, keepdim=True)


def _crop(images: torch.Tensor, shift: torch.Tensor, padding: int) -> torch.Tensor:
    size = images.shape[-1]
    padded = F.pad(images, (padding,) * 4, mode="reflect")
    reach = torch.arange(size, device=images.device)
    rows = (shift[:, :1] + reach)[:, None, :, None]
    columns = (shift[:, 1:] + reach)[:, None, None, :]
    batch = torch.arange(len(images), device=images.device).view(-1, 1, 1, 1)
    channel = torch.arange(images.shape[1], device=images.device).view(1, -1, 1, 1)
    return padded[batch, channel, rows, columns]
