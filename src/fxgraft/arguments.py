"""Arguments of public calls, held against the types that the calls declare."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import numbers
import os
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fxgraft.errors import ConfigError, FxgraftError

_NUMBERS = {int: numbers.Integral, float: numbers.Real}  # NumPy's scalars are registered as these


def path_at(path: str | os.PathLike[str], error: type[FxgraftError] = ConfigError) -> Path:
    """Return a path that a user gave; a "~" at its start is the user's home.

    Raises:
        ConfigError: no system has files of that name. Or ``error``, where another says more.
    """
    try:
        target = Path(path).expanduser()
        target.resolve()  # `is_dir` passes over a zero byte
        target.is_dir()
    # No text, a zero byte, no home, too long.
    except (TypeError, ValueError, RuntimeError, OSError) as problem:
        raise error(
            f"{str(path)[:80]!r} ({type(path).__name__}) cannot be the path of a file: {problem}.\n"
            "Pass the name of a file or of a folder."
        ) from problem
    return target


def checked_device(device: str | torch.device) -> torch.device:
    """Turn a device name into a device that is there.

    Raises:
        ConfigError: the name means nothing to torch, or this machine has no such device.
    """
    try:
        checked = torch.device(device)
        torch.empty(0, device=checked)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        known = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise ConfigError(
            f"This machine has no device {str(device)!r}, as far as torch can see.\n"
            f"It sees {', '.join(known)}; an accelerator needs its driver, and a torch that was built for it.\n"
            "Name one of these, or leave the device out."
        ) from error
    if checked.type == "meta":
        raise ConfigError(
            "The 'meta' device computes nothing, so nothing can be measured on it.\nTake \"cpu\", or an accelerator."
        )
    return checked


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for an argument that is not of the type that a function declares for it.

    Args:
        function: a function whose parameters are annotated.
        arguments: values by the parameters' names.
    """
    declared = _declared(function)
    for name, value in arguments.items():
        if name in declared and not fits(value, declared[name]):
            # Annotations are text here, as the documentation shows them.
            expected = inspect.signature(function).parameters[name].annotation
            raise ConfigError(
                f"{function.__name__}: {name} is declared as {expected}, and got {value!r} "
                f"({type(value).__name__}).\n"
                f"help(fxgraft.{function.__name__}) says what it takes."
            )


@functools.cache
def _declared(function: Callable[..., Any]) -> dict[str, Any]:
    return typing.get_type_hints(function)


def fits(value: Any, hint: Any) -> bool:
    """Say whether a value is of a type, as an annotation states it; of what has no simple check, it is.

    NumPy's scalars are numbers, arrays are sequences, and True is no number.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is typing.Literal:
        return value in parts
    if hint in _NUMBERS:
        return isinstance(value, _NUMBERS[hint]) and not isinstance(value, bool)
    if origin is collections.abc.Callable:
        return callable(value)
    if origin in (collections.abc.Sequence, tuple):
        return _is_sequence(value) and all(fits(item, parts[0]) for item in value)
    if origin is collections.abc.Mapping:
        return isinstance(value, origin) and all(
            fits(key, parts[0]) and fits(item, parts[1]) for key, item in value.items()
        )
    kind = hint if origin is None else origin
    return not isinstance(kind, type) or kind is Any or isinstance(value, kind)


def _is_sequence(value: Any) -> bool:
    """Say whether a value is a row of values, arrays included: texts are one value, sets and mappings have no order."""
    if isinstance(value, (str, bytes, collections.abc.Set, collections.abc.Mapping)):
        return False
    return hasattr(value, "__len__") and hasattr(value, "__getitem__") and getattr(value, "ndim", 1) > 0
