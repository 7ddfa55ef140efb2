"""What einops offers to forwards, where it was imported: its functions and layers stay one call each in a graph."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import nn


def einops_functions() -> list[Callable[..., Any]]:
    """List the functions of einops, which take tensors alone and no proxies."""
    einops = sys.modules.get("einops")
    named = (getattr(einops, name) for name in getattr(einops, "__all__", ()))
    return [value for value in named if inspect.isfunction(value)]


def is_einops_layer(module: nn.Module, *names: str) -> bool:
    """Say whether a module is one of the layers of einops that are named; of all, if none is."""
    layers = sys.modules.get("einops.layers.torch")
    named = (getattr(layers, name, None) for name in names or ("Rearrange", "Reduce", "EinMix"))
    return isinstance(module, tuple(kind for kind in named if kind is not None))
