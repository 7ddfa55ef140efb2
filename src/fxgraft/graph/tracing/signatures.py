"""Calls of a forward brought to one form."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn
from torch.utils import _pytree as pytree

INPUT: Final = type("_Input", (), {"__repr__": lambda self: "INPUT"})()
"""Marks the argument leaves that are inputs of a graph."""


def bind(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Bring a call to one form: defaults filled in, whatever the caller left out or passed by name."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    plain = pytree.tree_map_only(torch.Size, tuple, (bound.args, bound.kwargs))
    return plain[0], plain[1]


def bare_forward(module: nn.Module) -> Callable[..., Any]:
    """Return what ``module`` runs without the bookkeeping of a patched model's outer call."""
    cls = type(module)
    return getattr(cls, "_fxgraft_forward", cls.forward)


def forward_signature(module: nn.Module) -> inspect.Signature:
    """Return the signature of the class's own forward, without ``self`` and without ``target``."""
    cls = getattr(type(module), "_fxgraft_base", type(module))
    declared = inspect.signature(cls.forward)
    return declared.replace(parameters=list(declared.parameters.values())[1:])


def leaf_names(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Name every argument leaf after the parameter it belongs to."""
    declared = list(signature.parameters)
    bases = [declared[i] if i < len(declared) else f"input_{i}" for i in range(len(args))]
    names: list[str] = []
    for base, value in [*zip(bases, args, strict=True), *kwargs.items()]:
        count = len(pytree.tree_leaves(value))
        names += [base] if count == 1 else [f"{base}_{i}" for i in range(count)]
    return names
