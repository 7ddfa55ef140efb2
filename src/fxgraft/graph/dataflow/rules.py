"""Rules: what the dimensions of an operation's output mean, given those of its inputs.

The operations are torch's own below autograd, of which there are few: functions, layers and methods all end in them.
Whatever has no rule keeps the meaning of the dimensions that keep their place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fxgraft.graph.dataflow.axes import (
    BATCH,
    CHANNEL,
    KEY,
    ONE,
    POSITION,
    UNKNOWN,
    Axes,
    Axis,
    Factor,
    as_keys,
    best,
    joined,
    kind_of,
    regrouped,
    resized,
    sliced,
    unknown,
)

Known = Callable[[Any], Axes | None]
"""What is known of an argument's dimensions; None where it isn't a tensor made from the image."""


class Operation:
    """One operation as it was called.

    Args:
        func: the operation.
        args, kwargs: its arguments.
        known: a function that returns the meaning of a tensor's dimensions.
        out: a tensor that it returned.
        index: the place of that tensor among those returned.
        others: all tensors that it returned.
    """

    def __init__(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        known: Known,
        out: Tensor,
        index: int,
        others: Sequence[Tensor],
    ) -> None:
        self.args = args
        self.kwargs = kwargs
        self.known = known
        self.out = out
        self.shape = tuple(out.shape)
        self.index = index
        self.others = others
        self.schema = func._schema

    def get(self, name: str, default: Any = None) -> Any:
        """Return an argument by its name in the schema."""
        for index, argument in enumerate(self.schema.arguments):
            if argument.name == name:
                if index < len(self.args):
                    return self.args[index]
                return self.kwargs.get(name, argument.default_value if default is None else default)
        return default

    def axes(self, place: int) -> Axes:
        """Return the dimensions of a tensor argument, all unknown where it doesn't depend on the image."""
        tensor = self.args[place]
        return self.known(tensor) or unknown(tensor.shape)


def axes_after(operation: Operation, name: str) -> Axes:
    """Say what the dimensions of an operation's output mean."""
    rule = _RULES.get(name)
    if rule is None and _reduces(operation):
        rule = _reduced
    try:
        axes = None if rule is None else rule(operation)
    except (IndexError, TypeError, ValueError):  # the rule is written for another overload of the operation
        axes = None
    if axes is None or len(axes) != len(operation.shape):
        axes = _aligned(operation)
    return axes


def _tensors(operation: Operation) -> list[tuple[Tensor, Axes]]:
    inputs = []
    for argument in (*operation.args, *operation.kwargs.values()):
        for value in argument if isinstance(argument, (list, tuple)) else (argument,):
            axes = operation.known(value) if isinstance(value, Tensor) else None
            if axes is not None:
                inputs.append((value, axes))
    return inputs


def _aligned(operation: Operation) -> Axes:
    """Broadcast: every dimension means what it means in the inputs that have it; a window or a stride resizes it."""
    shape = operation.shape
    inputs = [(value, axes) for value, axes in _tensors(operation) if value.ndim <= len(shape)]
    # Inputs may disagree, as where a branch took places for features: then the one with a whole map is believed.
    inputs.sort(key=lambda pair: [kind_of(axis) for axis in pair[1][1:]].count(CHANNEL) != 1)
    aligned: list[Axis] = []
    for dim, size in enumerate(shape):
        said = []
        for value, axes in inputs:
            own = dim - len(shape) + value.ndim
            if own >= 0 and value.shape[own] == size:
                said.append(axes[own])
        if not said:
            said = [
                resized(axes[dim], size)
                for value, axes in inputs
                if value.ndim == len(shape) and value.shape[dim] != 1
            ]
        aligned.append(best(said, size))
    return tuple(aligned)


def _reduces(operation: Operation) -> bool:
    return any(argument.name == "keepdim" for argument in operation.schema.arguments)


def _reduced(operation: Operation) -> Axes:
    axes = operation.axes(0)
    listed = operation.get("dim")
    dims = [listed] if isinstance(listed, int) else list(listed or range(len(axes)))
    dims = [dim % len(axes) for dim in dims] if axes else []
    if operation.get("keepdim"):
        return tuple((Factor(ONE, 1),) if dim in dims else axis for dim, axis in enumerate(axes))
    return tuple(axis for dim, axis in enumerate(axes) if dim not in dims)


def _view(operation: Operation) -> Axes:
    return regrouped((factor for axis in operation.axes(0) for factor in axis), operation.shape)


def _permute(operation: Operation) -> Axes:
    axes = operation.axes(0)
    return tuple(axes[dim] for dim in operation.get("dims"))


