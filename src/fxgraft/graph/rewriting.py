"""Edits of a traced graph, and the way from an edited graph back to a function.

A graph is turned into Python source once and run with the *living module* as ``self``: children are looked
up by name at every call, so that a layer the user replaces is picked up, parameters stay where they are, and
a copy of the module runs the same source on its own weights.
"""

from __future__ import annotations

import itertools
import linecache
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.fx._symbolic_trace import _wrapped_fns_to_patch
from torch.utils import _pytree as pytree

from fxgraft.errors import BypassError, SiteError, candidates
from fxgraft.graph.tracing import CHECKPOINT_REGION, INPUT, Traced, bind

STATE = "_fxgraft"
"""Name under which a grafted module keeps its state; generated code reaches units through it."""

_numbers = itertools.count()


@dataclass(frozen=True)
class After:
    """Run a unit on a node's value; everything that used the value uses the unit's output.

    Attributes:
        node: name of the node in its owner's graph.
    """

    node: str


@dataclass(frozen=True)
class Edge:
    """Run a unit on a node's value as only some of its users see it, just before the first of them runs.

    Attributes:
        node: name of the node that produces the value.
        users: names of the nodes that receive the unit's output instead.
    """

    node: str
    users: tuple[str, ...]


@dataclass(frozen=True)
class Before:
    """Run a unit on one argument of a node, as that node alone sees it.

    Attributes:
        node: name of the node.
        argument: position among the node's tensor arguments.
    """

    node: str
    argument: int = 0


@dataclass(frozen=True)
class Replace:
    """Call a unit instead of a node, with the node's own arguments.

    Attributes:
        node: name of the node.
    """

    node: str


@dataclass(frozen=True)
class Span:
    """Call a unit instead of everything on the way from one value to another.

    The unit gets the first value and gives the last; nodes that only served the last one are dropped. What
    else uses values on the way keeps them.

    Attributes:
        start: name of the node whose value the unit gets.
        end: name of the node whose value the unit gives.
    """

    start: str
    end: str


@dataclass(frozen=True)
class Output:
    """Run a unit on the module's output; needs no trace of the module."""


@dataclass(frozen=True)
class Input:
    """Run a unit on the module's first argument; needs no trace of the module."""


@dataclass(frozen=True)
class Instead:
    """Call a unit in place of the module's own forward, as ``unit(module, *args, **kwargs)``.

    Needs no trace: the unit gets the living module, whose parameters and settings it may use.
    """


Edit = After | Edge | Before | Replace | Span | Input | Instead | Output
"""Everything a patch can do to a module's forward. More inputs and outputs of a pass go through its context."""


