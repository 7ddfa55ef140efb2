"""Walks over a graph: what a value reaches, what it is made from, and the part between two values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import fx


def downstream_of(node: fx.Node) -> set[fx.Node]:
    """Collect every node that a node's value reaches, without the node."""
    return _reached(node, lambda step: step.users)


def upstream_of(node: fx.Node) -> set[fx.Node]:
    """Collect every node that a node's value is made from, without the node."""
    return _reached(node, lambda step: step.all_input_nodes)


def _reached(node: fx.Node, following: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        new = [reached for reached in following(waiting.pop()) if reached not in seen]
        seen.update(new)
        waiting += new
    return seen


def cut(
    inputs: Sequence[fx.Node],
    end: fx.Node,
    also: Iterable[fx.Node] = (),
    without: Mapping[fx.Node, fx.Node] | None = None,
) -> fx.Graph:
    """Copy what a value is computed with from other values into a graph of its own.

    Args:
        inputs: the values to start from: the placeholders of the new graph, in this order.
        end: the value that the new graph returns. All it depends on must come from ``inputs`` and from attributes.
        also: nodes to copy with all that they depend on, though the end does not.
        without: nodes to leave out, with the inputs that take their places.
    """
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    needed: set[fx.Node] = set()
    waiting = [end, *also]
    while waiting:
        node = waiting.pop()
        if node not in copies and node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
    for node in sorted(needed):
        copies[node] = (
            copies[without[node]]
            if without and node in without
            else graph.node_copy(node, copies.__getitem__)
        )
    graph.output(copies[end])
    return graph


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """List the inputs of a graph."""
    return [node for node in graph.nodes if node.op == "placeholder"]


def scope_of(node: fx.Node) -> str:
    """Return the name of the module in whose forward a node was traced, '' for the module traced."""
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    if node.op == "call_module" and stack:
        stack.pop()
    return stack[-1] if stack else ""


def modules_in(nodes: Iterable[fx.Node]) -> Iterator[str]:
    """Name the modules that nodes call or were traced in, without the module traced."""
    for node in nodes:
        yield from (path for path, _ in node.meta.get("nn_module_stack", {}).values() if path)
        if node.op == "call_module":
            yield str(node.target)
