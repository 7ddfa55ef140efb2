"""From an edited trace to a forward that takes the module's own arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxgraft.errors import BypassError
from fxgraft.graph.tracing.compile import compile_graph
from fxgraft.graph.tracing.editing import (
    is_unit,
)
from fxgraft.graph.tracing.signatures import INPUT, bind
from fxgraft.graph.tracing.trace import CHECKPOINT_REGION, Traced


def restore_checkpointing(traced: Traced) -> None:
    """Put the checkpointed calls of a traced graph back under activation checkpointing.

    Tracing runs through ``torch.utils.checkpoint``, which would lose it. Each call of a child in such a
    region is checkpointed on its own, except in regions that hold a unit: what a unit draws or reads
    belongs to one forward pass, and a recomputation in backward must not repeat it.
    """
    graph = traced.graph
    nodes = list(graph.nodes)
    grafted = {
        node.meta.get(CHECKPOINT_REGION)
        for unit in nodes
        if is_unit(unit)
        for node in (*unit.all_input_nodes, *unit.users)
    }
    for node in nodes:
        region = node.meta.get(CHECKPOINT_REGION)
        if region is None or region in grafted or node.op != "call_module" or node.kwargs:
            continue
        with graph.inserting_before(node):
            child = graph.get_attr(str(node.target))
            call = graph.call_function(
                torch.utils.checkpoint.checkpoint, (child, *node.args), {"use_reentrant": False}
            )
        node.replace_all_uses_with(call)
        graph.erase_node(node)


def as_forward(traced: Traced, label: str) -> Callable[..., Any]:
    """Turn a module's edited graph into a forward that takes the module's own arguments.

    The usual call, with the tensors in front and the rest left at its default, costs nothing extra.

    Raises:
        BypassError: (when called) a non-tensor argument differs from the one the graph was traced with.
    """
    function = compile_graph(traced.graph, traced.constants, label)
    inputs = traced.fixed.count(INPUT)
    positional = len(traced.spec.children()[0].children()) if traced.fixed else 0
    simple = (
        all(value is INPUT for value in traced.fixed[:inputs])
        and positional == len(traced.fixed)
        and all(child.is_leaf() for child in traced.spec.children()[0].children())
    )
    names = list(traced.signature.parameters)

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if simple and not kwargs and len(args) == inputs:
            return function(module, *args)
        leaves, spec = pytree.tree_flatten(bind(traced.signature, args, kwargs))
        if spec != traced.spec:
            raise BypassError(
                f"{label} was called with arguments of another structure than when it was patched.\n"
                f"Its graph was traced for {traced.spec}.\nUnpatch it, or call it as the model's forward does."
            )
        given = []
        for index, (leaf, fixed) in enumerate(zip(leaves, traced.fixed, strict=True)):
            if fixed is INPUT:
                given.append(leaf)
            elif leaf is not fixed and (isinstance(leaf, Tensor) or leaf != fixed):
                shown = f"a tensor of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)
                name = names[index] if simple and index < len(names) else f"argument {index}"
                raise BypassError(
                    f"{label} was called with {name}={shown}, but its graph was traced with {fixed!r}.\n"
                    "Running the original code instead would bypass the patch in silence.\n"
                    "Unpatch it for such calls, or choose a module's output as the site."
                )
        return function(module, *given)

    return forward
