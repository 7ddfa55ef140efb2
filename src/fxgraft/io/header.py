"""The entries that open a file of fxgraft, and their check."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxgraft.errors import RecipeError


@dataclass(frozen=True)
class Header:
    """The entries that open a file of fxgraft.

    Attributes:
        format: the name of the format.
        version: the version that this release writes, and the only one it reads.
        what: the kind of file, for messages: "recipe of fxgraft.save".
        instead: what to do with a file of another kind.
        upgrade: what to do with a file of another version.
    """

    format: str
    version: int
    what: str
    instead: str
    upgrade: str

    def entries(self) -> dict[str, Any]:
        """Return the entries as they are written."""
        return {"format": self.format, "version": self.version}

    def check(self, content: Any, path: Path) -> None:
        """Raise `RecipeError` unless what was read from ``path`` is of this format and version."""
        if not isinstance(content, dict) or content.get("format") != self.format:
            raise RecipeError(f"{str(path)!r} isn't a {self.what}.\n{self.instead}")
        if content.get("version") != self.version:
            raise RecipeError(
                f"{str(path)!r} is of version {content.get('version')!r}; this fxgraft reads version "
                f"{self.version}.\nIt was written by another release.\n{self.upgrade}"
            )
