"""The ledger: which grafts are on a model, and the one way they are put on and taken off.

A model's grafts are always planned together, on the bare model, and written in one step; taking one off is
taking all off and writing the others again. So a plan that fails has written nothing, and any order of
removal leaves exactly what the remaining grafts would have made.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Protocol

from torch import nn

from fxgraft.errors import FxgraftError, SiteError, WrappedModelError
from fxgraft.graph.anatomy import Anatomy
from fxgraft.graph.context import Context
from fxgraft.graph.grafted import (
    GraftState,
    Program,
    Unit,
    grafted_class,
    release_orphans,
    stale_settings,
    state_of,
)
from fxgraft.graph.rewriting import STATE, Edit, Editor, Input, Output, as_forward, restore_checkpointing

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Placement:
    """One unit and where it goes.

    Attributes:
        owner: qualified name of the module whose graph or output is edited.
        edit: what to do there.
        key: the unit's name within its graft; a unit is kept under it when the model is planned again.
        unit: the unit.
        training, evaluation: the modes in which it acts.
    """

    owner: str
    edit: Edit
    key: str
    unit: Unit
    training: bool = True
    evaluation: bool = True


class Placer(Protocol):
    """What the ledger asks of a patch."""

    def place(self, anatomy: Anatomy, make: Callable[[str, Callable[[], Unit]], Unit]) -> Sequence[Placement]:
        """Say which units go where; ``make(key, build)`` returns the graft's unit of that key."""
        ...


@dataclass
class Graft:
    """A patch on a model.

    Attributes:
        name: under which it can be taken off.
        patch: the settings, as given.
        units: what it inserted, by key.
        input_size: (C, H, W) that its sites were resolved at, None for the model's own.
    """

    name: str
    patch: Any
    units: dict[str, Unit] = field(default_factory=dict)
    input_size: tuple[int, ...] | None = None

    def parameters(self) -> list[nn.Parameter]:
        """List the parameters that the graft added, for an optimiser."""
        return [p for unit in self.units.values() for p in unit.parameters()]

    def make(self, key: str, build: Callable[[], Unit]) -> Unit:
        """Return the unit of that key, building it the first time."""
        if key not in self.units:
            self.units[key] = build()
        unit = self.units[key]
        unit.graft = self.name
        return unit

    def __repr__(self) -> str:
        return f"Graft({self.name!r}, {self.patch!r})"


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


class Ledger:
    """The grafts of one patched model, in the order they were added.

    Attributes:
        grafts: the grafts.
        context: what their units share during a pass.
        installation: what is written on the model now.
    """

    def __init__(self) -> None:
        self.grafts: list[Graft] = []
        self.context = Context()
        self.installation: Installation | None = None
        self.owners: dict[str, tuple[bool, bool]] = {}

    def plan(self, model: nn.Module, grafts: Sequence[Graft]) -> Installation:
        """Plan and compile grafts on a bare model; nothing is written.

        Raises:
            FxgraftError: whatever a patch finds wrong.
        """
        installation = Installation(model)
        anatomies: dict[Any, Anatomy] = {}
        for graft in grafts:
            anatomy = anatomies.setdefault(graft.input_size, Anatomy(model, graft.input_size))
            for placement in graft.patch.place(anatomy, graft.make):
                installation.placements.append((graft, placement))
        by_owner: dict[str, list[tuple[Graft, Placement]]] = {"": []}
        for graft, placement in installation.placements:
            by_owner.setdefault(placement.owner, []).append((graft, placement))
        for path, placed in by_owner.items():
            module = model.get_submodule(path)
            _check_owner(module, path)
            state = GraftState(type(module), path, self.context, outer=path == "")
            state.ledger = self if path == "" else None
            names = [_place_unit(installation, state, module, graft, p) for graft, p in placed]
            anatomy = anatomies[placed[0][0].input_size] if placed else None
            state.training = _program(anatomy, state, module, placed, names, True)
            state.evaluation = _program(anatomy, state, module, placed, names, False)
            installation.states[path] = state
            installation.modules[path] = module
        return installation

    def install(self, model: nn.Module, grafts: Sequence[Graft] | None = None) -> None:
        """Put grafts on a model in place of those that are there; on failure nothing changes."""
        wanted = list(self.grafts if grafts is None else grafts)
        release_orphans(model)
        before = self.installation
        self._erase()
        try:
            after = self.plan(model, wanted) if wanted else None
        except BaseException:
            if before is not None:
                before.write()
            raise
        self.grafts = wanted
        self.installation = after
        self.owners = {}
        if after is None:
            return
        after.write()
        for path, state in after.states.items():
            runs = (state.training.acts, state.evaluation.acts)
            if path and any(runs):
                self.owners[path] = runs
        acts_in_evaluation = any(p.evaluation for _, p in after.placements)
        try:
            for graft in self.grafts:
                for unit in graft.units.values():
                    unit.context = self.context
                    unit.set_progress(self.context.progress)
                    if acts_in_evaluation:
                        unit.installed(Anatomy(model, graft.input_size))
        except BaseException:
            after.erase()
            if before is not None:
                before.write()
            raise

    def _erase(self) -> None:
        if self.installation is None:
            return
        wrapped = self.installation.intact()
        if wrapped is not None:
            raise WrappedModelError(
                f"{wrapped!r} was wrapped or converted after it was patched (by FSDP, parametrize, ...).\n"
                "Taking the graft off would take that off as well.\nUnpatch first, wrap after."
            )
        self.installation.erase()

    def renew(self, model: nn.Module) -> None:
        """Plan all grafts again on the model as it is now, keeping their units."""
        self.install(model)

    def check(self, model: nn.Module) -> None:
        """Notice what would run an old graph in silence, and plan again."""
        if self.installation is None:
            return
        for path, state in self.installation.states.items():
            try:
                module = model.get_submodule(path)
            except AttributeError:
                break
            if state_of(module) is not state or (state.settings and stale_settings(module, state)):
                break
        else:
            if not any(unit.stale(model) for graft in self.grafts for unit in graft.units.values()):
                return
        self.renew(model)

    def names(self, owner: str) -> list[str]:
        """Name the grafts that act on one module."""
        placed = self.installation.placements if self.installation else []
        return list(dict.fromkeys(graft.name for graft, p in placed if p.owner == owner))

    def describe(self) -> str:
        """Name the grafts, for the model's repr."""
        return ", ".join(graft.name for graft in self.grafts)

    def set_progress(self, fraction: float) -> None:
        """Tell every unit how much of the training is done."""
        self.context.progress = fraction
        for graft in self.grafts:
            for unit in graft.units.values():
                unit.set_progress(fraction)

    def portable(self) -> Ledger:
        """Return the ledger without what is compiled, to travel with a copy of the model."""
        twin = Ledger()
        twin.grafts = [replace(graft) for graft in self.grafts]
        twin.context.progress = self.context.progress
        return twin

    def localise(self, model: nn.Module) -> None:
        """Give a DataParallel replica its own context and units, since replicas run in threads."""
        context = Context()
        context.progress = self.context.progress
        twins: dict[int, Unit] = {}

        def twin(unit: Unit) -> Unit:
            if id(unit) not in twins:
                twins[id(unit)] = copy.copy(unit)
                twins[id(unit)].context = context
            return twins[id(unit)]

        for path in self.installation.states if self.installation else ():
            module = model.get_submodule(path)
            state = copy.copy(module.__dict__[STATE])
            state.context = context
            for name, child in module._modules.items():
                if name.startswith("graft_") and isinstance(child, Unit):
                    twins[id(state.registered.get(name))] = child
                    child.context = context
            state.units = SimpleNamespace(**{k: twin(u) for k, u in vars(state.units).items()})
            for name in ("training", "evaluation"):
                program: Program = getattr(state, name)
                inputs, units = [twin(u) for u in program.inputs], [twin(u) for u in program.units]
                setattr(state, name, replace(program, inputs=inputs, units=units))
            module.__dict__[STATE] = state


