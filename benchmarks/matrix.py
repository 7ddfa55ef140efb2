"""What works with what, as a table: from the file that the tests write (`pytest -m works_with --works-with FILE`)."""

from __future__ import annotations

import json
from pathlib import Path

from tools.readme import markdown_table

LOOPS = "loop: "
"""What the names of features begin with that are loops, and not tools."""


def matrix_table(path: Path, loops: bool = False) -> str:
    """Write the matrix in Markdown: a row per feature, a column per method, and the reasons of what does not work.

    Args:
        path: the file.
        loops: the rows are the loops, and not the tools.
    """
    known: dict[str, dict[str, str]] = json.loads(path.read_text(encoding="utf-8"))["features"]
    features = {
        name.removeprefix(LOOPS): said for name, said in known.items() if name.startswith(LOOPS) is loops
    }
    methods = sorted({method for found in features.values() for method in found})
    reasons = list(
        dict.fromkeys(said for found in features.values() for said in found.values() if said != "yes")
    )

    def cell(said: str | None) -> str:
        return "" if said is None else "✓" if said == "yes" else f"– ({reasons.index(said) + 1})"

    rows = [
        (feature, *(cell(found.get(method)) for method in methods)) for feature, found in features.items()
    ]
    table = markdown_table(("", *(f"`{method}`" for method in methods)), rows)
    notes = [f"{number}. {said.removeprefix('no: ')}" for number, said in enumerate(reasons, 1)]
    return "\n".join([table, "", *notes])
