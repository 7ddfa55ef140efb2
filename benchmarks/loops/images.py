"""From image files to pixels, and from pixels to what a network takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import IO

import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from fxgraft.errors import ConfigError


def decode(name: str, opened: Callable[[], IO[bytes]], size: int) -> torch.Tensor:
    """Read an image, cropped about its centre to a square and resized (bicubic).

    Args:
        name: what to call it in an error.
        opened: opens the file.
        size: side of the square in pixels.

    Returns:
        uint8 of shape (3, size, size), RGB.

    Raises:
        ConfigError: it cannot be read as an image.
    """
    try:
        with opened() as stream, Image.open(stream) as image:
            rgb = image.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"Cannot read {name} as an image: {error}") from error
    if rgb.size != (size, size):
        rgb = ImageOps.fit(rgb, (size, size), method=Image.Resampling.BICUBIC)
    # bytearray: frombuffer warns about memory that cannot be written to.
    flat = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return flat.view(size, size, 3).permute(2, 0, 1).contiguous()


def to_floats(images: torch.Tensor) -> torch.Tensor:
    """Turn uint8 pixels into floats in [0, 1]."""
    return images.float() / 255


def normalised(images: torch.Tensor) -> torch.Tensor:
    """Turn floats in [0, 1] into what networks are trained on here: floats in [-1, 1]."""
    return images * 2 - 1


def as_input(images: torch.Tensor) -> torch.Tensor:
    """Turn uint8 images (N, 3, S, S) into what `train` and `evaluate` feed to a model: floats in [-1, 1]."""
    return normalised(to_floats(images))
