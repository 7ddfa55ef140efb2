"""Structure: the rest of a network after a site, and the pooling and linear layer it may end in."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from fxgraft.errors import SiteError, StructureError, TraceError
from fxgraft.graph.anatomy import Anatomy
from fxgraft.graph.context import Context
from fxgraft.graph.grafted import Capture
from fxgraft.graph.rewriting import After, Edit, Output, compile_graph
from fxgraft.graph.sites import Site, module_site
from fxgraft.graph.tracing import Traced, is_primitive, plain_settings

LOGITS_KEYS = ("out", "logits")
"""Keys under which segmentation models and transformers return their logits."""


@dataclass(frozen=True)
class LinearTail:
    """The rest of a network that is global average pooling, then one linear layer.

    Attributes:
        linear: qualified name of the `torch.nn.Linear`.
    """

    linear: str


@dataclass(frozen=True)
class Captured:
    """A value that the rest of the network needs besides the site's, recorded as the pass goes by.

    Attributes:
        key: under which it stands in ``context.values``.
        owner, edit: where a `Capture` unit records it.
    """

    key: str
    owner: str
    edit: Edit


@dataclass
class Rest:
    """The rest of a network after a site, as a function that can be evaluated on its own.

    Attributes:
        site: the site it starts from.
        function: ``f(model, z, *captured, *inputs) -> logits``, evaluation behaviour.
        captured: values from before the site that it needs.
        inputs: which of the model's own positional inputs it needs (for their shape, mostly).
        children: qualified names of the modules it calls.
        tail: set when the rest is pooling and one linear layer.
        settings: plain attributes of the modules it was traced through, by qualified name.
        identities: the modules it was traced with, to notice a replaced one.
    """

    site: Site
    function: Callable[..., Tensor]
    captured: tuple[Captured, ...]
    inputs: tuple[int, ...]
    children: tuple[str, ...]
    tail: LinearTail | None
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    identities: dict[str, nn.Module] = field(default_factory=dict)

    def stale(self, model: nn.Module) -> bool:
        """Say whether the model changed since: a module replaced, or an attribute the trace may have read."""
        try:
            if any(model.get_submodule(name) is not module for name, module in self.identities.items()):
                return True
        except AttributeError:
            return True
        return any(plain_settings(model.get_submodule(n)) != kept for n, kept in self.settings.items())

    def evaluate(self, model: nn.Module, z: Tensor, context: Context) -> Tensor:
        """Return the logits for a value ``z`` at the site.

        Args:
            model: the model of this pass.
            z: value at the site. Nothing is written to it as long as it is not used elsewhere; pass a clone.
            context: of this pass; holds the captured values and the inputs.
        """
        others = [_detached(context.values[each.key]) for each in self.captured]
        inputs = [_detached(context.inputs[index]) for index in self.inputs]
        with self.evaluation_mode(model):
            return self.function(model, z, *others, *inputs)

    @contextlib.contextmanager
    def evaluation_mode(self, model: nn.Module) -> Iterator[None]:
        """Put the modules of the rest into evaluation mode for the block: no BatchNorm update, no dropout."""
        switched = [
            each for name in self.children for each in model.get_submodule(name).modules() if each.training
        ]
        for each in switched:
            each.training = False
        try:
            yield
        finally:
            for each in switched:
                each.training = True


def _detached(value: Any) -> Any:
    """Copy what a probe must neither write to nor differentiate through."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def ancestors(path: str) -> tuple[str, ...]:
    """List the qualified names of the modules around ``path``, outermost first, without the model and itself."""
    parts = path.split(".")
    return tuple(".".join(parts[:i]) for i in range(1, len(parts)))


def _scope(node: fx.Node) -> str:
    """Return the qualified name of the module in whose forward a node was traced."""
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    if node.op == "call_module" and stack:
        stack.pop()
    return stack[-1] if stack else ""


