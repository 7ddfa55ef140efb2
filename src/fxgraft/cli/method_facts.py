"""What the methods declare, as plain data: for `fxgraft info`, the documentation and what the shell completes.

The facts of the built-in methods stand in ``method_facts.json`` as well, which ``python -m tools generate`` writes: the
command line then knows them without importing torch, which takes seconds.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
import types
import typing
from importlib import metadata
from pathlib import Path
from typing import Any

STORED = Path(__file__).with_name("method_facts.json")

_SECTION = re.compile(r"^(Args|Attributes):\s*$")
_ENTRY = re.compile(r"^(\w+)(?: \([^)]*\))?:\s*(.*)$")


def all_facts() -> dict[str, dict[str, Any]]:
    """Return the facts of every method, by name; see `facts_of`.

    They are read from the file where nobody else can have registered a method: no package offers any, and the registry
    is not imported.
    """
    if "fxgraft.patches.registry" in sys.modules or metadata.entry_points(group="fxgraft.patches"):
        from fxgraft.patches.registry import methods

        return {name: facts_of(method) for name, method in methods().items()}
    return json.loads(STORED.read_text(encoding="utf-8"))


def measured_costs() -> dict[str, dict[str, float]]:
    """Return what the built-in methods cost on a ResNet-50, as multiples of the bare network's time, by name."""
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    return {name: facts["measured"] for name, facts in stored.items()}


def facts_of(method: Any) -> dict[str, Any]:
    """Return what a method declares: title, where, cost, the sections of its card, and rows of options and presets."""
    return {
        "title": method.title,
        "where": method.where,
        "cost": method.cost,
        "sections": card_sections(method),
        "options": option_rows(method),
        "presets": preset_rows(method),
    }


def card_sections(method: Any) -> dict[str, str]:
    """List what a method says of itself, by the label on its card."""
    from fxgraft.patches.base import Patch
    from fxgraft.patches.registry import not_beside

    acts = "in training only" if method.train_only else "in training and in evaluation"
    labels = "needs labels in training" if method.needs_labels else "needs no labels"
    own = "adds parameters" if method.adds_parameters else "adds no parameters"
    shown = "" if method.picture is Patch.picture else f"fxgraft show effect {method.method} IMAGE"
    facts = {
        "idea": method.idea or _description(method),
        "equation": method.equation,
        "where": method.where,
        "acts": f"{acts}; {labels}; {own}",
        "cost": method.cost,
        "works with": method.works_with,
        "not beside": "\n".join(not_beside(method)),
        "hurts": method.hurts,
        "diagnostics": "\n".join(f"{key}: {meaning}" for key, meaning in method.measures.items()),
        "picture": shown,
        "reference": "\n".join(filter(None, (method.paper, method.url))),
    }
    return {label: fact for label, fact in facts.items() if fact}


def _description(method: type) -> str:
    """Return what a class docstring says before its first section, without line breaks inside paragraphs."""
    doc = inspect.cleandoc(method.__dict__.get("__doc__") or "")
    if doc.startswith(f"{method.__name__}("):  # what dataclasses write where the author wrote nothing
        return ""
    text = re.split(r"^[A-Z]\w+:\s*$", doc, maxsplit=1, flags=re.MULTILINE)[0].strip()
    return "\n".join(" ".join(part.split()) for part in text.split("\n\n"))


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
    from fxgraft.patches.options import option_hints

    documented, hints = option_docs(method), option_hints(method)
    return [
        (field.name, _type(hints[field.name]), _default(field), documented.get(field.name, ""))
        for field in dataclasses.fields(method)
    ]


def option_docs(cls: type) -> dict[str, str]:
    """Read the options' documentation from the docstrings of a class and its bases."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base is not object and "__doc__" in vars(base):
            docs |= _entries(inspect.cleandoc(base.__doc__ or ""))
    return docs


def _entries(doc: str) -> dict[str, str]:
    """Return the entries of the Args or Attributes section of a Google docstring, each as one line."""
    entries: dict[str, str] = {}
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
                entries[current] = text
            elif current:
                entries[current] = f"{entries[current]} {line.strip()}".strip()
    return entries


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
