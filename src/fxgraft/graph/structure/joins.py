"""Residual joins: finds where a block's input is added to what a branch computed from it, in the modules' graphs.

An addition is a residual join when its operands come from one value, the fork:

- the identity leads back to the fork unchanged, or through what keeps its role: views, scales, norms, pooling, and a
  projection, but no activation behind it and no attention;
- the branch is made of the fork, and of nothing else that the fork is made of, and something computes in it. Beside a
  projected identity the branch has to bend, or to be a longer chain: two linear paths are one convolution in two parts,
  as adapters and re-parametrised layers have them;
- the sum goes on as the block's value. It does not where all that it does is to gate other values, and where it is one
  of several parallel sums that are concatenated (a NASNet cell).

Where the branch is linear and the identity not projected, both together are one layer in parts. Such a sum is a join
where the network goes through it, as in MobileOne, and none inside the branch of another join. If the branch is one
convolution per channel and no activation follows, its kind is "depthwise": so are convolutional position encodings.
A join on some of the channels of a block's value, as on the residual half of a dual path, is of the kind "part"; where
the block concatenates the rest again itself, "post" is the whole, and "residual" the whole branch.

Four positions belong to a join: "pre" (the fork as the branch sees it), "residual" (the end of the branch, in front of
dropout and stochastic depth), "identity" (the shortcut just before the addition) and "post" (the sum). With several
branches there is no "residual".
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, fx, nn

from fxgraft.errors import FxgraftError
from fxgraft.graph.dataflow.graph_utils import downstream_of, placeholders
from fxgraft.graph.dataflow.steps import (
    JOINING,
    PROJECTIONS,
    Steps,
    called,
    computed_from,
    is_addition,
    sources_of,
    steps_of,
)
from fxgraft.graph.names import inside, join, relative
from fxgraft.graph.structure.layout import layout_of
from fxgraft.graph.structure.onward import goes_on
from fxgraft.graph.structure.site import Edits, Site
from fxgraft.graph.tracing.editing import After, Edge
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.observe import tensors
from fxgraft.graph.tracing.tracer import is_primitive
from fxgraft.graph.tracing.values import Values

POSITIONS = ("pre", "residual", "identity", "post")

Kind = Literal["block", "depthwise", "part"]

_BENDS = {"act", "gate", "mix", "norm"}
_WORKS = {"project", "pool", "mix"}
_HEAVY = {"deep", "gate", "mix", "pick"}


@dataclass(frozen=True)
class Join:
    """One residual join.

    Attributes:
        name: the owner's qualified name and the addition's node.
        owner: qualified name of the module whose forward adds.
        sites: by position, each under the join's name.
        kind: "block", "depthwise" (a depthwise convolution alone, as of a position encoding) or "part" (on some of the
            channels of the block's value).
        branch: qualified names of the modules that are called between the fork and the end of the branch.
    """

    name: str
    owner: str
    sites: dict[str, Site]
    kind: Kind = "block"
    branch: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Parts:
    """A join's nodes: the sum, its operands, and where the two paths fork."""

    total: fx.Node
    identity: fx.Node
    branch: fx.Node
    fork: fx.Node
    between: frozenset[fx.Node]
    """The nodes on the way from the fork to the end of the branch."""
    adds_to: fx.Node
    """The addition that takes the identity; the sum itself unless further branches are added to it."""
    end: tuple[fx.Node, tuple[fx.Node, ...]] | None
    """The end of the branch, and which of its users see it there; None with several branches."""
    taken: tuple[fx.Node, tuple[fx.Node, ...]]
    """The end of the shortcut, and which of its users see it there."""
    kind: Kind = "block"
    linear: bool = False
    projected: bool = False
    length: int = 0
    scales: int = 0
    """How many scales lie between the end and the sum."""

    def edits(self) -> dict[str, Edge | After]:
        edits: dict[str, Edge | After] = {"identity": _edge(*self.taken), "post": After(self.total.name)}
        if self.end is not None:
            edits["residual"] = _edge(*self.end)
        forked = tuple(user.name for user in self.fork.users if user in self.between)
        if forked:
            edits["pre"] = Edge(self.fork.name, forked)
        return edits


def _edge(node: fx.Node, users: tuple[fx.Node, ...]) -> Edge:
    return Edge(node.name, tuple(user.name for user in users))


def residual_joins(trace: ModelTrace) -> list[Join]:
    """Find the residual joins of a model, in the order they run.

    Modules that cannot be traced are passed over: their insides cannot be edited either.
    """
    return trace.once("residual joins", lambda own: _Search(own).joins())


def candidate_sums(trace: ModelTrace) -> list[str]:
    """List the sums of two values of one shape, joins or not, by the names that ``layers=`` takes."""
    names = []
    for owner in _openable(trace):
        if not _can_be_traced(trace, owner):
            continue
        graph = trace.graph(owner, training=False).graph
        values = trace.values(owner)
        data = steps_of(trace).data(owner, graph)
        sums = [
            n
            for n in graph.nodes
            if is_addition(n) and _are_nodes(n.args[:2]) and data.issuperset(n.args[:2])
        ]
        names += [join(owner, n.name) for n in sums if _same_shape(values, *n.args[:2])]
    return names


def closed_blocks(trace: ModelTrace) -> list[str]:
    """List the modules whose forwards cannot be traced, innermost ones alone, by name."""
    closed: list[str] = []
    for owner in _openable(trace):
        if owner and not any(inside(path, owner) for path in closed) and not _can_be_traced(trace, owner):
            closed.append(owner)
    return closed


def _can_be_traced(trace: ModelTrace, owner: str) -> bool:
    try:
        trace.graph(owner, training=False)
    except FxgraftError:
        return False
    return True


def share_in_branches(trace: ModelTrace) -> float:
    """Return the share of a model's convolutions and linear layers that lies in branches of its joins."""
    layers = {path for path in trace.in_order() if isinstance(trace.module(path), PROJECTIONS)}
    joined = {path for residual in residual_joins(trace) for path in residual.branch}
    held = {path for path in layers if any(inside(path, path_inside) for path_inside in joined)}
    return len(held) / max(len(layers), 1)


def _openable(trace: ModelTrace) -> list[str]:
    """List the modules whose forwards may add, in running order."""
    paths = []
    for path in trace.in_order():
        module = trace.module(path)
        # timm keeps some blocks out of traces through them; as the root of one they can still be opened.
        closed = is_primitive(module) and not any(module.children())
        if not closed and not isinstance(module, (nn.Sequential, nn.MultiheadAttention)):
            paths.append(path)
    return paths


class _Search:
    """One search for the joins of a model."""

    def __init__(self, trace: ModelTrace) -> None:
        self.trace = trace
        self.steps: Steps = steps_of(trace)
        images = next(iter(tensors(trace.observation.calls[""][0].args)), None)
        self.images = 0 if images is None else images.shape[0]
        self.found: dict[str, list[_Parts]] = {}

    def joins(self) -> list[Join]:
        return [residual for path in _openable(self.trace) for residual in self._joins_in(path)]

    def _joins_in(self, owner: str) -> list[Join]:
        try:
            return self._decided(owner)
        except FxgraftError:
            return []

    def _decided(self, owner: str) -> list[Join]:
        evaluation = [parts for parts in self._parts_in(owner) if self._goes_on(owner, parts)]
        if not evaluation:
            return []
        joins = []
        for parts, training in zip(evaluation, self._in_training(owner, evaluation), strict=True):
            if training is not None:
                parts = self._before_drops(owner, parts, training.scales)
                name = join(owner, parts.adds_to.name)
                calls = (str(node.target) for node in sorted(parts.between) if node.op == "call_module")
                branch = tuple(join(owner, call) for call in calls)
                joins.append(Join(name, owner, self._sites(owner, name, parts, training), parts.kind, branch))
        return joins

    def _sites(self, owner: str, name: str, parts: _Parts, training: _Parts) -> dict[str, Site]:
        """Return the site of each position of a join."""
        others = training.edits()
        usual = parts.kind == "block"
        return {
            position: Site(
                name,
                owner,
                edit.node,
                op=position if usual else f"{position}, {parts.kind}",
                value=self.trace.values(owner).get(edit.node),
                edits=Edits(owner, edit, others.get(position, edit)),
                position=position,
                block=owner,
                kind="" if usual else parts.kind,
            )
            for position, edit in parts.edits().items()
        }

    def _parts_in(self, owner: str) -> list[_Parts]:
        """Find the joins of one forward by its own graph."""
        if owner not in self.found:
            graph = self.trace.graph(owner, training=False).graph
            added = any(is_addition(node) for node in graph.nodes)
            self.found[owner] = self._find(owner, graph, self.trace.values(owner)) if added else []
        return self.found[owner]

    def _goes_on(self, owner: str, parts: _Parts) -> bool:
        """Say whether the network goes through a sum, as far as modules around its own can tell."""
        if parts.linear and self._within_branch(owner, parts.total):
            return False
        return goes_on(self.trace, owner, parts.total.name)

    def _within_branch(self, owner: str, node: fx.Node) -> bool:
        """Say whether a value lies in the branch of another join, of this forward or one around it."""
        if any(node in other.between for other in self._parts_in(owner) if other.total is not node):
            return True
        if not owner:
            return False
        caller = self.trace.caller(owner)
        try:
            graph = self.trace.graph(caller, training=False).graph
            self._parts_in(caller)
        except FxgraftError:
            return False
        target = relative(owner, caller)
        calls = [call for call in graph.nodes if call.op == "call_module" and call.target == target]
        return any(self._within_branch(caller, call) for call in calls[:1])

    def _in_training(self, owner: str, evaluation: list[_Parts]) -> list[_Parts | None]:
        """Find the same joins in the training graph, by order where the node names differ."""
        traced = self.trace.graph(owner, training=True)
        if _listing(traced.graph) == _listing(self.trace.graph(owner, training=False).graph):
            return list(evaluation)
        joins = self._find(owner, traced.graph, self.trace.values(owner, traced))
        known = self._parts_in(owner)
        if len(joins) == len(known):
            return [joins[known.index(residual)] for residual in evaluation]
        named = {residual.adds_to.name: residual for residual in joins}
        return [named.get(residual.adds_to.name) for residual in evaluation]

    def _find(self, owner: str, graph: fx.Graph, values: Values) -> list[_Parts]:
        sums: list[_Parts] = []
        data = self.steps.data(owner, graph)
        taken: set[fx.Node] = set()
        for node in graph.nodes:
            if not is_addition(node) or node in taken or not _are_nodes(node.args[:2]):
                continue
            first, second = node.args[:2]
            if first is second or not {first, second} <= data or not _same_shape(values, first, second):
                continue
            ways = [
                parts
                for identity, branch in ((first, second), (second, first))
                if (parts := self._parts(owner, values, node, identity, branch)) is not None
            ]
            # Both ways only where the fork lies on both operands' paths; the lighter shortcut is the identity.
            ways.sort(key=lambda parts: (parts.projected, parts.length))
            for parts in ways[:1]:
                parts = self._with_more_branches(owner, values, parts)
                taken.add(parts.total)
                if not _one_of_several(parts.total):
                    sums.append(self._finished(owner, values, parts))
        return sums

    def _parts(self, owner: str, values: Values, total: fx.Node, identity: Any, branch: Any) -> _Parts | None:
        """Read an addition as identity + branch, or return None."""
        upstream = computed_from([branch])
        data = self.steps.data(owner, total.graph)
        region, forks = _back_to(identity, upstream | {branch}, data)
        fork = forks.pop() if len(forks) == 1 else None
        words = self.steps.all_of(owner, region)
        if words & _HEAVY or fork is branch:
            return None
        if fork is None or fork not in upstream:
            return self._given(owner, total, identity, branch)
        if not self._alone(owner, values, branch, fork):
            return None
        between = frozenset(_between(fork, branch, upstream))
        return self._made(owner, total, identity, branch, fork, between, owner, region)

    def _alone(self, owner: str, values: Values, branch: fx.Node, fork: fx.Node) -> bool:
        """Say whether a branch depends on the values before the fork only through the fork.

        Keys and values beside a query do not. What belongs to no image, as rotary embeddings, does not count.
        """
        behind = computed_from([fork])
        both = computed_from([branch], around=fork) & behind & self.steps.data(owner, fork.graph)
        # Attention may count windows or heads among the images: its own batch is another than that of its input.
        batches = {_shape(values, fork)[:1], (self.images,)}
        return not any(_shape(values, operand)[:1] in batches for operand in both)

    def _with_more_branches(self, owner: str, values: Values, parts: _Parts) -> _Parts:
        """Follow a sum to which further branches of the same fork are added."""
        while len(parts.total.users) == 1:
            (user,) = parts.total.users
            others = [source for source in user.all_input_nodes if source is not parts.total]
            if (
                not is_addition(user)
                or len(others) != 1
                or not self._is_branch(owner, values, parts, others[0])
            ):
                break
            upstream = computed_from(others)
            between = parts.between | _between(parts.fork, others[0], upstream)
            linear = parts.linear and not self.steps.all_of(owner, between) & _BENDS
            parts = replace(parts, total=user, end=None, between=frozenset(between), linear=linear)
        return parts

    def _is_branch(self, owner: str, values: Values, parts: _Parts, end: fx.Node) -> bool:
        """Say whether a value is made of a join's fork alone, as another branch beside it."""
        upstream = computed_from([end])
        return (
            parts.fork in upstream
            and parts.total not in upstream
            and self._alone(owner, values, end, parts.fork)
        )

    def _finished(self, owner: str, values: Values, parts: _Parts) -> _Parts:
        """Determine a join's kind, and where its branch ends."""
        if parts.linear:
            learned = self.steps.all_of(owner, parts.between) & {"project", "dense"}
            if learned == {"project"} and not self._activated(owner, parts.total):
                parts = replace(parts, kind="depthwise")
        parts = self._whole(owner, values, parts)
        return self._before_drops(owner, parts)

    def _whole(self, owner: str, values: Values, parts: _Parts) -> _Parts:
        """Take the whole value of a block that adds on some of its channels, or note that it is a part."""
        ends = [_channels_of(self.trace, values, side) for side in (parts.branch, parts.identity)]
        joint = next(iter(parts.total.users)) if len(parts.total.users) == 1 else None
        if joint is None or called(joint) not in JOINING or not self._on_channels(values, parts.total, joint):
            return replace(parts, kind="part") if any(ends) else parts
        rest = [source for source in joint.all_input_nodes if source is not parts.total]
        if not all(set(source.all_input_nodes) & {*filter(None, ends), *parts.between} for source in rest):
            return replace(parts, kind="part")
        branch, identity = (None if end is None else (end, _slices(end)) for end in ends)
        return replace(
            parts, total=joint, end=parts.end and (branch or parts.end), taken=identity or parts.taken
        )

    def _on_channels(self, values: Values, part: fx.Node, joint: fx.Node) -> bool:
        small, large = _shape(values, part), _shape(values, joint)
        return len(small) == len(large) and _unlike(small, large) == [_channel(self.trace, values, joint)]

    def _activated(self, owner: str, node: fx.Node) -> bool:
        """Say whether an activation follows right after a sum, or after its norm or gate."""
        while len(node.users) == 1:
            (node,) = node.users
            words = self.steps.of(owner, node)
            if "act" in words and "gate" not in words:
                return True
            if node.op == "output" or (
                not words <= {"affine", "norm", "drop", "scale"} and "gate" not in words
            ):
                return False
        return False

    def _before_drops(self, owner: str, parts: _Parts, least: int = 0) -> _Parts:
        """Move the branch's end in front of dropout and stochastic depth, so that a unit there gets the whole value.

        Args:
            owner: the module whose forward makes the join.
            parts: the join.
            least: how many scales at the end of the branch to leave behind, though no drop is seen in front of them:
                those of the training graph, where a drop is a function that evaluation does not call.
        """
        if parts.end is None:
            return parts
        node, users = end = parts.end
        data = self.steps.data(owner, node.graph)
        scales = passed = 0
        while node in parts.between:
            words = self.steps.of(owner, node)
            inputs = [source for source in sources_of(node) if source in data]
            if not words <= {"drop", "scale"} or len(inputs) != 1 or inputs[0] is parts.fork:
                break
            users, node = (node,), inputs[0]
            scales += "scale" in words
            if "drop" in words or passed < scales <= least:
                end, passed = (node, users), scales
        return replace(parts, end=end, scales=passed)

    def _given(self, owner: str, total: fx.Node, identity: fx.Node, branch: fx.Node) -> _Parts | None:
        """Read an addition whose shortcut is an argument: its caller must have taken both from one value."""
        data = self.steps.data(owner, total.graph)
        upstream = computed_from([branch]) | {branch}
        inputs = [node for node in placeholders(total.graph) if node in upstream and node in data]
        if not owner or identity.op != "placeholder" or len(inputs) != 1:
            return None
        caller = self.trace.caller(owner)
        try:
            outer = self.trace.graph(caller, training=False).graph
        except FxgraftError:
            return None
        target = relative(owner, caller)
        call = next((n for n in outer.nodes if n.op == "call_module" and n.target == target), None)
        arguments = [] if call is None else call.all_input_nodes
        for source in arguments[1:]:
            way, forks = _back_to(
                source, computed_from(arguments[:1]) | {arguments[0]}, self.steps.data(caller, outer)
            )
            if len(forks) == 1 and not self.steps.all_of(caller, way) & _HEAVY:
                between = frozenset(_between(inputs[0], branch, upstream))
                return self._made(owner, total, identity, branch, inputs[0], between, caller, way)
        return None

    def _made(
        self,
        owner: str,
        total: fx.Node,
        identity: fx.Node,
        branch: fx.Node,
        fork: fx.Node,
        between: frozenset[fx.Node],
        taker: str,
        way: list[fx.Node],
    ) -> _Parts | None:
        """Read an addition whose fork is known, by what the branch does beside the shortcut, or return None.

        Args:
            owner: the module whose forward adds.
            total: the sum.
            identity: its operand that leads back to the fork.
            branch: the other one.
            fork: the value that both come from.
            between: the nodes from the fork to the end of the branch.
            taker: the module that makes the shortcut.
            way: the nodes of its graph that do.
        """
        made = self.steps.all_of(owner, between)
        linear = not made & _BENDS
        projected = "project" in self.steps.all_of(taker, way)
        if not made & _WORKS:
            return None
        if linear and projected:
            # A chain with a narrow middle is an update of low rank: an adapter in parallel to its layer.
            deeper = self.steps.depth(owner, between) > self.steps.depth(taker, way)
            if not deeper or len(self.steps.widths(owner, between)) > 1:
                return None
        ends = (branch, (total,)), (identity, (total,))
        return _Parts(
            total, identity, branch, fork, between, total, *ends, "block", linear, projected, len(way)
        )


def _listing(graph: fx.Graph) -> list[tuple[Any, ...]]:
    return [(node.op, node.name, node.target, str(node.args), str(node.kwargs)) for node in graph.nodes]


def _are_nodes(operands: tuple[Any, ...]) -> bool:
    return len(operands) == 2 and all(isinstance(operand, fx.Node) for operand in operands)


def _shape(values: Values, node: Any) -> tuple[int, ...]:
    try:
        value = values(node)
    except FxgraftError:
        return ()
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _same_shape(values: Values, first: Any, second: Any) -> bool:
    """Say whether two values have one shape: a sum that broadcasts a bias, a mask or a pooled value isn't a join."""
    shape = _shape(values, first)
    return len(shape) >= 2 and shape == _shape(values, second) and bool(values(first).is_floating_point())


def _back_to(start: fx.Node, known: set[fx.Node], data: set[fx.Node]) -> tuple[list[fx.Node], set[fx.Node]]:
    """Walk back from a value to where it meets known ones.

    Returns:
        The nodes on the way, and the known ones that it meets; the latter are empty where something on the way comes
        from elsewhere.
    """
    way: list[fx.Node] = []
    met: set[fx.Node] = set()
    waiting = [start]
    elsewhere = False
    while waiting:
        node = waiting.pop()
        if node in known:
            met.add(node)
        elif node not in way:
            way.append(node)
            waiting += [source for source in sources_of(node) if source in data]
            elsewhere = elsewhere or node.op == "placeholder"
    return way, set() if elsewhere else met


def _between(fork: fx.Node, end: fx.Node, upstream: set[fx.Node]) -> set[fx.Node]:
    """Collect the nodes on the paths from ``fork``, left out, to ``end``, included."""
    reached: set[fx.Node] = set()
    waiting = [fork]
    while waiting:
        for user in waiting.pop().users:
            if user not in reached and (user in upstream or user is end):
                reached.add(user)
                waiting.append(user)
    return reached


def _one_of_several(total: fx.Node) -> bool:
    """Say whether a sum is concatenated with sums that neither depend on it nor it on them, as in a NASNet cell."""
    for user in total.users:
        if called(user) not in JOINING:
            continue
        others = {source for source in user.all_input_nodes if source is not total and is_addition(source)}
        if others - computed_from([total]) - downstream_of(total):
            return True
    return False


def _channel(trace: ModelTrace, values: Values, node: fx.Node) -> int:
    value = values(node)
    layout = layout_of(trace, value, "", strict=False) if value.ndim > 2 else None
    return value.ndim - 1 if layout is not None and layout.channels_last else 1


def _unlike(one: tuple[int, ...], other: tuple[int, ...]) -> list[int]:
    return [i for i in range(len(one)) if one[i] != other[i]]


def _channels_of(trace: ModelTrace, values: Values, node: fx.Node) -> fx.Node | None:
    """Return the value of which a node takes some channels; None if it does something else."""
    if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
        return None
    entries = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if any(isinstance(entry, slice) and entry.step is not None for entry in entries):
        return None
    small, large = _shape(values, node), _shape(values, node.args[0])
    if len(small) != len(large) or _unlike(small, large) != [_channel(trace, values, node.args[0])]:
        return None
    return node.args[0]


def _slices(node: fx.Node) -> tuple[fx.Node, ...]:
    return tuple(user for user in node.users if user.target is operator.getitem)
