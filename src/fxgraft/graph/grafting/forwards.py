"""From an edited trace to a forward that takes the module's own arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch.utils.checkpoint
from torch import Tensor, nn

from fxgraft._torch import pytree
from fxgraft.errors import BypassError
from fxgraft.graph.tracing.compile import compile_graph
from fxgraft.graph.tracing.editing import (
    is_unit,
)
from fxgraft.graph.tracing.regions import REGION, region_of
from fxgraft.graph.tracing.signatures import INPUT, Declared, bind
from fxgraft.graph.tracing.trace import Traced
from fxgraft.graph.tracing.tracer import CHECKPOINT_REGION


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
        child.meta[REGION] = call.meta[REGION] = region_of(node)
        node.replace_all_uses_with(call)
        graph.erase_node(node)


class Passing(NamedTuple):
    """How a graph hands on keywords that it was not traced with.

    Attributes:
        traced: the same graph with one more keyword, called `MORE`, that it hands on to its children or not at all.
        known: keywords that the code reads by name: the graph was not traced for their values.
    """

    traced: Traced
    known: frozenset[str]


class _Form:
    """A module's edited graph as a function of the arguments that it was traced with.

    Args:
        traced: the graph.
        label: a name for the generated code.
    """

    def __init__(self, traced: Traced, label: str) -> None:
        self.function = compile_graph(traced.graph, traced.constants, label)
        # Copied out of the graph, which is done with: its nodes refer to each other and would stay in memory.
        self.spec, self.fixed = traced.spec, traced.fixed
        self.keywords = list(self.spec.children()[1].context) if self.fixed else []
        self.inputs = self.fixed.count(INPUT)
        positional = self.spec.children()[0].children() if self.fixed else ()
        self.simple = (
            all(value is INPUT for value in self.fixed[: self.inputs])
            and len(positional) == len(self.fixed)
            and all(child.is_leaf() for child in positional)
        )

    def odd(self, leaves: Sequence[Any]) -> int | None:
        """Return the index of the first argument that differs from what the graph was traced with, or None."""
        for index, (leaf, value) in enumerate(zip(leaves, self.fixed, strict=True)):
            if value is INPUT or leaf is value:
                continue
            if isinstance(leaf, Tensor) or leaf != value:
                return index
        return None

    def given(self, leaves: Sequence[Any]) -> list[Any]:
        """Return the arguments that are inputs of the graph."""
        return [leaf for leaf, value in zip(leaves, self.fixed, strict=True) if value is INPUT]


def _shown(spec: pytree.TreeSpec) -> str:
    return " ".join(str(spec).split())


def nests(args: tuple[Any, ...]) -> bool:
    """Say whether an argument holds others."""
    return any(isinstance(arg, (list, tuple, dict)) for arg in args)


def as_forward(
    traced: Traced, label: str, labelled: Sequence[Traced] = (), passing: Passing | None = None
) -> Callable[..., Any]:
    """Turn a module's edited graph into a forward that takes the module's own arguments.

    The usual call, with the tensors in front and the rest left at its default, costs nothing extra.

    Args:
        traced: the edited graph.
        label: a text that names the module and the mode, for messages.
        labelled: edited graphs for calls with labels, which the module's own forward takes.
        passing: the edited graph for calls with keywords that the module only hands on; None where they are refused.

    Raises:
        BypassError: (when called) a non-tensor argument differs from the one the graph was traced with.
    """
    usual = _Form(traced, label)
    forms = [usual, *(_Form(keywords, f"{label} with labels") for keywords in labelled)]
    signature, names = traced.signature, list(traced.signature.parameters)
    handed_on = None if passing is None else _Form(passing.traced, f"{label} with other keywords")
    known = frozenset() if passing is None else passing.known.union(names, usual.keywords)

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if usual.simple and not kwargs and len(args) == usual.inputs and not nests(args):
            return usual.function(module, *args)
        leaves, spec = pytree.tree_flatten(bind(signature, args, kwargs))
        for form in forms:
            if form.spec == spec and form.odd(leaves) is None:
                return form.function(module, *form.given(leaves))
        more = {key: value for key, value in kwargs.items() if key not in known}
        if handed_on is not None and more:
            fewer = {key: value for key, value in kwargs.items() if key in known}
            leaves, spec = pytree.tree_flatten(bind(signature, args, fewer))
            if usual.spec == spec and usual.odd(leaves) is None:
                return handed_on.function(module, *usual.given(leaves), more)
        if spec != usual.spec:
            other = [repr(key) for key in kwargs if key not in names]
            what = f" (with {', '.join(other)})" if other else ""
            raise BypassError(
                f"{label} was called with arguments of another structure than when it was patched{what}.\n"
                f"Its graph was traced for {_shown(usual.spec)}, and this call is {_shown(spec)}.\n"
                "A forward that takes a tensor or a list of them goes two ways, of which the graph holds one: join the "
                "list before (torch.cat), patch the part that gets one tensor, or call it as it was traced."
            )
        index = usual.odd(leaves) or 0
        leaf = leaves[index]
        shown = f"a tensor of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)
        name = names[index] if usual.simple and index < len(names) else f"argument {index}"
        if name in Declared.of(signature).labels:
            raise BypassError(
                f"{label} was called with {name}={shown}, and what it does with them could not be made a graph.\n"
                "The graph that the patch acts in was traced without, and gives no loss.\n"
                "Call model(x, target=y) and fxgraft.loss(model, out, y), or say before patching which loss the model "
                "computes (transformers: model.config.problem_type)."
            )
        raise BypassError(
            f"{label} was called with {name}={shown}, but its graph was traced with {usual.fixed[index]!r}.\n"
            "Running the original code instead would bypass the patch in silence.\n"
            "Unpatch it for such calls, or choose a module's output as the site."
        )

    return forward
