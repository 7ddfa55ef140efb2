"""Residual joins: where a shortcut and a branch are added, found from the graphs of a model's modules.

An addition is a residual join when one operand, the identity, leads back to a value v unchanged (or through a
light projection), and the other, the branch, computes something from the same v. Attention's position biases,
rotary embeddings and the fusion of features from different places do not look like that: their operands have
no such v in common, or neither of them is v.

Four positions belong to a join: "pre" (v as the branch sees it), "residual" (the end of the branch),
"identity" (the shortcut just before the addition) and "post" (the sum).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from fxgraft.errors import SiteError, TraceError
from fxgraft.graph.tracing.anatomy import Anatomy
from fxgraft.graph.tracing.branches import iadd
from fxgraft.graph.tracing.editing import After, Edge, Edit
from fxgraft.graph.tracing.names import join, relative
from fxgraft.graph.tracing.trace import is_primitive
from fxgraft.graph.tracing.values import Values
from fxgraft.graph.tracing.walks import upstream_of

POSITIONS = ("pre", "residual", "identity", "post")

_ADDITIONS = {operator.add, operator.iadd, iadd, torch.add, "add", "add_"}
_VIEWS = {
    *(
        torch.permute,
        torch.transpose,
        torch.reshape,
        torch.flatten,
        torch.unsqueeze,
        torch.squeeze,
        torch.roll,
    ),
    *("permute", "transpose", "reshape", "view", "flatten", "contiguous", "unflatten", "clone"),
    *("unsqueeze", "squeeze"),
}
_LEARNED = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase)


@dataclass(frozen=True)
class Join:
    """One residual join.

    Attributes:
        name: the owner's qualified name and the addition's node.
        owner: qualified name of the module whose forward adds.
        edits: what to do at each position, in evaluation's graph.
        training_edits: the same in the training graph, where nodes may be named otherwise.
        values: the node in evaluation's graph whose value is found at each position.
    """

    name: str
    owner: str
    edits: dict[str, Edit]
    training_edits: dict[str, Edit]
    values: dict[str, str]


@dataclass(frozen=True)
class _Parts:
    """A join's nodes: the sum, its operands, and where the two paths fork."""

    total: fx.Node
    identity: fx.Node
    branch: fx.Node
    fork: fx.Node
    forked: tuple[fx.Node, ...] = field(default=())
    """The users of the fork that begin the branch; empty where the fork is outside this graph."""

    def edits(self) -> dict[str, Edit]:
        found: dict[str, Edit] = {
            "residual": Edge(self.branch.name, (self.total.name,)),
            "identity": Edge(self.identity.name, (self.total.name,)),
            "post": After(self.total.name),
        }
        if self.forked:
            found["pre"] = Edge(self.fork.name, tuple(user.name for user in self.forked))
        return found

    def values(self) -> dict[str, str]:
        return {
            "pre": self.fork.name,
            "residual": self.branch.name,
            "identity": self.identity.name,
            "post": self.total.name,
        }


def residual_joins(anatomy: Anatomy) -> list[Join]:
    """Find the residual joins of a model, in the order they run.

    Modules that cannot be traced are passed over: their insides cannot be edited either.
    """
    found = []
    for path in anatomy.in_order():
        module = anatomy.module(path)
        # timm keeps some blocks out of traces through them; as the root of one they can still be opened.
        closed = is_primitive(module) and not any(module.children())
        if closed or isinstance(module, (nn.Sequential, nn.MultiheadAttention)):
            continue
        try:
            found += _joins_in(anatomy, path)
        except (TraceError, SiteError):
            continue
    return found


def _joins_in(anatomy: Anatomy, owner: str) -> list[Join]:
    graph = anatomy.graph(owner, training=False).graph
    if not any(_is_addition(node) for node in graph.nodes):
        return []
    values = anatomy.values(owner)
    evaluation = [parts for parts in _find(anatomy, owner, graph) if _same_shape(values, parts)]
    if not evaluation:
        return []
    named = {p.total.name: p for p in _find(anatomy, owner, anatomy.graph(owner, training=True).graph)}
    return [
        Join(
            join(owner, p.total.name),
            owner,
            p.edits(),
            named[p.total.name].edits(),
            p.values(),
        )
        for p in evaluation
        if p.total.name in named
    ]


def _same_shape(values: Values, parts: _Parts) -> bool:
    """Say whether nothing is broadcast: a sum with a bias, a mask or a pooled value is no join."""
    a, b = values.get(parts.identity.name), values.get(parts.branch.name)
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    return a.ndim >= 2 and a.is_floating_point() and a.shape == b.shape


