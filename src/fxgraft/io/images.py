"""Reading images, in one place."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from fxgraft.errors import ConfigError


def read_rgb(source: Path | IO[bytes], name: str) -> Image.Image:
    """Decode an image to RGB.

    Args:
        source: a file, or its open bytes.
        name: what an error calls the image.

    Raises:
        ConfigError: it cannot be read as an image; names it.
    """
    try:
        with Image.open(source) as image:
            return _with_8_bits(image).convert("RGB")
    # Pillow raises a SyntaxError for a PNG that is broken inside.
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"Cannot read {name} as an image: {error}\nRemove or replace it.") from error


def _with_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16 bits to 8, which Pillow would cut off at 255."""
    if image.mode in ("I", "F"):
        raise ValueError("its 32 bits a pixel have no range that is known; save it with 8 or 16")
    if not image.mode.startswith("I;16"):
        return image
    import numpy as np

    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