class Editor:
    """Carries out edits on one traced graph.

    Edits at one node stack in the order they are applied: each sees what the one before it left.
    """

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self._named = {node.name: node for node in traced.graph.nodes}
        self._latest: dict[fx.Node, fx.Node] = {}
        self._latest_on_edge: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
        self._dropped: set[fx.Node] = set()

    def apply(self, edit: Edit, unit: str) -> None:
        """Carry out one edit.

        Args:
            edit: what to do in the graph; `Input`, `Instead` and `Output` act outside it.
            unit: attribute path, from the module, of the unit to call.

        Raises:
            SiteError: the graph has no node of that name.
        """
        graph = self.traced.graph
        if isinstance(edit, Replace):
            node = self._node(edit.node)
            with graph.inserting_before(node):
                call = graph.call_module(unit, node.args, node.kwargs)
            node.replace_all_uses_with(call)
            graph.erase_node(node)
            self._named[edit.node] = call
            if node in self._latest:
                self._latest[call] = self._latest.pop(node)
        elif isinstance(edit, Span):
            self._replace_span(edit, unit)
        elif isinstance(edit, After):
            node = self._node(edit.node)
            value = self._latest.get(node, node)
            call = self._insert_after(value, unit)
            value.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
            self._latest[node] = call
        elif isinstance(edit, Before):
            node = self._node(edit.node)
            value = node.all_input_nodes[edit.argument]
            node.replace_input_with(value, self._insert_after(value, unit))
        elif isinstance(edit, Edge):
            node = self._node(edit.node)
            # In running order, and before a user rather than after the value: what overwrites the value in
            # between has then done so, as the user would see it.
            calls: dict[fx.Node, fx.Node] = {}
            for user in sorted(self._node(name) for name in edit.users):
                value = self._latest_on_edge.get((node, user), self._latest.get(node, node))
                if value not in calls:
                    with graph.inserting_before(user):
                        calls[value] = graph.call_module(unit, (value,))
                user.replace_input_with(value, calls[value])
                self._latest_on_edge[node, user] = calls[value]

    def _replace_span(self, edit: Span, unit: str) -> None:
        graph = self.traced.graph
        start, end = self._node(edit.start), self._node(edit.end)
        value, last = self._latest.get(start, start), self._latest.get(end, end)
        with graph.inserting_before(end):
            call = graph.call_module(unit, (value,))
        last.replace_all_uses_with(call)
        waiting = [last]
        while waiting:
            node = waiting.pop()
            if node.users or node is value or node.op == "placeholder" or node in self._dropped:
                continue
            if _is_unit(node):
                raise SiteError(
                    f"One patch acts between {edit.start!r} and {edit.end!r}, and another rewrites that.\n"
                    "The first would never run in training.\nChoose a site before or after that part."
                )
            waiting += node.all_input_nodes
            graph.erase_node(node)
            self._dropped.add(node)
        # Later edits at the end act on what the unit gives.
        self._named[edit.end] = call
        self._latest.pop(end, None)

    def _node(self, name: str) -> fx.Node:
        if name not in self._named:
            raise SiteError(
                f"There is no value {name!r} in the forward that is to be edited.\n"
                f"{candidates(name, self._named)}\nfxgraft.sites(model) lists what is there."
            )
        if self._named[name] in self._dropped:
            raise SiteError(
                f"{name!r} lies inside a part of the network that another patch rewrites in training.\n"
                "A unit there would never run.\nChoose a site before or after that part."
            )
        return self._named[name]

    def _insert_after(self, value: fx.Node, unit: str) -> fx.Node:
        graph = self.traced.graph
        with graph.inserting_after(value):
            return graph.call_module(unit, (value,))


def _is_unit(node: fx.Node) -> bool:
    return node.op == "call_module" and str(node.target).startswith((STATE + ".", "graft_"))


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
        if _is_unit(unit)
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


def _constant(value: Any) -> Callable[..., Any]:
    def constant(like: Any = None) -> Any:
        moves = isinstance(value, Tensor) and isinstance(like, Tensor)
        return value.to(like.device) if moves else value

    return constant


def compile_graph(graph: fx.Graph, constants: dict[str, Any], label: str) -> Callable[..., Any]:
    """Turn a graph into a function ``f(module, *inputs)``.

    Args:
        graph: its ``call_module`` and ``get_attr`` targets are looked up on ``module`` at every call.
        constants: tensors that the traced forward made from nothing, by the name the graph calls them; they
            follow the first input to its device.
        label: what to call the source in tracebacks.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in [n for n in graph.nodes if n.op == "get_attr" and n.target in constants]:
        with graph.inserting_before(node):
            value = graph.call_function(_constant(constants[node.target]), tuple(inputs[:1]))
        node.replace_all_uses_with(value)
        graph.erase_node(node)
    code = graph.python_code(root_module="self")
    filename = f"<fxgraft {label} {next(_numbers)}>"
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(keepends=True), filename)
    namespace = dict(code.globals)
    exec(compile(code.src, filename, "exec"), namespace)  # noqa: S102 - source generated by torch.fx
    # Taken out of its own globals, which the registry of wrapped functions holds: so it can be forgotten.
    function = namespace.pop("forward")
    wrapped = [key for key in _wrapped_fns_to_patch if key[0] == id(namespace)]
    weakref.finalize(function, _forget, filename, wrapped).atexit = False
    return function


def _forget(filename: str, wrapped: list[tuple[int, str]]) -> None:
    """Clear what the compilation of a function left in others' books, once the function is gone.

    Otherwise every patch would leave its source and its globals behind, and make all later traces slower.
    """
    linecache.cache.pop(filename, None)
    for key in wrapped:
        _wrapped_fns_to_patch.pop(key, None)


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
