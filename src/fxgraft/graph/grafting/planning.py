"""Planning: from a model and its grafts to a plan, which says what is to be written on the model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from fxgraft.errors import StructureError
from fxgraft.graph.atomic import synchronized
from fxgraft.graph.grafting.backbone import Backbone
from fxgraft.graph.grafting.class_swap import grafted_class
from fxgraft.graph.grafting.graft import Graft, Make, Placer, U, checked_placements
from fxgraft.graph.grafting.placement import Placed, Placement, PlacementRecord
from fxgraft.graph.grafting.programs import Part, compile_placements
from fxgraft.graph.grafting.state import GraftState, foreign_forward
from fxgraft.graph.grafting.unit import Unit
from fxgraft.graph.names import join
from fxgraft.graph.runtime.forward_context import Context
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.shadow import Shadow

if TYPE_CHECKING:
    from fxgraft.graph.grafting.graft_registry import GraftRegistry


@dataclass(frozen=True, eq=False)
class Look:
    """A model as it is without its grafts, with the traces that were made of it.

    Attributes:
        shadow: the shadow of the bare model.
        traces: the traces of the shadow, by input size.
    """

    shadow: Shadow
    traces: dict[Any, ModelTrace] = field(default_factory=dict)

    def trace(self, input_size: tuple[int, ...] | None) -> ModelTrace:
        """Return what is known of the model with images of that size."""
        return self.traces.setdefault(input_size, ModelTrace(self.shadow, input_size))

    def forget(self) -> None:
        """Drop graphs and shapes, and keep the shadow, which shows whether they would be the same."""
        self.traces.clear()


class Plan:
    """What a transaction writes on a model for its grafts. A plan doesn't change once it is made.

    It refers to modules weakly: the model leads to its plan, which must not keep the model alive in turn.

    Args:
        model: the model.
        look: the look at the bare model that the plan was made from.
        grafts: all grafts of the model.
        placements: the placements of the grafts' units.
        parts: what is to be written on each module, by qualified name.

    Attributes:
        look, grafts, placements, parts: as given.
        states: what each module keeps, by qualified name.
    """

    def __init__(
        self,
        model: nn.Module,
        look: Look,
        grafts: Sequence[Graft],
        placements: Placed,
        parts: Mapping[str, Part],
    ) -> None:
        own = weakref.ref(self)

        def forget(_: object) -> None:
            # The model's state holds the registry, and that this plan: with the model, the circle goes.
            left = own()
            if left is not None:
                for table in (left.parts, left.states):
                    table.clear()

        self._model = weakref.ref(model, forget)
        self.look = look
        self.grafts = tuple(grafts)
        self.placements = tuple(placements)
        self.parts = dict(parts)
        self.states = {path: part.state for path, part in parts.items()}
        self._modules = {path: weakref.ref(model.get_submodule(path)) for path in parts}
        self._beside = [
            (weakref.ref(model.get_submodule(path)), name, unit)
            for part in parts.values()
            for path, name, unit in part.registered
        ]

    @property
    def model(self) -> nn.Module:
        """The model. Whoever works with its plan holds it, so it is alive."""
        return cast(nn.Module, self._model())

    def modules(self) -> Iterator[tuple[str, GraftState, nn.Module]]:
        """List the modules that the plan is about, without those that were replaced and are gone."""
        for path, state in self.states.items():
            module = self._modules[path]()
            if module is not None:
                yield path, state, module

    def units(self) -> Iterator[tuple[nn.Module, str, Unit]]:
        """List the units that join the module tree: the module that holds each, and its name there."""
        for known, name, unit in self._beside:
            holder = known()
            if holder is not None:
                yield holder, name, unit

    def placed(self, graft: Graft) -> list[Placement]:
        """List the placements of one graft."""
        return [placement for owner, placement in self.placements if owner is graft]

    def evaluated(self, graft: Graft) -> tuple[list[Placement], list[Placement]]:
        """List what acts in evaluation, in front of one graft and from it on; nothing where the graft isn't planned."""
        before = [id(each) for each in self.grafts]
        if id(graft) not in before:
            return [], []
        del before[before.index(id(graft)) :]
        acting = [(id(owner) in before, each) for owner, each in self.placements if each.evaluation]
        return [each for first, each in acting if first], [each for first, each in acting if not first]

    def names(self) -> dict[int, str]:
        """Return the qualified names of the units that join the module tree, by identity."""
        names = {
            id(unit): join(path, name)
            for path, s in self.states.items()
            for name, unit in s.registered.items()
        }
        beside = [(holder, name, unit) for holder, name, unit in self.units() if id(unit) not in names]
        paths = {id(module): path for path, module in self.model.named_modules()} if beside else {}
        return names | {id(unit): join(paths.get(id(holder), ""), name) for holder, name, unit in beside}

    def intact(self) -> str | None:
        """Return the name of a module that was wrapped again since it was written on, or None."""
        for path, state, module in self.modules():
            if type(module) is not grafted_class(state.base, state.outer):
                return path or state.base.__name__
        return None

    def hidden(self) -> str | None:
        """Return the name of a module that was given a forward of its own since, or None."""
        return next(
            (path or s.base.__name__ for path, s, part in self.modules() if foreign_forward(part)), None
        )


