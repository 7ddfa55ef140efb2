"""Qualified names and paths of modules, and the names that belong to grafts."""

from __future__ import annotations

from torch import nn

PREFIX = "graft_"
"""What the name of every module that a graft adds starts with."""

STATE = "_fxgraft"
"""Name under which a grafted module keeps its state; generated code reaches units through it."""


UNIT = "_fxgraft_unit"
"""What tells a graft's unit, by identity where a name would be a guess: an attribute of its class, which is below
what is traced here, and the key in ``node.meta`` of what a graph computes in it."""


def join(path: str, name: str) -> str:
    """Name a descendant of the module ``path``; '' is the model."""
    return f"{path}.{name}" if path and name else path or name


def relative(path: str, owner: str) -> str:
    """Name a module as its ancestor ``owner`` does."""
    return path[len(owner) + 1 :] if owner else path


def inside(path: str, owner: str) -> bool:
    """Say whether a module is ``owner`` or one of its descendants."""
    return not owner or path == owner or path.startswith(f"{owner}.")


def ancestors(path: str) -> tuple[str, ...]:
    """List the modules around ``path``, outermost first, without the model and without itself."""
    return tuple(path[:i] for i, sign in enumerate(path) if sign == ".")


def is_graft_key(key: str) -> bool:
    """Say whether a ``state_dict`` key or a qualified name belongs to a graft."""
    return any(part.startswith(PREFIX) for part in key.split("."))


def class_name(model: nn.Module) -> str:
    """Name the class of a model, bare or patched."""
    return model._get_name()
