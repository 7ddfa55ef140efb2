"""The registry of a model's grafts: it lists them, puts them on, takes them off and plans them again.

A change has one direction: `plan` reads the model and says what is to be written on it, a `Transaction` writes that in
place of what is there, and `connect` tells the units what they work with. A model's grafts are always planned together,
on the bare model. So a plan that fails has written nothing, and any order of removal leaves exactly what the remaining
grafts would have made.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxgraft._torch import transforms_active
from fxgraft.errors import FxgraftWarning, WrappedModelError
from fxgraft.graph.atomic import synchronized
from fxgraft.graph.grafting.backbone import Backbone
from fxgraft.graph.grafting.graft import Graft, Placer
from fxgraft.graph.grafting.placement import PlacementRecord
from fxgraft.graph.grafting.planning import Look, Plan, plan
from fxgraft.graph.grafting.state import hidden_forward, parts_without_model, state_of
from fxgraft.graph.grafting.transaction import Transaction, UnitSnapshot
from fxgraft.graph.names import STATE, class_name, join
from fxgraft.graph.runtime.forward_context import Context
from fxgraft.graph.runtime.living import note_patched
from fxgraft.graph.runtime.parameter_watch import REFERENCES, ParameterWatch
from fxgraft.graph.tracing.preserve import own_random_state, preserved_random_state
from fxgraft.graph.tracing.reads import plain_value
from fxgraft.graph.tracing.settings import settings_changed
from fxgraft.graph.tracing.shadow import Shadow

KEPT: ContextVar[tuple[GraftRegistry, Callable[[Graft], bool]] | None] = ContextVar("kept", default=None)
"""Says which grafts of a registry go along with the copies of its model that are made now; None for all."""


class GraftRegistry:
    """The grafts of one patched model, in the order they were added.

    Attributes:
        grafts: the grafts.
        context: state that their units share during a pass.
        plan: what is written on the model now; None while it is bare.
        owners: the grafted parts of the model, and in which modes (training, evaluation) they run a graft.
        options: keyword arguments of a call that the grafts read, apart from ``target``.
        records: placements to repeat on a copy of the model; set only while it is being copied.
        left_out: names of the grafts that a copy won't have; set only while the model is being copied.
        news: what the last plan had to make again, as a text for a warning; '' for nothing.
        renewals: how often the grafts were planned again; it seeds what each renewal draws.
        schedules: options that follow the progress of the training, by graft.
        plain: numbers, texts and lists that traced forwards have read, which compiled code guards on: the path of a
            module, the name of its attribute, and the value.
    """

    records: tuple[PlacementRecord, ...] = ()
    left_out: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.grafts: list[Graft] = []
        self.context = Context()
        self.plan: Plan | None = None
        self.owners: dict[str, tuple[bool, bool]] = {}
        self.options: tuple[str, ...] = ()
        self.news = ""
        self.renewals = 0
        self.schedules: dict[str, tuple[str, ...]] = {}
        self.plain: tuple[tuple[tuple[str, ...], str, Any], ...] = ()
        self._watched = False

    def look(self, model: nn.Module, again: bool = False) -> tuple[Look, Plan | None]:
        """Look at the model as it is without its grafts.

        Args:
            model: the model.
            again: look again, even if nothing has changed.

        Returns:
            The look and the plan that was made from it. Where nothing that planning reads has changed since the plan on
            the model was made, these are that plan and its look.
        """
        self._check_intact()
        look = Look(self._bare(model))
        known = self.plan
        if known is None or again or self._stale(model) or not known.look.shadow.same_as(look.shadow):
            return look, None
        return known.look, known

    @synchronized
    def install(
        self,
        model: nn.Module,
        grafts: Sequence[Graft] | None = None,
        records: Sequence[PlacementRecord] = (),
        look: Look | None = None,
    ) -> None:
        """Put grafts on a model in place of those that are there; on failure nothing changes.

        Args:
            model: the model.
            grafts: those that it is to have; by default those that it has, planned again.
            records: the placements to repeat, where it is the copy of a model.
            look: what is known of the bare model, where it was looked at already.
        """
        self._check_intact()
        if self.plan is not None and self.plan.model is not model:
            raise WrappedModelError(
                f"This {class_name(model)} is a shallow copy (copy.copy) of a patched one, whose parts and grafts are "
                "the other's as well.\nUse copy.deepcopy, or work on the original."
            )
        note_patched(model)
        wanted = list(self.grafts if grafts is None else grafts)
        names = {} if self.plan is None else self.plan.names()
        with Transaction(model, self, parts_without_model(model)) as change:
            after = known = None
            if wanted:
                seen, known = (look, None) if look is not None else self.look(model, again=grafts is None)
                after = plan(model, wanted, seen, self, self.context, known, records)
            change.apply(after, wanted)
            if after is not None:
                connect(model, self, after, known)
            self.news = _news(change.units, wanted, names)
            for unit in [unit for graft in wanted for unit in graft.units.values() if unit.restarts]:
                unit.restart(model)
                unit.bind(restarts=False)

    def _bare(self, model: nn.Module) -> Shadow:
        """Make a shadow of the model as it is without its grafts."""
        bases = {part: part.__dict__[STATE].base for part in parts_without_model(model)}
        if self.plan is None:
            return Shadow(model, bases)
        bases |= {module: state.base for _, state, module in self.plan.modules()}
        return Shadow(model, bases, [unit for _, _, unit in self.plan.units()])

    @synchronized
    def trial(self, model: nn.Module, graft: Graft) -> Plan:
        """Plan one more graft, and leave the model and the grafts that it has as they are."""
        look, known = self.look(model)
        present = self.grafts if known is not None else [_draft(present) for present in self.grafts]
        with preserved_random_state():  # units are built, and draw what they start from
            return plan(model, [*present, graft], look, self, self.context, known)

    def _check_intact(self) -> None:
        """Raise where another library changed a grafted module since: taking the graft off would undo that, too."""
        wrapped = None if self.plan is None else self.plan.intact()
        if wrapped is not None:
            raise WrappedModelError(
                f"{wrapped!r} was wrapped or converted after it was patched (by FSDP, parametrize, ...).\n"
                "Taking the graft off, as a copy and a merge do, would take that off as well.\n"
                "Unpatch first, wrap after: then patch again what is wrapped inside of the model (parametrize)."
            )
        hidden = None if self.plan is None else self.plan.hidden()
        if hidden is not None:
            raise WrappedModelError(hidden_forward(hidden))

    def renew(self, model: nn.Module) -> None:
        """Plan all grafts again on the model as it is now, keeping their units.

        New units are drawn from a generator of their own, so that the pass that notices a change moves no random
        state. It may be one of evaluation.
        """
        self.renewals += 1
        seed = (torch.initial_seed() + self.renewals) % 2**63
        with own_random_state(seed), torch.inference_mode(False):
            self.install(model)

    def check(self, model: nn.Module) -> None:
        """Prepare a pass: plan again where an old graph would run in silence; tell patches of a first training pass."""
        self.renew_stale(model)
        if self.plan is not None:  # it is used now, and no more grafts are coming
            self.plan.look.forget()
        self.context.checks.answers()
        for graft in self.grafts if model.training else ():
            if not graft.started:
                graft.started = True
                graft.patch.on_first_training_pass(graft, model)
        if model.training:
            self._watched = True
            self._watch(model)
        elif self.schedules:
            self.context.progress_watch.evaluated()

    def changed_for_compiler(self, model: nn.Module) -> bool:
        """Say in a compiled pass whether a value of `plain` has changed. The compiler guards on what is read here."""
        for path, name, kept in self.plain:
            part: Any = model
            for child in path:
                part = part._modules.get(child, part)
            if getattr(part, name, None) != kept:
                return True
        return False

    def watch_asked(self, model: nn.Module) -> None:
        """Watch schedules and parameters at the loss of a compiled training pass, which `check` has not seen."""
        if not self._watched:
            self._watch(model)
        self._watched = False

    def _watch(self, model: nn.Module) -> None:
        """Notice schedules that nobody feeds, and parameters that nobody trains."""
        if torch.is_grad_enabled() and not transforms_active():
            self.context.progress_watch.note(model, self.schedules)
            self.context.parameter_watch.note(
                model, lambda: {graft.name: graft.parameters() for graft in self.grafts}
            )

    def renew_stale(self, model: nn.Module) -> None:
        """Plan all grafts again if the model has changed in something that they depend on."""
        kept = KEPT.get()
        if self._stale(model) and (kept is None or kept[0] is not self):
            self._renew_stale(model)

    @synchronized
    def _renew_stale(self, model: nn.Module) -> None:
        if not self._stale(model):  # another thread has noticed it and planned already
            return
        self.renew(model)
        self.tell()

    def tell(self) -> None:
        """Warn, once, of what the last plan had to make again."""
        news, self.news = self.news, ""
        if news:
            warnings.warn(news, FxgraftWarning, stacklevel=3)

    def _stale(self, model: nn.Module) -> bool:
        if self.plan is None:
            return False
        memo: dict[int, Any] = {}
        for path, state in self.plan.states.items():
            try:
                module = model.get_submodule(path)
            except AttributeError:
                return True
            if state_of(module) is not state or settings_changed(module, state.settings, memo):
                return True
        return any(unit.stale(model) for graft in self.grafts for unit in graft.units.values())

    def names(self, owner: str) -> list[str]:
        """Name the grafts that act on one module."""
        placed = self.plan.placements if self.plan else []
        return list(dict.fromkeys(graft.name for graft, p in placed if p.owner == owner))

    def counterparts(self) -> dict[str, str]:
        """Map graft parameters that are further copies of a parameter of the model to that one, by qualified names."""
        names = {} if self.plan is None else self.plan.names()
        units = [unit for graft in self.grafts for unit in graft.units.values() if id(unit) in names]
        return {
            join(names[id(unit)], own): stock for unit in units for own, stock in unit.counterparts().items()
        }

    def describe(self) -> str:
        """Name the grafts, for the model's repr."""
        return ", ".join(graft.name for graft in self.grafts)

    def set_progress(self, fraction: float) -> None:
        """Tell every unit how much of the training is done."""
        self.context.progress = fraction
        self.context.progress_watch.told(fraction)
        for graft in self.grafts:
            for unit in graft.units.values():
                unit.set_progress(fraction)

    def portable(self) -> GraftRegistry:
        """Return the registry without what is compiled, to travel with a copy of the model.

        Raises:
            WrappedModelError: a grafted part was wrapped or converted since, and a copy could not be grafted again.
        """
        self._check_intact()
        twin = GraftRegistry()
        twin.grafts = [replace(graft) for graft in self.grafts]
        twin.context.progress = self.context.progress
        twin.records = self.recorded()
        kept = KEPT.get()
        if kept is not None and kept[0] is self:
            twin.left_out = tuple(graft.name for graft in self.grafts if not kept[1](graft))
        return twin

    def recorded(self) -> tuple[PlacementRecord, ...]:
        """Record all placements; none where the model has changed in something that they depend on."""
        if self.plan is None or self._stale(self.plan.model):
            return ()
        keys = {id(unit): key for graft in self.grafts for key, unit in graft.units.items()}
        return tuple(PlacementRecord.of(graft.name, p, keys) for graft, p in self.plan.placements)

    def restore(self, model: nn.Module) -> None:
        """Put the grafts on a copy of the model that they were on."""
        # Units beside a part that is not grafted itself were copied along with that part.
        own = {id(unit) for graft in self.grafts for unit in graft.units.values()}
        for module in model.modules():
            for name in [name for name, child in module._modules.items() if id(child) in own]:
                del module._modules[name]
        self.grafts = [graft for graft in self.grafts if graft.name not in self.left_out]
        records = [record for record in self.records if record.graft not in self.left_out]
        self.records = self.left_out = ()
        with preserved_random_state():  # units that are not repeated are built and dropped
            self.install(model, records=records)

    def paths(self) -> list[str]:
        """Name the grafted modules."""
        return list(self.plan.states) if self.plan else []


