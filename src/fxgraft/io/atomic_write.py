"""Files that are never half written, and what they say of themselves in their first entries."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxgraft.errors import RecipeError

Write = Callable[[Path], object]
"""Writes a whole file at the path it is given."""


def write_files(folder: Path, files: Mapping[str, Write]) -> None:
    """Write files of a folder that belong together: each is whole, and a failure leaves all the old ones.

    Each is written beside its target first, in their order, and none is moved into place before the last is whole.
    A process that is killed between two moves leaves files of two saves; where that matters, let the last file hold
    the digests of the others. A draft that a killed process left is gone after the next
    save. Savers of the same folder take turns where the file system has locks.

    Args:
        folder: made if need be.
        files: by name in the folder, what writes each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drafts = {folder / name: _beside(folder / name, "part") for name in files}
    former = {folder / name: _beside(folder / name, "old") for name in files}
    with _alone_in(folder), _cleared(*drafts.values(), *former.values()):
        for draft, write in zip(drafts.values(), files.values(), strict=True):
            # Of a killed process, perhaps another user's: it could be removed, but not written over.
            draft.unlink(missing_ok=True)
            write(draft)
        new = [target for target in former if not target.exists()]
        for target, old in former.items():
            old.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # nothing there yet, or a file system without links
                os.link(target, old)
        try:
            for target, draft in drafts.items():
                draft.replace(target)
        except BaseException:
            for target, old in former.items():
                if old.exists():
                    old.replace(target)
                elif target in new:
                    target.unlink(missing_ok=True)
            raise


def clear_drafts(target: Path) -> None:
    """Remove what a process that was killed while it wrote a file has left beside it."""
    with _alone_in(target.parent), _cleared(_beside(target, "part"), _beside(target, "old")):
        pass


def _beside(target: Path, what: str) -> Path:
    return target.parent / f".{target.name}.{what}"


@contextlib.contextmanager
def _cleared(*paths: Path) -> Iterator[None]:
    """Remove files after the block, and once more in case an interruption hit that."""
    try:
        try:
            yield
        finally:
            for path in paths:
                path.unlink(missing_ok=True)
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file in one move; a pipe or a device is written to as it is."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    target = path.resolve()  # a link stays one
    write_files(target.parent, {target.name: lambda draft: draft.write_text(text, encoding="utf-8")})


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
            raise RecipeError(f"{str(path)!r} is no {self.what}.\n{self.instead}")
        if content.get("version") != self.version:
            raise RecipeError(
                f"{str(path)!r} is of version {content.get('version')!r}; this fxgraft reads version "
                f"{self.version}.\nIt was written by another release.\n{self.upgrade}"
            )


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other savers out of a folder; where it cannot be locked, savers have to be told apart by the user."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            # Closing would do, but for an interruption here: a handle left open would lock this process out for good.
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)
