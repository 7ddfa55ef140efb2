"""Mixing masks of MixMo (Ramé, Sun, Cord, ICCV 2021): which member is seen in which cell, for a whole batch.

From the ratios κ (B, M) of `fxgraft.patches.mixmo.tensors.dirichlet` to masks (M, B, 1 or C, H or 1, W or 1), of
clips and volumes with T or 1 before H, that sum to 1 over the members at every position, and the shares (B, M) of the
map that each member really has.

Linear masks are κ itself. The others give member 0 a mask of its own and its complement to member 1. The
authors define all but the cut for two members only. With more, what they do for the cut is done for all:
the other members share the complement linearly, in the proportions of their κ.

A maker is a function of its draws, so that it can be checked on given ones; `draw_masks` draws them, from
torch's generator of κ's device. Nothing waits for the device, and no Python loop runs over samples.

Against the authors' release: every sample has a mask of its own there too, but the share is the mean of a mask
of which only the first channel is then mixed with. Here it is that of the mask in use.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fxgraft.errors import ConfigError, candidates

Mixing = Literal[
    "linear",
    "sum",
    "cut",
    "tube",
    "cow",
    "patchup_hard",
    "patchup_soft",
    "horizontal",
    "vertical",
    "channel",
    "stack_channel",
    "noise",
]
"""How the encodings are mixed; see `draw_masks`."""

MIXINGS: tuple[Mixing, ...] = get_args(Mixing)
WITHOUT_POSITIONS: tuple[Mixing, ...] = ("linear", "sum", "channel", "stack_channel")
BY_CHANNEL: tuple[Mixing, ...] = ("channel", "stack_channel")
_IN_FRAMES: tuple[Mixing, ...] = ("tube", "horizontal", "vertical")
"""What is drawn in rows and columns alone, and holds for every frame of a clip or slice of a volume."""

PATCHUP_BLOCK = 7
COW_PROPORTION = (0.2, 0.8)
COW_SIGMA = (4.0, 16.0)


def draw_masks(mixing: Mixing, kappa: Tensor, channels: int, *sizes: int) -> tuple[Tensor, Tensor]:
    """Draw the masks of a batch, and measure each member's share of the map.

    - "linear": mask_i = κ_i everywhere. "sum": 1/M (MIMO).
    - "cut": a box for member 0, see `box_mask`; in a clip or volume a cuboid.
    - "tube": a box of rows and columns for member 0, the same in every frame.
    - "cow": blobs for member 0, see `cow_mask`; their share does not depend on κ, as in the release.
    - "patchup_hard": square patches (cubes) for member 0, see `patches_mask`. "patchup_soft": the same patches, and
      the linear mixture outside them.
    - "horizontal", "vertical": a band of rows or of columns for member 0, see `band_mask`.
    - "channel": each channel goes to member 0 with probability κ_0; a mask per channel, constant over space.
    - "stack_channel": the first or the last channels go to member 0, see `band_mask`.
    - "noise": noise for member 0, cell by cell, see `noise_mask`.

    Args:
        mixing: one of the above.
        kappa: (B, M) ratios that sum to 1 over M, floating point.
        channels: C of the encodings.
        *sizes: sizes of the encodings, (H, W) or (T, H, W). A volume of depth one is mixed as the map that it is.

    Returns:
        Masks (M, B, ...): (1, 1, 1) for "linear" and "sum", (C, 1, 1) for "channel" and "stack_channel", (1, H, 1)
        for "horizontal", (1, 1, W) for "vertical", (1, H, W) for the rest; of volumes with T, or 1, before H.
        And shares (B, M), the mean of each mask.
        Both in the dtype and on the device of `kappa`. A single member has everything, whatever the mixing.

    Raises:
        ConfigError: no such mixing.
    """
    if mixing not in MIXINGS:
        raise ConfigError(f"There is no mixing {mixing!r}. {candidates(str(mixing), MIXINGS, len(MIXINGS))}")
    members = kappa.shape[1]
    if mixing == "sum" or members == 1:
        shares = torch.full_like(kappa, 1 / members)
        return _over(shares.t(), 1 + len(sizes)), shares
    if mixing == "linear":
        return _over(kappa.t(), 1 + len(sizes)), kappa
    return share_out(_first_mask(mixing, kappa[:, 0], channels, *sizes), kappa)


def _over(values: Tensor, dims: int) -> Tensor:
    return values.reshape(*values.shape, *[1] * dims)


def _first_mask(mixing: Mixing, share: Tensor, channels: int, *sizes: int) -> Tensor:
    """Draw the mask of member 0, (B, 1 or C, T or 1, H or 1, W or 1), from its share (B,)."""
    *_, height, width = sizes
    if len(sizes) > 2 and (sizes[0] == 1 or mixing in _IN_FRAMES):
        return _first_mask(mixing, share, channels, height, width).unsqueeze(2)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(share.shape[0], *shape, dtype=share.dtype, device=share.device)

    if mixing in ("cut", "tube"):
        return box_mask(share, draw_centres(share.shape[0], *sizes, device=share.device), *sizes)
    if mixing == "cow":
        (low, high), (narrow, wide) = COW_PROPORTION, COW_SIGMA
        proportion, sigma = low + (high - low) * uniform(), narrow * (wide / narrow) ** uniform()
        noise = torch.randn(share.shape[0], 1, *sizes, dtype=share.dtype, device=share.device)
        return cow_mask(proportion, sigma, noise)
    if mixing == "horizontal":
        return band_mask(share, uniform() < 0.5, height)[:, None, :, None]
    if mixing == "vertical":
        return band_mask(share, uniform() < 0.5, width)[:, None, None, :]
    if mixing == "channel":
        return _over((uniform(channels) < share.unsqueeze(1)).to(share.dtype), len(sizes))
    if mixing == "stack_channel":
        return _over(band_mask(share, uniform() < 0.5, channels), len(sizes))
    if mixing == "noise":
        return noise_mask(share, uniform(1, *sizes))
    block, share = patch_size(*sizes), _over(share, 1 + len(sizes))
    centres = uniform(1, *sizes) < patch_rate(share, *sizes, block=block)
    patches = patches_mask(centres.to(share.dtype), block)
    return patches if mixing == "patchup_hard" else torch.where(patches > 0, patches, share)


def share_out(first: Tensor, kappa: Tensor) -> tuple[Tensor, Tensor]:
    """Complete the mask of member 0, (B, ...), to those of all M ≥ 2 members, and measure them.

    The others share 1 − first in proportion to their κ (equally, where these are all 0). Returns masks
    (M, B, ...) and shares (B, M).
    """
    members = kappa.shape[1]
    share = first.flatten(1).mean(1, keepdim=True)
    if members == 2:
        return torch.stack((first, 1 - first)), torch.cat((share, 1 - share), 1)
    rest = kappa[:, 1:]
    total = rest.sum(1, keepdim=True)
    rest = torch.where(total > 0, rest / total, 1 / (members - 1))
    others = (1 - first) * rest.t().reshape(members - 1, -1, *[1] * (first.ndim - 1))
    return torch.cat((first.unsqueeze(0), others)), torch.cat((share, (1 - share) * rest), 1)


def shuffle_roles(masks: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Deal masks (M, B, ...) and shares (B, M) to the members again, the same way for all of the batch.

    As in the release: what a mixing does to member 0 alone falls on every member equally often.
    """
    order = torch.rand(masks.shape[0], device=masks.device).argsort()
    return masks.index_select(0, order), shares.index_select(1, order)


