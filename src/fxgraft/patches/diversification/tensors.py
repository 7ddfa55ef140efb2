"""Tensor functions of the diversification block (Sun, Cholakkal, Khan, Khan, Shao, AAAI 2020).

A network that sees the same telling part of every image learns little from the rest. On class maps M of
shape (B, K, *S), one map per image and class with S = (H, W), or (T, H, W) of clips and volumes, the block damps two
kinds of entries, drawn in each pass:

- the peak, with probability ``p_peak`` per map;
- patches of G×G cells (G×G×G, or of a side for each dimension), each with probability ``p_patch``; the peak does not
  belong to any patch.

Damped entries are multiplied by α, all others pass: logits = mean over S of M · (α if damped, else 1).
Masks come out of comparisons, so no gradient passes through them, and no input is written to. Damping is
scaling whatever the sign, as in the reference code: a damped negative entry rises towards zero.

`draw` makes the random numbers, `suppression_mask` the mask from given ones, and `damp` multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fxgraft.errors import ConfigError

Border = Literal["skip", "partial"]
Ties = Literal["first", "all"]
Patch = int | tuple[int, ...]
"""Side of the patches in every dimension, or one for each: (T, H, W) in a clip or volume."""


@dataclass(frozen=True)
class Draws:
    """The random part of one pass; None where nothing can be drawn (probability 0).

    Attributes:
        peak: bool (B, K), or (B, K, *S) with one draw per entry; whether a peak is damped.
        patch: bool (B, K, *patches); whether a patch is damped.
    """

    peak: Tensor | None
    patch: Tensor | None


def patch_sides(patch: Patch, sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the sides of a patch, one for each dimension of a map of these sizes.

    Raises:
        ConfigError: they were given for another number of dimensions.
    """
    sides = (patch,) * len(sizes) if isinstance(patch, int) else tuple(patch)
    if len(sides) != len(sizes):
        raise ConfigError(
            f"patch={sides} has {len(sides)} sides, and the class maps have {len(sizes)} dimensions, {_by(sizes)}.\n"
            "A patch has one side for each dimension.\n"
            f"Pass patch={tuple(min(3, size) for size in sizes)}, or one number for all."
        )
    return sides


def _by(sizes: Sequence[int]) -> str:
    return "×".join(map(str, sizes))


def patch_grid(sizes: Sequence[int], patch: Patch, border: Border = "skip") -> tuple[int, ...]:
    """Count the patches that a map has along each dimension.

    Args:
        sizes: the sizes of the map, (H, W) or (T, H, W), in cells.
        patch: side G of a patch, or a side for each dimension.
        border: "skip" counts whole patches only; "partial" also the smaller ones at the far borders.

    Raises:
        ConfigError: the patch is larger than the map, or smaller than one cell.
    """
    sides = patch_sides(patch, sizes)
    if min(sides) < 1:
        raise ConfigError(f"A patch has at least one cell on a side, got patch={patch}.")
    if any(side > size for side, size in zip(sides, sizes, strict=True)):
        fits = tuple(min(side, size) for side, size in zip(sides, sizes, strict=True))
        per_map = f", or patch={fits}" if len(sizes) > 2 else ""
        larger = "larger images" if len(sizes) < 3 else "longer or larger clips, deeper or larger volumes"
        raise ConfigError(
            f"Patches of {_by(sides)} cells are larger than the class maps of {_by(sizes)}.\n"
            "No patch would fit, and only peaks could be damped.\n"
            f"Use patch={min(sizes)} or less{per_map}, or {larger}."
        )
    if border == "partial":
        return tuple(-(-size // side) for side, size in zip(sides, sizes, strict=True))
    return tuple(size // side for side, size in zip(sides, sizes, strict=True))


def draw(
    maps: Tensor,
    *,
    p_peak: float = 0.5,
    p_patch: float = 0.5,
    patch: Patch = 3,
    border: Border = "skip",
    ties: Ties = "first",
    generator: torch.Generator | None = None,
) -> Draws:
    """Draw which peaks and patches to damp: one call of the generator for each kind, none at probability 0.

    Args:
        maps: class maps (B, K, *S); their shape and device count.
        p_peak: probability that a map's peak is damped.
        p_patch: probability that a patch is damped.
        patch: side G of a patch, or a side for each dimension, in cells.
        border: see `patch_grid`.
        ties: with "all", every entry gets its own draw, since every one may be a peak.
        generator: random numbers on the device of the maps; torch's global one if None.

    Raises:
        ConfigError: the patch does not fit the maps.
    """
    patches = patch_grid(maps.shape[2:], patch, border)
    peaks = tuple(maps.shape) if ties == "all" else tuple(maps.shape[:2])

    def bernoulli(shape: tuple[int, ...], p: float) -> Tensor | None:
        if p <= 0:
            return None
        # Given as an argument, even None, a generator keeps compiled code from taking batches of any size.
        source: dict[str, Any] = {} if generator is None else {"generator": generator}
        return torch.rand(shape, device=maps.device, **source) < p

    return Draws(bernoulli(peaks, p_peak), bernoulli((*maps.shape[:2], *patches), p_patch))


def peak_mask(maps: Tensor, ties: Ties = "first") -> Tensor:
    """Mark the largest entry of each map (B, K, *S); bool, of the same shape.

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


def spread_patches(drawn: Tensor, sizes: Sequence[int], patch: Patch) -> Tensor:
    """Spread one value per patch (B, K, *patches) over the cells (B, K, *sizes).

    Cells that no patch covers are False; what a patch has beyond the border is cut off.
    """
    counts, sides = drawn.shape[2:], patch_sides(patch, sizes)
    pairs = [*zip(counts, sides, strict=True)]
    tiled = drawn.reshape(*drawn.shape[:2], *(n for count in counts for n in (count, 1)))
    tiled = tiled.expand(-1, -1, *(n for _, side in pairs for n in (-1, side)))
    cells = tiled.reshape(*drawn.shape[:2], *(count * side for count, side in pairs))
    cells = cells[(..., *map(slice, sizes))]
    missing = [n for have, size in zip(cells.shape[2:], sizes, strict=True) for n in (size - have, 0)]
    return F.pad(cells, missing[::-1]) if any(missing) else cells


def suppression_mask(maps: Tensor, draws: Draws, *, patch: Patch = 3, ties: Ties = "first") -> Tensor:
    """Say which entries are damped: drawn peaks, and cells of drawn patches that aren't peaks.

    Args:
        maps: class maps (B, K, *S).
        draws: the draws, as `draw` makes them, for the same maps and patch; numbers count as drawn where they are not
            0.
        patch: side G of a patch, or a side for each dimension, in cells.
        ties: see `peak_mask`.

    Returns:
        bool (B, K, *S).
    """
    peaks = peak_mask(maps, ties)
    mask = torch.zeros_like(peaks)
    if draws.patch is not None:
        mask = spread_patches(draws.patch.bool(), maps.shape[2:], patch) & ~peaks
    if draws.peak is not None:
        drawn = draws.peak.bool()
        mask = mask | (peaks & drawn.reshape(*drawn.shape, *[1] * (maps.ndim - drawn.ndim)))
    return mask


def damp(maps: Tensor, mask: Tensor, alpha: float = 0.1) -> Tensor:
    """Multiply the masked entries of the maps (B, K, *S) by α in one multiplication; the gradient alike."""
    return maps * torch.ones_like(maps, requires_grad=False).masked_fill(mask, alpha)
