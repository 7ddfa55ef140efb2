"""From a model to its grafts."""

from __future__ import annotations

from torch import nn

from fxgraft.graph.grafting.graft import Graft
from fxgraft.graph.grafting.ledger import Ledger
from fxgraft.graph.grafting.state import state_of


def ledger_of(model: nn.Module) -> Ledger | None:
    """Return the ledger of a patched model, or None for a bare one."""
    state = state_of(model)
    return state.ledger if state is not None and isinstance(state.ledger, Ledger) else None


def unwrapped(model: nn.Module) -> nn.Module:
    """Look through what is wrapped around a patched model: DistributedDataParallel, torch.compile."""
    while state_of(model) is None:
        inner = next((model._modules[n] for n in ("_orig_mod", "module") if n in model._modules), None)
        if inner is None:
            break
        model = inner
    return model


def grafts_on(model: nn.Module) -> list[Graft]:
    """List the grafts of a model, wrapped or not, in the order they were added; empty for a bare one."""
    ledger = ledger_of(unwrapped(model))
    return list(ledger.grafts) if ledger is not None else []
