"""Layout: which dimension of a value holds channels, which hold space or tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxgraft.errors import SiteError, StructureError
from fxgraft.graph.tracing.anatomy import Anatomy

DIMENSIONS = {"NCHW": 4, "NHWC": 4, "NLC": 3, "NCL": 3, "NC": 2}
"""The layouts by name, with their number of dimensions."""

NAMES = tuple(DIMENSIONS)


@dataclass(frozen=True)
class Layout:
    """The meaning of a value's dimensions.

    Attributes:
        name: "NCHW", "NHWC", "NLC" (tokens), "NCL" or "NC" (vectors).
        prefix: how many leading tokens are class or register tokens, no positions ("NLC" only).
    """

    name: str
    prefix: int = 0

    def __str__(self) -> str:
        return f"{self.name}, {self.prefix} prefix" if self.prefix else self.name

    def canonical(self, x: Tensor) -> Tensor:
        """View ``x`` as (B, C, *positions), without a copy and without its prefix tokens."""
        if self.name in ("NHWC", "NLC"):
            x = x[:, self.prefix :] if self.prefix else x
            return x.movedim(-1, 1)
        return x

    def restore(self, x: Tensor, canonical: Tensor) -> Tensor:
        """Bring a new value of ``canonical(x)`` back to the dimensions of ``x``, whose prefix tokens it keeps."""
        if self.name in ("NHWC", "NLC"):
            new = canonical.movedim(1, -1)
            return torch.cat((x[:, : self.prefix], new), dim=1) if self.prefix else new
        return canonical

    def multiply(self, x: Tensor, mask: Tensor) -> Tensor:
        """Multiply ``x`` by a canonical mask (B, C or 1, *positions or ones); prefix tokens pass unchanged."""
        if self.name in ("NHWC", "NLC"):
            mask = mask.movedim(1, -1)
        if self.prefix:
            rows = mask.expand(-1, x.shape[1] - self.prefix, -1)
            mask = torch.cat(
                (mask.new_ones(1).expand(mask.shape[0], self.prefix, mask.shape[2]), rows), dim=1
            )
        return x * mask


def prefix_tokens(anatomy: Anatomy, tokens: int) -> int:
    """Count the class and register tokens in front of a sequence of ``tokens``.

    A sequence as long as one of the network's maps has cells has none; otherwise the model's own
    ``num_prefix_tokens`` decides, or the difference to the longest map that fits.
    """
    cells = set()
    for calls in anatomy.observation.calls.values():
        for call in calls:
            if isinstance(call.output, Tensor) and call.output.ndim == 4:
                _, a, b, c = call.output.shape
                cells |= {b * c, a * b}
    if tokens in cells:
        return 0
    declared = getattr(anatomy.model, "num_prefix_tokens", None)
    if isinstance(declared, int) and 0 < declared < tokens:
        return declared
    shorter = [n for n in cells if tokens - 16 <= n < tokens]
    return tokens - max(shorter) if shorter else 0


def layout_of(anatomy: Anatomy, value: Tensor, path: str, strict: bool = True) -> Layout | None:
    """Find the layout of a value of the model.

    Channels are the dimension beside two that have the shape of the image, or, where that does not decide,
    the one that stays when the image grows.

    Args:
        anatomy: of the bare model.
        value: fake tensor at the site, batch first.
        path: the module whose output it is, or ''.
        strict: raise where the layout cannot be told, instead of returning None.

    Raises:
        SiteError: the layout cannot be told from the shape; says which argument to pass.
    """
    if value.ndim == 2:
        return Layout("NC")
    if value.ndim == 3:
        if value.shape[2] == 1 < value.shape[1]:  # pooled: one position, its channels in front
            return Layout("NCL")
        return Layout("NLC", prefix_tokens(anatomy, value.shape[1]))
    if value.ndim == 4:
        _, a, b, c = value.shape
        first, last = _unlike_image(anatomy, b, c), _unlike_image(anatomy, a, b)
        if (first < 1) != (last < 1):
            return Layout("NCHW" if first < 1 else "NHWC")
        fixed = _fixed_dimension(anatomy, value, path) if strict else None
        if fixed in (1, 3):
            return Layout("NCHW" if fixed == 1 else "NHWC")
        channels = getattr(anatomy.model, "num_features", None)
        if channels == a and channels != c:
            return Layout("NCHW")
        if channels == c and channels != a:
            return Layout("NHWC")
        if first < 1 and first != last:
            return Layout("NCHW" if first < last else "NHWC")
        if b == c and a != b:  # a square map of an image that is none, or a pooled one
            return Layout("NCHW")
        if first >= 1 and a == b and b != c:
            return Layout("NHWC")
    if not strict:
        return None
    raise SiteError(
        f"The layout of {path or 'this value'!r}, of shape {tuple(value.shape)}, cannot be told from its "
        f"shape.\nEvery dimension might hold the channels.\nPass layout=, one of {', '.join(NAMES)}."
    )


def named_layout(anatomy: Anatomy, value: Tensor, path: str, name: str, where: str) -> Layout:
    """Check the layout that a user names for a value; prefix tokens are counted where that is what is found.

    Raises:
        SiteError: it does not fit the value; names ``where``.
    """
    if value.ndim != DIMENSIONS[name]:
        raise SiteError(
            f"{where!r} was said to be {name}, but its shape is {tuple(value.shape)}.\n"
            f"Leave layout= out, or pass one of {', '.join(NAMES)} that fits."
        )
    known = layout_of(anatomy, value, path, strict=False)
    return known if known is not None and known.name == name else Layout(name)


def _unlike_image(anatomy: Anatomy, height: int, width: int) -> float:
    """Say how far a map of this size is from the shape of the image; below 1 it may be rounding."""
    size = anatomy.image_size
    image_height, image_width = size[-2:] if len(size) == 3 else (1, 1)
    return abs(height * image_width - width * image_height) / max(image_height, image_width)


def _fixed_dimension(anatomy: Anatomy, value: Tensor, path: str) -> int | None:
    """Run the model on a larger image and return the one dimension of the value that did not change."""
    if not path:
        return None
    try:
        other = anatomy.enlarged.observation.output(path)
    except StructureError:  # a model of one fixed image size tells nothing this way
        return None
    same = [i for i in range(1, value.ndim) if other.shape[i] == value.shape[i]]
    return same[0] if len(same) == 1 else None