def _transpose(operation: Operation) -> Axes:
    axes = list(operation.axes(0))
    a, b = operation.get("dim0"), operation.get("dim1")
    axes[a], axes[b] = axes[b], axes[a]
    return tuple(axes)


def _unsqueeze(operation: Operation) -> Axes:
    axes = list(operation.axes(0))
    axes.insert(operation.get("dim") % (len(axes) + 1), (Factor(ONE, 1),))
    return tuple(axes)


def _squeeze(operation: Operation) -> Axes:
    axes = operation.axes(0)
    listed = operation.get("dim")
    dims = range(len(axes)) if listed is None else [listed] if isinstance(listed, int) else listed
    dims = {dim % len(axes) for dim in dims}
    shape = operation.args[0].shape
    return tuple(axis for dim, axis in enumerate(axes) if dim not in dims or shape[dim] != 1)


def _expand(operation: Operation) -> Axes:
    value, axes = operation.args[0], operation.axes(0)
    new = len(operation.shape) - value.ndim
    return (
        *unknown(operation.shape[:new]),
        *(
            axis if had == size else (Factor(UNKNOWN, size),)
            for axis, had, size in zip(axes, value.shape, operation.shape[new:], strict=True)
        ),
    )


def _select(operation: Operation) -> Axes:
    axes = operation.axes(0)
    dim = operation.get("dim", 0) % len(axes)
    return axes[:dim] + axes[dim + 1 :]


def _slice(operation: Operation) -> Axes:
    axes = list(operation.axes(0))
    dim = (operation.get("dim") or 0) % len(axes)
    size = operation.args[0].shape[dim]
    start, stop, step = slice(
        operation.get("start"), operation.get("end"), operation.get("step") or 1
    ).indices(size)
    axes[dim] = sliced(axes[dim], start, stop, step)
    return tuple(axes)


def _split(operation: Operation) -> Axes:
    axes = list(operation.axes(0))
    dim = (operation.get("dim") or 0) % len(axes)
    start = sum(other.shape[dim] for other in operation.others[: operation.index])
    axes[dim] = sliced(axes[dim], start, start + operation.shape[dim])
    return tuple(axes)


def _cat(operation: Operation) -> Axes:
    values = [part for part in operation.args[0] if part.ndim == len(operation.shape)]
    dim = (operation.get("dim") or 0) % len(operation.shape)
    known = [operation.known(value) for value in values]
    axes = []
    for axis, size in enumerate(operation.shape):
        said = [axes[axis] for axes in known if axes is not None]
        if axis == dim:
            parts = [None if axes is None else axes[axis] for axes in known]
            axes.append(joined(parts, [value.shape[dim] for value in values]))
        else:
            axes.append(best(said, size))
    return tuple(axes)


def _stack(operation: Operation) -> Axes:
    dim = (operation.get("dim") or 0) % len(operation.shape)
    known = [axes for part in operation.args[0] if (axes := operation.known(part)) is not None]
    axes = [best(said, 0) for said in zip(*known, strict=True)]
    axes.insert(dim, (Factor(UNKNOWN, operation.shape[dim]),))
    return tuple(axes)


def _repeat(operation: Operation) -> Axes:
    value, axes = operation.args[0], operation.axes(0)
    new = len(operation.shape) - value.ndim
    return (
        *unknown(operation.shape[:new]),
        *(
            (Factor(UNKNOWN, size),) if kind_of(axis) == ONE else resized(axis, size)
            for axis, size in zip(axes, operation.shape[new:], strict=True)
        ),
    )


def _index(operation: Operation) -> Axes | None:
    axes = operation.known(operation.args[0])
    picked = [dim for dim, entry in enumerate(operation.args[1]) if entry is not None]
    if axes is None or len(picked) != 1 or operation.args[1][picked[0]].ndim != 1:
        return unknown(operation.shape)
    (dim,) = picked
    changed = axes[dim] if not any(factor.runs for factor in axes[dim]) else (Factor(UNKNOWN, 0),)
    return (*axes[:dim], resized(changed, operation.shape[dim]), *axes[dim + 1 :])


def _unfold(operation: Operation) -> Axes:
    axes = operation.axes(0)
    dim = operation.get("dimension") % len(axes)
    new = resized(axes[dim], operation.shape[dim])
    return (*axes[:dim], new, *axes[dim + 1 :], resized(axes[dim], operation.shape[-1]))


def _columns(operation: Operation) -> Axes:
    _, features, places = operation.shape
    return (operation.axes(0)[0], (Factor(CHANNEL, features),), (Factor(POSITION, places),))


def _from_columns(operation: Operation) -> Axes:
    _, features, height, width = operation.shape
    positions = ((Factor(POSITION, height),), (Factor(POSITION, width),))
    return (operation.axes(0)[0], (Factor(CHANNEL, features),), *positions)


