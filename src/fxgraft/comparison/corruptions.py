"""The fifteen corruptions of ImageNet-C at five severities (Hendrycks and Dietterich, ICLR 2019)."""

from __future__ import annotations

import functools
from collections.abc import Callable
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
_IMPULSES = (0.03, 0.06, 0.09, 0.17, 0.27)
"""Share of the values that impulse noise replaces, by severity."""


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
        from imagecorruptions import corrupt
        from PIL import ImageOps
        from skimage.util import random_noise

        square = np.asarray(ImageOps.fit(image, (self.size, self.size), method=Image.Resampling.BICUBIC))
        own = int(np.random.randint(1 << 31))
        if self.name == "impulse_noise":  # the package leaves its generator to chance
            amount = _IMPULSES[self.severity - 1]
            return Image.fromarray(np.uint8(random_noise(square, mode="s&p", amount=amount, rng=own) * 255))
        if self.name == "glass_blur":  # compiled code of the package draws from a generator of its own
            _seed_compiled()(own)
        return Image.fromarray(np.uint8(corrupt(square, corruption_name=self.name, severity=self.severity)))


@functools.cache
def _seed_compiled() -> Callable[[int], None]:
    """Return what seeds the generator that numba's compiled functions draw from."""
    import numba

    return numba.njit(lambda seed: np.random.seed(seed))


def check_corruptions(size: int) -> None:
    """Raise unless images of this size can be corrupted.

    Raises:
        ConfigError: the package is not installed, or images are smaller than 32 pixels.
    """
    if size < 32:
        raise ConfigError(f"Corruptions need images of 32 pixels or more, got size={size}.")
    try:
        import imagecorruptions  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            'Corruptions come with the package imagecorruptions.\nInstall it with: pip install "fxgraft[corruptions]".'
        ) from error
