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
    # By themselves: the graph is of no use any more, and its nodes hold each other.
    signature, spec, fixed = traced.signature, traced.spec, traced.fixed
    inputs = fixed.count(INPUT)
    positional = len(spec.children()[0].children()) if fixed else 0
    simple = (
        all(value is INPUT for value in fixed[:inputs])
        and positional == len(fixed)
        and all(child.is_leaf() for child in spec.children()[0].children())
    )
    names = list(signature.parameters)

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if simple and not kwargs and len(args) == inputs:
            return function(module, *args)
        leaves, given_spec = pytree.tree_flatten(bind(signature, args, kwargs))
        if given_spec != spec:
            raise BypassError(
                f"{label} was called with arguments of another structure than when it was patched.\n"
                f"Its graph was traced for {spec}.\nUnpatch it, or call it as the model's forward does."
            )
        given = []
        for index, (leaf, traced_with) in enumerate(zip(leaves, fixed, strict=True)):
            if traced_with is INPUT:
                given.append(leaf)
            elif leaf is not traced_with and (isinstance(leaf, Tensor) or leaf != traced_with):
                shown = f"a tensor of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)
                name = names[index] if simple and index < len(names) else f"argument {index}"
                raise BypassError(
                    f"{label} was called with {name}={shown}, but its graph was traced with {traced_with!r}.\n"
                    "Running the original code instead would bypass the patch in silence.\n"
                    "Unpatch it for such calls, or choose a module's output as the site."
                )
        return function(module, *given)

    return forward
