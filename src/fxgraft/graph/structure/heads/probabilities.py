"""Probabilities: a sigmoid or softmax that a model ends in. Its logits are what stands before that."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fxgraft._torch import ConvNd
from fxgraft.errors import StructureError, TraceError
from fxgraft.graph.dataflow.graph_utils import scope_of
from fxgraft.graph.names import ancestors
from fxgraft.graph.structure.heads.outputs import logits_node
from fxgraft.graph.structure.heads.pooling import DROPOUTS, SCALES, SHAPES, SQUASHING, SUMS
from fxgraft.graph.structure.heads.progressive_trace import OpaqueError, opening
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.trace import Traced
from fxgraft.graph.tracing.tracer import is_primitive
from fxgraft.graph.tracing.values import Values, describe_node, node_name, tensor_inputs

_STRAIGHT = SHAPES | DROPOUTS | {"float", "to", "double", "half", "type_as"}
_COMPUTED = (
    _STRAIGHT | SCALES | SUMS | {"sub", "rsub", "isub", "cat", "concat", "log", "log2", "exp", "clamp"}
)
_COMPUTED |= {"clip", "clamp_", "clamp_min", "interpolate", "upsample", "upsamplingbilinear2d"}


@dataclass(frozen=True)
class Squashed:
    """A model's end in probabilities.

    Attributes:
        shown: the step that gives the probabilities, for messages.
        opened: the modules whose forwards contain it.
        straight: whether only changes of shape follow, so that the model without that step gives logits.
    """

    shown: str
    opened: tuple[str, ...]
    straight: bool


def squashed_end(trace: ModelTrace, output: str | int | None, training: bool) -> Squashed | None:
    """Find out whether a model returns probabilities; None where it does not, or cannot be looked into.

    Args:
        trace: the trace of the model.
        output: which entry of a structured output is looked at.
        training: the mode.
    """

    def search(traced: Traced) -> list[fx.Node]:
        values = trace.values("", traced)
        return _squashing(trace, logits_node(values, output, trace.name), values)

    try:
        traced, nodes, _ = opening(trace, training, search, alike=True)
    except (TraceError, StructureError):
        return None
    if not nodes:
        return None
    values = trace.values("", traced)
    scopes = [
        str(node.target).rpartition(".")[0] if node.op == "call_module" else scope_of(node) for node in nodes
    ]
    opened = tuple(sorted({path for scope in scopes for path in (*ancestors(scope), scope) if path}))
    straight = squashing(logits_node(values, output, trace.name), values) is not None
    return Squashed(describe_node(nodes[0], values), opened, straight)


def squashing(end: fx.Node, values: Values) -> fx.Node | None:
    """Find the sigmoid or softmax that gives a value, behind changes of its shape; None where there is none."""
    while node_name(end, values.owner) not in SQUASHING:
        sources = tensor_inputs(end, values)
        if len(sources) != 1 or node_name(end, values.owner) not in _STRAIGHT:
            return None
        (end,) = sources
    return end


def _squashing(trace: ModelTrace, end: fx.Node, values: Values) -> list[fx.Node]:
    """List the sigmoids and softmaxes that a value is made of, if it is made of probabilities alone; else nothing."""
    waiting, seen, nodes = [end], {end}, list[fx.Node]()
    while waiting:
        node = waiting.pop()
        name = node_name(node, values.owner)
        if name in SQUASHING:
            nodes.append(node)
            continue
        module = trace.module(str(node.target)) if node.op == "call_module" else None
        if module is not None and not is_primitive(module):
            raise OpaqueError(str(node.target))
        sources = tensor_inputs(node, values)
        if not sources or name not in _COMPUTED or isinstance(module, ConvNd):
            return []
        waiting += [source for source in sources if source not in seen]
        seen.update(sources)
    return nodes
