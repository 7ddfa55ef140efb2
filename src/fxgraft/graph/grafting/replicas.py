"""DataParallel: replicas of a patched model run in threads, each with its own copies of what holds tensors."""

from __future__ import annotations

from torch import nn

from fxgraft.graph.grafting.state import state_of
from fxgraft.graph.grafting.unit import Unit
from fxgraft.graph.tracing.names import STATE


def localise(model: nn.Module) -> None:
    """Let a replica run its own copies of the units that hold tensors.

    What a pass shares needs no copy: it belongs to the thread.
    """
    state = state_of(model)
    if state is None or state.registry is None:
        return
    twins: dict[int, Unit] = {}
    owned = [model.get_submodule(path) for path in state.registry.paths()]
    for module in owned:
        registered = module.__dict__[STATE].registered
        for name, child in module._modules.items():
            if isinstance(child, Unit) and name in registered:
                twins[id(registered[name])] = child
    for module in owned:
        state = module.__dict__[STATE]
        module.__dict__[STATE] = state.with_units(lambda unit: twins.get(id(unit), unit))
