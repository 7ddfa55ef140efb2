"""The pooling and linear layer that a network may end in right after a site."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from fxgraft.errors import SiteError, StructureError, TraceError
from fxgraft.graph.structure.linear import made_by_hooks
from fxgraft.graph.structure.outputs import logits_node
from fxgraft.graph.structure.places import locate
from fxgraft.graph.structure.pooling import head_in
from fxgraft.graph.structure.sites import Site
from fxgraft.graph.tracing.anatomy import Anatomy
from fxgraft.graph.tracing.trace import is_primitive


@dataclass(frozen=True)
class LinearTail:
    """The rest of a network that is global average pooling, then one linear layer.

    Attributes:
        linear: qualified name of the `torch.nn.Linear`.
    """

    linear: str


def linear_tail(
    anatomy: Anatomy, site: Site, opened: tuple[str, ...], children: tuple[str, ...], output: str | int | None
) -> LinearTail | None:
    """Recognise global average pooling, flattening, dropout and one linear layer, and nothing else."""
    closed = tuple(name for name in children if not is_primitive(anatomy.module(name)))
    if len(children) > 8 or site.layout not in ("NCHW", "NHWC"):
        return None
    try:
        traced = anatomy.graph("", training=False, opened=opened, deep=closed)
        start = locate(anatomy, site, traced)
        logits = logits_node(traced.graph, output, "")
        head = head_in(anatomy, "", traced, logits)
    except (TraceError, StructureError, SiteError):
        return None
    between = head.maps
    while between is not start and len(between.users) == 1 and passes(anatomy.model, between):
        between = between.all_input_nodes[0]
    layer = head.classifier
    plain = layer is not None and type(anatomy.module(str(layer.target))) is nn.Linear
    while logits is not layer and passes(anatomy.model, logits):
        logits = logits.all_input_nodes[0]
    if between is not start or len(start.users) != 1 or not (plain and head.neutral) or layer is not logits:
        return None
    return LinearTail(str(layer.target))  # type: ignore[union-attr]


def passes(model: nn.Module, node: fx.Node) -> bool:
    """Say whether a node hands its one input on in evaluation."""
    if node.op == "call_module":
        return isinstance(model.get_submodule(str(node.target)), (nn.Identity, nn.Dropout, nn.Dropout2d))
    return getattr(node.target, "__name__", "") == "dropout"


def tail_layer(model: nn.Module, tail: LinearTail) -> nn.Linear | None:
    """Return the linear layer of a tail as the model has it now.

    None where it is no plain layer any more, or makes its weight when it is called. Other hooks are not looked at: most
    of them only read.
    """
    layer = model.get_submodule(tail.linear)
    return layer if type(layer) is nn.Linear and not made_by_hooks(layer) else None
