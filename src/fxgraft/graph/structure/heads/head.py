"""Finds the head of a model, and makes the edit that replaces it in training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx, nn

from fxgraft.errors import SiteError, StructureError, TraceError
from fxgraft.graph.dataflow.graph_utils import downstream_of, scope_of, upstream_of
from fxgraft.graph.names import ancestors, inside, join, relative
from fxgraft.graph.structure.heads.linear import made_by_hooks
from fxgraft.graph.structure.heads.outputs import logits_node
from fxgraft.graph.structure.heads.pooling import (
    DROPOUTS,
    SHAPES,
    HeadTrace,
    averaged_before,
    head_in,
    logits_before,
    opened_head,
)
from fxgraft.graph.structure.layout import layout_of_value
from fxgraft.graph.structure.site import Site, counterpart, module_site, node_sites, own_nodes
from fxgraft.graph.tracing.editing import Span
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.trace import Traced
from fxgraft.graph.tracing.values import Values, describe_node, node_name


@dataclass(frozen=True)
class Head:
    """Where a model's head is, and the graphs in which it was found.

    Attributes:
        owner: the smallest module whose forward holds pooling and classifier ('' is the model).
        classifiers: qualified names of the classifiers; none where the maps hold classes already.
        span: the edit that gives a unit the map and takes logits back, in the owner's training graph.
        training, evaluation: the head in the owner's training trace, and in the model's evaluation trace.
        traced: the owner's training trace, with the head opened.
        whole: the model's evaluation trace, with the head opened.
        grid: (H, W) or (T, H, W) of a map of tokens as the model was observed, None for a map with dimensions of its
            own.
        shape: the shape of the map, batch first, as observed.
        ndim: number of dimensions of what the span gives back.
        source: the map's site, if a module without the classifier pools the map, as the body of a network of
            transformers does. The span then starts at that module's output. None where the span starts at the map.
    """

    owner: str
    classifiers: tuple[str, ...]
    span: Span
    training: HeadTrace
    evaluation: HeadTrace
    traced: Traced
    whole: Traced
    grid: tuple[int, ...] | None
    shape: tuple[int, ...]
    ndim: int
    source: Site | None = None

    @property
    def classifier(self) -> str:
        """The classifier's name where there is exactly one, else ''."""
        return self.classifiers[0] if len(self.classifiers) == 1 else ""


def find_head(trace: ModelTrace, head: str | None = None, output: str | int | None = None) -> Head:
    """Find a model's head by its structure.

    Args:
        trace: the trace of the bare model.
        head: qualified name of the classifier, where the model has several.
        output: which entry of a structured output holds the logits.

    Raises:
        StructureError: no average in front of one linear classifier, or several; says what was found.
    """
    whole, evaluation, opened = opened_head(trace, head, output)
    classifiers = tuple(sorted(str(node.target) for node in evaluation.classifiers))
    for name in classifiers:
        if made_by_hooks(trace.module(name)):
            raise StructureError(
                f"The classifier {name!r} of {trace.name} makes its weight in a hook before each call "
                "(torch.nn.utils: weight_norm, spectral_norm or pruning), and here it is used without one.\n"
                "Use torch.nn.utils.parametrizations, or make the weight permanent first (remove_weight_norm, "
                "remove_spectral_norm, prune.remove)."
            )
    owner = _owner(trace, evaluation)
    wanted = {*opened, *(ancestor for name in classifiers for ancestor in ancestors(name))} - {owner}
    inner = tuple(sorted(relative(path, owner) for path in wanted if inside(path, owner)))
    traced = trace.graph(owner, training=True, opened=inner)
    if len(classifiers) == 1:
        (target,) = (relative(name, owner) for name in classifiers)
        calls = [node for node in traced.graph.nodes if node.op == "call_module" and node.target == target]
        if len(calls) != 1:
            raise StructureError(
                f"{classifiers[0]!r} is called {len(calls)} times in a training pass of {trace.name}.\n"
                "One call of the classifier can be rewritten.\nName another head, as head=..."
            )
        end = calls[0]
    else:
        inner = trace.values(owner, traced)
        end = logits_before(logits_node(inner, None if owner else output, owner or trace.name), inner)
    training = head_in(trace, owner, traced, end)
    values = trace.values(owner, traced)
    if averaged_before(training.maps, values) is not training.maps:
        raise StructureError(
            f"The head of {trace.name} averages in steps: {describe_node(training.maps, values)} averages some of the "
            f"positions, {describe_node(training.pool, values)} the rest.\n"
            "Scores by position need all of them, and some are gone after the first step.\n"
            "Average in one step, as x.mean((2, 3)) or nn.AdaptiveAvgPool2d(1) do."
        )
    span, ndim, apart = _span(trace, owner, traced, training, values)
    source = _map_site(trace, head, output) if apart else None
    if apart and source is None:
        raise _out_of_reach(trace, training.pool)
    shape = tuple(values(training.maps).shape)
    grid = token_grid(trace, traced, training.maps, training.pooling.channel, owner)
    return Head(owner, classifiers, span, training, evaluation, traced, whole, grid, shape, ndim, source)


