"""The registry: which grafts are on a model, and the one way they are put on and taken off.

A model's grafts are always planned together, on the bare model, and written in one step; taking one off is
taking all off and writing the others again. So a plan that fails has written nothing, and any order of
removal leaves exactly what the remaining grafts would have made.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from fxgraft.errors import FxgraftWarning, StructureError, WrappedModelError
from fxgraft.graph.grafting.backbone import Backbone
from fxgraft.graph.grafting.class_swap import orphaning, parts_without_model, releasing
from fxgraft.graph.grafting.forward_context import Context
from fxgraft.graph.grafting.graft import Graft, Make, Placer, U, checked_placements
from fxgraft.graph.grafting.journal import Installation, UnitSnapshot
from fxgraft.graph.grafting.living import note_patched
from fxgraft.graph.grafting.loss_watch import REFERENCES, ParameterWatch
from fxgraft.graph.grafting.placement import Placement, PlacementRecord
from fxgraft.graph.grafting.planning import compile_placements
from fxgraft.graph.grafting.state import GraftState, hidden_forward, state_of
from fxgraft.graph.tracing.atomic import Step, apply_atomically, refilling, restoring, synchronized
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.names import class_name, join
from fxgraft.graph.tracing.preserve import own_random_state, preserved_random_state
from fxgraft.graph.tracing.settings import settings_changed


class GraftRegistry:
    """The grafts of one patched model, in the order they were added.

    Attributes:
        grafts: the grafts.
        context: what their units share during a pass.
        installation: what is written on the model now.
        owners: the grafted parts of the model, and in which modes (training, evaluation) they run a graft.
        options: keyword arguments of a call that the grafts read, besides ``target``.
        records: the placements that are to be repeated on a copy of the model; on the way to it only.
        news: what the last plan had to make again, for a warning; '' for nothing.
        renewals: how often the grafts were planned again; what is drawn for that has a seed of its own each time.
        schedules: options that follow the progress of the training, by graft.
    """

    records: tuple[PlacementRecord, ...] = ()

    def __init__(self) -> None:
        self.grafts: list[Graft] = []
        self.context = Context()
        self.installation: Installation | None = None
        self.owners: dict[str, tuple[bool, bool]] = {}
        self.options: tuple[str, ...] = ()
        self.news = ""
        self.renewals = 0
        self.schedules: dict[str, tuple[str, ...]] = {}
        self._watched = False

    @synchronized
    def plan(
        self, model: nn.Module, grafts: Sequence[Graft], records: Sequence[PlacementRecord] = ()
    ) -> Installation:
        """Plan and compile grafts on a bare model; nothing is written.

        Args:
            model: the model.
            grafts: all of its grafts.
            records: the placements to repeat, where it is the copy of a model.

        Raises:
            FxgraftError: whatever a patch finds wrong.
        """
        installation = Installation(model)
        traces: dict[Any, ModelTrace] = {}
        for graft in grafts:
            trace = traces.setdefault(graft.input_size, ModelTrace(model, graft.input_size))
            asked: set[str] = set()
            make = _noting(graft, asked)
            placed = checked_placements(graft, graft.patch.place(Backbone(trace), make))
            if records:
                placed = _repeated(
                    graft, placed, [each for each in records if each.graft == graft.name], asked
                )
            installation.placements += [(graft, placement) for placement in placed]
            # What an earlier plan made, for a layer that another has replaced since, is of no use any more;
            # what this one asked for is, placed or not.
            for key in [key for key in graft.units if key not in asked]:
                del graft.units[key]
        compile_placements(installation, traces, self.context)
        installation.states[""].registry = self
        return installation

    @synchronized
    def install(
        self,
        model: nn.Module,
        grafts: Sequence[Graft] | None = None,
        records: Sequence[PlacementRecord] = (),
    ) -> None:
        """Put grafts on a model in place of those that are there; on failure nothing changes.

        Args:
            model: the model.
            grafts: those that it is to have; by default those that it has, planned again.
            records: see `plan`.
        """
        self._check_intact()
        if self.installation is not None and self.installation.model is not model:
            raise WrappedModelError(
                f"This {class_name(model)} is a shallow copy (copy.copy) of a patched one, whose parts and grafts are "
                "the other's as well.\nUse copy.deepcopy, or work on the original."
            )
        note_patched(model)
        wanted = list(self.grafts if grafts is None else grafts)
        orphans = parts_without_model(model)
        kept = UnitSnapshot(self.grafts)
        names = {} if self.installation is None else self.installation.names()
        undo = [*self._as_now(), *kept.restoring(), *(step for each in orphans for step in orphaning(each))]
        undo.append(partial(torch.set_rng_state, torch.get_rng_state()))  # new units draw their weights
        after = None
        try:
            apply_atomically([*self._erasing(), *(step for each in orphans for step in releasing(each))])
            after = self.plan(model, wanted, records) if wanted else None
            written: list[Step] = []
            if after is not None:
                kept.settle_new(after)
                written = after.writing()
            now = {"grafts": wanted, "installation": after, "owners": {}}
            apply_atomically([*written, partial(self.__dict__.update, now)])
            if after is not None:
                self._connect(model, after)
            self.news = _news(kept, wanted, names)
            for unit in [unit for graft in wanted for unit in graft.units.values() if unit.restarts]:
                unit.restart(model)
                unit.bind(restarts=False)
        except BaseException:
            apply_atomically([*(after.erasing() if after is not None else ()), *undo])
            raise

    def _connect(self, model: nn.Module, installation: Installation) -> None:
        """Tell the units what they work with, now that all of them are in place."""
        for path, state in installation.states.items():
            runs = (state.training.acts, state.evaluation.acts)
            if path and any(runs):
                self.owners[path] = runs
        declared = [option for graft in self.grafts for option in graft.patch.call_options]
        self.options = tuple(dict.fromkeys(declared))
        self.context.replays = any(graft.patch.replays() for graft in self.grafts)
        self.context.samples = _some([n for n, _ in model.named_parameters()]) if self.context.replays else ()
        self.context.loss_grafts = tuple(
            graft.name for graft in self.grafts if graft.patch.contributes_loss()
        )
        self.context.model = weakref.ref(model)
        self.context.parameter_watch.close()
        self.context.parameter_watch = ParameterWatch()
        self.schedules = {graft.name: own for graft in self.grafts if (own := graft.patch.schedules())}
        for graft in self.grafts:
            graft.context = self.context
            for unit in graft.units.values():
                unit.context = self.context
                unit.set_progress(self.context.progress)
        if any(p.evaluation for _, p in installation.placements):
            for graft in self.grafts:
                graft.patch.on_installed(graft, Backbone.of(model, graft.input_size))
        self.context.forget()
        self.context.measured = {}

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Take the grafts off for the block, to look at the bare model, and put them back as they were."""
        self._check_intact()
        undo = [*self._as_now(), *UnitSnapshot(self.grafts).restoring()]
        with restoring(partial(apply_atomically, undo)):
            apply_atomically(self._erasing())
            yield

    def _as_now(self) -> list[Step]:
        """Return the steps that bring back what is on the model, and in the books, now."""
        books = [
            *refilling(self.__dict__),
            partial(self.context.__dict__.update, dict(self.context.__dict__)),
        ]
        return [*(self.installation.rewriting() if self.installation is not None else ()), *books]

    def _erasing(self) -> list[Step]:
        return self.installation.erasing() if self.installation is not None else []

    def _check_intact(self) -> None:
        """Raise where taking the grafts off would take off what another library has put on since."""
        wrapped = None if self.installation is None else self.installation.intact()
        if wrapped is not None:
            raise WrappedModelError(
                f"{wrapped!r} was wrapped or converted after it was patched (by FSDP, parametrize, ...).\n"
                "Taking the graft off, as a copy and a merge do, would take that off as well.\n"
                "Unpatch first, wrap after: then patch again what is wrapped inside of the model (parametrize)."
            )
        hidden = None if self.installation is None else self.installation.hidden()
        if hidden is not None:
            raise WrappedModelError(hidden_forward(hidden))

    def renew(self, model: nn.Module) -> None:
        """Plan all grafts again on the model as it is now, keeping their units.

        What is made again is drawn from a generator of its own: the pass that notices a change, one of evaluation
        above all, moves no random state.
        """
        self.renewals += 1
        seed = (torch.initial_seed() + self.renewals) % 2**63
        with own_random_state(seed), torch.inference_mode(False):
            self.install(model)

    def check(self, model: nn.Module) -> None:
        """Before a pass: notice what would run an old graph in silence, and plan again; tell who waits for training."""
        self.renew_stale(model)
        self.context.doubts.answers()
        for graft in self.grafts if model.training else ():
            if not graft.started:
                graft.started = True
                graft.patch.on_first_training_pass(graft, model)
        if model.training:
            self._watched = True
            self._watch(model)

    def watch_asked(self, model: nn.Module) -> None:
        """Do so where the loss of a training pass is asked for that ran in compiled code, so that none saw it."""
        if not self._watched:
            self._watch(model)
        self._watched = False

    def _watch(self, model: nn.Module) -> None:
        """Notice schedules that nobody feeds, and parameters that nobody trains."""
        if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            self.context.progress_watch.note(model, self.schedules)
            self.context.parameter_watch.note(
                model, lambda: {graft.name: graft.parameters() for graft in self.grafts}
            )

    def renew_stale(self, model: nn.Module) -> None:
        """Plan all grafts again where the model has changed since in what they depend on."""
        if self._stale(model):
            self._renew_stale(model)

    @synchronized
    def _renew_stale(self, model: nn.Module) -> None:
        if not self._stale(model):  # another thread that noticed it has been here first
            return
        self.renew(model)
        self.tell()

    def tell(self) -> None:
        """Warn, once, of what the last plan had to make again."""
        news, self.news = self.news, ""
        if news:
            warnings.warn(news, FxgraftWarning, stacklevel=3)

    def _stale(self, model: nn.Module) -> bool:
        if self.installation is None:
            return False
        for path, state in self.installation.states.items():
            try:
                module = model.get_submodule(path)
            except AttributeError:
                return True
            if state_of(module) is not state or (state.settings and _stale_settings(module, state)):
                return True
        return any(unit.stale(model) for graft in self.grafts for unit in graft.units.values())

    def names(self, owner: str) -> list[str]:
        """Name the grafts that act on one module."""
        placed = self.installation.placements if self.installation else []
        return list(dict.fromkeys(graft.name for graft, p in placed if p.owner == owner))

    def counterparts(self) -> dict[str, str]:
        """Name the model's parameter that parameters of grafts are another one of, by their qualified names."""
        names = {} if self.installation is None else self.installation.names()
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
        return twin

    def recorded(self) -> tuple[PlacementRecord, ...]:
        """Take down all placements; none where the model has changed since in what they depend on."""
        if self.installation is None or self._stale(self.installation.model):
            return ()
        keys = {id(unit): key for graft in self.grafts for key, unit in graft.units.items()}
        return tuple(PlacementRecord.of(graft.name, p, keys) for graft, p in self.installation.placements)

    def restore(self, model: nn.Module) -> None:
        """Put the grafts on a copy of the model that they were on."""
        # Units beside a part that is not grafted itself were copied along with that part.
        own = {id(unit) for graft in self.grafts for unit in graft.units.values()}
        for module in model.modules():
            for name in [name for name, child in module._modules.items() if id(child) in own]:
                del module._modules[name]
        records, self.records = self.records, ()
        with preserved_random_state():  # units that are not repeated are built and dropped
            self.install(model, records=records)

    def paths(self) -> list[str]:
        """Name the grafted modules."""
        return list(self.installation.states) if self.installation else []


