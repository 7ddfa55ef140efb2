"""The card of each method, and the table of all, on a terminal: `fxgraft info`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fxgraft.cli.method_facts import all_facts
from fxgraft.errors import no_method


def overview() -> Table:
    """Return the table of all methods: name, where it goes, what it costs."""
    headings = ("method", "what it is", "where it goes", "what it costs")
    return _table(headings, [(n, m["title"], m["where"], m["cost"]) for n, m in all_facts().items()])


def card(name: str) -> Group:
    """Return the card of one method, from what it declares; sections of which it says nothing are left out.

    Idea, equation, where it goes, cost, what it works with, when it hurts, what its diagnostics mean, reference; then
    its options and its presets.

    Raises:
        UnknownGraftError: no such method (with close matches).
    """
    methods = all_facts()
    if name not in methods:
        raise no_method(name, methods)
    method = methods[name]
    facts = Table.grid(padding=(0, 2))
    for label, fact in method["sections"].items():
        facts.add_row(Text(label, style="bold"), Text(fact))
    title = f"{name}: {method['title']}" if method["title"] else name
    parts: list[Any] = [Text(title, style="bold"), "", facts]
    if method["options"]:
        parts += ["", _table(("option", "type", "default", "what it does"), method["options"])]
    if method["presets"]:
        parts += ["", _table(("preset", "source", "options", "training"), method["presets"])]
    return Group(*parts)


def _table(headings: tuple[str, ...], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(show_lines=True)
    for heading in headings:
        table.add_column(heading)
    for row in rows:
        table.add_row(*map(Text, row))
    return table
