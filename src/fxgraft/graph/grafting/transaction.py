"""The transaction: the only writer of grafts. It writes a plan whole or not at all, and can undo it exactly."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxgraft.graph.atomic import Step, apply_atomically, refilling
from fxgraft.graph.grafting.class_swap import grafted_class
from fxgraft.graph.grafting.graft import Graft
from fxgraft.graph.grafting.planning import Plan
from fxgraft.graph.grafting.state import GraftState, foreign_forward, state_of
from fxgraft.graph.names import STATE

if TYPE_CHECKING:
    from fxgraft.graph.grafting.graft_registry import GraftRegistry


class UnitSnapshot:
    """Units as they were before a model is planned again: planning writes on them what it finds."""

    def __init__(self, grafts: Sequence[Graft]) -> None:
        self.units = [(graft.units, dict(graft.units)) for graft in grafts]
        self.attributes = [(u, dict(u.__dict__)) for _, units in self.units for u in units.values()]

    def restoring(self) -> list[Step]:
        """Return the steps that put everything back."""
        kept = [*self.units, *((unit.__dict__, then) for unit, then in self.attributes)]
        return [step for now, then in kept for step in refilling(now, then)]


class Transaction:
    """Replaces the plan on a model by another.

    Any exception in the block, before or after `apply`, restores the model, the units of the grafts that were there,
    the registry and the random state. Other threads see the model with one plan or with the other.

    Args:
        model: the model.
        registry: the registry of the model's grafts.
        orphans: its parts that come from another patched model; they become plain modules again.
    """

    def __init__(self, model: nn.Module, registry: GraftRegistry, orphans: Sequence[nn.Module]) -> None:
        self.model = model
        self.registry = registry
        self.units = UnitSnapshot(registry.grafts)
        self._before = registry.plan
        self._after: Plan | None = None
        self._orphans = orphans
        context = registry.context.__dict__
        self._undo = [
            *(_writing_again(self._before) if self._before is not None else ()),
            *refilling(registry.__dict__),
            partial(context.update, dict(context)),
            *self.units.restoring(),
            *restoring_parts(self._orphans),
            partial(torch.set_rng_state, torch.get_rng_state()),  # new units draw their weights
        ]

    def __enter__(self) -> Transaction:
        """Note the present state, which an exception restores."""
        return self

    def apply(self, plan: Plan | None, grafts: Sequence[Graft] = ()) -> None:
        """Replace the plan on the model by another, in one step.

        Args:
            plan: what to write; None for the bare model.
            grafts: what the registry lists from then on.
        """
        self._after = plan
        books: dict[str, Any] = {"grafts": list(grafts), "plan": plan, "owners": {}}
        apply_atomically(
            [
                *(_erasing(self._before) if self._before is not None else ()),
                *(step for orphan in self._orphans for step in _releasing(orphan)),
                *(_writing(plan, self._before) if plan is not None else ()),
                partial(self.registry.__dict__.update, books),
            ]
        )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Undo everything after an exception."""
        if kind is not None:
            apply_atomically([*(_erasing(self._after) if self._after is not None else ()), *self._undo])


def _writing(plan: Plan, before: Plan | None = None) -> list[Step]:
    """Return the steps that swap the classes and register the units.

    Args:
        plan: what to write.
        before: the plan on the model, which is taken off first.
    """
    steps: list[Step] = []
    for _, state, module in plan.modules():
        steps.append(partial(operator.setitem, module.__dict__, STATE, state))
        steps.append(_to_class(module, grafted_class(state.base, state.outer)))
    units, model = list(plan.units()), plan.model
    steps += [
        partial(operator.setitem, holder._modules, name, unit)
        for holder, name, unit in units
        if holder is not model
    ]
    # Before the model's own children: code that takes the last parameters of a model for its head's finds those.
    first = {name: unit for holder, name, unit in units if holder is model}
    off = {id(unit) for _, _, unit in before.units()} if before is not None else set[int]()
    own = {name: child for name, child in model._modules.items() if id(child) not in off}
    if first:
        steps += refilling(model._modules, {**first, **own, **first})
    return steps


def _erasing(plan: Plan) -> list[Step]:
    """Return the steps that undo `_writing`: class, attribute and registration, each exactly as before."""
    steps: list[Step] = [
        partial(holder._modules.pop, name, None)
        for holder, name, unit in plan.units()
        if holder._modules.get(name) is unit
    ]
    for _, state, module in plan.modules():
        steps.append(partial(module.__dict__.pop, STATE, None))
        if state_of(module) is not None and not foreign_forward(module):
            # Undoing a wrapper may leave the grafted class's forward on the instance, where it would outlive the graft.
            steps.append(partial(module.__dict__.pop, "forward", None))
        steps.append(_to_class(module, state.base))
    return steps


def _writing_again(plan: Plan) -> list[Step]:
    """Return the steps that write the present plan again, as `_writing` does, with children in their order."""
    holders = dict.fromkeys(holder for holder, *_ in plan.units())
    return [*_writing(plan), *(step for holder in holders for step in refilling(holder._modules))]


def _releasing(part: nn.Module) -> list[Step]:
    """Return the steps that make a part that was copied without its model a plain module again."""
    state: GraftState = part.__dict__[STATE]
    return [partial(part.__dict__.pop, STATE, None), _to_class(part, state.base)]


def restoring_parts(parts: Sequence[nn.Module]) -> list[Step]:
    """Return the steps that make parts of other patched models again what they are now; see `parts_without_model`."""
    return [step for part in parts for step in _orphaning(part)]


def _orphaning(part: nn.Module) -> list[Step]:
    """Return the steps that undo `_releasing`."""
    state: GraftState = part.__dict__[STATE]
    return [partial(operator.setitem, part.__dict__, STATE, state), _to_class(part, type(part))]


def _to_class(module: nn.Module, cls: type[nn.Module]) -> Step:
    """Return the step that changes a module's class, past what the class makes of attributes."""
    return partial(object.__setattr__, module, "__class__", cls)