def _made(contracted: Axis, others: Sequence[Axis], size: int) -> Axis:
    """Return the meaning of the dimension that a layer's weights give.

    It holds features, unless the weights mix places and leave the features in another dimension alone.
    """
    kind = kind_of(contracted)
    beside = any(factor.kind == CHANNEL for axis in others for factor in axis)
    return (Factor(kind if kind in (POSITION, KEY, UNKNOWN) and beside else CHANNEL, size),)


def _linear(operation: Operation) -> Axes:
    axes = operation.axes(0)
    return (*axes[:-1], _made(axes[-1], axes[:-1], operation.shape[-1]))


def _convolution(operation: Operation) -> Axes:
    axes = operation.axes(0)
    size = operation.shape[1]
    batches = tuple(factor for factor in axes[1] if factor.kind == BATCH)
    for factor in batches:  # a kernel for every image: images were merged into the groups
        size //= factor.size
    spatial = [resized(axis, n) for axis, n in zip(axes[2:], operation.shape[2:], strict=True)]
    taken = kind_of(axes[1]) == CHANNEL  # else it mixes places, and what it slides over are features
    spatial = [
        (Factor(POSITION, n),)
        if kind_of(axis) in ((CHANNEL, KEY, UNKNOWN, ONE) if taken else (UNKNOWN, ONE))
        else axis
        for axis, n in zip(spatial, operation.shape[2:], strict=True)
    ]
    features = _made(axes[1], axes[2:], size)
    return (axes[0], (*batches, *features), *spatial)


def _product(operation: Operation, a: Any, b: Any) -> Axes | None:
    """Multiply matrices (.., n, m) and (.., m, p)."""
    left, right = operation.known(a), operation.known(b)
    if right is None:
        return None if left is None else (*left[:-1], _made(left[-1], left[:-1], operation.shape[-1]))
    if left is None:
        others = (*right[:-2], right[-1])
        return (*right[:-2], _made(right[-2], others, operation.shape[-2]), right[-1])
    outer = tuple(
        best(said, size) for *said, size in zip(left[:-2], right[:-2], operation.shape[:-2], strict=True)
    )
    rows, columns = left[-2], right[-1]
    kinds = kind_of(rows), kind_of(columns)
    # Places compared with each other by their features: none of those are left, though there may be several heads.
    if CHANNEL in (kind_of(left[-1]), kind_of(right[-2])) and CHANNEL not in kinds:
        if kinds[1] == POSITION:
            columns = as_keys(columns)
        elif kinds[0] == POSITION:
            rows = as_keys(rows)
    elif kinds == (
        KEY,
        CHANNEL,
    ):  # weights of places that were compared with a single one, applied to its features
        rows = (Factor(POSITION, operation.shape[-2]),)
    return (*outer, rows, columns)


def _matmul(operation: Operation) -> Axes | None:
    return _product(operation, operation.args[0], operation.args[1])


def _matmul_added(operation: Operation) -> Axes | None:
    return _product(operation, operation.args[1], operation.args[2])


CONVOLUTION = "aten::convolution"
_RULES: dict[str, Callable[[Operation], Axes | None]] = {
    **dict.fromkeys(("aten::view", "aten::_unsafe_view", "aten::reshape", "aten::_reshape_alias"), _view),
    **dict.fromkeys(("aten::split", "aten::split_with_sizes", "aten::unsafe_split", "aten::chunk"), _split),
    "aten::unsafe_chunk": _split,
    "aten::unsafe_split_with_sizes": _split,
    "aten::permute": _permute,
    "aten::transpose": _transpose,
    "aten::transpose_": _transpose,
    "aten::t": lambda operation: operation.axes(0)[::-1],
    "aten::unsqueeze": _unsqueeze,
    "aten::unsqueeze_": _unsqueeze,
    "aten::squeeze": _squeeze,
    "aten::squeeze_": _squeeze,
    "aten::expand": _expand,
    "aten::select": _select,
    "aten::unbind": _select,
    "aten::slice": _slice,
    "aten::cat": _cat,
    "aten::stack": _stack,
    "aten::repeat": _repeat,
    "aten::index": _index,
    "aten::unfold": _unfold,
    "aten::im2col": _columns,
    "aten::col2im": _from_columns,
    "aten::linear": _linear,
    CONVOLUTION: _convolution,
    "aten::mm": _matmul,
    "aten::bmm": _matmul,
    "aten::addmm": _matmul_added,
    "aten::baddbmm": _matmul_added,
    "aten::as_strided": lambda operation: unknown(operation.shape),
}
LAYERS = frozenset(
    name for name, rule in _RULES.items() if rule in (_linear, _convolution, _matmul, _matmul_added)
)
"""The operations that layers with weights come down to."""
