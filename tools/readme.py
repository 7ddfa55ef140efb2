"""The parts of the README that the registry knows: the methods, their options, their papers.

    python -m tools.readme --write    # after a change to a method
    python -m tools.readme --check    # fails where README.md says something else

A part stands between two comments that name it. Methods of other packages are left out, whatever is installed
where this runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

import fxgraft
from fxgraft.cli.method_card import option_rows
from fxgraft.errors import ConfigError
from fxgraft.io.atomic_write import write_text


def own_methods() -> dict[str, type[fxgraft.Patch]]:
    """Return the methods that come with fxgraft, by name."""
    return {
        name: method for name, method in fxgraft.methods().items() if method.__module__.startswith("fxgraft.")
    }


def method_table(methods: Mapping[str, type[fxgraft.Patch]]) -> str:
    """Return the table of methods: where each goes and what it costs."""
    rows = [
        (f"`{name}`", f"[{method.title}]({method.url})", method.where, method.cost)
        for name, method in methods.items()
    ]
    return markdown_table(("name", "method", "where it goes", "what it costs"), rows)


def option_tables(methods: Mapping[str, type[fxgraft.Patch]]) -> str:
    """Return the options of each method, folded away under its name."""
    parts = []
    for name, method in methods.items():
        rows = [
            (f"`{option}`", f"`{kind}`", f"`{default}`", text)
            for option, kind, default, text in option_rows(method)
        ]
        table = markdown_table(("option", "type", "default", "what it does"), rows)
        if method.presets:
            table += (
                f"\n\nPresets (`fxgraft info {name}`): {', '.join(f'`{each}`' for each in method.presets)}."
            )
        parts.append(f"<details>\n<summary>Options of <code>{name}</code></summary>\n\n{table}\n\n</details>")
    return "\n\n".join(parts)


def citations(methods: Mapping[str, type[fxgraft.Patch]]) -> str:
    """Return the list of papers; one that several methods come from is listed once."""
    papers: dict[str, list[type[fxgraft.Patch]]] = {}
    for method in methods.values():
        papers.setdefault(method.url, []).append(method)
    return "\n".join(
        f"- {', '.join(f'`{method.method}`' for method in sharing)}: [{sharing[0].paper}]({url})"
        for url, sharing in papers.items()
    )


PARTS: dict[str, Callable[[Mapping[str, type[fxgraft.Patch]]], str]] = {
    "methods": method_table,
    "options": option_tables,
    "citations": citations,
}
"""What writes each generated part, by its name in the markers."""


def regenerated(text: str) -> str:
    """Return a README with its generated parts written anew.

    Raises:
        ConfigError: the markers of a part are missing, or not there once.
    """
    methods = own_methods()
    for name, write in PARTS.items():
        begin = f"<!-- {name}: written by python -m tools.readme -->"
        end = f"<!-- {name}: end -->"
        before, *rest = re.split(f"{re.escape(begin)}.*?{re.escape(end)}", text, flags=re.DOTALL)
        if len(rest) != 1:
            raise ConfigError(f"The README needs one line {begin!r} and, after it, one line {end!r}.")
        text = f"{before}{begin}\n\n{write(methods)}\n\n{end}{rest[0]}"
    return text


def markdown_table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Write a table in Markdown; a bar in a cell is escaped."""
    lines = [headings, ("---",) * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def main(
    write: Annotated[bool, typer.Option("--write/--check", help="Write, or only compare.")] = False,
    path: Annotated[Path, typer.Argument(help="The README.")] = Path("README.md"),
) -> None:
    """Write the generated parts of the README anew, or check that they are up to date."""
    text = path.read_text(encoding="utf-8")
    wanted = regenerated(text)
    if write:
        write_text(path, wanted)
    elif text != wanted:
        typer.echo(f"{path} is not what the registry says: python -m tools.readme --write", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
