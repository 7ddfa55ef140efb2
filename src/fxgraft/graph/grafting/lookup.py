"""From a model to its grafts, and to copies of it with some of them."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from fxgraft.errors import FxgraftWarning
from fxgraft.graph.atomic import synchronized
from fxgraft.graph.grafting.graft import Graft
from fxgraft.graph.grafting.graft_registry import KEPT, GraftRegistry, registry_of
from fxgraft.graph.grafting.state import state_of
from fxgraft.graph.grafting.unit import Unit
from fxgraft.graph.names import join
from fxgraft.graph.runtime.living import last_change, noted_models

M = TypeVar("M", bound=nn.Module)


def unwrapped(model: nn.Module) -> nn.Module:
    """Look through what is wrapped around a patched model: DistributedDataParallel, torch.compile.

    A wrapper has one child, the model. A user's model that has a ``module`` and other children isn't a wrapper.
    """
    while state_of(model) is None and len(model._modules) == 1:
        name, inner = next(iter(model._modules.items()))
        if name not in ("_orig_mod", "module") or inner is None:
            break
        model = inner
    return model


def patched_inside(model: nn.Module) -> str:
    """Say where in an unpatched model the patched one is, for messages; empty where nothing is patched."""
    inside = next(iter(patched_parts(model)), None)
    if inside is None:
        return ""
    return f"Its part {inside!r}" if inside else f"The {unwrapped(model)._get_name()} that it wraps"


def grafts_on(model: nn.Module) -> list[Graft]:
    """List the grafts of a model, wrapped or not, in the order they were added; empty for a bare one."""
    registry = registry_of(unwrapped(model))
    return list(registry.grafts) if registry is not None else []


def patched_parts(model: nn.Module) -> dict[str, nn.Module]:
    """Find the patched models in a model by their names in it, outermost first.

    The name of the model itself, wrapped or not, is "". Empty where nothing is patched. Asked again, it costs the same
    in a large network as in a small one: see `_kept`.
    """
    root = unwrapped(model)
    if torch.compiler.is_compiling():  # only while code is compiled, so once
        return _search(root)
    parts = _kept(root)
    if parts is None:
        change = last_change()
        elsewhere = _all_patched()
        parts = _search(root)
        _tell_of_new(root, parts)
        elsewhere -= set(map(id, parts.values()))
        _keep(root, parts, elsewhere, change)
    return parts


def _all_patched() -> set[int]:
    """Return the identities of all models alive that have grafts."""
    return {id(model) for model in noted_models() if registry_of(model) is not None}


def _search(root: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in root.named_modules() if registry_of(module) is not None}


def _tell_of_new(root: nn.Module, parts: Mapping[str, nn.Module]) -> None:
    """Warn of parts that were trained in a model before they were found in it.

    `torch.nn.ModuleList.insert` and `torch.nn.Sequential.insert` write past torch's hook for what is registered.
    """
    before = _found.get(id(root))
    if before is None or before.root() is not root:
        return
    for path, part in parts.items():
        registry = registry_of(part)
        missed = 0 if registry is None else registry.context.watch.unasked or 0
        if missed > 1 and path not in before.places and part.training:
            warnings.warn(
                f"{path!r} is newly found in this {root._get_name()}, and its last {missed} training passes had no "
                "share in a loss.\nPut into the model by insert, or past register_module, it is not seen at once.\n"
                "Use append or an attribute, or put parts in before the training begins.",
                FxgraftWarning,
                stacklevel=4,
            )


class _Found(NamedTuple):
    """What a search found in a model, which it does not hold."""

    root: weakref.ref[nn.Module]
    places: dict[str, weakref.ref[nn.Module] | None]  # of its parts; None where an earlier search found one
    elsewhere: set[int]  # the other models with grafts that were alive, by identity
    change: object


_found: dict[int, _Found] = {}  # by identity, since modules may define equality


def _keep(root: nn.Module, parts: Mapping[str, nn.Module], elsewhere: set[int], change: object) -> None:
    key = id(root)

    def forget(gone: weakref.ref[nn.Module]) -> None:
        if (
            key in _found and _found[key].root is gone
        ):  # ids are used again: another module may have this one by now
            del _found[key]

    places: dict[str, weakref.ref[nn.Module] | None] = {
        path: weakref.ref(part) for path, part in parts.items()
    }
    before = _found.get(key)
    if before is not None and before.root() is root:
        places |= {path: None for path in before.places if _patched_at(root, path) is None}
    _found[key] = _Found(weakref.ref(root, forget), places, elsewhere, change)


def _kept(root: nn.Module) -> dict[str, nn.Module] | None:
    """Return the patched parts that an earlier search found; None where there may be others by now.

    They count as all if each is where it was and has grafts, and no other model alive has grafts. Other such models are
    no matter if the search knew of them and no module was put into another since.
    """
    search = _found.get(id(root))
    if search is None or search.root() is not root:
        return None
    parts: dict[str, nn.Module] = {}
    for path, known in search.places.items():
        part = _patched_at(root, path)
        if part is not (None if known is None else known()):
            return None
        if part is not None:
            parts[path] = part
    others = _all_patched() - set(map(id, parts.values()))
    if others and not (search.change is last_change() and others <= search.elsewhere):
        return None
    return parts


def _patched_at(root: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = root
    for name in path.split(".") if path else ():
        module = None if module is None else module._modules.get(name)
    return None if module is None or registry_of(module) is None else module


def named_grafts(model: nn.Module) -> dict[str, Graft]:
    """Find the grafts of a model and of the patched models inside of it, by the part's name and their own."""
    return {
        ".".join(filter(None, (path, graft.name))): graft
        for path, part in patched_parts(model).items()
        for graft in grafts_on(part)
    }


def grafts_in(model: nn.Module) -> list[Graft]:
    """List the grafts of a model and of the patched models inside of it."""
    return list(named_grafts(model).values())


def own_keys(model: nn.Module) -> set[str]:
    """Return the ``state_dict`` keys of a model that its grafts have added."""
    units = [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, Unit)]
    return {key for key in model.state_dict() if any(key.startswith(f"{name}.") for name in units)}


def counterparts(model: nn.Module) -> dict[str, str]:
    """Map graft parameters that are further copies of a parameter of the model to that one, by names in the model."""
    registries = {path: registry_of(part) for path, part in patched_parts(model).items()}
    return {
        join(path, own): join(path, stock)
        for path, registry in registries.items()
        if registry is not None
        for own, stock in registry.counterparts().items()
    }


@synchronized
def copy_with(model: M, keep: Callable[[Graft], bool]) -> M:
    """Copy a model with only some of its grafts.

    Args:
        model: bare or patched; it is left as it was.
        keep: a function that says which grafts the copy has.
    """
    registry = registry_of(model)
    if registry is None:
        return copy.deepcopy(model)
    token = KEPT.set((registry, keep))  # deepcopy passes no arguments on to the modules that copy themselves
    try:
        return copy.deepcopy(model)
    finally:
        KEPT.reset(token)


@synchronized
def add_graft(model: nn.Module, graft: Graft) -> None:
    """Put one more graft on a model, in place."""
    registry = registry_of(model) or GraftRegistry()
    registry.install(model, [*registry.grafts, graft])
