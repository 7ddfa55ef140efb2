"""Pictures of what a method sees.

Draws an image's class maps, those of its highest-scoring classes, with the peak and the patches that the
diversification block would damp in one pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxgraft.errors import ConfigError
from fxgraft.patches.diversification.tensors import Border, Draws, draw, peak_mask, suppression_mask

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation of the colours, for models that do not say what they were trained with."""


@dataclass(frozen=True)
class ClassMapsPicture:
    """What a picture of class maps shows.

    Attributes:
        image: (3, S, S), colours in [0, 1].
        classes: the classes drawn, highest score first.
        scores: their logits.
        maps: (k, H, W), their class maps.
        peaks: bool (k, H, W).
        damped: bool (k, H, W), what one pass of the block damps.
    """

    image: Tensor
    classes: tuple[int, ...]
    scores: tuple[float, ...]
    maps: Tensor
    peaks: Tensor
    damped: Tensor


def look(
    model: nn.Module,
    image: Tensor,
    *,
    top: int = 3,
    patch: int = 3,
    p_peak: float = 0.5,
    p_patch: float = 0.5,
    border: Border = "skip",
    seed: int = 0,
    head: str | None = None,
) -> ClassMapsPicture:
    """Compute the class maps of one image, and what a pass of the block would damp in them.

    Args:
        model: bare or patched, with a head of average pooling and a linear classifier.
        image: (3, S, S), colours in [0, 1].
        top: how many classes, highest score first.
        patch: side of a patch in cells of the map.
        p_peak: probability that a peak is damped.
        p_patch: probability that a patch is damped.
        border: as in the block.
        seed: of the draw.
        head: qualified name of the classifier, where the model has several.

    Raises:
        ConfigError: a number out of range, or patches larger than the map.
        StructureError: the model has no such head.
    """
    from fxgraft.extend import position_scores as class_maps

    if top < 1:
        raise ConfigError(f"There must be at least one class to draw, got top={top}.")
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    mean, std = (config.get(key) or default for key, default in zip(("mean", "std"), IMAGENET, strict=True))
    channels = [torch.tensor(value).view(-1, 1, 1) for value in (mean, std)]
    with torch.no_grad():
        found = class_maps(model, ((image - channels[0]) / channels[1]).unsqueeze(0), head)
    logits = found.mean((2, 3))[0]
    best = logits.topk(min(top, len(logits)))
    chosen = found[:, best.indices]
    generator = torch.Generator().manual_seed(seed)
    draws: Draws = draw(
        chosen, p_peak=p_peak, p_patch=p_patch, patch=patch, border=border, generator=generator
    )
    damped = suppression_mask(chosen, draws, patch=patch)
    classes = tuple(best.indices.tolist())
    return ClassMapsPicture(
        image, classes, tuple(best.values.tolist()), chosen[0], peak_mask(chosen)[0], damped[0]
    )


def save_picture(shown: ClassMapsPicture, path: Path, names: dict[int, str] | None = None) -> None:
    """Draw the image and, beside it, each map over it: peak as a cross, damped cells hatched.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise ConfigError(
            'Pictures need matplotlib, which is not installed.\nInstall it with: pip install "fxgraft[demo]".'
        ) from error
    side = shown.image.shape[-1]
    pixels = shown.image.permute(1, 2, 0).numpy()
    figure = Figure(figsize=(3 * (len(shown.classes) + 1), 3.4), layout="constrained")
    first, *axes = figure.subplots(1, len(shown.classes) + 1, squeeze=False)[0]
    first.imshow(pixels)
    first.set_title("image")
    for axis, index, score, values, peaks, damped in zip(
        axes, shown.classes, shown.scores, shown.maps, shown.peaks, shown.damped, strict=True
    ):
        height, width = values.shape
        smooth = F.interpolate(values[None, None], size=(side, side), mode="bilinear", align_corners=False)
        axis.imshow(pixels)
        axis.imshow(smooth[0, 0].numpy(), cmap="viridis", alpha=0.6)
        for row, column in damped.nonzero().tolist():
            corner = (column * side / width - 0.5, row * side / height - 0.5)
            cell = Rectangle(corner, side / width, side / height, fill=False, hatch="////", linewidth=0)
            cell.set_edgecolor("white")
            axis.add_patch(cell)
        row, column = peaks.nonzero()[0].tolist()
        axis.plot((column + 0.5) * side / width - 0.5, (row + 0.5) * side / height - 0.5, "rx", markersize=10)
        axis.set_title(f"{(names or {}).get(index, f'class {index}')}: {score:.2f}", fontsize=9)
    for axis in (first, *axes):
        axis.set_axis_off()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot write the picture {str(path)!r}: {error}.") from error


def read_weights(model: nn.Module, path: Path) -> None:
    """Load a ``state_dict`` from a safetensors file or one written by ``torch.save``.

    Raises:
        ConfigError: it cannot be read, or does not fit the model.
    """
    from timm.models import load_checkpoint

    try:
        load_checkpoint(model, str(path), strict=True)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ConfigError(f"Cannot load {str(path)!r} into {type(model).__name__}: {error}") from error
