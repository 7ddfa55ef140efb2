"""The pooling and linear layer that a network may end in right after a site."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from fxgraft.errors import SiteError, StructureError, TraceError
from fxgraft.graph.structure.outputs import logits_node
from fxgraft.graph.structure.pooling import head_in, is_classifier, logits_before
from fxgraft.graph.structure.site import Site, locate
from fxgraft.graph.tracing.graph_utils import modules_in
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.names import ancestors
from fxgraft.graph.tracing.regions import region_of
from fxgraft.graph.tracing.settings import acted_on, output_hooked
from fxgraft.graph.tracing.trace import is_primitive


@dataclass(frozen=True)
class LinearTail:
    """The rest of a network that is global average pooling, then one linear layer.

    Attributes:
        linear: qualified name of the `torch.nn.Linear`.
        modules: qualified names of all modules behind the site that take part in it.
        around: those of the modules that the site lies in, and its own: what their hooks change comes behind it.
    """

    linear: str
    modules: tuple[str, ...] = ()
    around: tuple[str, ...] = ()


def linear_tail(
    trace: ModelTrace,
    site: Site,
    opened: tuple[str, ...],
    children: tuple[str, ...],
    output: str | int | None,
) -> LinearTail | None:
    """Recognise global average pooling, flattening, dropout and one linear layer, and nothing else."""
    closed = tuple(name for name in children if not is_primitive(trace.module(name)))
    if len(children) > 8 or site.layout not in ("NCHW", "NHWC"):
        return None
    try:
        traced = trace.graph("", training=False, opened=opened, deep=closed)
        start = locate(trace, site, traced)
        logits = logits_before(logits_node(traced.graph, output, ""), trace.values("", traced))
        head = head_in(trace, "", traced, logits)
    except (TraceError, StructureError, SiteError):
        return None
    if any(region_of(node) for node in traced.graph.nodes if node >= start):
        return None  # the closed form knows nothing of another precision, or of gradients that end there
    between = head.maps
    passed = [head.pool, *head.between]
    while between is not start and len(between.users) == 1 and passes(trace.model, between):
        passed.append(between)
        between = between.all_input_nodes[0]
    layer = head.classifier
    plain = layer is not None and type(trace.module(str(layer.target))) is nn.Linear
    while logits is not layer and passes(trace.model, logits):
        passed.append(logits)
        logits = logits.all_input_nodes[0]
    if between is not start or len(start.users) != 1 or not (plain and head.neutral) or layer is not logits:
        return None
    around = ("", *ancestors(site.path or site.owner), site.path or site.owner)
    passed.append(logits)
    inner = tuple(dict.fromkeys(each for each in modules_in(passed) if each not in around))
    return LinearTail(str(logits.target), inner, tuple(dict.fromkeys(around)))


def passes(model: nn.Module, node: fx.Node) -> bool:
    """Say whether a node hands its one input on in evaluation."""
    if node.op == "call_module":
        return isinstance(model.get_submodule(str(node.target)), (nn.Identity, nn.Dropout, nn.Dropout2d))
    return getattr(node.target, "__name__", "") == "dropout"


def tail_layer(model: nn.Module, tail: LinearTail) -> nn.Linear | None:
    """Return the linear layer of a tail as the model has it now.

    None where more than pooling and a plain layer acts: another class of layer, hooks on one of the modules, or a
    forward of its own. Most hooks only read, but which of them cannot be known.
    """
    layer = model.get_submodule(tail.linear)
    if type(layer) is not nn.Linear or not is_classifier(layer):
        return None
    if any(acted_on(model.get_submodule(name)) for name in tail.modules):
        return None
    return None if any(output_hooked(model.get_submodule(name)) for name in tail.around) else layer
