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

from fxgraft.errors import UnknownGraftError, candidates
from fxgraft.patches.options import option_hints

_SECTION = re.compile(r"^(Args|Attributes):\s*$")
_ENTRY = re.compile(r"^(\w+)(?: \([^)]*\))?:\s*(.*)$")


def overview() -> Table:
    """Return the table of all methods: name, where it goes, what it costs."""
    headings = ("method", "what it is", "where it goes", "what it costs")
    return _table(headings, [(n, m.title, m.where, m.cost) for n, m in _methods().items()])


def card(name: str) -> Group:
    """Return the card of one method, from what it declares; sections of which it says nothing are left out.

    Idea, equation, where it goes, cost, what it works with, when it hurts, what its diagnostics mean, reference; then
    its options and its presets.

    Raises:
        UnknownGraftError: no such method (with close matches).
    """
    methods = _methods()
    if name not in methods:
        raise UnknownGraftError(f"There is no method {name!r}. {candidates(name, methods)}")
    method = methods[name]
    facts = Table.grid(padding=(0, 2))
    for label, fact in card_sections(method).items():
        facts.add_row(Text(label, style="bold"), Text(fact))
    parts: list[Any] = [Text(f"{name}: {method.title}" if method.title else name, style="bold"), "", facts]
    rows = option_rows(method)
    if rows:
        parts += ["", _table(("option", "type", "default", "what it does"), rows)]
    if method.presets:
        parts += ["", _table(("preset", "source", "options", "training"), preset_rows(method))]
    return Group(*parts)


def card_sections(method: Any) -> dict[str, str]:
    """List what a method says of itself, by the label on its card."""
    acts = "in training only" if method.train_only else "in training and in evaluation"
    labels = "needs labels in training" if method.needs_labels else "needs no labels"
    own = "adds parameters" if method.adds_parameters else "adds no parameters"
    shown = "" if method.picture is _patch().picture else f"fxgraft show {method.method} IMAGE"
    found = {
        "idea": method.idea or _description(method),
        "equation": method.equation,
        "where": method.where,
        "acts": f"{acts}; {labels}; {own}",
        "cost": method.cost,
        "works with": method.works_with,
        "not beside": "\n".join(_not_beside(method)),
        "hurts": method.hurts,
        "diagnostics": "\n".join(f"{key}: {meaning}" for key, meaning in method.measures.items()),
        "picture": shown,
        "reference": "\n".join(filter(None, (method.paper, method.url))),
    }
    return {label: fact for label, fact in found.items() if fact}


def _description(method: type) -> str:
    """Return what a class docstring says before its first section, without line breaks inside paragraphs."""
    doc = inspect.cleandoc(method.__dict__.get("__doc__") or "")
    if doc.startswith(f"{method.__name__}("):  # what dataclasses write where the author wrote nothing
        return ""
    text = re.split(r"^[A-Z]\w+:\s*$", doc, maxsplit=1, flags=re.MULTILINE)[0].strip()
    return "\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _table(headings: tuple[str, ...], rows: list[Any]) -> Table:
    table = Table(show_lines=True)
    for heading in headings:
        table.add_column(heading)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


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
    documented, hints = option_docs(method), option_hints(method)
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


def _patch() -> Any:
    import fxgraft

    return fxgraft.Patch


def _not_beside(method: Any) -> list[str]:
    from fxgraft.patches.registry import not_beside

    return not_beside(method)


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
