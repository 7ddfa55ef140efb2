"""Onward: follows a value through the modules around it, to see which part of it reaches the model's output.

A `Flow` says which tokens of a value depend on the one that is followed, and whether they carry it or are only gated by
it. It is followed through the graph of the module where it starts, into the modules that are called there, and on
through the callers, up to the model.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Size, Tensor, fx, nn

from fxgraft._torch import DropoutNd, pytree
from fxgraft.errors import FxgraftError, SiteError
from fxgraft.graph.dataflow.graph_utils import placeholders
from fxgraft.graph.dataflow.steps import (
    ENTRY_BY_ENTRY,
    JOINING,
    called,
    is_addition,
    is_drop,
    is_size,
    sources_of,
    squashes,
    steps_of,
)
from fxgraft.graph.names import join, relative
from fxgraft.graph.structure.site import Site, edits_of, layout_at
from fxgraft.graph.tracing.editing import After, Edge, Output
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.signatures import INPUT, bind
from fxgraft.graph.tracing.tracer import is_primitive
from fxgraft.graph.tracing.values import Values

_ROLES = ("value", "squashed", "gate")
_TOKEN_BY_TOKEN = (nn.LayerNorm, nn.RMSNorm, nn.Linear, nn.Identity, DropoutNd)
_KEEPING = {
    *ENTRY_BY_ENTRY,
    "linear",
    "layer_norm",
    "rms_norm",
    "contiguous",
    "clone",
    "to",
    "float",
    "type_as",
}
_SPLITTING = {"split", "chunk", "tensor_split"}
_REDUCING = {"sum", "mean", "amax", "amin"}


@dataclass(frozen=True)
class Flow:
    """The part of a value that depends on the value that is followed.

    Attributes:
        first: the first token that does, along dimension ``dim``; those before it do not.
        dim: the dimension of the tokens; -1 where every entry may depend on it.
        role: "value", "squashed" (brought into the bounds of a gate) or "gate".
    """

    first: int = 0
    dim: int = -1
    role: str = "value"


@dataclass(frozen=True)
class Entries:
    """The flow of every entry of a structure, by its position, its key or its field."""

    named: tuple[tuple[Any, Carried], ...]

    def at(self, key: Any) -> Carried:
        """Return the flow of an entry; the merged flow of all entries where the key is unknown."""
        named = dict(self.named)
        return named[key] if key in named else _merged(_flows(self))


Carried = Flow | Entries | None
"""The flow of a value, of the entries of a structure, or None: nothing of it depends on what is followed."""


def goes_on(trace: ModelTrace, owner: str, node: str) -> bool:
    """Say whether the output carries a value, and isn't only gated by it. It counts as carried unless seen otherwise.

    Args:
        trace: the trace of the bare model.
        owner: the module in whose evaluation graph the value is.
        node: its name there.
    """
    try:
        reached = _flows(_follower(trace).outward(owner, {node: Flow()}))
    except FxgraftError:
        return True
    return not reached or any(flow.role != "gate" for flow in reached)


def without_idle(trace: ModelTrace, sites: list[Site]) -> list[Site]:
    """Leave out the sites that no prediction reads: behind them a class token alone goes on, or nothing.

    Args:
        trace: the trace of the bare model.
        sites: in running order.

    Raises:
        SiteError: all of them are.
    """
    kept = [site for site in sites if not _is_idle(trace, site)]
    if sites and not kept:
        raise SiteError(
            f"Nothing that happens at {sites[-1].name!r} can change a prediction: the logits read its class token "
            "alone.\nChoose an earlier block, or build the model to pool by average (timm: global_pool='avg')."
        )
    return kept


def _is_idle(trace: ModelTrace, site: Site) -> bool:
    follower = _follower(trace)
    try:
        prefix = layout_at(trace, site).prefix
        flow = Flow(prefix, 1) if prefix else Flow()
        edits = edits_of(trace, site)
        if isinstance(edits.evaluation, After):
            reached = follower.outward(edits.module, {edits.evaluation.node: flow})
        elif isinstance(edits.evaluation, Edge):
            reached = follower.along(edits.module, edits.evaluation, flow)
        elif isinstance(edits.evaluation, Output):
            reached = follower.beyond(edits.module, flow)
        else:
            return False
    except FxgraftError:  # a site that cannot be followed to the output is kept
        return False
    return not _flows(reached)


def _follower(trace: ModelTrace) -> _Follower:
    return trace.once("flow", _Follower)


class _Follower:
    """Follows values through a model, up to its output."""

    def __init__(self, trace: ModelTrace) -> None:
        self.trace = trace
        self.steps = steps_of(trace)
        self.known: dict[tuple[Any, ...], Carried] = {}

    def outward(self, owner: str, carried: Mapping[str, Carried]) -> Carried:
        """Follow values of a module's graph, by the names of their nodes, to the output of the model.

        Raises:
            FxgraftError: a forward around the module cannot be followed.
        """
        key = ("outward", owner, *sorted(carried.items(), key=str))
        if key not in self.known:
            out = self._through(owner, carried)
            self.known[key] = self.beyond(owner, out) if owner and _flows(out) else out
        return self.known[key]

    def along(self, owner: str, edge: Edge, flow: Flow) -> Carried:
        """Follow a value as only some of its users see it."""
        graph = self.trace.graph(owner, training=False).graph
        named = {node.name: node for node in graph.nodes}
        values = self.trace.values(owner)
        seen = {named[edge.node]: flow}
        return self.outward(
            owner, {name: self._step(owner, values, named[name], seen) for name in edge.users}
        )

    def beyond(self, path: str, out: Carried) -> Carried:
        """Follow what a module returns to the output of the model."""
        if not path:
            return out
        caller = self.trace.caller(path)
        target = relative(path, caller)
        nodes = self.trace.graph(caller, training=False).graph.nodes
        calls = [node for node in nodes if node.op == "call_module" and node.target == target]
        if not calls:
            raise SiteError(
                f"{path!r} is not called in the graph of {caller or 'the model'!r}.\n"
                "So it cannot be followed to what the model returns.\nChoose the output of a module around it."
            )
        return self.outward(caller, {node.name: out for node in calls})

    def _through(self, owner: str, carried: Mapping[str, Carried]) -> Carried:
        """Follow values of a module's graph to what it returns."""
        graph = self.trace.graph(owner, training=False).graph
        values = self.trace.values(owner)
        held: dict[fx.Node, Carried] = {}
        for node in graph.nodes:
            if node.op == "output":
                return _nest(node.args[0], held)
            if node.name in carried:
                held[node] = carried[node.name]
            elif any(held.get(source) is not None for source in node.all_input_nodes) and not is_size(node):
                held[node] = self._step(owner, values, node, held)
        return None

    def _step(self, owner: str, values: Values, node: fx.Node, held: Mapping[fx.Node, Carried]) -> Carried:
        """Follow values through one node."""
        carrying = {
            source: flow for source in sources_of(node) if (flow := _merged(_flows(held.get(source))))
        }
        merged = _merged(list(carrying.values()))
        if merged is None:
            return None
        name = called(node)
        if node.target is operator.getitem:
            return _picked(values, node, held.get(node.args[0]))  # type: ignore[arg-type]
        if node.target is getattr and isinstance(entries := held.get(node.args[0]), Entries):  # type: ignore[arg-type]
            return _entry(values, node, entries)
        built = _built(values, node, held)
        if built is not None:
            return built
        if name in JOINING:
            return _joined(values, node, carrying)
        if name in _SPLITTING and merged.dim >= 0:
            return _parted(values, node, merged)
        if node.op == "call_module":
            return self._called(owner, values, node, held, merged)
        role = merged.role
        words = self.steps.of(owner, node)
        if "gate" in words:
            role = min(
                (_factor(values, node, source, flow) for source, flow in carrying.items()), key=_ROLES.index
            )
        else:
            role = self._bounded(owner, node, role, words)
        if merged.dim >= 0 and name in _REDUCING:
            return _reduced(values, node, merged)
        return Flow(merged.first, merged.dim, role) if name in _KEEPING else Flow(role=role)

    def _called(
        self, owner: str, values: Values, node: fx.Node, held: Mapping[fx.Node, Carried], merged: Flow
    ) -> Carried:
        """Follow values through a call of a module."""
        path = join(owner, str(node.target))
        module, words = self.trace.module(path), self.steps.module(path)
        by_entry = is_primitive(module) and words and words <= {"act", "drop", "scale"}
        if isinstance(module, _TOKEN_BY_TOKEN) or is_drop(module) or by_entry:
            return Flow(merged.first, merged.dim, self._bounded(owner, node, merged.role, words))
        whole = Flow(role=self._bounded(owner, node, merged.role, words))
        if is_primitive(module):
            return whole
        try:
            traced = self.trace.graph(path, training=False)
            spread = fx.map_arg(
                (node.args, dict(node.kwargs)), lambda source: _spread(values(source), held.get(source))
            )
            leaves = pytree.tree_leaves(bind(traced.signature, *spread))  # type: ignore[misc]
            flows = [leaf.carried if isinstance(leaf, _Held) else None for leaf in leaves]
            inputs = iter(placeholders(traced.graph))
            carried: dict[str, Carried] = {}
            for flow, fixed in zip(flows, traced.fixed, strict=True):
                if fixed is INPUT:
                    carried[next(inputs).name] = flow
                elif flow is not None:  # the argument's structure is unknown
                    return whole
            return self._inward(path, carried, whole)
        except (FxgraftError, TypeError, ValueError):  # a module that cannot be traced may hand anything on
            return whole

    def _bounded(self, owner: str, node: fx.Node, role: str, words: frozenset[str]) -> str:
        """Return the role of a value after a step. A bounded value that is projected counts as a value again."""
        if role == "gate":
            return role
        if words & {"project", "mix"} and not squashes(self.trace, owner, node):
            return "value"
        return "squashed" if squashes(self.trace, owner, node) else role

    def _inward(self, path: str, given: Mapping[str, Carried], whole: Flow) -> Carried:
        key = ("inward", path, *given.items())
        if key not in self.known:
            self.known[key] = whole  # of one that calls itself
            self.known[key] = self._through(path, given)
        return self.known[key]