def pooled_map(trace: ModelTrace, output: str | int | None = None) -> Site | None:
    """Find the map, or the tokens, whose average over all positions a linear classifier reads.

    Args:
        trace: the trace of the bare model.
        output: which entry of a structured output holds the logits.

    Returns:
        Where the value is; None where the network has no such head (it reads a class token, a maximum, attention,
        or maps that hold classes already), or where the value cannot be named or its layout told.
    """
    site = _map_site(trace, None, output)
    return site if site is not None and site.layout else None


def _map_site(trace: ModelTrace, classifier: str | None, output: str | int | None) -> Site | None:
    """Name the value that a head pools, by the module or the forward that gives it; None where it cannot be named."""
    calls = trace.observation.calls
    try:
        traced, head, _ = opened_head(trace, classifier, output, entries=True)
        node = head.maps
        while _is_identity(
            trace, node
        ):  # a placeholder for an option that was not taken: name what is before it
            (node,) = node.all_input_nodes
        node = averaged_before(node, trace.values("", traced))
        if not head.classifiers or node.op in ("placeholder", "get_attr"):
            return None
        path, scope = str(node.target), scope_of(node)
        if node.op == "call_module" and len(calls.get(path, [])) == 1:
            return module_site(trace, path)
        if len(calls.get(scope, [])) != 1:
            return None
        closed = own_nodes(trace.graph(scope, training=False).graph, None)
        own = counterpart(node, own_nodes(traced.graph, scope), closed)
        sites = [] if own is None else node_sites(trace, scope)
    except (StructureError, TraceError, SiteError):
        return None
    return next((candidate for candidate in sites if own is not None and candidate.node == own.name), None)


def _is_identity(trace: ModelTrace, node: fx.Node) -> bool:
    return node.op == "call_module" and type(trace.module(str(node.target))) is nn.Identity


