"""The plain attributes of a module that its Python code may branch on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def plain_settings(module: nn.Module) -> dict[str, Any]:
    """Collect the attributes of a module that its Python code may branch on.

    ``training`` is left out, since there is a graph for each mode, and so is PyTorch's own note on hooks.
    """
    kinds = (bool, int, float, str, type(None))
    return {
        name: value
        for name, value in module.__dict__.items()
        if name not in ("training", "_is_full_backward_hook")
        and (
            isinstance(value, kinds)
            or (isinstance(value, tuple) and all(isinstance(v, kinds) for v in value))
        )
    }


def settings_changed(module: nn.Module, kept: Mapping[str, Any]) -> bool:
    """Say whether a module's `plain_settings` differ from those kept when it was traced.

    Attributes added since do not count: the traced code was not written for them. Wrappers add such notes.
    """
    now = plain_settings(module)
    return any(name not in now or now[name] != value for name, value in kept.items())
