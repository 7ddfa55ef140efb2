"""Checks of options, by the names that users gave them."""

from __future__ import annotations

import dataclasses
import inspect
import math
import numbers
import sys
import types
import typing
from collections.abc import Iterable
from typing import Any

from fxgraft.arguments import fits
from fxgraft.errors import ConfigError, candidates

_NAMES: dict[Any, str] = {str: "a name", int: "a position", types.NoneType: "None"}


def wrong_option(patch: Any, name: str, must: str) -> ConfigError:
    """Say what an option of a patch must be, what it was, and the default."""
    default = next(f.default for f in dataclasses.fields(patch) if f.name == name)
    again = "" if default is dataclasses.MISSING else f"\nLeave it out for the default, {default!r}."
    return ConfigError(f"{type(patch).__name__}: {name} must be {must}, got {getattr(patch, name)!r}.{again}")


def check_share(patch: Any, *names: str) -> None:
    """Raise `ConfigError` unless each of these options is a number in [0, 1]."""
    for name in names:
        value = getattr(patch, name)
        if not is_number(value) or not 0 <= value <= 1:
            raise wrong_option(patch, name, "a share in [0, 1]")


def check_positive(patch: Any, *names: str) -> None:
    """Raise `ConfigError` unless each of these options is a finite number above 0."""
    for name in names:
        value = getattr(patch, name)
        if not is_number(value) or not 0 < value < math.inf:
            raise wrong_option(patch, name, "a positive number")


def check_not_negative(patch: Any, *names: str) -> None:
    """Raise `ConfigError` unless each of these options is a finite number of at least 0."""
    for name in names:
        value = getattr(patch, name)
        if not is_number(value) or not 0 <= value < math.inf:
            raise wrong_option(patch, name, "a number of at least 0")


def check_count(patch: Any, *names: str) -> None:
    """Raise `ConfigError` unless each of these options is a whole number of at least 1."""
    for name in names:
        if not is_count(getattr(patch, name)):
            raise wrong_option(patch, name, "a whole number of at least 1")


def check_known(cls: type, who: str, options: Iterable[str]) -> None:
    """Raise `ConfigError` for an option that a patch class does not take; lists close matches."""
    taken = inspect.signature(cls).parameters
    names = [f.name for f in dataclasses.fields(cls) if f.init]
    for option in options:
        if option not in taken:
            raise ConfigError(f"{who!r} has no option {option!r}.\n{candidates(option, names, 30)}")


def option_hints(cls: type) -> dict[str, Any]:
    """Return the types of a patch class's fields.

    `typing.get_type_hints` gives the same, but in Python 3.10 takes no class with an `InitVar`, which isn't a field.
    """
    fields = {f.name for f in dataclasses.fields(cls)}
    hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        own = {name: hint for name, hint in inspect.get_annotations(base).items() if name in fields}
        names = getattr(sys.modules.get(base.__module__), "__dict__", {})
        hints |= typing.get_type_hints(types.SimpleNamespace(__annotations__=own), names)
    return hints


def plain_numbers(patch: Any) -> None:
    """Replace NumPy's scalars among the options by Python's numbers, which recipes and protocols hold."""
    for f in dataclasses.fields(patch):
        object.__setattr__(patch, f.name, plain_number(getattr(patch, f.name)))


def plain_number(value: Any) -> Any:
    """Return Python's number for a scalar of NumPy or a fraction, also inside of tuples; anything else as it is."""
    if type(value) in (tuple, list):
        return type(value)(map(plain_number, value))
    own = isinstance(value, numbers.Number) or getattr(value, "ndim", None) == 0
    if isinstance(value, numbers.Rational) and not isinstance(value, numbers.Integral):  # fractions.Fraction
        return float(value)
    return value.item() if own and hasattr(value, "item") else value  # pyright: ignore[reportAttributeAccessIssue]


def check_choices(patch: Any) -> None:
    """Raise `ConfigError` for an option declared as a `typing.Literal`, a bool or a name that holds something else."""
    try:
        hints = option_hints(type(patch))
    except NameError:  # a name that only a type checker sees: nothing can be told of the choices
        return
    for f in dataclasses.fields(patch):
        hint = hints[f.name]
        parts = (
            typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        )
        value = getattr(patch, f.name)
        if hint is bool and not isinstance(value, bool):
            raise wrong_option(patch, f.name, "True or False")
        named = {*parts} <= _NAMES.keys() and str in parts
        if named and value is not f.default and not fits(value, hint):
            raise wrong_option(patch, f.name, " or ".join(_NAMES[part] for part in parts))
        literals = [part for part in parts if typing.get_origin(part) is typing.Literal]
        if not literals:
            continue
        allowed = [choice for part in literals for choice in typing.get_args(part)]
        if value not in allowed and not (value is None and types.NoneType in parts):
            raise wrong_option(patch, f.name, f"one of {', '.join(map(repr, allowed))}")


def is_number(value: Any) -> bool:
    """Say whether a value is a number, which True and False are not."""
    return fits(value, float)


def is_count(value: Any) -> bool:
    """Say whether a value is a whole number of at least 1."""
    return fits(value, int) and value >= 1
