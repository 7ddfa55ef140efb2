"""The journal: what is written on a patched model, and the exact inverse of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from fxgraft.graph.grafting.graft import Graft
from fxgraft.graph.grafting.placement import Placement
from fxgraft.graph.grafting.state import GraftState
from fxgraft.graph.grafting.swap import grafted_class
from fxgraft.graph.grafting.unit import Unit
from fxgraft.graph.tracing.names import STATE


@dataclass
class Installation:
    """Compiled grafts and the exact inverse of writing them.

    Attributes:
        model: the patched model.
        states: what each grafted module gets, by qualified name.
        modules: the grafted modules, by qualified name.
        registered: (holder, name, unit) of every unit that joins the module tree.
        placements: what was planned, with its graft.
    """

    model: nn.Module
    states: dict[str, GraftState] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    registered: list[tuple[nn.Module, str, Unit]] = field(default_factory=list)
    placements: list[tuple[Graft, Placement]] = field(default_factory=list)

    def write(self) -> None:
        """Swap the classes and register the units."""
        for path, state in self.states.items():
            module = self.modules[path]
            module.__dict__[STATE] = state
            module.__class__ = grafted_class(state.base, state.outer)
        for holder, name, unit in self.registered:
            holder._modules[name] = unit

    def intact(self) -> str | None:
        """Return the name of a module that was wrapped again since, or None."""
        for path, state in self.states.items():
            if type(self.modules[path]) is not grafted_class(state.base, state.outer):
                return path or type(self.model).__name__
        return None

    def erase(self) -> None:
        """Undo `write`: class, attribute and registration, each exactly as before."""
        for holder, name, _ in reversed(self.registered):
            holder._modules.pop(name, None)
        for path, state in self.states.items():
            module = self.modules[path]
            module.__dict__.pop(STATE, None)
            module.__class__ = state.base


class Kept:
    """Units as they were before a model is planned again, since planning tells them what it found."""

    def __init__(self, grafts: Sequence[Graft]) -> None:
        self.units = [(graft.units, dict(graft.units)) for graft in grafts]
        self.attributes = [(u, dict(u.__dict__)) for _, units in self.units for u in units.values()]

    def restore(self) -> None:
        """Put everything back."""
        for now, then in [*self.units, *((unit.__dict__, then) for unit, then in self.attributes)]:
            now.clear()
            now.update(then)

    def settle_new(self, installation: Installation) -> None:
        """Give units that were not there before the training flag, device and dtype of their place."""
        known = {id(unit) for unit, _ in self.attributes}
        for _, placement in installation.placements:
            if id(placement.unit) in known:
                continue
            owner = installation.modules[placement.owner]
            placement.unit.train(owner.training)
            near = (p for module in (owner, installation.model) for p in module.parameters())
            like = next((p for p in near if p.is_floating_point()), None)
            if like is not None and placement.unit.registered:
                placement.unit.to(like.device, like.dtype)
