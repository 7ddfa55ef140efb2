"""Searches that open modules as they meet them, one level at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from fxgraft.errors import StructureError
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.trace import Traced

Found = TypeVar("Found")


class OpaqueError(StructureError):
    """A closed module stands where a search must look inside; holds its name."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{path!r} has to be opened for this search.\nTrace the model with it opened.")
        self.path = path


def opening(
    trace: ModelTrace,
    training: bool,
    search: Callable[[Traced], Found],
    opened: tuple[str, ...] = (),
    alike: bool = False,
) -> tuple[Traced, Found, tuple[str, ...]]:
    """Search the model's trace, and again with a module opened whenever the search meets a closed one.

    Args:
        trace: the trace of the model.
        training: the mode to look at.
        search: what to look for; raises `OpaqueError` at a closed module.
        opened: modules to open from the start.
        alike: open with a module all of its class, so that a deep stack of blocks is not traced once for each.

    Returns:
        The trace, what was found in it, and the names of the modules that were opened.

    Raises:
        StructureError: a module cannot be opened, or whatever the search raises.
    """
    opened = tuple(sorted(opened))
    while True:
        traced = trace.graph("", training=training, opened=opened)
        try:
            return traced, search(traced), opened
        except OpaqueError as closed:
            if closed.path in opened:
                raise StructureError(
                    f"{closed.path!r} of {trace.name} cannot be opened to look inside.\n"
                    "The model arrived as a graph in which it is one call.\n"
                    "Patch the model that the graph was made from."
                ) from closed
            opened = tuple(sorted({*opened, closed.path, *(_alike(trace, closed.path) if alike else ())}))


def _alike(trace: ModelTrace, path: str) -> list[str]:
    wanted = type(trace.module(path))
    return [name for name, module in trace.model.named_modules() if name and type(module) is wanted]
