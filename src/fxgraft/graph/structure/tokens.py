"""Tokens: the grid they came from."""

from __future__ import annotations

from torch import Tensor, fx

from fxgraft.graph.tracing.anatomy import Anatomy
from fxgraft.graph.tracing.trace import Traced


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
