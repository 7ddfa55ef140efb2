"""Layout: which dimension of a value holds channels, which hold space or tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fxgraft.errors import FxgraftError, SiteError
from fxgraft.graph.dataflow.axes import (
    BATCH,
    CHANNEL,
    KEY,
    ONE,
    POSITION,
    UNKNOWN,
    Axes,
    kind_of,
    runs_of,
    unknown,
)
from fxgraft.graph.dataflow.flow import mark_of
from fxgraft.graph.tracing.model_trace import ModelTrace

LayoutName = Literal["NCHW", "NHWC", "NLC", "NCL", "NC", "NCDHW", "NDHWC"]
"""The layouts: maps, tokens, signals, vectors, and volumes, whose depth is time in a clip."""

DIMENSIONS: dict[str, int] = {layout: len(layout) for layout in get_args(LayoutName)}
"""The layouts by name, with their number of dimensions."""

NAMES = tuple(DIMENSIONS)


@dataclass(frozen=True)
class Layout:
    """The meaning of a value's dimensions.

    Attributes:
        name: "NCHW", "NHWC", "NLC" (tokens), "NCL", "NC" (vectors), "NCDHW" or "NDHWC" (volumes and clips).
        prefix: how many leading tokens are class or register tokens, no positions ("NLC" only).
    """

    name: str
    prefix: int = 0

    def __str__(self) -> str:
        return f"{self.name}, {self.prefix} prefix" if self.prefix else self.name

    @property
    def channels_last(self) -> bool:
        """Whether channels are the last dimension, behind the positions."""
        return len(self.name) > 2 and self.name[-1] == "C"

    @property
    def is_map(self) -> bool:
        """Whether positions have rows and columns of their own, in a map or a volume."""
        return len(self.name) > 3

    def canonical(self, x: Tensor) -> Tensor:
        """View ``x`` as (B, C, *positions), without a copy and without its prefix tokens."""
        if self.channels_last:
            x = x[:, self.prefix :] if self.prefix else x
            return x.movedim(-1, 1)
        return x

    def restore(self, x: Tensor, canonical: Tensor) -> Tensor:
        """Bring a new value of ``canonical(x)`` back to the dimensions of ``x``, whose prefix tokens it keeps."""
        if self.channels_last:
            new = canonical.movedim(1, -1)
            return torch.cat((x[:, : self.prefix], new), dim=1) if self.prefix else new
        return canonical

    def multiply(self, x: Tensor, mask: Tensor) -> Tensor:
        """Multiply ``x`` by a canonical mask (B, C or 1, *positions or ones); prefix tokens pass unchanged."""
        if self.channels_last:
            mask = mask.movedim(1, -1)
        if self.prefix:
            rows = mask.expand(-1, x.shape[1] - self.prefix, -1)
            mask = torch.cat(
                (mask.new_ones(1).expand(mask.shape[0], self.prefix, mask.shape[2]), rows), dim=1
            )
        return x * mask


def layout_of(
    trace: ModelTrace,
    value: Tensor,
    path: str,
    strict: bool = True,
    again: Callable[[ModelTrace], Any] | None = None,
    name: str = "",
) -> Layout | None:
    """Find the layout of a value of the model.

    The operations that made the value tell its dimensions: layers give features; operations that reshape, permute,
    cut or concatenate are followed; tokens that don't come from the image aren't places. A dimension that stays
    unknown is resolved with a larger image: places become more, features don't.

    Args:
        trace: the trace of the bare model.
        value: fake tensor at the site, batch first.
        path: the module whose output it is, or ''.
        strict: whether to raise where there is no layout, instead of returning None.
        again: how to find the value when the model sees a larger image; by default as the output of ``path``.
        name: what messages call the value; by default the module.

    Raises:
        SiteError: the value isn't a map, row of tokens or vector of each image, or its layout cannot be known: says
            which argument to pass.
    """
    mark = mark_of(value)
    axes = unknown(value.shape) if mark is None else mark.axes
    kinds = [kind_of(axis) for axis in axes]
    if strict and UNKNOWN in kinds[1:]:
        kinds = _seen_larger(trace, value, kinds, again or (_output(path) if path else None))
    layout = _layout(kinds, axes)
    if layout is not None or not strict:
        return layout
    what = f"{name or path or 'this value'!r}, of shape {tuple(value.shape)},"
    if kinds and kinds[0] not in (BATCH, UNKNOWN if mark is None else BATCH):
        raise SiteError(
            f"The first dimension of {what} is not that of the images: something else was merged with them.\n"
            "Windows, heads or tokens there are no samples, and have no labels.\n"
            "Choose the output of the block around it; fxgraft.sites(model) lists the layouts."
        )
    if KEY in kinds:
        raise SiteError(
            f"The value at {what} isn't a map: it compares places with each other, as attention weights do.\n"
            "It has no features that a method could act on.\n"
            "Choose the output of the block around it; fxgraft.sites(model) lists the layouts."
        )
    if value.ndim not in DIMENSIONS.values():
        raise SiteError(_too_many(what, value))
    raise SiteError(
        f"The layout of {what} cannot be told: {_reason(kinds, axes)}.\n"
        "Which dimension holds the channels follows from the layers and reshapes that made a value, and from what a "
        f"larger image changes.\nChoose another site, or pass layout= to a method that takes it: {', '.join(NAMES)}."
    )


def layout_of_value(value: Tensor) -> Layout | None:
    """Find the layout of a value from the operations that made it, without a larger image; None if they don't tell."""
    mark = mark_of(value)
    return None if mark is None else _layout([kind_of(axis) for axis in mark.axes], mark.axes)


