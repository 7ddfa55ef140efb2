"""Tensor functions of the diversification block (Sun, Cholakkal, Khan, Khan, Shao, AAAI 2020).

A network that sees the same telling part of every image learns little from the rest. On class maps M of
shape (B, K, H, W), one map per image and class, the block damps two kinds of entries, drawn in each pass:

- the peak, with probability ``p_peak`` per map;
- patches of G×G cells, each with probability ``p_patch``; the peak does not belong to any patch.

Damped entries are multiplied by α, all others pass: logits = mean over H, W of M · (α if damped, else 1).
Masks come out of comparisons, so no gradient passes through them, and no input is written to. Damping is
scaling whatever the sign, as in the reference code: a damped negative entry rises towards zero.

`draw` makes the random numbers, `suppression_mask` the mask from given ones, `diversify` the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fxgraft.errors import ConfigError

Border = Literal["skip", "partial"]
Ties = Literal["first", "all"]


@dataclass(frozen=True)
class Draws:
    """The random part of one pass; None where nothing can be drawn (probability 0).

    Attributes:
        peak: bool (B, K), or (B, K, H, W) with one draw per entry; whether a peak is damped.
        patch: bool (B, K, rows, columns); whether a patch is damped.
    """

    peak: Tensor | None
    patch: Tensor | None


def patch_grid(height: int, width: int, patch: int, border: Border = "skip") -> tuple[int, int]:
    """Count the patches (rows, columns) that an H×W map has.

    Args:
        height: of the map, in cells.
        width: of the map, in cells.
        patch: side G of a patch.
        border: "skip" counts whole patches only; "partial" also the smaller ones at the far borders.

    Raises:
        ConfigError: the patch is larger than the map, or smaller than one cell.
    """
    if patch < 1:
        raise ConfigError(f"A patch has at least one cell on a side, got patch={patch}.")
    if patch > height or patch > width:
        raise ConfigError(
            f"Patches of {patch}×{patch} cells are larger than the class maps of {height}×{width}.\n"
            "No patch would fit, and only peaks could be damped.\n"
            f"Use patch={min(height, width)} or less, or larger images."
        )
    if border == "partial":
        return -(-height // patch), -(-width // patch)
    return height // patch, width // patch


def draw(
    maps: Tensor,
    *,
    p_peak: float = 0.5,
    p_patch: float = 0.5,
    patch: int = 3,
    border: Border = "skip",
    ties: Ties = "first",
    generator: torch.Generator | None = None,
) -> Draws:
    """Draw which peaks and patches to damp: one call of the generator for each kind, none at probability 0.

    Args:
        maps: class maps (B, K, H, W); their shape and device count.
        p_peak: probability that a map's peak is damped.
        p_patch: probability that a patch is damped.
        patch: side G of a patch, in cells.
        border: see `patch_grid`.
        ties: with "all", every entry gets its own draw, since every one may be a peak.
        generator: of the device of the maps; torch's global one if None.

    Raises:
        ConfigError: the patch does not fit the maps.
    """
    batch, classes, height, width = maps.shape
    rows, columns = patch_grid(height, width, patch, border)
    peaks = (batch, classes, height, width) if ties == "all" else (batch, classes)

    def bernoulli(shape: tuple[int, ...], p: float) -> Tensor | None:
        if p <= 0:
            return None
        # Given as an argument, even None, a generator keeps compiled code from taking batches of any size.
        source: dict[str, Any] = {} if generator is None else {"generator": generator}
        return torch.rand(shape, device=maps.device, **source) < p

    return Draws(bernoulli(peaks, p_peak), bernoulli((batch, classes, rows, columns), p_patch))


def peak_mask(maps: Tensor, ties: Ties = "first") -> Tensor:
    """Mark the largest entry of each map (B, K, H, W); bool, of the same shape.

    Args:
        maps: class maps.
        ties: "first" marks one entry per map, the first in reading order; "all" every entry equal to the
            maximum, as the reference code does (all of a constant map).
    """
    flat = maps.detach().flatten(2)
    if ties == "all":
        return (flat == flat.amax(2, keepdim=True)).view(maps.shape)
    cells = torch.arange(flat.shape[2], device=maps.device)
    return (cells == flat.argmax(2, keepdim=True)).view(maps.shape)


def spread_patches(drawn: Tensor, height: int, width: int, patch: int) -> Tensor:
    """Spread one value per patch (B, K, rows, columns) over the cells (B, K, H, W).

    Cells that no patch covers are False; what a patch has beyond the border is cut off.
    """
    batch, classes, rows, columns = drawn.shape
    tiled = drawn[:, :, :, None, :, None].expand(-1, -1, -1, patch, -1, patch)
    cells = tiled.reshape(batch, classes, rows * patch, columns * patch)[:, :, :height, :width]
    missing = height - cells.shape[2], width - cells.shape[3]
    return F.pad(cells, (0, missing[1], 0, missing[0])) if any(missing) else cells


def suppression_mask(maps: Tensor, draws: Draws, *, patch: int = 3, ties: Ties = "first") -> Tensor:
    """Say which entries are damped: drawn peaks, and cells of drawn patches that aren't peaks.

    Args:
        maps: class maps (B, K, H, W).
        draws: as `draw` makes them, for the same maps and patch; numbers count as drawn where they are not 0.
        patch: side G of a patch, in cells.
        ties: see `peak_mask`.

    Returns:
        bool (B, K, H, W).
    """
    height, width = maps.shape[2:]
    peaks = peak_mask(maps, ties)
    mask = torch.zeros_like(peaks)
    if draws.patch is not None:
        mask = spread_patches(draws.patch.bool(), height, width, patch) & ~peaks
    if draws.peak is not None:
        drawn = draws.peak.bool()
        mask = mask | (peaks & (drawn if drawn.ndim == 4 else drawn[:, :, None, None]))
    return mask


def damp(maps: Tensor, mask: Tensor, alpha: float = 0.1) -> Tensor:
    """Multiply the masked entries of the maps (B, K, H, W) by α in one multiplication; the gradient alike."""
    return maps * torch.ones_like(maps, requires_grad=False).masked_fill(mask, alpha)


def diversify(
    maps: Tensor,
    *,
    alpha: float = 0.1,
    p_peak: float = 0.5,
    p_patch: float = 0.5,
    patch: int = 3,
    border: Border = "skip",
    ties: Ties = "first",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw masks for class maps (B, K, H, W), damp them and average: logits (B, K).

    At α = 1, or with both probabilities 0, nothing is drawn and the logits are the plain averages. Arguments
    as `draw` and `damp`.
    """
    if alpha == 1 or (p_peak <= 0 and p_patch <= 0):
        return maps.mean((2, 3))
    draws = draw(
        maps, p_peak=p_peak, p_patch=p_patch, patch=patch, border=border, ties=ties, generator=generator
    )
    mask = suppression_mask(maps, draws, patch=patch, ties=ties)
    return damp(maps, mask, alpha).mean((2, 3))