def _check_owner(module: nn.Module, path: str) -> None:
    if "forward" in module.__dict__:
        raise WrappedModelError(
            f"{path or 'The model'!r} has a forward of its own, set on the instance.\n"
            "A patch works through the class, which that forward hides.\n"
            "Patch first, and replace the forward after."
        )
    state = state_of(module)
    if state is not None:
        raise FxgraftError(
            f"{path or 'The model'!r} is already part of another patched model.\n"
            "One module cannot obey two sets of patches.\nUnpatch the other model first."
        )


def _place_unit(
    installation: Installation, state: GraftState, module: nn.Module, graft: Graft, placement: Placement
) -> str:
    """Decide under which name a unit is reached from its owner, and register it if it holds tensors."""
    unit = placement.unit
    several = sum(1 for g, p in installation.placements if g is graft and p.owner == placement.owner) > 1
    safe = "".join(c if c.isalnum() else "_" for c in placement.key)
    name = f"graft_{graft.name}_{safe}" if several else f"graft_{graft.name}"
    if not name.isidentifier():
        raise SiteError(f"{graft.name!r} cannot name a graft.\nUse letters, digits and underscores.")
    if unit.registered and not isinstance(module, _CONTAINERS):
        installation.registered.append((module, name, unit))
        state.registered[name] = unit
        return name
    setattr(state.units, name, unit)
    if unit.registered:
        # A container runs or counts its children, so the unit lives beside it.
        holder_path, _, own = placement.owner.rpartition(".")
        while isinstance(installation.model.get_submodule(holder_path), _CONTAINERS) and holder_path:
            holder_path, _, outer = holder_path.rpartition(".")
            own = f"{outer}_{own}"
        holder = installation.model.get_submodule(holder_path)
        installation.registered.append((holder, f"{name}_{own}", unit))
    return f"{STATE}.units.{name}"


def _program(
    anatomy: Anatomy | None,
    state: GraftState,
    module: nn.Module,
    placed: list[tuple[Graft, Placement]],
    names: list[str],
    training: bool,
) -> Program:
    """Compile what an owner runs in one mode."""
    acting = [
        (placement, name)
        for (_, placement), name in zip(placed, names, strict=True)
        if (placement.training if training else placement.evaluation)
    ]
    units = [placement.unit for placement, _ in acting if isinstance(placement.edit, Output)]
    inputs = [placement.unit for placement, _ in acting if isinstance(placement.edit, Input)]
    inner = [(p, name) for p, name in acting if not isinstance(p.edit, (Input, Output))]
    if not inner or anatomy is None:
        return Program(None, units, inputs)
    traced = anatomy.fresh_graph(state.path, training)
    editor = Editor(traced)
    for placement, name in inner:
        editor.apply(placement.edit, name)
    restore_checkpointing(traced)
    state.settings.update(traced.settings)
    mode = "training" if training else "evaluation"
    return Program(as_forward(traced, f"{type(module).__name__} {state.path!r} in {mode}"), units, inputs)