def _flows(carried: Carried) -> list[Flow]:
    if isinstance(carried, Flow):
        return [carried]
    return [] if carried is None else [flow for _, part in carried.named for flow in _flows(part)]


def _merged(flows: list[Flow]) -> Flow | None:
    """Merge the flows of several values into the flow of a value computed from them."""
    if not flows:
        return None
    role = min((flow.role for flow in flows), key=_ROLES.index)
    if any(flow.dim != flows[0].dim for flow in flows):
        return Flow(role=role)
    return Flow(min(flow.first for flow in flows), flows[0].dim, role)


def _nest(value: Any, held: Mapping[fx.Node, Carried]) -> Carried:
    if isinstance(value, fx.Node):
        return held.get(value)
    if isinstance(value, (tuple, list)):
        return _entries((name, _nest(part, held)) for name, part in zip(_names(value), value, strict=True))
    return (
        _entries((key, _nest(part, held)) for key, part in value.items()) if isinstance(value, dict) else None
    )


@dataclass(frozen=True)
class _Held:
    """What is followed in one argument of a call."""

    carried: Carried


def _spread(value: Any, carried: Carried) -> Any:
    """Distribute what a structure carries over its entries; a single flow goes to every entry."""

    def inner(key: Any, part: Any) -> Any:
        return _spread(part, carried.at(key) if isinstance(carried, Entries) else carried)

    if isinstance(value, dict):
        return {key: inner(key, part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(inner(key, part) for key, part in zip(_names(value), value, strict=True))
    return _Held(carried)


def _names(sequence: Any) -> Sequence[Any]:
    """List the fields of a named tuple, or the positions of any other sequence."""
    return getattr(sequence, "_fields", range(len(sequence)))


def _entries(named: Iterable[tuple[Any, Carried]]) -> Entries | None:
    entries = Entries(tuple(named))
    return entries if _flows(entries) else None


def _built(values: Values, node: fx.Node, held: Mapping[fx.Node, Carried]) -> Carried:
    """Follow values into the structure that a node builds; None where it builds none that is known."""
    made = node.target
    if is_addition(node) and isinstance(values(node), (tuple, list)):
        return _entries(enumerate(entry for part in node.args for entry in _listed(values, part, held)))
    if node.op != "call_function" or not isinstance(made, type):
        return None
    if dataclasses.is_dataclass(made) or hasattr(made, "_fields"):
        return _nest(dict(inspect.signature(made).bind(*node.args, **node.kwargs).arguments), held)
    if issubclass(made, (dict, list, tuple)) and all(not isinstance(arg, fx.Node) for arg in node.args):
        return _nest(cast(Any, made)(*node.args, **node.kwargs), held)
    return None


def _listed(values: Values, part: Any, held: Mapping[fx.Node, Carried]) -> list[Carried]:
    """List what is followed in a sequence, entry by entry."""
    if not isinstance(part, fx.Node):
        return [_nest(item, held) for item in part]
    carried = held.get(part)
    return [carried.at(name) if isinstance(carried, Entries) else carried for name in _names(values(part))]


def _entry(values: Values, node: fx.Node, entries: Entries) -> Carried:
    """Follow values through the access to an entry of a structure, by its key, its field or its position."""
    if values(node) is None:
        return None
    key: Any = node.args[1]
    structure: Any = values(node.all_input_nodes[0])
    if isinstance(structure, (tuple, list)) and isinstance(key, slice):
        return _entries(enumerate(entries.at(name) for name in _names(structure)[key]))
    if isinstance(structure, (tuple, list)) and isinstance(key, int):
        key = _names(structure)[key]
    elif isinstance(key, int):  # transformers' outputs count the fields that are there
        same = [name for name, _ in entries.named if _of(structure, name) is values(node)]
        key = same[0] if len(same) == 1 else key
    return entries.at(key)


def _of(structure: Any, name: Any) -> Any:
    return structure.get(name) if isinstance(structure, Mapping) else getattr(structure, str(name), None)


def _shape(values: Values, node: fx.Node) -> tuple[int, ...]:
    value = values(node)
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _factor(values: Values, node: fx.Node, source: fx.Node, flow: Flow) -> str:
    """Return the flow of one factor into a product: a factor that is bounded, or smaller than the others, is a gate."""
    smaller = Size(_shape(values, source)).numel() < Size(_shape(values, node)).numel()
    return "gate" if smaller or flow.role != "value" else "value"


def _picked(values: Values, node: fx.Node, carried: Carried) -> Carried:
    """Follow values through an index."""
    index = node.args[1]
    if isinstance(carried, Entries):
        return _entry(values, node, carried)
    if carried is None or carried.dim < 0:
        return carried
    whole = Flow(role=carried.role)
    entries: list[Any] = list(index) if isinstance(index, tuple) else [index]
    if not all(isinstance(part, (int, slice)) for part in entries):
        return whole
    entry = entries[carried.dim] if len(entries) > carried.dim else slice(None)
    count = _shape(values, node.all_input_nodes[0])[carried.dim]
    if isinstance(entry, int):
        return whole if entry % count >= carried.first else None
    bounds = [
        values(bound) if isinstance(bound, fx.Node) else bound
        for bound in (entry.start, entry.stop, entry.step)
    ]
    if not all(bound is None or isinstance(bound, int) for bound in bounds):
        return whole
    start, stop, step = slice(*bounds).indices(count)
    if step != 1:
        return whole
    if stop <= max(start, carried.first):
        return None
    dropped = sum(isinstance(part, int) for part in entries[: carried.dim])
    return Flow(max(carried.first - start, 0), carried.dim - dropped, carried.role)


def _parted(values: Values, node: fx.Node, flow: Flow) -> Carried:
    """Follow a value into the parts of a split along one dimension."""
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    parts: Any = values(node)
    if not isinstance(dim, int):
        return Flow(role=flow.role)
    flows: list[Carried] = []
    start = 0
    for part in parts:
        stop = start + part.shape[flow.dim]
        if dim % part.ndim != flow.dim:
            flows.append(flow)
        elif stop <= flow.first:
            flows.append(None)
        else:
            flows.append(Flow(max(flow.first - start, 0), flow.dim, flow.role))
        start = stop
    return _entries(enumerate(flows))


def _joined(values: Values, node: fx.Node, carrying: Mapping[fx.Node, Flow]) -> Carried:
    """Follow values through a concatenation or a stack."""
    merged = _merged(list(carrying.values()))
    parts: Any = node.args[0] if node.args else node.kwargs.get("tensors", ())
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    if merged is None or merged.dim < 0 or not isinstance(parts, (tuple, list)) or not isinstance(dim, int):
        return None if merged is None else Flow(role=merged.role)
    dim %= len(_shape(values, node))
    if called(node) == "stack":
        return Flow(merged.first, merged.dim + (dim <= merged.dim), merged.role)
    if dim != merged.dim:
        return merged
    before = 0
    firsts = []
    for part in parts:
        if part in carrying:
            firsts.append(before + carrying[part].first)
        before += _shape(values, part)[dim]
    return Flow(min(firsts), dim, merged.role)


def _reduced(values: Values, node: fx.Node, flow: Flow) -> Flow:
    """Follow a value through a sum or mean over one dimension."""
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    before, after = _shape(values, node.all_input_nodes[0]), _shape(values, node)
    if not isinstance(dim, int) or dim % len(before) == flow.dim:
        return Flow(role=flow.role)
    gone = len(before) > len(after) and dim % len(before) < flow.dim
    return Flow(flow.first, flow.dim - gone, flow.role)
