"""Pictures of what a method does with an image: what a method draws with, without a plotting library.

A method returns a `Picture` of `Panel` objects from `Patch.picture`; the command line draws it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from fxgraft.errors import SiteError


@dataclass(frozen=True)
class View:
    """What a method is asked to make a picture of.

    Attributes:
        model: patched with the method alone, in evaluation mode, to be used up: nobody needs it afterwards.
        images: (B, 3, S, S), or clips (B, 3, T, S, S), colours in [0, 1]; at least two, where the user gave one the
            second is its negative, mirrored.
        inputs: the same, as the model takes them.
        labels: (B,) the classes that the model itself says.
        given: how many of the images are the user's.
        top: how many classes to show, for pictures that show some.
        seed: the seed for draws that a generator of their own makes; torch's is seeded with it.
        names: the names of the classes, in their order; empty where nobody gave them.
        layouts: returns the layouts of the bare model's sites by their names, as words ("NCHW", "NLC, 1 prefix"); ''
            where one is not seen at once.
    """

    model: nn.Module
    images: Tensor
    inputs: Tensor
    labels: Tensor
    given: int = 1
    top: int = 3
    seed: int = 0
    names: Sequence[str] = ()
    layouts: Callable[[], Mapping[str, str]] = dict

    def class_name(self, number: int) -> str:
        """Return the name of a class, or "class 7" where there are no names."""
        return self.names[number] if self.names else f"class {number}"

    def grid(self, values: Tensor) -> Tensor:
        """Arrange positions, of a map (h, w), a volume (t, h, w) or tokens (L,), as they lie in the image.

        Tokens of images come in rows and columns, as near to a square as can be.

        Raises:
            SiteError: tokens of clips or volumes, of which it isn't known how many there are in a frame.
        """
        if values.ndim > 1:
            return values
        if self.images.ndim > 4:
            raise SiteError(
                f"{len(values)} tokens of a clip or volume are to be drawn, and how many are in a frame isn't known.\n"
                "A picture shows one frame.\nChoose a layer that gives a volume (B, C, T, H, W)."
            )
        rows = max(n for n in range(1, int(len(values) ** 0.5) + 1) if len(values) % n == 0)
        return values.view(rows, -1)


@dataclass(frozen=True)
class Panel:
    """One panel: an image with what is laid over it, or curves.

    Attributes:
        title: above it.
        image: (C, H, W), or a clip (C, T, H, W), in [0, 1]: three colours, or other channels, whose mean is drawn in
            grey. Of a clip the middle frame is drawn.
        heat: (h, w), of a clip (t, h, w), laid over the image as colours, brought to its size.
        hatched: bool, cells to hatch, shaped as ``heat``.
        cross: (row, column), of a clip (frame, row, column), of a cell to mark, of ``hatched`` or ``heat``.
        curves: values by name, (n,) each, where there is no image.
        unit: what the numbers of ``heat`` or ``curves`` are, for the colour bar and the axis.
        along: what ``curves`` run along.
        hatched_as: what hatching means, for the legend.
        cross_as: what the cross means, for the legend.
    """

    title: str
    image: Tensor | None = None
    heat: Tensor | None = None
    hatched: Tensor | None = None
    cross: tuple[int, ...] | None = None
    curves: Mapping[str, Tensor] = field(default_factory=dict)
    unit: str = ""
    along: str = "channel"
    hatched_as: str = "acted on"
    cross_as: str = "peak"


@dataclass(frozen=True)
class Picture:
    """What to draw.

    Attributes:
        rows: panels, row by row, of any lengths.
        caption: one line on what it shows.
        note: what has to be known to read it, above it; '' for nothing.
    """

    rows: Sequence[Sequence[Panel]]
    caption: str
    note: str = ""
