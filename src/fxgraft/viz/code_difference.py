"""The code that a patch changed in a model, as text: each grafted forward before and after."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence

from rich.text import Text

from fxgraft.graph.grafting.views import PartView

_COLOURS = {"+": "green", "-": "red", " ": "dim"}


def difference(part: PartView) -> Iterator[Text]:
    """Write one grafted module as lines: what went with a minus, what came with a plus, the rest as it is."""
    names = [path or "the model" for path in part.paths]
    yield Text(f"{part.kind}: {', '.join(names)}", style="bold")
    before, after = part.before.splitlines(), part.after.splitlines()
    for line in difflib.ndiff(before, after):
        if line[0] in _COLOURS:
            yield Text(f"{line[0]} {line[2:]}", style=_COLOURS[line[0]])


def differences(parts: Sequence[PartView]) -> Text:
    """Write all grafted modules, one below the other."""
    return Text("\n\n").join(Text("\n").join(difference(part)) for part in parts)