def images_merged(value: Tensor) -> bool:
    """Say whether the first dimension holds more than the images: windows, heads or tokens as well."""
    mark = mark_of(value)
    return mark is not None and sum(factor.size > 1 for factor in mark.axes[0]) > 1


def _layout(kinds: list[str], axes: Axes) -> Layout | None:
    """Read the layout off the meaning of the dimensions; None where they are not those of a map, tokens or a vector."""
    if not kinds or kinds[0] != BATCH:
        return None
    rest = kinds[1:]
    if len(rest) == 1:
        return Layout("NC") if rest[0] != KEY else None
    channels = [dim for dim, kind in enumerate(kinds) if kind == CHANNEL]
    if len(channels) != 1 or any(kind not in (CHANNEL, POSITION, ONE) for kind in rest):
        return None
    runs = [run for dim in range(1, len(axes)) if kinds[dim] == POSITION for run in runs_of(axes[dim])]
    name = _BY_CHANNEL.get((len(kinds), channels[0]))
    if name is None or all(places for _, places in runs):
        return None if name is None else Layout(name)
    leading = 0 if runs[0][1] else runs[0][0]
    if name != "NLC" or not all(places for _, places in runs[bool(leading) :]):
        return None
    return Layout(name, leading)


_BY_CHANNEL = {(len(name), name.index("C")): name for name in NAMES}


def _reason(kinds: list[str], axes: Axes) -> str:
    words = {CHANNEL: "features", POSITION: "places", ONE: "one entry", UNKNOWN: "unknown", BATCH: "images"}
    if any(factor.runs for axis in axes for factor in axis) and UNKNOWN not in kinds:
        return "tokens that aren't places stand elsewhere than in front of the others"
    return f"its dimensions are {', '.join(words[kind] for kind in kinds)}"


def _output(path: str) -> Callable[[ModelTrace], Any]:
    return lambda trace: trace.observation.output(path)


def _seen_larger(
    trace: ModelTrace, value: Tensor, kinds: list[str], again: Callable[[ModelTrace], Any] | None
) -> list[str]:
    """Resolve unknown dimensions with a larger image, which has more places and as many features."""
    try:
        other = None if again is None else again(trace.enlarged)
    except FxgraftError:  # a model with one fixed image size cannot be asked this way
        other = None
    if not isinstance(other, Tensor) or other.ndim != value.ndim:
        return kinds
    same = [a == b for a, b in zip(value.shape, other.shape, strict=True)]
    if sum(same[1:]) != 1 or not same[0]:
        return kinds
    told = [
        kind if kind != UNKNOWN else CHANNEL if alike else POSITION
        for kind, alike in zip(kinds, same, strict=True)
    ]
    return [BATCH, *told[1:]] if kinds[0] in (BATCH, UNKNOWN) else told


def _too_many(what: str, value: Tensor) -> str:
    return (
        f"The value at {what} has {value.ndim} dimensions, and no layout has as many.\n"
        "Methods act on maps (B, C, H, W), on volumes and clips (B, C, D, H, W), on tokens or signals, and on "
        "vectors.\n"
        "Choose another layer, whose output has two to five dimensions; fxgraft.sites(model) lists the shapes."
    )


def named_layout(
    trace: ModelTrace,
    value: Tensor,
    path: str,
    name: str,
    where: str,
) -> Layout:
    """Check the layout that a user names for a value. If it is the layout found, that is returned, with prefix tokens.

    Raises:
        SiteError: it does not fit the value; names ``where``.
    """
    if value.ndim not in DIMENSIONS.values():
        raise SiteError(_too_many(f"{where!r}, of shape {tuple(value.shape)},", value))
    if value.ndim != DIMENSIONS[name]:
        raise SiteError(
            f"{where!r} was said to be {name}, but its shape is {tuple(value.shape)}.\n"
            f"Leave layout= out, or pass one of {', '.join(NAMES)} that fits."
        )
    known = layout_of(trace, value, path, strict=False)
    return known if known is not None and known.name == name else Layout(name)
