"""A picture of what RSC mutes in a training step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import fxgraft
from fxgraft.experiments.domains import Domain
from fxgraft.experiments.images import as_input
from fxgraft.patches.rsc.patch import record


def draw_muted(model: nn.Module, domains: Sequence[Domain], seed: int, path: Path) -> str | None:
    """Draw what RSC mutes on training images, with the labels it is given there.

    Args:
        model: patched with RSC.
        domains: those it was trained on; a few images of each are looked at.
        seed: of the choice of images, and of the draws of the patch.
        path: the file to write.

    Returns:
        The name of the file; None if nothing was muted that can be drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = [(domain, torch.randperm(len(domain), generator=generator)[:24]) for domain in domains]
    images = torch.cat([domain.images[index] for domain, index in chosen])
    labels = torch.cat([domain.labels[index] for domain, index in chosen])
    titles = [f"{domain.name}: {domain.classes[k]}" for domain, index in chosen for k in domain.labels[index]]
    device = next(model.parameters()).device
    model.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        fxgraft.set_progress(model, 1.0)
        for _ in range(20):  # the scope is drawn anew in every pass, and only positions can be drawn
            with record(model) as records:
                model(as_input(images).to(device), target=labels.to(device))
            spatial = [r for r in records if r.scope == "spatial" and r.mask.ndim == 4 and r.selected.any()]
            if spatial:
                muting_picture(images, titles, spatial[0].mask, spatial[0].selected, path)
                return path.name
    return None


def muting_picture(
    images: torch.Tensor,
    titles: Sequence[str],
    mask: torch.Tensor,
    selected: torch.Tensor,
    path: Path,
    *,
    count: int = 12,
) -> None:
    """Draw images with the positions that were muted, as a PNG.

    Args:
        images: uint8 (B, 3, S, S).
        titles: one per image.
        mask: (B, 1, H, W), 1 keep and 0 mute; spread over the image without smoothing.
        selected: (B,) bool, the samples that stayed muted; only these are drawn.
        path: the file to write.
        count: how many to draw at most, spread evenly over the selected ones.
    """
    from matplotlib.figure import Figure

    chosen = selected.nonzero().flatten()
    chosen = chosen[torch.linspace(0, len(chosen) - 1, min(count, len(chosen))).round().long()]
    columns = min(6, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    figure = Figure(figsize=(1.7 * columns, 3.8 * rows), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    muted = 1 - F.interpolate(mask[chosen].float(), size=images.shape[-2:], mode="nearest")
    for place, index in enumerate(chosen.tolist()):
        row, column = divmod(place, columns)
        plain = images[index].permute(1, 2, 0).float() / 255
        red = torch.tensor([0.85, 0.1, 0.1])
        veil = 0.75 * muted[place].permute(1, 2, 0)
        axes[2 * row][column].imshow(plain.numpy())
        axes[2 * row][column].set_title(titles[index], fontsize=8)
        axes[2 * row + 1][column].imshow((plain * (1 - veil) + red * veil).numpy())
    height, width = mask.shape[-2:]
    figure.suptitle(f"Muted by RSC in one training step (red), on the {height}×{width} map", fontsize=10)
    figure.savefig(path, dpi=120)
