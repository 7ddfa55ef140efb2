"""What the registry knows about each method, as tables: `fxgraft info`."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fxgraft.errors import UnknownMethodError, candidates

_SECTION = re.compile(r"^(Args|Attributes):\s*$")
_ENTRY = re.compile(r"^(\w+)(?: \([^)]*\))?:\s*(.*)$")


def overview() -> Table:
    """Return the table of all methods: name, where it goes, what it costs."""
    table = Table(show_lines=True)
    for heading in ("method", "what it is", "where it goes", "what it costs"):
        table.add_column(heading)
    for name, method in _methods().items():
        table.add_row(*map(Text, (name, method.title, method.where, method.cost)))
    return table


def card(name: str) -> Group:
    """Return the card of one method: what it is, where it goes, what it costs, its options and its presets.

    Raises:
        UnknownMethodError: no such method (with close matches).
    """
    methods = _methods()
    if name not in methods:
        raise UnknownMethodError(f"There is no method {name!r}. {candidates(name, methods)}")
    method = methods[name]
    facts = Table.grid(padding=(0, 2))
    for label, fact in {
        name: method.title,
        "paper": f"{method.paper} {method.url}",
        "where": method.where,
        "cost": method.cost,
        "acts": "in training only" if method.train_only else "in training and in evaluation",
        "labels": "needed in training" if method.needs_labels else "not needed",
        "parameters": "adds its own" if method.adds_parameters else "adds none",
    }.items():
        facts.add_row(Text(label, style="bold"), Text(fact))
    options = Table(show_lines=True)
    for heading in ("option", "type", "default", "what it does"):
        options.add_column(heading)
    for row in option_rows(method):
        options.add_row(*map(Text, row))
    if not method.presets:
        return Group(facts, options)
    presets = Table(show_lines=True)
    for heading in ("preset", "source", "options", "training"):
        presets.add_column(heading)
    for row in preset_rows(method):
        presets.add_row(*map(Text, row))
    return Group(facts, options, presets)


def preset_rows(method: Any) -> list[tuple[str, str, str, str]]:
    """List the presets of a method, each as name, source, the options that it sets, and how it was trained."""
    rows = []
    for name, preset in method.presets.items():
        settings = [f"{key}={_value(value)}" for key, value in preset.options.items()]
        asked = [f"{key}=… (yours)" for key in preset.needs]
        rows.append((name, preset.source, ", ".join(settings + asked), str(preset.training)))
    return rows


def option_rows(method: type) -> list[tuple[str, str, str, str]]:
    """List the options of a method, each as name, type, default and what it does."""
    documented, hints = option_docs(method), typing.get_type_hints(method)
    return [
        (field.name, _type(hints[field.name]), _default(field), documented.get(field.name, ""))
        for field in dataclasses.fields(method)
    ]


def option_docs(cls: type) -> dict[str, str]:
    """Read the options' documentation from the docstrings of a class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base is not object and "__doc__" in vars(base):
            found |= _entries(inspect.cleandoc(base.__doc__ or ""))
    return found


def _entries(doc: str) -> dict[str, str]:
    """Return the entries of the Args or Attributes section of a Google docstring, each as one line."""
    found: dict[str, str] = {}
    inside, depth, current = False, None, ""
    for line in doc.splitlines():
        indent = len(line) - len(line.lstrip())
        if line and not indent:
            inside, depth = bool(_SECTION.match(line)), None
        elif inside and line.strip():
            depth = indent if depth is None else depth
            entry = _ENTRY.match(line.strip()) if indent == depth else None
            if entry:
                current, text = entry.groups()
                found[current] = text
            elif current:
                found[current] = f"{found[current]} {line.strip()}".strip()
    return found


def _methods() -> dict[str, Any]:
    import fxgraft

    return dict(fxgraft.methods())


def _type(hint: Any) -> str:
    """Write a type hint as its values where it is a choice, and without module names where it is not."""
    if hint is type(None):
        return "None"
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(repr, arguments))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(map(_type, arguments))
    return re.sub(r"\b(?:\w+\.)+", "", inspect.formatannotation(hint))


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    return _value(value)


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else repr(value)
