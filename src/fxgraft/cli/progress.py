"""Progress of long commands, with the time left: a bar on a terminal, lines in a pipe or a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES = 10
"""So many lines at most, after the first."""


@contextmanager
def progress_of(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show the progress of the block on stderr.

    Args:
        what: goes on.

    Yields:
        What to call with the number of steps done and their total.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(what)
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _lines(what: str) -> Callable[[int, int], None]:
    start = time.monotonic()
    console = Console(stderr=True, soft_wrap=True, highlight=False)

    def report(done: int, total: int) -> None:
        if done not in (1, total) and done * LINES // total == (done - 1) * LINES // total:
            return
        left = (time.monotonic() - start) / done * (total - done)
        console.print(f"{what}: {done} of {total}" + (f", about {left:.0f} s left" if done < total else ""))

    return report