def _some(names: Sequence[str]) -> tuple[str, ...]:
    """Choose a few of many, the last one among them."""
    return (*names[: -1 : -(-len(names) // REFERENCES) or 1], *names[-1:])


def _repeated(
    graft: Graft[Placer], placed: list[Placement], records: Sequence[PlacementRecord], asked: set[str]
) -> list[Placement]:
    """Return the placements that are recorded of a graft, in place of those that it would choose now.

    Layers that were wrapped or replaced since the model was patched may look like other places for units.

    Raises:
        StructureError: a unit that was placed is not found on the model any more.
    """
    keys = {id(unit): key for key, unit in graft.units.items()}
    if [PlacementRecord.of(graft.name, each, keys) for each in placed] == list(records):
        return placed
    repeated = {each.unit: each for each in records}
    lost = next(
        (k for k, each in repeated.items() if k not in asked and not (each.whole and k in graft.units)), None
    )
    if lost is not None:
        raise StructureError(
            f"{graft.name!r} has a unit {lost!r} that is not found on a copy of the model.\n"
            "What stands there was wrapped or replaced since the model was patched.\n"
            "Patch after layers are wrapped or replaced, or copy fxgraft.unpatch(model) and patch the copy."
        )
    asked.clear()
    asked.update(repeated)
    for key, each in repeated.items():
        graft.units[key].bind(**each.bound)
    return [each.placement(graft.units[each.unit]) for each in records]


def _news(kept: UnitSnapshot, wanted: Sequence[Graft], names: dict[int, str]) -> str:
    """Say which tensors of grafts that were there before are lost, and what is new; '' where nothing is."""
    lost: list[str] = []
    made: list[str] = []
    for graft in wanted:
        before = next((then for now, then in kept.units if now is graft.units), None)
        if not before:  # a graft that is new
            continue
        units = list(graft.units.values())
        for unit in before.values():
            if unit.restarts or all(each is not unit for each in units):
                where = names.get(id(unit), graft.name)
                lost += [f"{where}.{name}" for name in unit.state_dict()]
                made += [graft.name] if unit.registered else []
        known = {id(unit) for unit in before.values()}
        made += [
            graft.name for unit in units if id(unit) not in known and any(True for _ in unit.parameters())
        ]
    if not made:
        return ""
    shown = ", ".join(lost[:8]) + (f" and {len(lost) - 8} more" if len(lost) > 8 else "")
    return (
        f"A layer that {', '.join(map(repr, dict.fromkeys(made)))} copied or served was replaced, and what the graft "
        f"adds to it was made anew{f'. Lost are {shown}' if lost else ''}.\n"
        "An optimiser that was built before does not train that: build it now, or add "
        "fxgraft.grafts(model)[...].parameters() to it.\nBetter replace layers first, then patch."
    )


def _stale_settings(module: nn.Module, state: GraftState) -> bool:
    """Say whether an attribute that the graphs were traced under has changed since."""
    for name, settings in state.settings.items():
        part = module.get_submodule(name) if name else module
        if settings_changed(part, settings):
            return True
    return False


def _noting(graft: Graft[Placer], asked: set[str]) -> Make:
    """Return the graft's maker of units, which notes the keys that it was asked for."""

    def make(key: str, kind: Callable[..., U], *args: Any, **kwargs: Any) -> U:
        asked.add(key)
        return graft.make(key, kind, *args, **kwargs)

    return make
