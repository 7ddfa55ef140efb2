"""From a model to its grafts."""

from __future__ import annotations

from torch import nn

from fxgraft.graph.grafting.graft import Graft
from fxgraft.graph.grafting.graft_registry import GraftRegistry
from fxgraft.graph.grafting.state import state_of
from fxgraft.graph.grafting.unit import Unit
from fxgraft.graph.tracing.names import join


def registry_of(model: nn.Module) -> GraftRegistry | None:
    """Return the registry of a patched model, or None for a bare one."""
    state = state_of(model)
    return state.registry if state is not None and isinstance(state.registry, GraftRegistry) else None


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
    registry = registry_of(unwrapped(model))
    return list(registry.grafts) if registry is not None else []


def patched_parts(model: nn.Module) -> dict[str, nn.Module]:
    """Find the patched models in a model by their names in it, outermost first.

    The name of the model itself, wrapped or not, is "". Empty where nothing is patched.
    """
    inside = unwrapped(model).named_modules()
    return {path: module for path, module in inside if registry_of(module) is not None}


def named_grafts(model: nn.Module) -> dict[str, Graft]:
    """Find the grafts of a model and of the patched models inside of it, by the part's name and their own."""
    parts = patched_parts(model).items()
    return {
        ".".join(filter(None, (path, each.name))): each for path, part in parts for each in grafts_on(part)
    }


def grafts_in(model: nn.Module) -> list[Graft]:
    """List the grafts of a model and of the patched models inside of it."""
    return list(named_grafts(model).values())


def own_keys(model: nn.Module) -> set[str]:
    """Return the ``state_dict`` keys of a model that its grafts have added."""
    units = [name for name, each in model.named_modules(remove_duplicate=False) if isinstance(each, Unit)]
    return {key for key in model.state_dict() if any(key.startswith(f"{name}.") for name in units)}


def counterparts(model: nn.Module) -> dict[str, str]:
    """Name the model's parameter that parameters of its grafts are another one of, by their names in the model."""
    found = {path: registry_of(part) for path, part in patched_parts(model).items()}
    return {
        join(path, own): join(path, stock)
        for path, registry in found.items()
        if registry is not None
        for own, stock in registry.counterparts().items()
    }
