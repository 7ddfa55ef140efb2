"""A look ahead: the logits for another value at a site, in the middle of a pass that notices nothing of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fxgraft._torch import fsdp_state_before_backward
from fxgraft.graph.grafting.unit import PassView
from fxgraft.graph.structure.rest_of_network import Rest


def look_ahead(run: PassView, rest: Rest, z: Tensor) -> Tensor:
    """Return the logits for a value at the site that a `Rest` starts from; nothing else notices.

    Args:
        run: the pass, as the graft sees it that captured what else the rest needs.
        rest: the rest of the network.
        z: the value. Nothing is written to it as long as it is not used elsewhere; pass a clone.
    """
    captured = [run.get(each.name) for each in rest.captured]
    inputs = [run.inputs[index] for index in rest.inputs]
    with run.model_pass.aside(), _outside_sharded_step(run.model, rest.children):
        return rest.evaluate(run.model, z, captured, inputs, run.model_pass.calls)


@contextlib.contextmanager
def _outside_sharded_step(model: nn.Module, children: tuple[str, ...]) -> Iterator[None]:
    """Keep what runs in the block out of the step that FSDP2 is in the middle of.

    FSDP2 ends its step in a callback of the first backward that passes its modules, which would be that of
    a look ahead: the parameters of the model would be sharded again in the middle of its forward. Modules that
    are in their backward already are run plainly, as activation checkpointing needs it, so they are made to look
    like that.
    """
    sharded = [
        part
        for name in children
        for part in model.get_submodule(name).modules()
        if hasattr(type(part), "_get_fsdp_state")
    ]
    if not sharded:
        yield
        return
    states: list[Any] = [part._get_fsdp_state() for part in sharded]  # type: ignore[operator]
    before = [state._training_state for state in states]
    for part, state in zip(sharded, states, strict=True):
        part.unshard()  # type: ignore[operator]
        state._training_state = fsdp_state_before_backward()
    try:
        yield
    finally:
        for state, kept in zip(states, before, strict=True):
            state._training_state = kept
