"""Says whether a pass is watched from outside: by a compiler, an exporter, a tracer or a transform of `torch.func`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from fxgraft._torch import is_wrapped, transforms_active, unwrapped_once


def recorded() -> bool:
    """Say whether a pass is being compiled or recorded: by torch.compile, torch.export, jit.trace or make_fx.

    A number that Python reads from a tensor then becomes a constant of the record, or breaks it.
    """
    if torch.compiler.is_compiling():
        return True
    return torch.jit.is_tracing() or get_proxy_mode() is not None  # pyright: ignore[reportPrivateImportUsage]


def transformed() -> bool:
    """Say whether a pass is part of a transform of `torch.func`."""
    return transforms_active()


def values_of(tensor: Tensor) -> Tensor:
    """Return the plain tensor behind the wrappers of `torch.func`: under `vmap` that of all entries."""
    while not torch.compiler.is_compiling() and is_wrapped(tensor):
        tensor = unwrapped_once(tensor)
    return tensor
