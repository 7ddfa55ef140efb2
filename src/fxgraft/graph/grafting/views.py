"""Views of what grafts changed: the forward of each grafted module before and after, as code and as a graph."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import fx, nn

from fxgraft.errors import TraceError, UnknownGraftError
from fxgraft.graph.grafting.graft_registry import registry_of
from fxgraft.graph.grafting.placement import Placed, by_edge, by_rank
from fxgraft.graph.grafting.state import GraftState
from fxgraft.graph.names import STATE, class_name
from fxgraft.graph.tracing.editing import Editor, Input, Instead, Output, unit_call
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.preserve import preserved_random_state
from fxgraft.graph.tracing.regions import python_code
from fxgraft.graph.tracing.trace import Traced
from fxgraft.graph.tracing.values import shape_of

_NOISE = re.compile(r";(\s+\w+ =)+ None|(?<=\)) -> [\w.]+(?=:)|\bfxgraft_graph_tracing_[a-z]+_(?=\w+\()")
"""What torch.fx writes behind a value's last use and behind the arguments, and in front of functions of a trace."""


@dataclass(frozen=True)
class NodeView:
    """One node of a grafted module's graph.

    Attributes:
        name: the node's name, unique in its graph.
        label: what it computes, in a few words.
        graft: the graft that it belongs to; '' for a node of the network's own.
        inputs: the names of the nodes whose values it takes.
        shape: the shape of its value, with a batch of 2; None where the value is no single tensor.
    """

    name: str
    label: str
    graft: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...] | None


@dataclass(frozen=True)
class PartView:
    """One grafted module in one mode.

    Attributes:
        paths: qualified names of all modules that are changed in just this way; '' is the model.
        kind: class of the module.
        before: code of its forward without grafts.
        after: code of its forward with them.
        nodes: the grafted graph, in running order.
    """

    paths: tuple[str, ...]
    kind: str
    before: str
    after: str
    nodes: tuple[NodeView, ...]


def view_grafts(model: nn.Module, training: bool = True) -> list[PartView]:
    """Show what the grafts of a model change, module by module; what is changed alike is one entry.

    Args:
        model: a patched model; it is left as it is.
        training: the mode to look at.

    Returns:
        The grafted modules in which a graft acts in that mode, in the order of the placements.

    Raises:
        UnknownGraftError: the model is bare.
    """
    registry = registry_of(model)
    if registry is None or registry.plan is None:
        raise UnknownGraftError(f"There is no graft on this {class_name(model)}.\nPatch it first.")
    owners: dict[str, Placed] = {}
    for graft, placement in registry.plan.placements:
        if placement.training if training else placement.evaluation:
            owners.setdefault(placement.owner, []).append((graft, placement))
    views: list[PartView] = []
    look, _ = registry.look(model)
    with preserved_random_state():
        for path, placed in owners.items():
            by_rank(placed)
            trace = look.trace(placed[0][0].input_size)
            view = _view(trace, registry.plan.states[path], by_edge(placed), training)
            same = next((i for i, other in enumerate(views) if _alike(other, view)), None)
            if same is None:
                views.append(view)
            else:
                first = views[same]
                views[same] = PartView(
                    (*first.paths, path), first.kind, first.before, first.after, first.nodes
                )
    return views


def _alike(one: PartView, other: PartView) -> bool:
    return (one.kind, one.before, one.after) == (other.kind, other.before, other.after)


def _view(trace: ModelTrace, state: GraftState, placed: Placed, training: bool) -> PartView:
    names = {id(unit): name for name, unit in (*vars(state.units).items(), *state.registered.items())}
    traced = _traced(trace, state.path, training)
    graph = _one_call() if traced is None else traced.graph
    before = _code(graph)
    shapes = _shapes(trace, state.path, graph, traced)
    labels = {node.name: _label(node, trace.module(state.path)) for node in graph.nodes}
    grafts: dict[str, str] = {}
    editor = None if traced is None else Editor(traced)
    for graft, placement in placed:
        known, edit = set(graph.nodes), placement.edit
        at = getattr(edit, "end", None) or getattr(edit, "node", None)
        if isinstance(edit, (Input, Output, Instead)):
            at = None if isinstance(edit, Input) else _given_back(graph)
            _around(graph, edit, names[id(placement.unit)])
        elif editor is not None:
            editor.apply(edit, names[id(placement.unit)])
        for node in graph.nodes:
            if node not in known:
                grafts[node.name], labels[node.name] = graft.name, type(placement.unit).__name__
                source = node.all_input_nodes[0].name if node.all_input_nodes else ""
                shapes[node.name] = shapes.get(at or source)
    nodes = tuple(
        NodeView(
            node.name,
            labels[node.name],
            grafts.get(node.name, ""),
            tuple(source.name for source in node.all_input_nodes),
            shapes.get(node.name),
        )
        for node in graph.nodes
    )
    return PartView((state.path,), state.base.__name__, before, _code(graph), nodes)


def _traced(trace: ModelTrace, path: str, training: bool) -> Traced | None:
    """Trace a module's forward; None where it cannot be traced, since units around a forward need no trace."""
    try:
        return trace.fresh_graph(path, training)
    except TraceError:
        return None


def _one_call() -> fx.Graph:
    """Stand in for a forward that cannot be opened."""
    graph = fx.Graph()
    graph.output(graph.call_module("forward", (graph.placeholder("x"),)))
    return graph


def _shapes(
    trace: ModelTrace, path: str, graph: fx.Graph, traced: Traced | None
) -> dict[str, tuple[int, ...] | None]:
    if traced is None:
        return {}
    values = trace.values(path, traced)
    return {node.name: shape_of(values.get(node.name)) for node in graph.nodes if node.op != "output"}


def _around(graph: fx.Graph, edit: Input | Instead | Output, unit: str) -> None:
    """Add a unit that acts on a forward's input or output to its graph."""
    places = [node for node in graph.nodes if node.op == "placeholder"]
    (out,) = (node for node in graph.nodes if node.op == "output")
    if isinstance(edit, Input):
        with graph.inserting_after(places[-1]):
            call = unit_call(graph, unit, (places[0],))
        places[0].replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
        return
    with graph.inserting_before(out):
        call = unit_call(graph, unit, tuple(places) if isinstance(edit, Instead) else (out.args[0],))
    out.args = (call,)
    for node in reversed(list(graph.nodes)):  # what only the forward used that is replaced now
        if isinstance(edit, Instead) and not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


def _given_back(graph: fx.Graph) -> str | None:
    """Name the node whose value a forward returns; None where that is several."""
    (out,) = (node for node in graph.nodes if node.op == "output")
    return out.args[0].name if isinstance(out.args[0], fx.Node) else None


def _code(graph: fx.Graph) -> str:
    """Write a graph as the code that torch.fx makes of it, without what a reader doesn't need."""
    source = python_code(graph).src.replace(f"{STATE}.units.", "")
    start = source.index("def forward")
    lines = [_NOISE.sub("", line).rstrip() for line in source[start:].splitlines()]
    return "\n".join(line for line in lines if line)


def _label(node: fx.Node, owner: nn.Module) -> str:
    """Say what a node computes: a module by its path and class, a function by its name."""
    if node.op == "call_module":
        try:
            return f"{node.target}: {class_name(owner.get_submodule(str(node.target)))}"
        except AttributeError:
            return f"{class_name(owner)}.forward"
    if node.op == "call_function":
        return getattr(node.target, "__name__", str(node.target))
    return {"placeholder": "input", "output": "output"}.get(node.op, str(node.target))