def _own_nodes(graph: fx.Graph, scope: str | None) -> list[fx.Node]:
    """List the computing nodes of one module's forward; grafts that were placed there do not count."""
    return [
        node
        for node in graph.nodes
        if node.op not in ("placeholder", "output", "get_attr")
        and (scope is None or _scope(node) == scope)
        and not str(node.target).rpartition(".")[2].startswith("graft_")
    ]


def locate(anatomy: Anatomy, site: Site, traced: Traced) -> fx.Node:
    """Find a site's node in a trace of the whole model that opened the modules around it."""
    if site.path and site.calls == 1:
        for node in traced.graph.nodes:
            if node.op == "call_module" and node.target == site.path:
                return node
    owner = anatomy.graph(site.owner, training=False)
    local = [
        node
        for node in _own_nodes(owner.graph, None)
        if node.name == site.node or (not site.node and node.target == _relative(site.path, site.owner))
    ]
    if local:
        index = _own_nodes(owner.graph, None).index(local[0])
        matching = _own_nodes(traced.graph, site.owner)
        if index < len(matching):
            return matching[index]
    raise SiteError(
        f"{site.name!r} is not part of the model's forward pass in evaluation mode.\n"
        "The rest of the network after it cannot be evaluated.\nfxgraft.sites(model) lists what is."
    )


def _relative(path: str, owner: str) -> str:
    return path[len(owner) + 1 :] if owner else path


def site_edit(anatomy: Anatomy, site: Site) -> tuple[str, Edit]:
    """Say where a unit acts on a site's value: on the module itself where that is possible.

    Returns:
        The module to graft and the edit. A module called once, outside activation checkpointing, is grafted
        on its output, so that every way of calling it passes the unit; anything else inside its owner's graph.
    """
    if site.on_module:
        return site.path, Output()
    if site.node:
        return site.owner, After(site.node)
    relative = _relative(site.path, site.owner)
    for node in anatomy.graph(site.owner, training=True).graph.nodes:
        if node.op == "call_module" and node.target == relative:
            return site.owner, After(node.name)
    raise SiteError(
        f"{site.name!r} runs under activation checkpointing, in a region that cannot be opened.\n"
        "What a patch draws must not be drawn again when the region is recomputed in backward.\n"
        "Switch checkpointing off (model.set_grad_checkpointing(False)) or name a site outside the region."
    )


def logits_node(graph: fx.Graph, output: str | int | None, model: str) -> fx.Node:
    """Find the node that holds the logits: the output itself, or one named entry of it.

    Args:
        graph: of the whole model.
        output: key, attribute or position of the logits in a structured output; None for a plain tensor, or
            for the usual names ("out", "logits").
        model: name for messages.

    Raises:
        StructureError: the output has no such entry; lists those it has.
    """
    value = next(node for node in graph.nodes if node.op == "output").args[0]
    if isinstance(value, fx.Node) and value.op == "call_function" and isinstance(value.target, type):
        value = dict(value.kwargs) or list(value.args)
    elif isinstance(value, fx.Node):
        if output is None:
            return value
        raise StructureError(
            f"{model} returns a single value, which has no entry {output!r}.\nLeave output= out."
        )
    entries: dict[Any, Any] = dict(value) if isinstance(value, dict) else dict(enumerate(value))  # type: ignore[arg-type]
    wanted = output
    if wanted is None:
        wanted = next((key for key in LOGITS_KEYS if key in entries), None)
    if wanted not in entries or not isinstance(entries[wanted], fx.Node):
        names = ", ".join(repr(key) for key, node in entries.items() if isinstance(node, fx.Node))
        raise StructureError(
            f"{model} returns several values, and {wanted!r} is not one of them.\n"
            f"It has: {names}.\nSay which one holds the logits, as output=..."
        )
    return entries[wanted]


_CHEAP_FUNCTIONS = {getattr, operator.getitem, operator.mul, operator.add, operator.sub, operator.floordiv}
_CHEAP_METHODS = {"size", "dim"}


