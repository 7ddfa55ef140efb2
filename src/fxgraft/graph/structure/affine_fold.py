"""Layers that can take a scale and a shift per channel of a value into their own weights.

y = a · x + b per channel is linear. So with other weights the layer that gives x can give y exactly, and a layer that
is the only reader of x can compute what it would from y. No operation is added.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import torch
from timm.layers import norm as timm_norm
from torch import Tensor, fx, nn
from torchvision.models.convnext import LayerNorm2d

from fxgraft.errors import SiteError, StructureError, TraceError
from fxgraft.graph.dataflow.graph_utils import modules_in
from fxgraft.graph.names import ancestors, join
from fxgraft.graph.structure.heads.linear import sharers
from fxgraft.graph.structure.heads.pooling import (
    DROPOUTS,
    SHAPES,
    is_classifier,
    opened_head,
    pooling_of,
)
from fxgraft.graph.structure.layout import Layout
from fxgraft.graph.structure.rest_of_network import passes
from fxgraft.graph.structure.site import Site
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.settings import acted_on, output_hooked
from fxgraft.graph.tracing.trace import Traced
from fxgraft.graph.tracing.tracer import is_primitive
from fxgraft.graph.tracing.values import node_name

LAYERS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm),
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(timm_norm.LayerNorm, timm_norm.LayerNorm2d, timm_norm.GroupNorm, timm_norm.GroupNorm1, LayerNorm2d),
)
"""Whose forward ends in a weight and a bias per channel; other subclasses may do more."""


@dataclass(frozen=True)
class Absorber:
    """A layer that takes a scale and a shift per channel of a value into its weights.

    Attributes:
        path: qualified name of the layer.
        side: "output" where the layer gives the value, "input" where it reads it.
    """

    path: str
    side: Literal["output", "input"]

    @torch.no_grad()
    def absorb(self, model: nn.Module, scale: Tensor, shift: Tensor) -> None:
        """Change the layer's weights in place.

        Args:
            model: the network that the layer is in.
            scale: (C,), of the value's channels.
            shift: (C,).
        """
        layer = model.get_submodule(self.path)
        weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
        wide = weight.to(scale.dtype) if scale.element_size() > weight.element_size() else weight
        if self.side == "output":
            bias.copy_(bias * scale + shift)
            weight.copy_(wide * scale.view(-1, *[1] * (weight.ndim - 1)))
            return
        # In a flattened map, all cells of a channel come before those of the next.
        times = weight.shape[1] // len(scale)
        scale, shift = (vector.repeat_interleave(times) for vector in (scale, shift))
        across = (1, -1, *[1] * (weight.ndim - 2))
        bias.add_((wide * shift.view(across)).flatten(1).sum(1))
        weight.copy_(wide * scale.view(across))


def absorber_of(trace: ModelTrace, site: Site, layout: Layout) -> Absorber | None:
    """Find the layer that can take in a scale and a shift per channel of a site's value.

    That is the layer whose output the value is (a normalisation, a linear layer, a convolution), else the linear
    layer that alone reads it, through averages over all positions, changes of shape and dropout.

    Args:
        trace: the trace of the bare model.
        site: where the value is.
        layout: the layout of the value.

    Returns:
        None where there is no such layer, or where hooks act between the value and the layer: then nothing but an
        operation of its own can scale the value.
    """
    channels = layout.canonical(site.value).shape[1]
    giver = _last_of(trace, site.path)
    if site.path and site.calls == 1 and giver and _gives(trace.module(giver), channels):
        return _owned(trace, Absorber(giver, "output"))
    reader = _reader(trace, site, layout, channels)
    return _owned(trace, Absorber(reader, "input")) if reader else None


def _last_of(trace: ModelTrace, path: str) -> str:
    """Name the layer inside of a module that gives the module's output, or the module itself; '' where hooks act."""
    while path and not is_primitive(trace.module(path)):
        try:
            graph = trace.graph(path, training=False).graph
        except TraceError:
            return path
        (node,) = next(node for node in graph.nodes if node.op == "output").args
        while isinstance(node, fx.Node) and len(node.users) == 1 and passes(trace.module(path), node):
            if any(acted_on(trace.module(join(path, name))) for name in modules_in([node])):
                return ""
            node = node.all_input_nodes[0]
        # Values other than the module's output that come from the layer's output would change as well.
        if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.users) > 1:
            return path
        path = join(path, str(node.target))
        # What is placed on the outer module acts before its own hooks, and behind those of the layers in it.
        if acted_on(trace.module(path)):
            return ""
    return path


def _gives(layer: nn.Module, channels: int) -> bool:
    """Say whether a layer ends in a weight and a bias per channel."""
    bias = getattr(layer, "bias", None)
    known = type(layer) in LAYERS or is_classifier(layer)
    return known and isinstance(bias, Tensor) and bias.shape == (channels,)


def _owned(trace: ModelTrace, absorber: Absorber) -> Absorber | None:
    """Leave out a layer that computes its weight from others, runs twice, or shares it."""
    layer = trace.module(absorber.path)
    own = {name for name, _ in layer.named_parameters(recurse=False)}
    alone = next(sharers(trace.model, layer), None) is None
    once = len(trace.observation.calls.get(absorber.path, ())) == 1
    return absorber if {"weight", "bias"} <= own and alone and once else None


def _node_of(trace: ModelTrace, site: Site) -> tuple[Traced, fx.Node] | None:
    """Find a site's node, with the head opened or what is around it: whichever trace holds exactly that node."""
    outer = tuple(ancestor for ancestor in ancestors(site.path) if ancestor)
    for tracing in (lambda: opened_head(trace)[0], lambda: trace.graph("", training=False, opened=outer)):
        with suppress(StructureError, TraceError, SiteError):
            traced = tracing()
            for node in traced.graph.nodes:
                own = node.op == "call_module" and node.target == site.path and site.calls == 1
                if own or (not outer and not site.owner and not site.path and node.name == site.node):
                    return traced, node
    return None


def _reader(trace: ModelTrace, site: Site, layout: Layout, channels: int) -> str | None:
    """Follow a value to the linear layer that reads it, if nothing else does and nothing mixes its channels before."""
    opened = _node_of(trace, site)
    if opened is None:
        return None
    traced, node = opened
    values = trace.values("", traced)
    around = {site.path or site.owner, *ancestors(site.path or site.owner)} - {""}
    if any(output_hooked(trace.module(outer_path)) for outer_path in around):
        return None
    pooled = False
    while len(node.users) == 1:
        (user,) = node.users
        if user.op == "output" or any(
            acted_on(trace.module(callee)) for callee in modules_in([user]) if callee not in around
        ):
            return None
        if user.op == "call_module" and is_classifier(trace.module(str(user.target))):
            path = str(user.target)
            width = trace.module(path).get_parameter("weight").shape[1]
            # Cells stay with their channel where the channels come first and all the rest is flattened.
            whole = not width % channels and not layout.channels_last and layout.name != "NC" and not pooled
            return path if width == channels or whole else None
        average = pooling_of(user, values, weighted=True)
        name = node_name(user, trace.model)
        if average is not None and not pooled:
            pooled = True
        elif not (name in DROPOUTS | {"flatten", "identity"} or (pooled and name in SHAPES)):
            return None
        node = user
    return None
