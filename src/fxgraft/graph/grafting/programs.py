"""Programs: compiles placements into what every grafted module runs in each mode. Nothing is written here."""

from __future__ import annotations

import contextlib
import dis
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from types import CodeType, FrameType
from typing import Any

from torch import fx, nn

from fxgraft.errors import FxgraftError, SiteError, TraceError, WrappedModelError
from fxgraft.graph.atomic import restoring
from fxgraft.graph.dataflow.graph_utils import downstream_of, placeholders
from fxgraft.graph.grafting.forwards import Passing, as_forward, restore_checkpointing
from fxgraft.graph.grafting.graft import Graft
from fxgraft.graph.grafting.placement import Placed, Placement, by_edge, by_rank
from fxgraft.graph.grafting.state import GraftState, Program, foreign_forward, state_of
from fxgraft.graph.grafting.unit import Unit
from fxgraft.graph.names import PREFIX, STATE, inside, join
from fxgraft.graph.runtime.forward_context import Context
from fxgraft.graph.tracing.compile import MORE
from fxgraft.graph.tracing.editing import Edit, Editor, Input, Instead, Output
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.signatures import Declared
from fxgraft.graph.tracing.trace import Traced

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_LISTINGS = {"children", "named_children", "modules", "named_modules", "_modules"}
_OUTSIDE = (Input, Instead, Output)
"""Edits that act around a forward and not in it."""
_OURS = {"torch", "fxgraft"}
"""Packages of the tracer, whose functions see every keyword and mean none."""


Beside = tuple[str, str, Unit]
"""The path of a module, and the name that a unit gets among its children."""


@dataclass(frozen=True, eq=False)
class Part:
    """What is to be written on one module.

    Attributes:
        state: the graft state of the module.
        placed: its placements, in running order, each with its graft.
        registered: its units that join the module tree.
    """

    state: GraftState
    placed: tuple[tuple[Graft, Placement], ...]
    registered: tuple[Beside, ...]

    def of(self, placed: Placed) -> bool:
        """Say whether the part was compiled from just these placements."""
        pairs = zip(self.placed, placed, strict=False)
        return len(self.placed) == len(placed) and all(a is c and b is d for (a, b), (c, d) in pairs)


def compile_placements(
    model: nn.Module,
    placements: Placed,
    traces: Mapping[Any, ModelTrace],
    context: Context,
    known: Mapping[str, Part],
) -> dict[str, Part]:
    """Compile placements into what is to be written on the modules they are on, by qualified name.

    Args:
        model: the look-alike of the bare model.
        placements: what to compile.
        traces: the traces of the bare model, by input size.
        context: state that the grafts share during a pass.
        known: parts that were compiled for the same model, used again for modules with the same placements.

    Raises:
        FxgraftError: placements that cannot be carried out, alone or together.
    """
    by_owner: dict[str, Placed] = {"": []}
    for graft, placement in placements:
        by_owner.setdefault(placement.owner, []).append((graft, placement))
    parts: dict[str, Part] = {}
    for path, placed in by_owner.items():
        by_rank(placed)
        if path in known and known[path].of(placed):
            parts[path] = known[path]
            continue
        module = model.get_submodule(path)
        _check_owner(module, path)
        state = GraftState(type(module), path, context, outer=path == "")
        keys: dict[str, set[str]] = {}
        for graft, placement in placed:
            keys.setdefault(graft.name, set()).add(placement.key)
        beside: list[Beside] = []
        names = [_place_unit(model, beside, state, module, g, p, len(keys[g.name]) > 1) for g, p in placed]
        trace = traces[placed[0][0].input_size] if placed else None
        state.training = _program(trace, state, module, placed, names, True)
        state.evaluation = _program(trace, state, module, placed, names, False)
        parts[path] = Part(state, tuple(placed), tuple(beside))
    _check_reached(parts)
    return parts


def _check_owner(module: nn.Module, path: str) -> None:
    who = repr(path) if path else "The model"
    if foreign_forward(module):
        raise WrappedModelError(
            f"{who} has a forward of its own, set on the instance.\n"
            "A patch works through the class, which that forward hides.\n"
            "Patch first, and replace the forward after."
        )
    state = state_of(module)
    if state is not None:
        raise FxgraftError(
            f"{who} is already part of another patched model.\n"
            "One module cannot obey two sets of patches.\nUnpatch the other model first."
        )