def draw_centres(batch: int, *sizes: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw a cell of a map of these sizes for every sample, uniformly: (B, 2) row and column, or (B, 3)."""
    drawn = torch.rand(len(sizes), batch, device=device).unbind()
    return torch.stack([(share * size).long() for share, size in zip(drawn, sizes, strict=True)], 1)


def box_mask(share: Tensor, centres: Tensor, *sizes: int) -> Tensor:
    """CutMix's boxes: 1 inside a box of the sides √share · H and √share · W, clipped at the border.

    In a clip or volume the sides of the cuboid are ∛share · T, ∛share · H and ∛share · W.

    Sides and half sides are cut to whole cells, as in the release, so a box has less than `share` of the map: on
    8×8 a share of 1/2 gives about 1/5. Measure it.

    Args:
        share: (B,), in [0, 1].
        centres: (B, 2) row and column, or (B, 3) with the frame before them, whole numbers.
        *sizes: (H, W) of the map, or (T, H, W).

    Returns:
        (B, 1, *sizes) of zeros and ones in the dtype of `share`.
    """
    side = share.sqrt() if len(sizes) == 2 else share ** (1 / len(sizes))

    def inside(centre: Tensor, size: int) -> Tensor:
        half = ((side * size).long() // 2).unsqueeze(1)
        distance = torch.arange(size, device=share.device) - centre.unsqueeze(1)
        return (distance >= -half) & (distance < half)

    mask = torch.ones(share.shape[0], 1, dtype=torch.bool, device=share.device)
    for centre, size in zip(centres.unbind(1), sizes, strict=True):
        along = inside(centre, size)
        mask = mask.unsqueeze(-1) & along.reshape(len(along), *[1] * (mask.ndim - 1), size)
    return mask.to(share.dtype)


def band_mask(share: Tensor, at_end: Tensor, size: int) -> Tensor:
    """The first ⌊share · size⌋ of `size` places, or the last where `at_end` (B,) says so: (B, size).

    The release inverts the share when it turns the band to the end. As κ is drawn symmetrically, two members
    are mixed alike on average either way; here the band keeps its share.
    """
    places = torch.arange(size, device=share.device)
    places = torch.where(at_end.unsqueeze(1), size - 1 - places, places)
    return (places < (share * size).long().unsqueeze(1)).to(share.dtype)


def noise_mask(share: Tensor, noise: Tensor) -> Tensor:
    """Noise from 0 to 1 with `share` in the middle: half of the cells lie evenly below it, half evenly above it.

    The mean is therefore 1/4 + share / 2, as in the release. One mask for all channels, as the release mixes,
    though it can draw one per channel.

    Args:
        share: (B,), in [0, 1].
        noise: (B, 1, *S), uniform from 0 to 1.

    Returns:
        (B, 1, *S) in [0, 1], in the dtype of `noise`.
    """
    share, centred = _over(share, noise.ndim - 1), 2 * noise - 1
    return share + torch.where(centred < 0, share, 1 - share) * centred


def cow_mask(proportion: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """CowMix's blobs: 1 where blurred noise lies below its quantile, taken as that of a normal distribution.

    Args:
        proportion: (B,) of the map that is 1 on average over draws.
        sigma: (B,) width of the Gaussian blur in cells; the release draws it log-uniformly from 4 to 16.
        noise: (B, 1, *S), standard normal.

    Returns:
        (B, 1, *S) of zeros and ones in the dtype of `noise`.
    """
    rows, columns = _blur(sigma, noise.shape[-2]), _blur(sigma, noise.shape[-1])
    # The meta device has no autocast to switch off.
    full = nullcontext() if noise.is_meta else torch.autocast(noise.device.type, enabled=False)
    with full:
        if noise.ndim == 4:
            blurred = rows @ noise @ columns
        else:
            blurred = rows.unsqueeze(2) @ noise @ columns.unsqueeze(2)
            blurred = (_blur(sigma, noise.shape[2]) @ blurred.flatten(3)).view(noise.shape)
    dims, cells = tuple(range(2, noise.ndim)), noise.shape[2:].numel()
    std, mean = torch.std_mean(blurred, dim=dims, keepdim=True, correction=min(1, cells - 1))
    height = math.sqrt(2) * _over(torch.erfinv(2 * proportion - 1), noise.ndim - 1)
    return (blurred <= mean + height * std).to(noise.dtype)


def _blur(sigma: Tensor, size: int) -> Tensor:
    """Zero-padded convolution with a Gaussian as a matrix, (B, 1, size, size), up to a factor.

    The factor moves mean, deviation and map alike. The kernel ends where the release's does.
    """
    places = torch.arange(size, device=sigma.device)
    distance = places.unsqueeze(1) - places
    weights = torch.exp(-0.5 * (distance / sigma.reshape(-1, 1, 1, 1)) ** 2)
    return weights * (distance.abs() <= 3 * COW_SIGMA[1])


def patch_size(*sizes: int, block: int = PATCHUP_BLOCK) -> int:
    """Side of PatchUp's patches: `block`, or the largest odd number of cells that the map holds each way."""
    return min(block, (min(sizes) - 1) // 2 * 2 + 1)


def patch_rate(share: Tensor, *sizes: int, block: int) -> Tensor:
    """Probability of a cell to be the centre of a patch, shaped as `share`, as in DropBlock and the authors' release.

    share · H · W / (block² · (H − block + 1) · (W − block + 1)). The patches that come of it overlap, and on small
    maps there are many: with a block of 7, a share of 0.9 covers 0.7 of a 32×32 map, one of 0.35 half of 16×16.

    On maps that are not square the release takes the width for the height, W² for H · W, and
    (W − block + 1)² likewise: its rate is ``patch_rate(share, width, width, block=block)``. Here DropBlock's rate
    is kept, as what a mask covers should not depend on which way an image lies: of 16×32 cells a share of 0.5 covers
    0.56, turned or not, and at the release's rate 0.47, turned 0.66.
    """
    within = math.prod([size - block + 1 for size in sizes])
    return share * (math.prod(sizes) / (block ** len(sizes) * within))


def patches_mask(centres: Tensor, block: int) -> Tensor:
    """PatchUp's patches: 1 on the squares of an odd side `block` around the ones of `centres` (B, 1, *S).

    One mask for all channels, as the release mixes, though it draws one per channel.
    """
    pool = F.max_pool2d if centres.ndim == 4 else F.max_pool3d
    return pool(centres, block, 1, block // 2)
