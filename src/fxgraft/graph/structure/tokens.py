"""Tokens: the grid they came from, and whether anything but the class tokens among them is read."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from timm.layers import drop, layer_scale, mlp
from torch import Tensor, fx, nn
from torchvision.models.vision_transformer import MLPBlock

from fxgraft.graph.tracing.anatomy import Anatomy
from fxgraft.graph.tracing.branches import iadd, imul
from fxgraft.graph.tracing.trace import Traced

_LAYERS = (nn.LayerNorm, nn.RMSNorm, nn.Linear, nn.Identity, nn.Dropout)
_BLOCKS = (mlp.Mlp, mlp.GluMlp, mlp.SwiGLU, MLPBlock, layer_scale.LayerScale, drop.DropPath)
_FUNCTIONS = {operator.add, iadd, operator.mul, imul, torch.add, torch.mul, F.dropout}


def token_grid(
    anatomy: Anatomy, traced: Traced, node: fx.Node, channel: int, path: str = ""
) -> tuple[int, int] | None:
    """Find the grid that the tokens of a value came from: the last map with as many cells, or a square.

    Args:
        anatomy: of the model.
        traced: the trace of the module ``path``.
        node: the value; one with two spatial dimensions has no need of a grid.
        channel: its channel dimension.
        path: the module that was traced.
    """
    shape = anatomy.values(path, traced)(node).shape
    if len(shape) != 3:
        return None
    tokens = shape[3 - channel]
    recorded = [call for calls in anatomy.observation.calls.values() for call in calls]
    for value in (call.output for call in sorted(recorded, key=lambda call: -call.order)):
        if isinstance(value, Tensor) and value.ndim == 4:
            for height, width in (tuple(value.shape[2:]), tuple(value.shape[1:3])):
                if height * width == tokens:
                    return height, width
    side = round(tokens**0.5)
    return (side, side) if side * side == tokens else None


def reads_prefix_only(
    model: nn.Module, node: fx.Node, inside: set[fx.Node], prefix: int, users: Iterable[fx.Node] | None = None
) -> bool:
    """Say whether what follows a sequence of tokens takes its first ``prefix`` tokens and no other.

    Followed through what treats every token by itself, up to where tokens are picked; anything else may mix them.

    Args:
        model: whose graph it is.
        node: the tokens.
        inside: the nodes on the way to the logits.
        prefix: how many class and register tokens come first.
        users: the only nodes to look at that use the tokens; by default all inside.
    """
    users = [user for user in (node.users if users is None else users) if user in inside]
    for user in users:
        if user.target is operator.getitem:
            picked = user.args[1]
            token = picked[1] if isinstance(picked, tuple) and len(picked) > 1 else None
            first = token.start or 0 if isinstance(token, slice) else token
            last = token.stop if isinstance(token, slice) else token
            # A length that the forward reads off a tensor is a node here: from the front, it counts the prefix.
            if not (isinstance(first, int) and 0 <= first < prefix) or last is None:
                return False
            if isinstance(last, int) and not 0 < last + (not isinstance(token, slice)) <= prefix:
                return False
            continue
        alone = user.target in _FUNCTIONS
        if user.op == "call_module":
            module = model.get_submodule(str(user.target))
            alone = isinstance(module, _LAYERS) or type(module) in _BLOCKS
        if not alone or not reads_prefix_only(model, user, inside, prefix):
            return False
    return bool(users)