def _place_unit(
    model: nn.Module,
    beside: list[Beside],
    state: GraftState,
    module: nn.Module,
    graft: Graft,
    placement: Placement,
    several: bool,
) -> str:
    """Choose the name by which the owner reaches a unit, and the module that holds the unit if it has tensors.

    ``several`` says whether the owner has more than one unit of that graft.
    """
    unit = placement.unit
    key = placement.key.removeprefix(placement.owner + ".") if placement.owner else placement.key
    safe = "".join(c if c.isalnum() else "_" for c in key)
    name = f"{PREFIX}{graft.name}_{safe}" if several else f"{PREFIX}{graft.name}"
    if not name.isidentifier():
        raise SiteError(f"{graft.name!r} cannot name a graft.\nUse letters, digits and underscores.")
    if unit.registered and not _runs_children(module):
        _check_free(module, name, graft)
        if name not in state.registered:  # placed twice where the two graphs name its site differently
            beside.append((placement.owner, name, unit))
        state.registered[name] = unit
        return name
    setattr(state.units, name, unit)
    if unit.registered:
        # A container runs or counts its children, so the unit lives beside it.
        holder_path, _, own = placement.owner.rpartition(".")
        while _runs_children(model.get_submodule(holder_path)) and holder_path:
            holder_path, _, outer = holder_path.rpartition(".")
            own = f"{outer}_{own}"
        if _runs_children(model.get_submodule(holder_path)):  # the model itself goes through its children
            inner = (path for path, part in model.named_modules() if not _runs_children(part))
            holder_path = next(inner, holder_path)
        full = f"{name}_{own}".rstrip("_")
        _check_free(model.get_submodule(holder_path), full, graft)
        beside.append((holder_path, full, unit))
    return f"{STATE}.units.{name}"


def _runs_children(module: nn.Module) -> bool:
    """Say whether a module runs all of its children, whatever they are, so that one more would run as well."""
    code = getattr(type(module).forward, "__code__", None)
    return isinstance(module, _CONTAINERS) or (code is not None and not _LISTINGS.isdisjoint(code.co_names))


def _check_free(holder: nn.Module, name: str, graft: Graft) -> None:
    """Raise if the model already uses the name that a unit would get."""
    # A unit there came along when the model was copied, with a module that is not grafted itself.
    if hasattr(holder, name) and not isinstance(getattr(holder, name), Unit):
        raise SiteError(
            f"{graft.name!r} would put its unit where {holder._get_name()} has {name!r} of its own.\n"
            "Units stand beside the layers they serve, under names that start with 'graft_'.\n"
            f'Give the graft another name, as name="{graft.name}_2", or rename that layer.'
        )


def _program(
    trace: ModelTrace | None,
    state: GraftState,
    module: nn.Module,
    placed: Placed,
    names: list[str],
    training: bool,
) -> Program:
    """Compile what an owner runs in one mode."""
    named = {id(placement): name for (_, placement), name in zip(placed, names, strict=True)}
    mine = [(g, p) for g, p in placed if (p.training if training else p.evaluation)]
    acting = [(placement, named[id(placement)]) for _, placement in by_edge(mine)]
    units = [placement.unit for placement, _ in acting if isinstance(placement.edit, Output)]
    inputs = [placement.unit for placement, _ in acting if isinstance(placement.edit, Input)]
    whole = [placement.unit for placement, _ in acting if isinstance(placement.edit, Instead)]
    inner = [(p, name) for p, name in acting if not isinstance(p.edit, _OUTSIDE)]
    if len(whole) + bool(inner) > 1:
        both = ", ".join(dict.fromkeys(repr(graft.name) for graft, _ in placed))
        raise SiteError(
            f"{both} cannot share {state.path or 'the model'!r}: one replaces its whole forward, and another "
            "acts inside of it.\nThe inner one would never run.\nTake one of them off, or choose another layer."
        )
    if not inner or trace is None:
        return Program(whole[0] if whole else None, units, inputs)
    traced = trace.fresh_graph(state.path, training)
    labelled = _labelled(trace, traced, [p.edit for p, _ in inner], training) if state.outer else []
    passing = _passing(trace, traced, state.path, training)
    before = _called(traced, state.path)
    traces = [traced, *labelled, *([passing.traced] if passing is not None else [])]
    for module_trace in traces:
        editor = Editor(module_trace)
        for placement, name in inner:
            editor.apply(placement.edit, name)
    skipped = before - _called(traced, state.path)
    for module_trace in traces:
        restore_checkpointing(module_trace)
        for name, settings in module_trace.settings.items():
            state.settings.setdefault(name, {}).update(settings)
    mode = "training" if training else "evaluation"
    function = as_forward(traced, f"{type(module).__name__} {state.path!r} in {mode}", labelled, passing)
    return Program(function, units, inputs, skipped)


def _labelled(trace: ModelTrace, traced: Traced, edits: Sequence[Edit], training: bool) -> list[Traced]:
    """Trace the model's own forward as it is called with labels, where it takes any.

    Such a trace is of use only if the edits mean the same in it. Calls with labels are refused otherwise.
    """
    names = Declared.of(traced.signature).labels
    edited = {name for edit in edits for name in _edited(edit)}
    forms_with_labels = []
    for labels in dict.fromkeys((*((name,) for name in names), names)) if names else ():
        try:
            other = trace.fresh_graph("", training, labels=labels)
        except TraceError:
            continue
        if edited <= _in_common(traced, other):
            forms_with_labels.append(other)
    return forms_with_labels


