"""Outputs: finds the logits in what a model returns, and replaces them."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx

from fxgraft.errors import StructureError
from fxgraft.graph.tracing.values import Values

LOGITS_KEYS = ("out", "logits")
"""Keys under which segmentation models and transformers return their logits.

A structured output with none of these holds them in its only tensor, where that is one row for each image."""


def logits_node(values: Values, output: str | int | None, model: str) -> fx.Node:
    """Find the node that holds the logits: the output itself, or one named entry of it.

    Args:
        values: the values of a trace of the model.
        output: key, attribute or position of the logits in a structured output; None for a plain tensor, or
            for the usual names ("out", "logits"), or the only tensor.
        model: the model's name, for messages.

    Raises:
        StructureError: the output has no such entry; lists those it has.
    """
    value = next(node for node in values.traced.graph.nodes if node.op == "output").args[0]
    if isinstance(value, fx.Node) and value.op == "call_function" and isinstance(value.target, type):
        names = _field_names(value.target)
        if isinstance(output, int) and hasattr(value.target, "_fields") and 0 <= output < len(names):
            output = names[output]
        filled = {**dict(zip(names, value.args, strict=False)), **value.kwargs}
        value = dict(value.args[0]) if value.target is OrderedDict else filled or list(value.args)  # type: ignore[arg-type]
    elif isinstance(value, fx.Node):
        if output is None:
            return value
        raise _no_entries(model, output)
    if not isinstance(value, (dict, tuple, list)):
        raise _no_entry(model, output, ())
    entries: dict[Any, Any] = dict(value) if isinstance(value, dict) else dict(enumerate(value))  # type: ignore[arg-type]
    wanted = output
    if wanted is None:
        wanted = _usual_key(entries)
    if wanted is None and output is None:
        held = {key: values(node) for key, node in entries.items() if isinstance(node, fx.Node)}
        alone = [key for key, entry in held.items() if isinstance(entry, Tensor)]
        wanted = alone[0] if len(alone) == 1 and _rows(held[alone[0]]) else None
    if wanted not in entries or not isinstance(entries[wanted], fx.Node):
        raise _no_entry(model, wanted, [key for key, node in entries.items() if isinstance(node, fx.Node)])
    return entries[wanted]


def _no_entries(model: str, output: Any) -> StructureError:
    return StructureError(
        f"{model} returns a single value, which has no entry {output!r}.\nLeave output= out."
    )


def _field_names(kind: type) -> list[str]:
    """Return what a class of outputs calls its entries, in the order in which its constructor takes them."""
    if dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind) if field.init]
    return list(getattr(kind, "_fields", ()))


def _no_entry(model: str, wanted: Any, names: Iterable[Any]) -> StructureError:
    names = list(names)
    if not names:
        return StructureError(
            f"{model} returns nothing that could be logits, and the method follows what it does to them.\n"
            "Let its forward return them."
        )
    problem = (
        "which of them holds the logits is not clear" if wanted is None else f"{wanted!r} is not one of them"
    )
    return StructureError(
        f"{model} returns several values, and {problem}.\n"
        f"It has: {', '.join(map(repr, names))}.\n"
        "Say which one holds the logits, as output=... A part of a model, as the backbone of a detector or of a dense "
        "predictor, ends before them: patch the whole model, whose output they are."
    )


def take_logits(out: Any, names: Iterable[str | int | None] = ()) -> Any:
    """Take the logits out of what a model returned: the tensor itself, or an entry of a structured output.

    Args:
        out: a tensor, dictionary, dataclass or tuple.
        names: keys, attributes or positions, of which the first that is there is taken; without any, or with None
            alone, the usual names.

    Raises:
        StructureError: none of them is there.
    """
    if isinstance(out, Tensor):
        return out
    named = [name for name in names if name is not None]
    for key in named or [_usual_key(out)]:
        if isinstance(out, dict) and key in out:
            return out[key]
        if isinstance(key, str) and isinstance(getattr(out, key, None), Tensor):
            return getattr(out, key)
        if isinstance(key, int) and isinstance(out, (tuple, list)) and 0 <= key < len(out):
            return out[key]
    if named:
        raise _no_entry(f"The model, with a {type(out).__name__},", named[0], _entry_names(out))
    alone = _only_tensor(out)
    if isinstance(alone, Tensor) and alone.ndim in (
        2,
        3,
    ):  # in training there may be several rows for each image
        return alone
    held = out if isinstance(out, dict) else range(len(out)) if isinstance(out, (tuple, list)) else ()
    raise StructureError(
        f"The model returned a {type(out).__name__}, and it is not clear what in it are the logits.\n"
        + (f"It has: {', '.join(map(repr, held))}.\n" if held else "")
        + "Pass the logits themselves to fxgraft.loss, or set output= on the patch of a method that has this option. "
        "Where a model around the patched part computes them, patch that whole model."
    )


def _usual_key(out: Any) -> str | None:
    """Return the usual key under which an output holds something; None with both, as nothing says which one it is."""
    held = [
        key
        for key in LOGITS_KEYS
        if (out[key] if isinstance(out, dict) and key in out else getattr(out, key, None)) is not None
    ]
    return held[0] if len(held) == 1 else None


def _rows(value: Any) -> bool:
    """Say whether a value is one row for each image, as logits are."""
    return isinstance(value, Tensor) and value.ndim == 2


def _only_tensor(out: Any) -> Any:
    """Return the only tensor of a structured output, not counting lists and empty entries; None if it holds several."""
    values: Any = out.values() if isinstance(out, dict) else out if isinstance(out, (tuple, list)) else ()
    if not isinstance(out, dict) and dataclasses.is_dataclass(out):
        values = (getattr(out, field.name) for field in dataclasses.fields(out))
    tensors = [value for value in values if isinstance(value, Tensor)]
    return tensors[0] if len(tensors) == 1 else None


def with_logits(out: Any, logits: Any, name: str | int | None = None) -> Any:
    """Put other logits into what a model returned: an output of the same class, with its other entries.

    Args:
        out: a tensor, dictionary, dataclass or tuple, as for `take_logits`; it is left as it is.
        logits: what takes their place.
        name: key, attribute or position of the logits; None for the usual names.

    Raises:
        StructureError: they are not there.
    """
    if isinstance(out, Tensor):
        return logits
    old = take_logits(out, (name,))
    if dataclasses.is_dataclass(type(out)):
        held = {field.name: getattr(out, field.name) for field in dataclasses.fields(out)}
        new = {key: logits if value is old else value for key, value in held.items()}
        if isinstance(out, dict):
            return type(out)(**new)
        made = copy.copy(out)  # a constructor might compute something, and would do so twice
        for key, value in new.items():
            object.__setattr__(made, key, value)
        return made
    if isinstance(out, dict):
        made = copy.copy(out)  # a constructor need not take entries: that of a defaultdict does not
        made.update({key: logits for key, value in out.items() if value is old})
        return made
    values = [logits if value is old else value for value in out]
    return type(out)(*values) if hasattr(out, "_fields") else type(out)(values)


def check_logits(out: Any, output: str | int | None, model: str) -> None:
    """Raise unless a model's output contains logits; called before the rest after a site is followed to them.

    Args:
        out: what the model returns, tensors fake.
        output: which entry holds the logits; None for the usual ones.
        model: the model's name, for messages.

    Raises:
        StructureError: there are none; says where they may be.
    """
    if output is not None:
        _check_entry(out, output, model)
        return
    named = any((isinstance(out, dict) and key in out) or hasattr(out, key) for key in LOGITS_KEYS)
    try:
        logits = take_logits(out)
    except StructureError:
        logits = None
    if not isinstance(logits, Tensor) or (logits is _only_tensor(out) and not named and not _rows(logits)):
        raise _no_entry(model, None, _entry_names(out))


def _check_entry(out: Any, output: str | int, model: str) -> None:
    """Raise unless an output has an entry of that name or at that position."""
    if isinstance(out, Tensor):
        raise _no_entries(model, output)
    positions = range(len(out)) if isinstance(out, (tuple, list)) else ()
    if output not in [*_entry_names(out), *positions]:
        raise _no_entry(model, output, _entry_names(out))


def _entry_names(out: Any) -> list[Any]:
    """Return by what the entries of an output are named: keys, fields or positions."""
    if isinstance(out, dict):
        return [*out]
    return _field_names(type(out)) or ([*range(len(out))] if isinstance(out, (tuple, list)) else [])
