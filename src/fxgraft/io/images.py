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
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"Cannot read {name} as an image: {error}\nRemove or replace it.") from error
