"""The flow of one pass: for every value that depends on the images, what made it and what its dimensions mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fxgraft.graph.dataflow.axes import (
    BATCH,
    CHANNEL,
    POSITION,
    UNKNOWN,
    Axes,
    Axis,
    Factor,
    kind_of,
    resized,
    unknown,
)
from fxgraft.graph.dataflow.rules import CONVOLUTION, LAYERS, Operation, axes_after


@dataclass(frozen=True)
class Mark:
    """What is known of a value.

    Attributes:
        axes: the meaning of its dimensions.
        number: number of the operation that made it; later ones have higher numbers.
    """

    axes: Axes
    number: int


def mark_of(value: Any) -> Mark | None:
    """Return what is known of a value of a pass; None where it is not made from the images."""
    return getattr(value, Flow.mark, None)


class Flow:
    """Follows the images through the operations of a pass.

    Attributes:
        sources: for each operation, by number, the operations whose results it works on; the images are number 0.
        vectors: numbers of the operations that concatenate values without places, such as pooled vectors.
        first_taken: what the first layer takes for channels, one of the kinds of `axes`, if it is a convolution.
        mark: the attribute of a tensor that holds its `Mark`.
    """

    mark = "_fxgraft_mark"

    def __init__(self) -> None:
        self.sources: list[tuple[int, ...]] = []
        self.first_taken: str | None = None
        self.vectors: set[int] = set()
        # Each with its tensor, which keeps the storage alive: a new storage could get the number of a freed one.
        self._written: dict[int, tuple[Mark, Tensor]] = {}
        self._in_pass, self._end = self._written, 0

    def end_pass(self) -> None:
        """Settle what is known of the pass's values. Operations that are run on them later are recorded as well.

        Those may write to the values in place, as they did in the pass, and must not seem to be what made these.
        """
        self._in_pass, self._end = dict(self._written), len(self.sources)

    def start(self, image: Tensor, channels: int = 1) -> None:
        """Begin with images (B, C, H, W), or with signals or tokens (B, *, *), whose meaning the first layers tell.

        Args:
            image: the input of the pass.
            channels: the dimension of its channels; `first_taken` says afterwards whether the first layer agrees.
        """
        kinds = [BATCH, *[POSITION] * (image.ndim - 1)]
        if image.ndim not in (1, 3):
            kinds[channels] = CHANNEL
        axes = tuple((Factor(kind, size),) for kind, size in zip(kinds, image.shape, strict=True))
        self._put([image], [axes], ())

    def note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Record an operation. A value whose shape alone was read does not count as a source."""
        name = func._schema.name
        if name.endswith("_like") or name.startswith("aten::new_"):
            return
        used: list[Mark] = []
        for argument in (*args, *kwargs.values()) if kwargs else args:
            for value in argument if isinstance(argument, (list, tuple)) else (argument,):
                mark = self._mark(value) if isinstance(value, Tensor) else None
                if mark is not None:
                    used.append(mark)
        if not used:
            return
        if self.first_taken is None and name in LAYERS:
            axes = self._known(args[0]) if name == CONVOLUTION else None
            self.first_taken = UNKNOWN if axes is None else kind_of(axes[1])
        outs = [out] if isinstance(out, Tensor) else [item for item in out or () if isinstance(item, Tensor)]
        axes = [
            axes_after(Operation(func, args, kwargs, self._known, tensor, index, outs), name)
            for index, tensor in enumerate(outs)
        ]
        if name == "aten::cat" and not any(_is_place(axis) for axis in axes[0]):
            self.vectors.add(len(self.sources))
        self._put(outs, axes, tuple(sorted({mark.number for mark in used})))
        if func._schema.is_mutable:
            for tensor in outs:
                self._written[_storage(tensor)] = getattr(tensor, self.mark), tensor

    def settled(self, value: Tensor) -> Mark | None:
        """Return what is known of a value, counting what was written to it through a view."""
        mark = self._mark(value)
        if mark is not None:
            object.__setattr__(value, self.mark, mark)
        return mark

    def like(self, value: Tensor, source: Tensor, features: int) -> None:
        """Record a layer of which one position ran: its output means what its input does, apart from the features."""
        mark = self._mark(source)
        if mark is not None and value.ndim == source.ndim:
            axes: list[Axis] = [resized(axis, n) for axis, n in zip(mark.axes, value.shape, strict=True)]
            axes[-1] = (Factor(CHANNEL, features),)
            used = self._mark(value) or mark
            self._put([value], [tuple(axes)], tuple({mark.number, used.number}))

    def _put(self, outs: list[Tensor], axes: list[Axes], used: tuple[int, ...]) -> None:
        number = len(self.sources)
        self.sources.append(used)
        for tensor, known in zip(outs, axes, strict=True):
            if not self._of_pass(self._own(tensor)):
                object.__setattr__(tensor, self.mark, Mark(known, number))

    def _own(self, value: Tensor) -> Mark | None:
        return getattr(value, self.mark, None)

    def _of_pass(self, mark: Mark | None) -> bool:
        return mark is not None and mark.number < self._end

    def _known(self, value: Any) -> Axes | None:
        mark = self._mark(value) if isinstance(value, Tensor) else None
        return None if mark is None else mark.axes

    def _mark(self, value: Tensor) -> Mark | None:
        own = self._own(value)
        writes = self._in_pass if self._of_pass(own) else self._written
        written, _ = writes.get(_storage(value), (None, None))
        if written is None or (own is not None and own.number >= written.number):
            return own
        if own is not None:
            return Mark(own.axes, written.number)
        if len(written.axes) != value.ndim:  # written to in part, through a view of another shape
            return Mark(unknown(value.shape), written.number)
        return Mark(
            tuple(resized(axis, n) for axis, n in zip(written.axes, value.shape, strict=True)), written.number
        )


def _is_place(axis: Axis) -> bool:
    return any(factor.size > 1 and factor.kind in (POSITION, UNKNOWN) for factor in axis)


def _storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def passed_by_all(sources: list[tuple[int, ...]], end: int) -> set[int]:
    """List the operations on the main path: every way from the first operation to ``end`` leads through them.

    Args:
        sources: for each operation, by number, the earlier operations that it works on; the first has none.
        end: the last one.
    """
    needed, waiting = {end}, [end]
    while waiting:
        for source in sources[waiting.pop()]:
            if source not in needed:
                needed.add(source)
                waiting.append(source)
    # Something goes around a value exactly where an operation before it feeds one behind it.
    reach, passed = 0, set[int]()
    users: dict[int, int] = {}
    for number in needed:
        for source in sources[number]:
            users[source] = max(users.get(source, 0), number)
    for number in sorted(needed):
        if reach <= number:
            passed.add(number)
        reach = max(reach, users.get(number, number))
    return passed