def _is_addition(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and node.target in _ADDITIONS


def _find(anatomy: Anatomy, owner: str, graph: fx.Graph) -> list[_Parts]:
    found: list[_Parts] = []
    for node in graph.nodes:
        if not _is_addition(node) or len(node.args) < 2:
            continue
        first, second = node.args[:2]
        if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or first is second:
            continue
        ways = [
            parts
            for identity, branch in ((first, second), (second, first))
            if (parts := _parts(anatomy, owner, node, identity, branch)) is not None
        ]
        # Both ways only where the fork lies on both operands' paths; the lighter shortcut is the identity.
        ways.sort(key=lambda parts: _weight(anatomy, owner, parts.identity, parts.fork))
        found += ways[:1]
    return found


def _parts(anatomy: Anatomy, owner: str, total: fx.Node, identity: fx.Node, branch: fx.Node) -> _Parts | None:
    """Read an addition as identity + branch, or return None."""
    upstream = _computed_from(branch)
    node: fx.Node | None = identity
    steps: list[fx.Node] = []
    while node is not None and node not in upstream and node is not branch:
        steps.append(node)
        node = _previous(anatomy, owner, node)
    if node is None:
        return _given(anatomy, owner, total, steps, branch)
    if node is branch:
        return None
    projected = sum(_learned(anatomy, owner, step) for step in steps)
    modules = [step for step in steps if not is_neutral(anatomy, owner, step)]
    between = _between(node, branch, upstream)
    work = [step for step in between if step.op == "call_module" and not is_neutral(anatomy, owner, step)]
    if not work:
        return None
    if modules:
        # Parallel convolutions of one weight (re-parametrised blocks) are no shortcut and branch.
        weight = sum(_learned(anatomy, owner, step) for step in between)
        if projected > 2 or weight < 2 or weight <= projected:
            return None
    forked = tuple(user for user in node.users if user in between)
    return _Parts(total, identity, branch, node, forked)


def _given(
    anatomy: Anatomy, owner: str, total: fx.Node, steps: list[fx.Node], branch: fx.Node
) -> _Parts | None:
    """Read an addition whose shortcut is an argument: its caller must have taken both from one value."""
    shortcut = steps[-1]
    if shortcut.op != "placeholder" or not owner:
        return None
    if any(not is_neutral(anatomy, owner, step) for step in steps[:-1]):
        return None
    upstream = upstream_of(branch)
    placeholders = [node for node in total.graph.nodes if node.op == "placeholder"]
    inputs = [node for node in placeholders if node in upstream]
    if len(inputs) != 1 or not any(
        node.op == "call_module" and not is_neutral(anatomy, owner, node) for node in upstream | {branch}
    ):
        return None
    caller = anatomy.caller(owner)
    try:
        outer = anatomy.graph(caller, training=False).graph
    except (TraceError, SiteError):
        return None
    called_as = relative(owner, caller)
    for call in outer.nodes:
        if call.op != "call_module" or call.target != called_as:
            continue
        given = call.all_input_nodes
        if len(given) < 2:
            return None
        for source in given[1:]:
            weight, node = 0, source
            sources = upstream_of(given[0]) | {given[0]}
            while node is not None and node not in sources:
                weight += _learned(anatomy, caller, node)
                node = _previous(anatomy, caller, node)
            if node is not None and weight <= 2:
                fork = inputs[0]
                between = _between(fork, branch, upstream)
                return _Parts(total, steps[0], branch, fork, tuple(u for u in fork.users if u in between))
    return None


def _previous(anatomy: Anatomy, owner: str, node: fx.Node) -> fx.Node | None:
    """Step back along a shortcut: through views, single-input modules and, inside a sum, no further."""
    sources = node.all_input_nodes
    if node.op == "call_module":
        return sources[0] if len(sources) == 1 else None
    if sources and _is_view(node):
        first = node.args[0]
        return first if isinstance(first, fx.Node) else None
    return None


def _is_view(node: fx.Node) -> bool:
    """Say whether a node only rearranges or slices its first argument; one entry of several is another value."""
    if node.target is operator.getitem:
        index = node.args[1]
        return isinstance(index, slice) or (
            isinstance(index, tuple) and any(isinstance(each, slice) for each in index)
        )
    return node.op in ("call_function", "call_method") and node.target in _VIEWS


def is_neutral(anatomy: Anatomy, owner: str, node: fx.Node) -> bool:
    """Say whether a step changes nothing about what a value is: views, dropout, identities."""
    if node.op == "placeholder":
        return True
    if node.op != "call_module":
        return _is_view(node)
    module = anatomy.module(join(owner, str(node.target)))
    if isinstance(module, (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)):
        return True
    # Stochastic depth has no common class: it is a module without tensors that keeps the training flag.
    stateless = next(iter(module.state_dict()), None) is None and not any(module.children())
    return stateless and ("drop_prob" in vars(module) or (hasattr(module, "mode") and hasattr(module, "p")))


def _learned(anatomy: Anatomy, owner: str, node: fx.Node) -> int:
    """Count the convolutions and linear layers in a step."""
    if node.op != "call_module":
        return 0
    module = anatomy.module(join(owner, str(node.target)))
    return sum(isinstance(each, _LEARNED) for each in module.modules())


def _weight(anatomy: Anatomy, owner: str, start: fx.Node, end: fx.Node) -> tuple[int, int]:
    weight = length = 0
    node: fx.Node | None = start
    while node is not None and node is not end:
        weight, length = weight + _learned(anatomy, owner, node), length + 1
        node = _previous(anatomy, owner, node)
    return weight, length


def _computed_from(end: fx.Node) -> set[fx.Node]:
    """Collect what a value is computed from; where only the size of something is read, it is not."""
    found: set[fx.Node] = set()
    waiting = [end]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in found and not _is_size(source):
                found.add(source)
                waiting.append(source)
    return found


def _is_size(node: fx.Node) -> bool:
    """Say whether a value is the size of a tensor, or arithmetic on sizes."""
    if node.op == "call_method" and node.target in ("size", "dim", "numel"):
        return True
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    return bool(node.all_input_nodes) and all(_is_size(each) for each in node.all_input_nodes)


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