@synchronized
def plan(
    model: nn.Module,
    grafts: Sequence[Graft],
    look: Look,
    registry: GraftRegistry,
    context: Context,
    known: Plan | None = None,
    records: Sequence[PlacementRecord] = (),
) -> Plan:
    """Plan the grafts of a model. The model is only read; the units are made, and bound to what is found on it.

    Args:
        model: the model, bare or with grafts.
        grafts: all grafts that the model is to have.
        look: what is known of the bare model.
        registry: the registry of the grafts.
        context: state that the grafts share during a pass.
        known: an earlier plan that was made from this very look: its placements and programs are taken.
        records: the placements to repeat, where the model is a copy.

    Raises:
        FxgraftError: whatever a patch finds wrong.
    """
    traces = {graft.input_size: look.trace(graft.input_size) for graft in grafts}
    before = {id(unit) for graft in grafts for unit in graft.units.values()}
    placements: Placed = []
    for graft in grafts:
        if known is not None and any(graft is other for other in known.grafts):
            placed = known.placed(graft)
        else:
            backbone = Backbone(traces[graft.input_size])
            placed = _place(
                graft, backbone, [record for record in records if record.graft == graft.name], bool(records)
            )
        placements += [(graft, placement) for placement in placed]
    parts = compile_placements(look.shadow.model, placements, traces, context, known.parts if known else {})
    for placement in (placement for _, placement in placements if id(placement.unit) not in before):
        _settle(placement, model, look)
    parts[""].state.registry = registry
    return Plan(model, look, grafts, placements, parts)


def _place(
    graft: Graft[Placer], backbone: Backbone, records: Sequence[PlacementRecord], repeats: bool
) -> list[Placement]:
    """Let a graft say where its units go."""
    asked: set[str] = set()
    make = _noting(graft, asked)
    placed = checked_placements(graft, graft.patch.place(backbone, make))
    if repeats:
        placed = _repeated(graft, placed, records, asked)
    # Units that this plan did not ask for are dropped: the layer that they were made for has been replaced.
    # Units that it asked for stay, also those that it did not place.
    for key in [key for key in graft.units if key not in asked]:
        del graft.units[key]
    return placed


def _settle(placement: Placement, model: nn.Module, look: Look) -> None:
    """Give a new unit the training flag, device and dtype of its place."""
    placement.unit.train(model.get_submodule(placement.owner).training)
    bare = look.shadow.model
    near = (p for module in (bare.get_submodule(placement.owner), bare) for p in module.parameters())
    like = next((p for p in near if p.is_floating_point()), None)
    if like is not None and placement.unit.registered:
        placement.unit.to(like.device, like.dtype)


def _noting(graft: Graft[Placer], asked: set[str]) -> Make:
    """Return the graft's maker of units, which notes the keys that it was asked for."""

    def make(key: str, kind: Callable[..., U], *args: Any, **kwargs: Any) -> U:
        asked.add(key)
        return graft.make(key, kind, *args, **kwargs)

    return make


def _repeated(
    graft: Graft[Placer], placed: list[Placement], records: Sequence[PlacementRecord], asked: set[str]
) -> list[Placement]:
    """Return the recorded placements of a graft, instead of those that it would choose now.

    The graft might choose others, since layers may have been wrapped or replaced since the model was patched.

    Raises:
        StructureError: the model has no place for a recorded unit any more.
    """
    keys = {id(unit): key for key, unit in graft.units.items()}
    if [PlacementRecord.of(graft.name, placement, keys) for placement in placed] == list(records):
        return placed
    repeated = {record.unit: record for record in records}
    lost = next(
        (k for k, record in repeated.items() if k not in asked and not (record.whole and k in graft.units)),
        None,
    )
    if lost is not None:
        raise StructureError(
            f"{graft.name!r} has a unit {lost!r} that is not found on a copy of the model.\n"
            "What stands there was wrapped or replaced since the model was patched.\n"
            "Patch after layers are wrapped or replaced, or copy fxgraft.unpatch(model) and patch the copy."
        )
    asked.clear()
    asked.update(repeated)
    for key, record in repeated.items():
        graft.units[key].bind(**record.bound)
    return [record.placement(graft.units[record.unit]) for record in records]