def _cheap(node: fx.Node) -> bool:
    """Say whether a value is arithmetic on the sizes of the model's inputs, or made from parameters alone."""
    if node.op in ("placeholder", "get_attr"):
        return True
    light = (node.op == "call_function" and node.target in _CHEAP_FUNCTIONS) or (
        node.op == "call_method" and node.target in _CHEAP_METHODS
    )
    return light and all(_cheap(each) for each in node.all_input_nodes)


def _descendants(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        for user in waiting.pop().users:
            if user not in found:
                found.add(user)
                waiting.append(user)
    return found


def _requirements(node: fx.Node) -> set[fx.Node]:
    found = {node}
    waiting = [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                waiting.append(source)
    return found


def rest_of_network(anatomy: Anatomy, site: Site, output: str | int | None = None) -> Rest:
    """Split off the rest of a model after a site.

    Args:
        anatomy: of the model, bare or with its grafts installed; those that act in evaluation are kept.
        site: where the rest starts.
        output: which entry of a structured output holds the logits.

    Raises:
        SiteError: the output does not depend on the site.
        StructureError: the output has no such entry.
        TraceError: a module around the site cannot be traced.
    """
    around = ancestors(site.path) if site.path else (*ancestors(site.owner), site.owner)
    opened = tuple(name for name in around if name)
    traced = anatomy.graph("", training=False, opened=opened)
    model = type(anatomy.model).__name__
    start = locate(anatomy, site, traced)
    logits = logits_node(traced.graph, output, model)
    downstream = _descendants(start)
    if logits not in downstream and logits is not start:
        raise SiteError(
            f"The output of {model} does not depend on {site.name!r}.\n"
            "Nothing that happens there can change a prediction.\n"
            "Choose a layer on the way from the image to the logits; fxgraft.sites(model) lists them in order."
        )
    inside = _requirements(logits) & downstream
    graph, captured, inputs = _cut(anatomy, traced, start, logits, inside)
    children = tuple(dict.fromkeys(str(n.target) for n in graph.nodes if n.op == "call_module"))
    inner = {name: anatomy.module(name) for name in children}
    return Rest(
        site,
        compile_graph(graph, traced.constants, f"rest of {model} after {site.name}"),
        captured,
        inputs,
        children,
        _linear_tail(anatomy, site, opened, children, output) if not captured and not inputs else None,
        settings=traced.settings,
        identities=inner,
    )


def _cut(
    anatomy: Anatomy,
    traced: Traced,
    start: fx.Node,
    logits: fx.Node,
    inside: set[fx.Node],
) -> tuple[fx.Graph, tuple[Captured, ...], tuple[int, ...]]:
    """Copy the nodes from ``start`` to ``logits`` into a graph of their own."""
    order = {node: index for index, node in enumerate(traced.graph.nodes)}
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    inside, frontier = set(inside), set()
    waiting = list(inside)
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source is start or source in inside or source in frontier:
                continue
            # What is not there yet when the site is reached is computed from what is; so is what costs nothing.
            if source.op != "placeholder" and (_cheap(source) or order[source] > order[start]):
                inside.add(source)
                waiting.append(source)
            else:
                frontier.add(source)
    used_inputs = [node for node in placeholders if node in frontier]
    boundary = sorted(frontier - set(used_inputs), key=order.__getitem__)
    graph = fx.Graph()
    copies = {start: graph.placeholder("z")}
    captured = []
    for index, node in enumerate(boundary):
        copies[node] = graph.placeholder(f"captured_{index}")
        owner, edit = _capture_edit(anatomy, node)
        captured.append(Captured(f"{start.name}:{node.name}", owner, edit))
    for node in used_inputs:
        copies[node] = graph.placeholder(f"input_{placeholders.index(node)}")
    for node in sorted(inside, key=order.__getitem__):
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[logits])
    return graph, tuple(captured), tuple(placeholders.index(node) for node in used_inputs)


def _capture_edit(anatomy: Anatomy, node: fx.Node) -> tuple[str, Edit]:
    """Say where a `Capture` unit records the value of a node of the whole model's trace."""
    path = str(node.target)
    if node.op == "call_module" and len(anatomy.observation.calls.get(path, [])) == 1:
        return site_edit(anatomy, module_site(anatomy, path))
    scope = _scope(node)
    index = _own_nodes(node.graph, scope).index(node)
    local = _own_nodes(anatomy.graph(scope, training=True).graph, None)
    return scope, After(local[index].name)


def captures(rest: Rest) -> list[tuple[str, Edit, str, Capture]]:
    """Make the units that record what a rest needs: (owner, edit, key, unit) each."""
    return [(each.owner, each.edit, each.key, Capture(each.key)) for each in rest.captured]


def _linear_tail(
    anatomy: Anatomy, site: Site, opened: tuple[str, ...], children: tuple[str, ...], output: str | int | None
) -> LinearTail | None:
    """Recognise global average pooling, flattening, dropout and one linear layer, and nothing else."""
    closed = tuple(name for name in children if not is_primitive(anatomy.module(name)))
    if len(children) > 8 or site.layout not in ("NCHW", "NHWC"):
        return None
    try:
        traced = anatomy.graph("", training=False, opened=opened, deep=closed)
        node = locate(anatomy, site, traced)
        logits = logits_node(traced.graph, output, "")
    except (TraceError, StructureError, SiteError):
        return None
    pooled = False
    spatial = {2, 3} if site.layout == "NCHW" else {1, 2}
    while True:
        users = list(node.users)
        if len(users) != 1 or list(users[0].all_input_nodes) != [node]:
            return None
        node = users[0]
        kind = _tail_step(anatomy.model, node, spatial, site.layout)
        if kind == "pool" and not pooled:
            pooled = True
        elif kind == "linear" and pooled:
            return LinearTail(str(node.target)) if node is logits else None
        elif kind != "neutral" and not (kind == "flatten" and pooled):
            return None


def _tail_step(model: nn.Module, node: fx.Node, spatial: set[int], layout: str) -> str:
    """Classify one node of a head: "pool", "flatten", "neutral", "linear" or "other"."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        if type(module) is nn.Linear:
            return "linear"
        if isinstance(module, (nn.Identity, nn.Dropout, nn.Dropout2d)):
            return "neutral"
        if isinstance(module, nn.Flatten):
            return "flatten" if module.start_dim == 1 else "other"
        if isinstance(module, nn.AdaptiveAvgPool2d) and layout == "NCHW":
            return "pool" if module.output_size in (1, (1, 1)) else "other"
        return "other"
    name = getattr(node.target, "__name__", node.target)
    rest = node.args[1:]
    if name == "mean":
        dims = node.kwargs.get("dim", rest[0] if len(rest) == 1 else rest)
        dims = (dims,) if isinstance(dims, int) else dims
        ints = isinstance(dims, (tuple, list)) and all(isinstance(d, int) for d in dims)
        return "pool" if ints and {d % 4 for d in dims} == spatial else "other"  # type: ignore[operator,union-attr]
    if name == "flatten":
        return "flatten" if (rest[0] if rest else node.kwargs.get("start_dim")) == 1 else "other"
    if name == "adaptive_avg_pool2d":
        return "pool" if rest and rest[0] in (1, (1, 1), [1, 1]) and layout == "NCHW" else "other"
    if name == "dropout":
        return "neutral"
    return "other"


def tail_layer(model: nn.Module, tail: LinearTail) -> nn.Linear | None:
    """Return the linear layer of a tail as the model has it now, or None when it is no plain layer any more."""
    layer = model.get_submodule(tail.linear)
    return layer if type(layer) is nn.Linear else None


__all__ = [
    "Captured",
    "LinearTail",
    "Rest",
    "ancestors",
    "captures",
    "locate",
    "logits_node",
    "rest_of_network",
    "site_edit",
    "tail_layer",
]