def _owner(trace: ModelTrace, head: HeadTrace) -> str:
    """Find the smallest called module whose forward holds the pooling, the classifier and what is between."""
    nodes = [head.pool, *head.between, head.end]
    scopes = [scope_of(node).split(".") if scope_of(node) else [] for node in nodes if node.op != "get_attr"]
    shared: list[str] = []
    for parts in zip(*scopes, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    while shared and len(trace.observation.calls.get(".".join(shared), [])) != 1:
        shared.pop()
    return ".".join(shared)


def _span(
    trace: ModelTrace, owner: str, opened: Traced, head: HeadTrace, values: Values
) -> tuple[Span, int, bool]:
    """Translate a head in an opened trace to the closed trace that edits are made in.

    Returns:
        The span; the number of dimensions of its end; whether it starts behind a module that holds map and pooling.
    """
    closed = trace.graph(owner, training=True)
    pool = _closed(opened, closed, head.pool)
    last = head.end
    end = _closed(opened, closed, last)
    (start, *others) = [node for node in pool.all_input_nodes if node.op != "get_attr"]
    apart = bool(others) or _top(head.maps) == _top(head.pool) != ""
    if apart:
        start = _pooled_output(trace, owner, closed, pool, end)
        again = [node for node in head.between if _top(node) == _top(head.pool) and node.op == "call_module"]
        # Layers after the pooling in that module run there and at every position: a norm would count a batch twice.
        if any(True for node in again for _ in values.owner.get_submodule(str(node.target)).buffers()):
            raise _out_of_reach(trace, head.pool)
    ndim = values(last).ndim
    if end.op == "call_module" and _top(last):
        ndim = _shape(trace, owner, end)
        _check_after(trace, owner, last, values)
    return Span(start.name, end.name), ndim, apart


def _out_of_reach(trace: ModelTrace, pool: fx.Node) -> StructureError:
    return StructureError(
        f"{_top(pool)!r} of {trace.name} holds the head's pooling and layers around it.\n"
        "The map in between is not in reach of the module around the classifier.\n"
        "Replace it by a module that pools and nothing else."
    )


def _pooled_output(trace: ModelTrace, owner: str, closed: Traced, pool: fx.Node, end: fx.Node) -> fx.Node:
    """Find the tensor through which the classifier sees what a module around the pooling returns.

    Raises:
        StructureError: there are several.
    """
    values = trace.values(owner, closed)
    way = {pool, *downstream_of(pool)} & {end, *upstream_of(end)}
    start = min(node for node in way if isinstance(values(node), Tensor))
    if not way <= {start, *upstream_of(start), *downstream_of(start)}:
        raise StructureError(
            f"The classifier of {trace.name} sees several values of {str(pool.target)!r}, which holds the pooling.\n"
            "What takes the head's place in training gets one.\n"
            "Replace it by a module that pools and nothing else."
        )
    return start


def _shape(trace: ModelTrace, owner: str, end: fx.Node) -> int:
    return trace.observation.output(join(owner, str(end.target))).ndim


def _check_after(trace: ModelTrace, owner: str, last: fx.Node, values: Values) -> None:
    """Raise if anything but a change of shape follows the classifier in its module."""
    module = trace.module(owner)
    node = last
    while True:
        users = [user for user in node.users if _top(user) == _top(last) and user.op != "output"]
        if not users:
            return
        if len(users) > 1 or node_name(users[0], module) not in SHAPES | DROPOUTS:
            raise StructureError(
                f"{describe_node(users[0], values)} follows the classifier {str(last.target)!r}.\n"
                f"The head is rewritten up to the output of {_top(last)!r}, which is more than that classifier's.\n"
                "Build the model with one classifier, or name another head, as head=..."
            )
        node = users[0]


def _top(node: fx.Node) -> str:
    """Name the opened child in whose forward a node was traced; '' for the traced module itself."""
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    if node.op == "call_module" and stack:
        stack.pop()
    return stack[0] if stack else ""


def _closed(opened: Traced, closed: Traced, node: fx.Node) -> fx.Node:
    """Find the node of a closed trace that stands for a node of an opened one."""
    top = _top(node)
    if top or node.op == "call_module":
        target = top or node.target
        return next(n for n in closed.graph.nodes if n.op == "call_module" and n.target == target)
    own = [n for n in opened.graph.nodes if not _top(n) and n.op in ("call_function", "call_method")]
    matching = [n for n in closed.graph.nodes if n.op in ("call_function", "call_method")]
    return matching[own.index(node)]


def token_grid(
    trace: ModelTrace, traced: Traced, node: fx.Node, channel: int, path: str = ""
) -> tuple[int, ...] | None:
    """Find the grid that the tokens of a value came from: the last map with as many cells, or a square.

    Args:
        trace: the trace of the model.
        traced: the trace of the module ``path``.
        node: the value; one with two or three spatial dimensions has no need of a grid.
        channel: its channel dimension.
        path: the module that was traced.
    """
    shape = trace.values(path, traced)(node).shape
    if len(shape) != 3:
        return None
    tokens = shape[3 - channel]
    if len(trace.image_size) == 2:  # a signal: its tokens are in one row
        return 1, tokens
    recorded = [call for calls in trace.observation.calls.values() for call in calls]
    for value in (call.output for call in sorted(recorded, key=lambda call: -call.order)):
        layout = layout_of_value(value) if isinstance(value, Tensor) else None
        grid = layout.canonical(value).shape[2:] if layout is not None and layout.is_map else None
        if grid is not None and grid.numel() == tokens:
            return tuple(grid)
    side = round(tokens**0.5)
    return (side, side) if side * side == tokens and len(trace.image_size) == 3 else None
