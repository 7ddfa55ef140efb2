"""The fifteen corruptions of ImageNet-C at five severities (Hendrycks and Dietterich, ICLR 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from fxgraft.errors import ConfigError

CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
SEVERITIES = (1, 2, 3, 4, 5)
_SEEDED = ("impulse_noise", "glass_blur")
"""Corruptions that do not draw from NumPy's global generator: they are given a seed from it."""


@dataclass(frozen=True)
class Corrupted:
    """Corrupts an image, as the package ``imagecorruptions`` does it at any size from 32 pixels on.

    Attributes:
        name: one of `CORRUPTIONS`.
        severity: 1 to 5.
        size: side in pixels to which the image is brought first, as the network sees it.
    """

    name: str
    severity: int
    size: int

    def __call__(self, image: Any) -> Any:
        """Return the corrupted image; draws come from NumPy's generator."""
        from imagecorruptions import corrupt, corruptions
        from PIL import ImageOps

        square = ImageOps.fit(image, (self.size, self.size), method=Image.Resampling.BICUBIC)
        if self.name in _SEEDED:
            seed = int(np.random.randint(1 << 31))
            pixels = getattr(corruptions, self.name)(square, self.severity, seed=seed)
        else:
            pixels = corrupt(np.asarray(square), corruption_name=self.name, severity=self.severity)
        return Image.fromarray(np.uint8(pixels))


def check_corruptions(size: int) -> None:
    """Raise unless images of this size can be corrupted.

    Raises:
        ConfigError: the package is not installed, or images are smaller than 32 pixels.
    """
    if size < 32:
        raise ConfigError(
            f"Corruptions need images of 32 pixels or more, got size={size}.\n"
            "Pass a larger size, or test without corruptions."
        )
    try:
        import imagecorruptions  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            'Corruptions come with the package imagecorruptions.\nInstall it with: pip install "fxgraft[corruptions]".'
        ) from error
