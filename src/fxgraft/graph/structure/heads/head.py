"""From a head as it is found to the edit that replaces it in training: the module around it, the two ends."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx, nn

from fxgraft.errors import SiteError, StructureError, TraceError
from fxgraft.graph.dataflow.graph_utils import scope_of
from fxgraft.graph.structure.heads.linear import made_by_hooks
from fxgraft.graph.structure.heads.outputs import logits_node
from fxgraft.graph.structure.heads.pooling import (
    DROPOUTS,
    SHAPES,
    HeadTrace,
    head_in,
    logits_before,
    opened_head,
)
from fxgraft.graph.structure.site import Site, module_site, node_sites, own_nodes
from fxgraft.graph.tracing.editing import Span
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.names import ancestors, inside, join, relative
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
        grid: (H, W) of a map of tokens as the model was observed, None for a map with dimensions of its own.
        shape: of the map, batch first, as observed.
        ndim: number of dimensions of what the span gives back.
    """

    owner: str
    classifiers: tuple[str, ...]
    span: Span
    training: HeadTrace
    evaluation: HeadTrace
    traced: Traced
    whole: Traced
    grid: tuple[int, int] | None
    shape: tuple[int, ...]
    ndim: int

    @property
    def classifier(self) -> str:
        """The classifier's name where there is exactly one, else ''."""
        return self.classifiers[0] if len(self.classifiers) == 1 else ""


def find_head(trace: ModelTrace, head: str | None = None, output: str | int | None = None) -> Head:
    """Find a model's head by its structure.

    Args:
        trace: of the bare model.
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
    wanted = {*opened, *(each for name in classifiers for each in ancestors(name))} - {owner}
    inner = tuple(sorted(relative(each, owner) for each in wanted if inside(each, owner)))
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
        end = logits_node(traced.graph, None if owner else output, owner or trace.name)
        end = logits_before(end, trace.values(owner, traced))
    training = head_in(trace, owner, traced, end)
    values = trace.values(owner, traced)
    span, ndim = _span(trace, owner, traced, training, values)
    shape = tuple(values(training.maps).shape)
    grid = token_grid(trace, traced, training.maps, training.pooling.channel, owner)
    return Head(owner, classifiers, span, training, evaluation, traced, whole, grid, shape, ndim)


def pooled_map(trace: ModelTrace, output: str | int | None = None) -> Site | None:
    """Find the map, or the tokens, whose average over all positions a linear classifier reads.

    Args:
        trace: of the bare model.
        output: which entry of a structured output holds the logits.

    Returns:
        Where the value is; None where the network has no such head (it reads a class token, a maximum, attention,
        or maps that hold classes already), or where the value cannot be named or its layout told.
    """
    try:
        traced, head, _ = opened_head(trace, output=output, entries=True)
        node = head.maps
        while _is_identity(
            trace, node
        ):  # a placeholder for an option that was not taken: name what is before it
            (node,) = node.all_input_nodes
        if not head.classifiers or node.op in ("placeholder", "get_attr"):
            return None
        path = str(node.target)
        if node.op == "call_module" and len(trace.observation.calls.get(path, [])) == 1:
            site = module_site(trace, path)
        else:
            scope = scope_of(node)
            index = own_nodes(traced.graph, scope).index(node)
            name = own_nodes(trace.graph(scope, training=False).graph, None)[index].name
            site = next(each for each in node_sites(trace, scope) if each.node == name)
    except (StructureError, TraceError, SiteError, StopIteration):
        return None
    return site if site.layout else None


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


def _span(trace: ModelTrace, owner: str, opened: Traced, head: HeadTrace, values: Values) -> tuple[Span, int]:
    """Translate a head in an opened trace to the closed trace that edits are made in."""
    closed = trace.graph(owner, training=True)
    pool = _closed(opened, closed, head.pool)
    last = head.end
    end = _closed(opened, closed, last)
    (start, *others) = [node for node in pool.all_input_nodes if node.op != "get_attr"]
    inside = _top(head.maps) == _top(head.pool) != ""
    if others or inside:
        raise StructureError(
            f"{str(pool.target)!r} of {trace.name} holds the head's pooling and layers before it.\n"
            "The map in between is not in reach of the module around the classifier.\n"
            "Replace it by a module that pools and nothing else."
        )
    ndim = values(last).ndim
    if end.op == "call_module" and _top(last):
        ndim = _shape(trace, owner, end)
        _check_after(trace, owner, last, values)
    return Span(start.name, end.name), ndim


def _shape(trace: ModelTrace, owner: str, end: fx.Node) -> int:
    return trace.observation.output(join(owner, str(end.target))).ndim


def _check_after(trace: ModelTrace, owner: str, last: fx.Node, values: Values) -> None:
    """Make sure that nothing but a change of shape follows the classifier in the module that holds it."""
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
    """Name the child, opened in the trace, that a node stands in; '' for the traced module itself."""
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
) -> tuple[int, int] | None:
    """Find the grid that the tokens of a value came from: the last map with as many cells, or a square.

    Args:
        trace: of the model.
        traced: the trace of the module ``path``.
        node: the value; one with two spatial dimensions has no need of a grid.
        channel: its channel dimension.
        path: the module that was traced.
    """
    shape = trace.values(path, traced)(node).shape
    if len(shape) != 3:
        return None
    tokens = shape[3 - channel]
    if len(trace.image_size) == 2:  # of a signal, whose tokens follow one after the other
        return 1, tokens
    recorded = [call for calls in trace.observation.calls.values() for call in calls]
    for value in (call.output for call in sorted(recorded, key=lambda call: -call.order)):
        if isinstance(value, Tensor) and value.ndim == 4:
            for height, width in (tuple(value.shape[2:]), tuple(value.shape[1:3])):
                if height * width == tokens:
                    return height, width
    side = round(tokens**0.5)
    return (side, side) if side * side == tokens else None
