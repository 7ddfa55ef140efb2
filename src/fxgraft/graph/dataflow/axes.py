"""Axes: the meaning of a value's dimension, as a product of the parts that it was put together from.

A dimension is a tuple of `Factor`, outermost first. A map that is flattened keeps its factors in one dimension, and
gives them back when it is unflattened; windows that are merged into the batch show there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

BATCH, CHANNEL, POSITION, KEY, ONE, UNKNOWN = "batch", "channel", "position", "key", "one", "unknown"
"""The kinds: images; features that a layer made; places in the image, or tokens; the places that a place is compared
with; a dimension that was reduced or inserted; what cannot be told."""


@dataclass(frozen=True)
class Factor:
    """A part of a dimension.

    Attributes:
        kind: one of the kinds above.
        size: its number of entries.
        runs: of a position whose entries are of two sorts, how many come after each other and whether they are places;
            the others are class, distillation or register tokens. Empty where all of them are places.
    """

    kind: str
    size: int
    runs: tuple[tuple[int, bool], ...] = ()


Axis = tuple[Factor, ...]
Axes = tuple[Axis, ...]


def kind_of(axis: Axis) -> str:
    """Say what a dimension means as a whole; "unknown" for images merged with anything else."""
    kinds = {factor.kind for factor in axis if factor.size > 1} or {factor.kind for factor in axis}
    kinds = kinds - {ONE} or {ONE}
    if len(kinds) == 1:
        return kinds.pop()
    if BATCH in kinds:
        return UNKNOWN
    return next(kind for kind in (KEY, CHANNEL, UNKNOWN) if kind in kinds)


def unknown(shape: Iterable[int]) -> Axes:
    """Return dimensions of which nothing is known."""
    return tuple((Factor(UNKNOWN, size),) for size in shape)


def runs_of(axis: Axis) -> tuple[tuple[int, bool], ...]:
    """List which entries of a dimension are places, as runs of (count, whether they are)."""
    size = prod(factor.size for factor in axis)
    if len(axis) == 1 and axis[0].runs:
        return axis[0].runs
    return ((size, kind_of(axis) != ONE),) if size else ()


def with_runs(runs: Iterable[tuple[int, bool]]) -> Axis:
    """Make a dimension of positions from runs; neighbouring runs of one sort become one."""
    joined: list[tuple[int, bool]] = []
    for count, places in runs:
        if count and joined and joined[-1][1] == places:
            joined[-1] = joined[-1][0] + count, places
        elif count:
            joined.append((count, places))
    size = sum(count for count, _ in joined)
    return (Factor(POSITION, size, () if all(places for _, places in joined) else tuple(joined)),)


def resized(axis: Axis, size: int) -> Axis:
    """Return a dimension with another size, as pooling, a stride or padding leaves it."""
    if prod(factor.size for factor in axis) == size:
        return axis
    kind = kind_of(axis)
    return (Factor(UNKNOWN if kind == BATCH else kind, size),)


def sliced(axis: Axis, start: int, stop: int, step: int = 1) -> Axis:
    """Take a range out of a dimension."""
    size = prod(factor.size for factor in axis)
    if (start, stop, step) == (0, size, 1):
        return axis
    if kind_of(axis) != POSITION:
        return resized(axis, len(range(start, stop, step)))
    runs, before = [], 0
    for count, places in runs_of(axis):
        taken = range(start, stop, step)
        inside = sum(before <= index < before + count for index in taken) if count < size else len(taken)
        runs.append((inside, places))
        before += count
    return with_runs(runs)


def joined(parts: Sequence[Axis | None], sizes: Sequence[int]) -> Axis:
    """Concatenate dimensions, None where a part was not made from the image: its tokens aren't places."""
    kinds = {kind_of(part) for part in parts if part is not None}
    if POSITION in kinds:
        return with_runs(
            run
            for part, size in zip(parts, sizes, strict=True)
            for run in (
                runs_of(part)
                if part is not None and kind_of(part) == POSITION
                else ((size, part is not None and kind_of(part) == UNKNOWN),)
            )
        )
    kinds.discard(ONE)
    return (Factor(kinds.pop() if len(kinds) == 1 else UNKNOWN, sum(sizes)),)


def regrouped(factors: Iterable[Factor], shape: Sequence[int]) -> Axes:
    """Distribute factors over the dimensions of another shape with as many entries; a factor is split where needed."""
    waiting = list[Factor]()
    for factor in factors:  # neighbours of one kind may be split at another place than where they were joined
        if waiting and waiting[-1].kind == factor.kind != BATCH and not (waiting[-1].runs or factor.runs):
            factor = replace(factor, size=waiting.pop().size * factor.size)
        waiting.append(factor)
    waiting.reverse()
    axes: list[Axis] = []
    for size in shape:
        group, have = list[Factor](), 1
        while have < size or (size == 1 and waiting and waiting[-1].size == 1 and not group):
            factor = waiting.pop() if waiting else Factor(UNKNOWN, 0)
            wanted = size // have
            if factor.size and wanted % factor.size == 0:
                group.append(factor)
            elif factor.size and size % have == 0 and factor.size % wanted == 0:
                kind = UNKNOWN if factor.runs or factor.kind == BATCH else factor.kind
                group.append(Factor(kind, wanted))
                waiting.append(Factor(kind, factor.size // wanted))
            else:
                return (*axes, *unknown(shape[len(axes) :]))
            have *= group[-1].size
        axes.append(tuple(group) or (Factor(ONE, 1),))
    if axes and waiting:  # ones at the end
        axes[-1] = (*axes[-1], *waiting[::-1])
    return tuple(axes)


def best(candidates: Sequence[Axis], size: int) -> Axis:
    """Choose the meaning of a dimension that several values share and may describe differently."""
    known = [axis for axis in candidates if kind_of(axis) not in (UNKNOWN, ONE)]
    for axis in known:
        if kind_of(axis) == KEY:
            return axis
    for axis in known:  # a sequence with class tokens, where another knows of none
        if kind_of(axis) == kind_of(known[0]) == POSITION and any(factor.runs for factor in axis):
            return axis
    if known:
        return known[0]
    return candidates[0] if candidates else (Factor(ONE if size == 1 else UNKNOWN, size),)


def as_keys(axis: Axis) -> Axis:
    """Turn positions into those that others are compared with."""
    return tuple(replace(factor, kind=KEY, runs=()) for factor in axis)
