"""Edits of a traced graph: each is a value that says what to do, and the editor carries it out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from fxgraft.errors import SiteError, candidates
from fxgraft.graph.names import UNIT
from fxgraft.graph.tracing.regions import REGION, region_of
from fxgraft.graph.tracing.trace import Traced


@dataclass(frozen=True)
class After:
    """Run a unit on a node's value; everything that used the value uses the unit's output.

    Attributes:
        node: name of the node in its owner's graph.
        last: run it behind all other units on that value, whenever they were added.
    """

    node: str
    last: bool = False


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

    Edits at one node stack in the order they are applied: each sees what the one before it left. `After` with
    ``last`` stays behind all others.
    """

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self._named = {node.name: node for node in traced.graph.nodes}
        self._latest: dict[fx.Node, fx.Node] = {}
        self._ends: dict[fx.Node, fx.Node] = {}
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
                call = unit_call(graph, unit, node.args, node.kwargs, like=node)
            node.replace_all_uses_with(call)
            graph.erase_node(node)
            self._named[edit.node] = call
            for known in (self._latest, self._ends):
                if node in known:
                    known[call] = known.pop(node)
        elif isinstance(edit, Span):
            self._replace_span(edit, unit)
        elif isinstance(edit, After):
            node = self._node(edit.node)
            value = self._latest.get(node, node)
            call = self._insert_after(value, unit)
            value.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
            if edit.last:
                self._ends.setdefault(node, call)
            else:
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
                end = self._ends.get(node, self._latest.get(node, node))
                value = self._latest_on_edge.get((node, user), end)
                if value not in calls:
                    with graph.inserting_before(user):
                        calls[value] = unit_call(graph, unit, (value,), like=user)
                user.replace_input_with(value, calls[value])
                self._latest_on_edge[node, user] = calls[value]

    def _replace_span(self, edit: Span, unit: str) -> None:
        graph = self.traced.graph
        start, end = self._node(edit.start), self._node(edit.end)
        value, last = self._latest.get(start, start), self._latest.get(end, end)
        with graph.inserting_before(end):
            call = unit_call(graph, unit, (value,), like=end)
        last.replace_all_uses_with(call)
        waiting = [last]
        while waiting:
            node = waiting.pop()
            if node.users or node is value or node.op == "placeholder" or node in self._dropped:
                continue
            if region_of(node) != region_of(end):
                raise SiteError(
                    f"Part of what lies between {edit.start!r} and {edit.end!r} runs under another grad mode or "
                    "autocast.\nWhat replaces it in training would run under one.\n"
                    "Leave that mode around the whole of it, or around none."
                )
            if is_unit(node):
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
            return unit_call(graph, unit, (value,), like=value)


def unit_call(
    graph: fx.Graph,
    unit: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    like: fx.Node | None = None,
) -> fx.Node:
    """Add a call of a unit at the graph's insert point. The unit goes by the name that its owner reaches it under."""
    call = graph.call_module(unit, args, kwargs)
    call.meta[UNIT] = True
    if like is not None:  # it runs under the grad mode and autocast of that node
        call.meta[REGION] = region_of(like)
    return call


def is_unit(node: fx.Node) -> bool:
    """Say whether a node calls a unit. The name isn't enough: a model may have a module of such a name."""
    return node.meta.get(UNIT, False)
