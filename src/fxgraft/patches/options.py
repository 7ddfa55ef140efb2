"""Checks of options."""

from __future__ import annotations

import dataclasses
import types
import typing

from fxgraft.errors import (
    ConfigError,
)
from fxgraft.patches.base import Patch


def check_share(owner: str, **shares: float) -> None:
    """Raise `ConfigError` unless every value is a number in [0, 1]."""
    for name, value in shares.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 <= value <= 1:
            raise ConfigError(f"{owner}: {name} must be a share in [0, 1], got {value!r}.")


def check_choices(patch: Patch) -> None:
    """Raise `ConfigError` for every option declared as a `typing.Literal` that holds something else."""
    hints = typing.get_type_hints(type(patch))
    for f in dataclasses.fields(patch):
        hint = hints[f.name]
        parts = (
            typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        )
        literals = [part for part in parts if typing.get_origin(part) is typing.Literal]
        if not literals:
            continue
        allowed = [value for part in literals for value in typing.get_args(part)]
        value = getattr(patch, f.name)
        if value not in allowed and not (value is None and types.NoneType in parts):
            raise ConfigError(
                f"{type(patch).__name__}: {f.name} must be one of {', '.join(map(repr, allowed))}, "
                f"got {value!r}."
            )
