"""Copies of a patched model for methods that work with a second network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from fxgraft.graph.grafting.graft import Graft
from fxgraft.graph.grafting.graft_registry import KEPT, GraftRegistry
from fxgraft.graph.grafting.lookup import registry_of
from fxgraft.graph.tracing.atomic import synchronized

M = TypeVar("M", bound=nn.Module)


@synchronized
def copy_with(model: M, keep: Callable[[Graft], bool]) -> M:
    """Copy a model with only some of its grafts.

    Args:
        model: bare or patched; it is left as it was.
        keep: says which grafts the copy has.
    """
    registry = registry_of(model)
    if registry is None:
        return copy.deepcopy(model)
    token = KEPT.set((registry, keep))
    try:
        return copy.deepcopy(model)
    finally:
        KEPT.reset(token)


@synchronized
def add_graft(model: nn.Module, graft: Graft) -> None:
    """Put one more graft on a model, in place."""
    registry = registry_of(model) or GraftRegistry()
    registry.install(model, [*registry.grafts, graft])
