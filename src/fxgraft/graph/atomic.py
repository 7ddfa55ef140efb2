"""Nothing by half, and one at a time: acts that no interruption divides, and a lock around looking and changing.

An exception may come from anywhere and at any line: Ctrl-C, a full memory, a full disk. What is written on a model
is therefore prepared as a list of steps of compiled code and carried out by `apply_atomically`, which no line of Python
divides; and what is put back after a block is put back by `restoring`, which an interruption does not keep from it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

Step = partial[Any]
"""One write, of a function that is compiled code: ``dict.pop``, ``dict.update``, ``object.__setattr__``."""

_lock = threading.RLock()


def synchronized(function: Callable[P, R]) -> Callable[P, R]:
    """Let one thread at a time run any of the functions that are decorated so; they may call each other.

    Looking at a model and changing one replaces, for a while, what all models share (torch.fx does so while it
    traces), and takes grafts off and puts them back.
    """

    @functools.wraps(function)
    def waiting(*args: P.args, **kwargs: P.kwargs) -> R:
        # On one line, so that no interruption comes between the return and the release.
        with _lock: return function(*args, **kwargs)  # fmt: skip # noqa: E701

    return waiting


def _forked() -> None:
    """Start a forked process with a lock that nobody holds: the thread that held it is not there."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def within(
    context: AbstractContextManager[Any], function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
) -> R:
    """Call a function in a context that changes what the whole thread does, and surely leave it."""
    with context: return function(*args, **kwargs)  # fmt: skip # noqa: E701 - as above


def apply_atomically(steps: Iterable[Step]) -> None:
    """Carry out steps without a line of Python between them, so that all of them happen or none."""
    deque(map(partial.__call__, steps), maxlen=0)


def refilling(mapping: dict[Any, Any], content: dict[Any, Any] | None = None) -> list[Step]:
    """Return the steps that give a dictionary the content it has now, or another, in its order."""
    return [partial(mapping.clear), partial(mapping.update, dict(mapping if content is None else content))]


@contextlib.contextmanager
def restoring(restore: Callable[[], object]) -> Iterator[None]:
    """Run ``restore`` after the block, and once more where an interruption hit it.

    Args:
        restore: may run twice, and may find that nothing has to be put back.
    """
    done = False
    try:
        try:
            yield
        finally:
            restore()
            done = True
    finally:  # reached also when an interruption hits the inner one, at any of its lines
        if not done:
            restore()
