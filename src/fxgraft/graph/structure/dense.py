"""Densely connected layers: each computes new channels from a joined value, and the two are concatenated.

The layer concatenates them itself, or the module that is called behind it does. It has one convolution or several, in
its own forward or in its children.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxgraft._torch import ConvNd
from fxgraft.errors import SiteError, StructureError, TraceError
from fxgraft.graph.dataflow.graph_utils import downstream_of, placeholders, upstream_of
from fxgraft.graph.names import join, relative
from fxgraft.graph.structure.site import Edits, Site, edits_of, module_site
from fxgraft.graph.tracing.editing import After, Edge
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.tracer import is_primitive

DENSE = ("conv1_pre", "conv1_post", "conv2_post")


@dataclass(frozen=True)
class _Layer:
    """A densely connected layer in one mode.

    Attributes:
        joined: what its convolutions read and what is concatenated with the channels they make.
        convs: names of the nodes of its convolutions, in running order; none where they are in parts of the layer.
        ends: whether the layer concatenates itself, in what it returns.
    """

    joined: fx.Node
    convs: tuple[str, ...]
    ends: bool

    def edit(self, position: str) -> After | Edge | None:
        """Return the edit at a position, if this forward has that position."""
        if position != "conv1_pre":
            number = 0 if position == "conv1_post" else 1
            return After(self.convs[number]) if number < len(self.convs) else None
        if self.joined.op != "placeholder":
            return After(self.joined.name)
        return Edge(self.joined.name, tuple(user.name for user in self.joined.users))


def dense_layers(trace: ModelTrace, position: str) -> list[Site]:
    """Find the densely connected layers, and the sites of one position in them."""
    sites = []
    layers: list[str] = []
    for owner in trace.in_order():
        if not _could_be_dense(trace, owner) or any(path.startswith(owner + ".") for path in layers):
            continue
        try:
            modes = [_layer(trace, owner, training) for training in (False, True)]
            if modes[0] is None or modes[1] is None:
                continue
            layers.append(owner)
            site = _position(trace, owner, position, modes[0], modes[1])
        except (TraceError, SiteError):
            continue
        sites += [] if site is None else [site]
    return sites


def _position(
    trace: ModelTrace, owner: str, position: str, evaluation: _Layer, training: _Layer
) -> Site | None:
    if position != "conv1_pre" and not evaluation.convs:
        inside = [path for path in trace.in_order() if path.startswith(owner + ".")]
        convs = [path for path in inside if isinstance(trace.module(path), ConvNd)]
        number = 0 if position == "conv1_post" else 1
        if number >= len(convs):
            return None
        site = module_site(trace, convs[number])
        edits = edits_of(trace, site)
        return dataclasses.replace(site, edits=edits, position=position, block=owner)
    edit, training_edit = evaluation.edit(position), training.edit(position)
    if edit is None or training_edit is None:
        return None
    name = f"{owner}.{edit.node}"
    return Site(
        name,
        owner,
        edit.node,
        value=trace.values(owner).get(edit.node),
        edits=Edits(owner, edit, training_edit),
        position=position,
        block=owner,
        onward=_onward(trace, owner, name) if position == "conv1_pre" and not evaluation.ends else (),
    )


def _could_be_dense(trace: ModelTrace, owner: str) -> bool:
    module = trace.module(owner)
    closed = is_primitive(module) and not any(True for _ in module.children())
    if closed or type(module) is nn.Sequential:
        return False
    return any(isinstance(inner, ConvNd) for inner in module.modules() if inner is not module)


def _layer(trace: ModelTrace, owner: str, training: bool) -> _Layer | None:
    """Read a forward as a densely connected layer, or return None."""
    graph = trace.graph(owner, training).graph
    starts = [node for node in graph.nodes if _joins(node) and _of_inputs(node)]
    returned = next(node for node in graph.nodes if node.op == "output").args[0]
    ends = None
    if isinstance(returned, fx.Node) and _joins(returned):
        ends = _base(trace, owner, returned)
    if ends is None and (len(starts) != 1 or not _joined_onward(trace, owner)):
        return None
    joined = starts[0] if ends is None else ends
    between = downstream_of(joined) & upstream_of(returned) if isinstance(returned, fx.Node) else set()
    between |= {returned} if isinstance(returned, fx.Node) and ends is None else set()
    modules = {
        node: trace.module(join(owner, str(node.target))) for node in between if node.op == "call_module"
    }
    convs = sorted(node for node, module in modules.items() if isinstance(module, ConvNd))
    if any(second not in downstream_of(first) for first, second in itertools.pairwise(convs)):
        return None
    if not any(_convolves(trace, owner, node) for node in between):
        return None
    return _Layer(joined, tuple(node.name for node in convs), ends is not None)


def _joins(node: fx.Node) -> bool:
    """Say whether a node concatenates along the channels of maps (B, C, H, W)."""
    if node.op != "call_function" or node.target not in (torch.cat, torch.concat, torch.concatenate):
        return False
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    return dim in (1, -3)


def _base(trace: ModelTrace, owner: str, returned: fx.Node) -> fx.Node | None:
    """Return which of the two parts that a layer returns the other one was computed from, if no convolution made it."""
    parts = returned.args[0] if returned.args else None
    if (
        not isinstance(parts, (list, tuple))
        or len(parts) != 2
        or not all(isinstance(p, fx.Node) for p in parts)
    ):
        return None
    nodes: list[Any] = list(parts)
    for base, new in (nodes, nodes[::-1]):
        before = {*upstream_of(base), base}
        from_input = any(node.op == "placeholder" for node in before)
        if (
            from_input
            and base in upstream_of(new)
            and not any(_convolves(trace, owner, node) for node in before)
        ):
            return base
    return None


def _convolves(trace: ModelTrace, owner: str, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    return any(isinstance(inner, ConvNd) for inner in trace.module(join(owner, str(node.target))).modules())


def _joined_onward(trace: ModelTrace, owner: str) -> bool:
    """Say whether something joins what a layer returns with something that the layer was given."""
    block = trace.caller(owner)
    called_as = relative(owner, block)
    graph = trace.graph(block, training=False).graph
    for call in (node for node in graph.nodes if node.op == "call_module" and node.target == called_as):
        arguments = set(call.all_input_nodes)
        for node in downstream_of(call):
            joins = _joins(node) or (node.op == "call_module" and len(node.all_input_nodes) > 1)
            if joins and arguments & set(node.all_input_nodes):
                return True
    return False


def _onward(trace: ModelTrace, owner: str, name: str) -> tuple[Site, ...]:
    """Find the values that a layer joins as the module around it uses them after the layer."""
    block = trace.caller(owner)
    try:
        evaluation, training = (_edges(trace, owner, block, mode) for mode in (False, True))
    except (TraceError, SiteError) as error:
        raise StructureError(
            f"{owner!r} joins its inputs, and {block or 'the model'!r} goes on using them in a way that cannot be "
            f"followed: {str(error).splitlines()[0]}\n"
            "What replaces its input before the first norm has to be what is concatenated onwards.\n"
            'Pass position="conv1_post" or "conv2_post", or layers= with names of sites.'
        ) from error
    values = trace.values(block)
    return tuple(
        Site(
            f"{name}:{index}",
            block,
            edge.node,
            value=values.get(edge.node),
            edits=Edits(block, edge, training_edge),
            position="conv1_pre",
            block=block,
        )
        for index, (edge, training_edge) in enumerate(zip(evaluation, training, strict=True))
    )


def _edges(trace: ModelTrace, owner: str, block: str, mode: bool) -> list[Edge]:
    """Return, for each value that a layer joins, the edges to what uses it after the layer."""
    inner = trace.graph(owner, mode).graph
    called_as = relative(owner, block)
    graph = trace.graph(block, mode).graph
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target == called_as]
    operands = calls[0].all_input_nodes if len(calls) == 1 else []
    inputs = placeholders(inner)
    if len(operands) != len(inputs):
        raise SiteError(
            f"it is called {len(calls)} times, with {len(operands)} values for {len(inputs)} inputs."
        )
    layer = _layer(trace, owner, mode)
    joined = [] if layer is None else layer.joined.all_input_nodes
    sources = [operands[inputs.index(node)] for node in joined]
    return [Edge(x.name, tuple(user.name for user in sorted(x.users) if calls[0] < user)) for x in sources]


def _of_inputs(node: fx.Node) -> bool:
    """Say whether a value is made of the module's own inputs and nothing else."""
    return all(source.op == "placeholder" for source in node.all_input_nodes)
