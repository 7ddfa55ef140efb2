"""Reach: whether a result depends on more of a value than its class tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fxgraft._torch import BATCH_NORMS, COPIES, RMS_NORMS, SOFTMAXES
from fxgraft.graph.dataflow.axes import (
    BATCH,
    CHANNEL,
    POSITION,
    Axes,
    Axis,
    Factor,
    kind_of,
    runs_of,
    with_runs,
)
from fxgraft.graph.dataflow.flow import Flow

_STATE = "_fxgraft_state"
_CLEAN, _ROWS, _ALL = "clean", "rows", "all"
# Which entries of a value may depend on a place: none, those of places themselves, or every one.

_ROW_BY_ROW = {"view", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "clone"}
_ROW_BY_ROW |= {"alias", "detach", "slice", "split", "split_with_sizes", "unsafe_split", "select"}
_ROW_BY_ROW |= COPIES
_ROW_BY_ROW |= {"stack"}  # along a dimension of its own
_ROW_BY_ROW |= {"native_batch_norm", "cudnn_batch_norm"} | BATCH_NORMS
_PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
_NORMS = {"native_layer_norm", "rms_norm"} | RMS_NORMS


class Reach(Flow):
    """Follows tokens (B, N, C) through operations. One that may mix tokens makes every entry depend on all of them.

    Args:
        prefix: how many class and register tokens come first.
    """

    mark = "_fxgraft_reach"

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix

    def start_at(self, value: Tensor) -> None:
        """Begin with tokens (B, L, C), in the middle of a network."""
        batch, tokens, channels = value.shape
        rows = with_runs([(self.prefix, False), (tokens - self.prefix, True)])
        self._put([value], [((Factor(BATCH, batch),), rows, (Factor(CHANNEL, channels),))], ())
        object.__setattr__(value, _STATE, _ROWS)

    def note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Record an operation, and which entries of its output depend on places."""
        used = [tensor for tensor in _tensors((*args, *kwargs.values())) if self._known(tensor) is not None]
        states = {getattr(tensor, _STATE, _ALL) for tensor in used}
        super().note(func, args, kwargs, out)
        if not used:
            return
        for tensor in _tensors((out,)):
            state = _CLEAN if states == {_CLEAN} else self._state(func, args, kwargs, tensor, states)
            object.__setattr__(tensor, _STATE, state)

    def reads(self, value: Tensor) -> bool:
        """Say whether a value depends on any place."""
        return self._known(value) is not None and getattr(value, _STATE, _ALL) != _CLEAN

    def _state(self, func: Any, args: Any, kwargs: Any, out: Tensor, states: set[str]) -> str:
        name = func._schema.name.partition("::")[2]
        axes = self._known(out) or ()
        places = set(_places(axes))
        if name == "cat":
            dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
            if kind_of(axes[dim]) != POSITION and _ALL in states:
                return _ALL
            for part in args[0]:
                known = self._known(part)
                if (
                    known is not None
                    and getattr(part, _STATE, _ALL) == _ALL
                    and kind_of(known[dim]) != POSITION
                ):
                    return _ALL
        elif _ALL in states or not self._by_row(func, name, args, kwargs):
            return _ALL
        elif name == "select":
            source, dim, index = args[0], args[1] % args[0].ndim, args[2]
            axis = (self._known(source) or ())[dim]
            if set(_places((axis,))):
                places |= {_entry(axis, index % source.shape[dim])}
        if places == {False}:
            return _CLEAN
        return _ROWS if places == {True, False} else _ALL

    def _by_row(self, func: Any, name: str, args: Any, kwargs: Any) -> bool:
        """Say whether an operation works on every token by itself."""
        if torch.Tag.pointwise in func.tags or name in _ROW_BY_ROW:
            return True
        axes = self._known(args[0]) if isinstance(args[0], Tensor) else None
        if name in _PRODUCTS:
            left, right = (self._known(args[position]) for position in _PRODUCTS[name])
            if (left is None) == (right is None):
                return False
            contracted = left[-1] if left is not None else right[-2] if right is not None else ()
            return not any(True for _ in _places((contracted,)))
        if axes is None:
            return False
        dims: Iterable[int] | None = None
        if name in _NORMS:
            dims = range(-len(args[1]), 0)
        elif name in SOFTMAXES:
            dims = (args[1],)
        elif any(argument.name == "keepdim" for argument in func._schema.arguments) and len(args) > 1:
            dims = args[1] if isinstance(args[1], (list, tuple)) else (args[1],)
        return dims is not None and not any(True for dim in dims for _ in _places((axes[dim],)))


def _places(axes: Axes | tuple[Axis, ...]) -> Iterator[bool]:
    """Yield, for every run of tokens in any dimension, whether it is one of places."""
    for axis in axes:
        for factor in axis:
            if factor.kind == POSITION:
                yield from (places for _, places in factor.runs or ((factor.size, True),))


def _entry(axis: Axis, index: int) -> bool:
    """Say whether an entry of a dimension is a place."""
    for count, places in runs_of(axis):
        if index < count:
            return places
        index -= count
    return True


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for item in values:
        for value in item if isinstance(item, (list, tuple)) else (item,):
            if isinstance(value, Tensor):
                yield value
