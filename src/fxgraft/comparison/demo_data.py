"""Four domains drawn from scikit-learn's digits: data for a demo that downloads nothing."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fxgraft.errors import ConfigError

DIGIT_DOMAINS = ("plain", "inverted", "thick", "sketch")


def write_digits(folder: Path, size: int) -> Path:
    """Write the digits as images, ``domain/class/number.png``, unless the folder is there already.

    Args:
        folder: the folder to be made; files are written beside it first, so that it is never half full.
        size: side of the images in pixels.

    Returns:
        The folder.

    Raises:
        ConfigError: as `digits_domains`, or the files cannot be written.
    """
    from PIL import Image

    if folder.is_dir():
        return folder
    domains = digits_domains(size)
    draft = folder.with_name(f".{folder.name}.part")
    try:
        for name, (images, labels) in domains.items():
            for digit in range(10):
                (draft / name / str(digit)).mkdir(parents=True, exist_ok=True)
            for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
                pixels = image.permute(1, 2, 0).contiguous().numpy()
                Image.fromarray(pixels).save(draft / name / str(label) / f"{index:04d}.png")
        draft.rename(folder)
    except OSError as error:
        raise ConfigError(
            f"Cannot write the digits to {str(folder)!r}: {error.strerror}.\nPass another folder."
        ) from error
    return folder


def digits_domains(size: int = 32, *, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Turn scikit-learn's bundled digits (1797 images of 8×8) into four domains that share no image.

    The digits of each class are shuffled and dealt out in turn, so that each image lands in exactly
    one domain and every domain has about 45 images of each class. Its style is then drawn on it:

    - ``plain``: the digit as it is, bright on black, in one faint tint per image;
    - ``inverted``: dark ink on a light coloured ground with a colour gradient and noise;
    - ``thick``: strokes widened, rotated by up to 25° and sheared, one saturated colour on another dark one;
    - ``sketch``: the outline alone, a thin dark line on white paper, with a slight tilt.

    Args:
        size: side of the images in pixels, 16 or more.
        seed: decides who goes where, and every random part of the styles.

    Returns:
        By domain, in the order of `DIGIT_DOMAINS`: images (N, 3, size, size) uint8, and labels (N,) int64.

    Raises:
        ConfigError: if `size` is below 16, or scikit-learn is not installed.
    """
    if size < 16:
        raise ConfigError(f"The styles need room to draw in: size must be at least 16, got {size}.")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "The embedded digits come with scikit-learn, which is not installed.\n"
            'Install it with: pip install "fxgraft[demo]", or compare on images of your own: fxgraft compare DATA.'
        ) from error
    flat, digits = load_digits(return_X_y=True)
    # The digits touch the frame: a margin keeps tilted and widened ones inside.
    ink = F.pad(torch.as_tensor(flat).float().view(-1, 1, 8, 8) / 16, (1, 1, 1, 1))
    labels = torch.as_tensor(digits).long()
    generator = torch.Generator().manual_seed(seed)
    home = torch.empty_like(labels)
    for digit in range(10):
        members = (labels == digit).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        # The start moves on with the class: otherwise the first domains would get every odd one out.
        home[members[order]] = (torch.arange(len(members)) + digit) % len(DIGIT_DOMAINS)
    ink = F.interpolate(ink, size=(size, size), mode="bicubic", align_corners=False).clamp(0, 1)
    domains = {}
    for index, name in enumerate(DIGIT_DOMAINS):
        images = _STYLES[name](ink[home == index], generator).clamp(0, 1)
        domains[name] = (images * 255).round().byte(), labels[home == index]
    return domains


def _plain(ink: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    tint = 0.85 + 0.15 * torch.rand(len(ink), 3, 1, 1, generator=generator)
    return ink * tint


def _inverted(ink: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    count, size = len(ink), ink.shape[-1]
    corners = 0.5 + 0.5 * torch.rand(count, 3, 2, 2, generator=generator)
    ground = F.interpolate(corners, size=(size, size), mode="bilinear", align_corners=True)
    noise = 0.08 * torch.randn(count, 3, size, size, generator=generator)
    pen = 0.3 * torch.rand(count, 3, 1, 1, generator=generator)
    return ground * (1 - ink) + pen * ink + noise


def _thick(ink: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    pen = 0.1 + 0.9 * torch.rand(len(ink), 3, 1, 1, generator=generator)
    # The strongest channel is raised to 1 so that every pen stands out against the dark ground.
    pen = pen / pen.amax(1, keepdim=True)
    ground = 0.45 * torch.rand(len(ink), 3, 1, 1, generator=generator)
    strokes = _dilate(_tilt(ink, 25, 0.4, generator), max(1, round(ink.shape[-1] / 32)))
    strokes = ((strokes - 0.4) * 4).clamp(0, 1)
    return ground * (1 - strokes) + pen * strokes


def _sketch(ink: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    solid = ((_tilt(ink, 8, 0.1, generator) - 0.3) * 4).clamp(0, 1)
    line = _dilate(solid, 1) - solid
    paper = 1 - 0.05 * torch.rand(len(ink), 1, 1, 1, generator=generator)
    return (paper - 0.9 * line).expand(-1, 3, -1, -1)


_STYLES = {"plain": _plain, "inverted": _inverted, "thick": _thick, "sketch": _sketch}


def _dilate(ink: torch.Tensor, radius: int) -> torch.Tensor:
    return F.max_pool2d(ink, 2 * radius + 1, stride=1, padding=radius)


def _tilt(ink: torch.Tensor, degrees: float, shear: float, generator: torch.Generator) -> torch.Tensor:
    """Rotate by up to ± `degrees` and shear by up to ± `shear`, a draw per image."""
    angle, slant = (2 * torch.rand(2, len(ink), generator=generator) - 1).unbind()
    angle, slant = angle * math.radians(degrees), slant * shear
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    rows = [torch.stack([cos, slant - sin, zero], -1), torch.stack([sin, cos, zero], -1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(ink.shape), align_corners=False)
    return F.grid_sample(ink, grid, align_corners=False)
