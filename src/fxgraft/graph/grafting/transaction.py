"""The transaction: the one writer of grafts. What it writes, it writes all of or nothing, and can take back exactly."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxgraft.graph.atomic import Step, apply_atomically, refilling, setting
from fxgraft.graph.grafting.class_swap import grafted_class
from fxgraft.graph.grafting.graft import Graft
from fxgraft.graph.grafting.planning import Plan, parts_without_model
from fxgraft.graph.grafting.state import GraftState, foreign_forward, state_of
from fxgraft.graph.tracing.names import STATE

if TYPE_CHECKING:
    from fxgraft.graph.grafting.graft_registry import GraftRegistry


class UnitSnapshot:
    """Units as they were before a model is planned again, since planning tells them what it found."""

    def __init__(self, grafts: Sequence[Graft]) -> None:
        self.units = [(graft.units, dict(graft.units)) for graft in grafts]
        self.attributes = [(u, dict(u.__dict__)) for _, units in self.units for u in units.values()]

    def restoring(self) -> list[Step]:
        """Return the steps that put everything back."""
        kept = [*self.units, *((unit.__dict__, then) for unit, then in self.attributes)]
        return [step for now, then in kept for step in refilling(now, then)]


class Transaction:
    """Puts a plan on a model in the place of the one that is there.

    An exception in the block, of whatever kind and at whatever line, puts back the model, the units of the grafts that
    were there, the registry and the random state: before and after `apply` alike. Other threads see the model with the
    one plan or with the other.

    Args:
        model: the model.
        registry: the registry of the model's grafts.
    """

    def __init__(self, model: nn.Module, registry: GraftRegistry) -> None:
        self.model = model
        self.registry = registry
        self.units = UnitSnapshot(registry.grafts)
        self._before = registry.plan
        self._after: Plan | None = None
        self._orphans = parts_without_model(model)
        context = registry.context.__dict__
        self._undo = [
            *(_writing_again(self._before) if self._before is not None else ()),
            *refilling(registry.__dict__),
            partial(context.update, dict(context)),
            *self.units.restoring(),
            *(step for orphan in self._orphans for step in _orphaning(orphan)),
            partial(torch.set_rng_state, torch.get_rng_state()),  # new units draw their weights
        ]

    def __enter__(self) -> Transaction:
        """Begin: what is there now is what an exception comes back to."""
        return self

    def apply(self, plan: Plan | None, grafts: Sequence[Graft] = ()) -> None:
        """Take off what is there and write a plan, in one step.

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
        before: what is there, and is taken off before.
    """
    steps: list[Step] = []
    for _, state, module in plan.modules():
        steps.append(partial(operator.setitem, module.__dict__, STATE, state))
        steps.append(setting(module, "__class__", grafted_class(state.base, state.outer)))
    units, model = list(plan.units()), plan.model
    steps += [
        partial(operator.setitem, holder._modules, name, unit)
        for holder, name, unit in units
        if holder is not model
    ]
    # In front of the model's own children: whoever takes its last parameters for the head's finds the head's.
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
            # What undid a wrapper may have left the class's forward on the instance, where it would outlive it.
            steps.append(partial(module.__dict__.pop, "forward", None))
        steps.append(setting(module, "__class__", state.base))
    return steps


def _writing_again(plan: Plan) -> list[Step]:
    """Return the steps that bring back what is written now: like `_writing`, and children in their order."""
    holders = dict.fromkeys(holder for holder, *_ in plan.units())
    return [*_writing(plan), *(step for holder in holders for step in refilling(holder._modules))]


def _releasing(part: nn.Module) -> list[Step]:
    """Return the steps that turn a part that was copied without its model back into a plain module."""
    state: GraftState = part.__dict__[STATE]
    return [partial(part.__dict__.pop, STATE, None), setting(part, "__class__", state.base)]


def _orphaning(part: nn.Module) -> list[Step]:
    """Return the steps that undo `_releasing`."""
    state: GraftState = part.__dict__[STATE]
    return [partial(operator.setitem, part.__dict__, STATE, state), setting(part, "__class__", type(part))]
