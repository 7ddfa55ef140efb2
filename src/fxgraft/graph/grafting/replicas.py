"""DataParallel: replicas of a patched model run in threads, each with its own copies of what holds tensors."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

from torch import nn

from fxgraft.graph.grafting.state import GraftState, Program, state_of
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
        module.__dict__[STATE] = _localised(module.__dict__[STATE], twins)


def _localised(state: GraftState, twins: dict[int, Unit]) -> GraftState:
    def twin(unit: Unit) -> Unit:
        return twins.get(id(unit), unit)

    def program(of: Program) -> Program:
        whole = twin(of.function) if isinstance(of.function, Unit) else of.function
        return replace(of, function=whole, inputs=[*map(twin, of.inputs)], units=[*map(twin, of.units)])

    local = copy.copy(state)
    local.units = SimpleNamespace(**{name: twin(unit) for name, unit in vars(state.units).items()})
    local.training, local.evaluation = program(state.training), program(state.evaluation)
    return local
