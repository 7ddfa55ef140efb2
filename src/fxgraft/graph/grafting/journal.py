"""The journal: what is written on a patched model, and the exact inverse of it, as steps that are done at once."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from typing import cast

from torch import nn

from fxgraft.graph.grafting.class_swap import grafted_class
from fxgraft.graph.grafting.graft import Graft
from fxgraft.graph.grafting.placement import Placement
from fxgraft.graph.grafting.state import GraftState, foreign_forward, state_of
from fxgraft.graph.grafting.unit import Unit
from fxgraft.graph.tracing.atomic import Step, refilling, setting
from fxgraft.graph.tracing.names import STATE, join


class Installation:
    """Compiled grafts and the steps that write them and undo that.

    Modules are known weakly: the model reaches its installation, which must not keep the model alive in turn.

    Args:
        model: the patched model.

    Attributes:
        states: what each grafted module gets, by qualified name.
        modules: the grafted modules, by qualified name.
        registered: (holder, name, unit) of every unit that joins the module tree.
        placements: what was planned, with its graft.
    """

    def __init__(self, model: nn.Module) -> None:
        own = weakref.ref(self)

        def forget(_: object) -> None:
            # The model's state holds the registry, and that this installation: with the model, the circle goes.
            left = own()
            if left is not None:
                left.states.clear()

        self._model = weakref.ref(model, forget)
        self.states: dict[str, GraftState] = {}
        self.modules: dict[str, weakref.ref[nn.Module]] = {}
        self.registered: list[tuple[weakref.ref[nn.Module], str, Unit]] = []
        self.placements: list[tuple[Graft, Placement]] = []

    @property
    def model(self) -> nn.Module:
        """The patched model, which whoever works with its installation holds."""
        return cast(nn.Module, self._model())

    def _parts(self) -> Iterator[tuple[str, GraftState, nn.Module]]:
        """List the grafted modules; those that were replaced and are gone need nothing."""
        for path, state in self.states.items():
            module = self.modules[path]()
            if module is not None:
                yield path, state, module

    def _units(self) -> Iterator[tuple[nn.Module, str, Unit]]:
        for known, name, unit in self.registered:
            holder = known()
            if holder is not None:
                yield holder, name, unit

    def writing(self) -> list[Step]:
        """Return the steps that swap the classes and register the units."""
        steps: list[Step] = []
        for _, state, module in self._parts():
            steps.append(partial(operator.setitem, module.__dict__, STATE, state))
            steps.append(setting(module, "__class__", grafted_class(state.base, state.outer)))
        units = list(self._units())
        steps += [
            partial(operator.setitem, holder._modules, name, unit)
            for holder, name, unit in units
            if holder is not self.model
        ]
        # In front of the model's own children: whoever takes its last parameters for the head's finds the head's.
        first = {name: unit for holder, name, unit in units if holder is self.model}
        if first:
            steps += refilling(self.model._modules, {**first, **self.model._modules, **first})
        return steps

    def erasing(self) -> list[Step]:
        """Return the steps that undo `writing`: class, attribute and registration, each exactly as before."""
        steps: list[Step] = [
            partial(holder._modules.pop, name, None)
            for holder, name, unit in self._units()
            if holder._modules.get(name) is unit
        ]
        for _, state, module in self._parts():
            steps.append(partial(module.__dict__.pop, STATE, None))
            if state_of(module) is not None and not foreign_forward(module):
                # What undid a wrapper may have left the class's forward on the instance, where it would outlive it.
                steps.append(partial(module.__dict__.pop, "forward", None))
            steps.append(setting(module, "__class__", state.base))
        return steps

    def rewriting(self) -> list[Step]:
        """Return the steps that bring back what is written now: like `writing`, and children in their order."""
        return [
            *self.writing(),
            *(step for holder, *_ in self._units() for step in refilling(holder._modules)),
        ]

    def names(self) -> dict[int, str]:
        """Return the qualified names of the units that joined the module tree, by identity."""
        found = {
            id(unit): join(path, name)
            for path, s in self.states.items()
            for name, unit in s.registered.items()
        }
        beside = [(holder, name, unit) for holder, name, unit in self._units() if id(unit) not in found]
        paths = {id(module): path for path, module in self.model.named_modules()} if beside else {}
        return found | {id(unit): join(paths.get(id(holder), ""), name) for holder, name, unit in beside}

    def intact(self) -> str | None:
        """Return the name of a module that was wrapped again since, or None."""
        for path, state, module in self._parts():
            if type(module) is not grafted_class(state.base, state.outer):
                return path or state.base.__name__
        return None

    def hidden(self) -> str | None:
        """Return the name of a module that was given a forward of its own since, or None."""
        return next(
            (path or s.base.__name__ for path, s, part in self._parts() if foreign_forward(part)), None
        )


class UnitSnapshot:
    """Units as they were before a model is planned again, since planning tells them what it found."""

    def __init__(self, grafts: Sequence[Graft]) -> None:
        self.units = [(graft.units, dict(graft.units)) for graft in grafts]
        self.attributes = [(u, dict(u.__dict__)) for _, units in self.units for u in units.values()]

    def restoring(self) -> list[Step]:
        """Return the steps that put everything back."""
        kept = [*self.units, *((unit.__dict__, then) for unit, then in self.attributes)]
        return [step for now, then in kept for step in refilling(now, then)]

    def settle_new(self, installation: Installation) -> None:
        """Give units that were not there before the training flag, device and dtype of their place."""
        known = {id(unit) for unit, _ in self.attributes}
        for _, placement in installation.placements:
            if id(placement.unit) in known:
                continue
            owner = installation.model.get_submodule(placement.owner)
            placement.unit.train(owner.training)
            near = (p for module in (owner, installation.model) for p in module.parameters())
            like = next((p for p in near if p.is_floating_point()), None)
            if like is not None and placement.unit.registered:
                placement.unit.to(like.device, like.dtype)
