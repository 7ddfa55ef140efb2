"""Walks over a graph: what a value reaches, what it is made from, and the part between two values."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx


def downstream_of(node: fx.Node) -> set[fx.Node]:
    """Collect every node that a node's value reaches, without the node."""
    return _reached(node, lambda each: each.users)


def upstream_of(node: fx.Node) -> set[fx.Node]:
    """Collect every node that a node's value is made from, without the node."""
    return _reached(node, lambda each: each.all_input_nodes)


def _reached(node: fx.Node, following: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        new = [each for each in following(waiting.pop()) if each not in found]
        found.update(new)
        waiting += new
    return found