def registry_of(model: nn.Module) -> GraftRegistry | None:
    """Return the registry of a patched model, or None for a bare one."""
    state = state_of(model)
    return None if state is None else state.registry


def _some(names: Sequence[str]) -> tuple[str, ...]:
    """Choose a few of many, including the last."""
    return (*names[: -1 : -(-len(names) // REFERENCES) or 1], *names[-1:])


def connect(model: nn.Module, registry: GraftRegistry, plan: Plan, known: Plan | None = None) -> None:
    """Tell the units what they work with, now that all of them are in place.

    Args:
        model: the model.
        registry: the registry of the model's grafts.
        plan: what is written on the model.
        known: the plan whose placements were taken: a graft beside which the same acts in evaluation looks no more.
    """
    context, grafts = registry.context, plan.grafts
    for path, state in plan.states.items():
        runs = (state.training.acts, state.evaluation.acts)
        if path and any(runs):
            registry.owners[path] = runs
    registry.plain = tuple(
        (tuple(filter(None, join(path, inner).split("."))), name, value)
        for path, state in plan.states.items()
        for inner, settings in state.settings.items()
        for name, kept in settings.items()
        for value in plain_value(kept)
    )
    registry.options = tuple(dict.fromkeys(option for graft in grafts for option in graft.patch.call_options))
    registry.schedules = {graft.name: own for graft in grafts if (own := graft.patch.schedules())}
    context.replays = any(bool(graft.patch.replays()) for graft in grafts)
    context.samples = _some([name for name, _ in model.named_parameters()]) if context.replays else ()
    context.loss_grafts = tuple(graft.name for graft in grafts if graft.patch.contributes_loss())
    context.model = weakref.ref(model)
    context.parameter_watch.close()
    context.parameter_watch = ParameterWatch()
    for graft in grafts:
        graft.context = context
        for unit in graft.units.values():
            unit.context = context
            unit.set_progress(context.progress)
    looking = [graft for graft in grafts if type(graft.patch).on_installed is not Placer.on_installed]
    # One that was placed now has looked at the bare model, where nothing acts.
    changed = [g for g in looking if plan.evaluated(g) != (([], []) if known is None else known.evaluated(g))]
    if changed:
        look = Look(Shadow(model))  # with the grafts
        for graft in changed:
            graft.patch.on_installed(graft, Backbone(look.trace(graft.input_size)))
    context.forget()
    context.measured = {}


def _draft(graft: Graft) -> Graft:
    """Copy a graft with units of its own, which share their tensors with its units."""
    tensors = [tensor for unit in graft.units.values() for tensor in (*unit.parameters(), *unit.buffers())]
    units = copy.deepcopy(graft.units, {id(tensor): tensor for tensor in tensors})
    return Graft(graft.name, graft.patch, units, graft.input_size)


def _news(kept: UnitSnapshot, wanted: Sequence[Graft], names: dict[int, str]) -> str:
    """Say which tensors of grafts that were there before are lost, and what is new; '' where nothing is."""
    lost: list[str] = []
    made: list[str] = []
    for graft in wanted:
        before = next((then for now, then in kept.units if now is graft.units), None)
        if not before:  # a graft that is new
            continue
        units = {id(unit): unit for unit in graft.units.values()}
        for unit in before.values():
            if unit.restarts or id(unit) not in units:
                where = names.get(id(unit), graft.name)
                lost += [f"{where}.{name}" for name in unit.state_dict()]
                made += [graft.name] if unit.registered else []
        known = {id(unit) for unit in before.values()}
        fresh = (unit for key, unit in units.items() if key not in known)
        made += [graft.name for unit in fresh if any(True for _ in unit.parameters())]
    if not made:
        return ""
    shown = ", ".join(lost[:8]) + (f" and {len(lost) - 8} more" if len(lost) > 8 else "")
    return (
        f"A layer that {', '.join(map(repr, dict.fromkeys(made)))} copied or served was replaced, and what the graft "
        f"adds to it was made again{f'. Lost are {shown}' if lost else ''}.\n"
        "An optimiser that was built before does not train that: build it now, or add "
        "fxgraft.grafts(model)[...].parameters() to it.\nBetter replace layers first, then patch."
    )