def _passing(trace: ModelTrace, traced: Traced, path: str, training: bool) -> Passing | None:
    """Trace a forward with one more keyword; None where it takes none, or does more than hand it on.

    The keywords that it reads by name are found in the functions that run while it is traced.
    """
    if not Declared.of(traced.signature).any_keyword:
        return None
    lines: dict[CodeType, set[int]] = {}
    try:
        with _watching(lines):
            other = trace.fresh_graph(path, training, labels=(MORE,))
    except TraceError:
        return None
    more = [node for node in placeholders(other.graph) if node.name == MORE]
    pairs = list(zip(traced.graph.nodes, (n for n in other.graph.nodes if n not in more), strict=False))
    alike = len(traced.graph.nodes) + 1 == len(other.graph.nodes) and all(
        _spelled(mine) == (*_spelled(theirs)[:4], str({k: v for k, v in theirs.kwargs.items() if k != MORE}))
        for mine, theirs in pairs
    )
    handed_on = all(
        node.kwargs.get(MORE) is program
        and program not in node.args
        and list(node.kwargs.values()).count(program) == 1
        for program in more
        for node in program.users
    )
    if not (alike and handed_on and len(more) == 1):
        return None
    return Passing(other, frozenset(name for code, run in lines.items() for name in _names(code, run)))


@contextlib.contextmanager
def _watching(lines: dict[CodeType, set[int]]) -> Iterator[None]:
    """Note the lines of all functions that run in the block, apart from the tracer's."""
    before = sys.gettrace()

    def note(frame: FrameType, event: str, _: Any) -> Any:
        if str(frame.f_globals.get("__name__")).partition(".")[0] in _OURS:
            return None
        lines.setdefault(frame.f_code, set()).add(frame.f_lineno)
        return note

    with restoring(partial(sys.settrace, before)):
        sys.settrace(note)
        yield


def _names(code: CodeType, run: set[int]) -> Iterator[str]:
    """List the arguments of a function, and the texts on lines that ran: keys of its keywords may be among them."""
    yield from code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    line = code.co_firstlineno
    for instruction in dis.get_instructions(code):
        positions = getattr(instruction, "positions", None)  # from Python 3.11 on, where a line may come back
        line = (positions.lineno if positions is not None else instruction.starts_line) or line
        if line in run and isinstance(instruction.argval, str) and "CONST" in instruction.opname:
            yield instruction.argval
        elif line in run and isinstance(instruction.argval, (tuple, frozenset)):
            yield from (name for name in instruction.argval if isinstance(name, str))


def _edited(edit: Edit) -> Iterator[str]:
    """Name the nodes that an edit is about."""
    for field in fields(edit):
        value = getattr(edit, field.name)
        yield from value if isinstance(value, tuple) else [value] if isinstance(value, str) else []


def _in_common(traced: Traced, labelled: Traced) -> set[str]:
    """Name the nodes at the start that are the same in a trace with labels and one without, and see no labels."""
    own = {node.name for node in placeholders(traced.graph)}
    added = [node for node in placeholders(labelled.graph) if node.name not in own]
    seeing = set(added).union(*map(downstream_of, added))
    pairs = zip(
        traced.graph.nodes, (node for node in labelled.graph.nodes if node not in seeing), strict=False
    )
    alike = itertools.takewhile(lambda pair: _spelled(pair[0]) == _spelled(pair[1]), pairs)
    return {node.name for node, _ in alike}


def _spelled(node: fx.Node) -> tuple[str, ...]:
    return node.op, node.name, str(node.target), str(node.args), str(node.kwargs)


def _called(traced: Traced, path: str) -> frozenset[str]:
    """Name the modules that a forward calls."""
    calls = (str(node.target) for node in traced.graph.nodes if node.op == "call_module")
    return frozenset(join(path, name) for name in calls)


def _check_reached(parts: Mapping[str, Part]) -> None:
    """Raise where one patch acts on a module that another one leaves out: it would never run."""
    for part in parts.values():
        for training, program in ((True, part.state.training), (False, part.state.evaluation)):
            for skipped in program.skipped:
                for owner, other in parts.items():
                    acting = [g for g, p in other.placed if (p.training if training else p.evaluation)]
                    if inside(owner, skipped) and acting:
                        inner = [g for g, p in part.placed if not isinstance(p.edit, _OUTSIDE)]
                        raise SiteError(
                            f"{acting[0].name!r} acts on {owner!r}, which {inner[-1].name!r} leaves out in "
                            f"{'training' if training else 'evaluation'}.\nThe first would never run there.\n"
                            "Take one of them off, or choose another site for it."
                        )
