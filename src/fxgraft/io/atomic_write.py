"""Files that are never half written."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

Write = Callable[[Path], object]
"""Writes a whole file at the path it is given."""


def write_file(target: Path, write: Write) -> None:
    """Write a file in one move: if the writer is stopped, there is the whole old file or the whole new one.

    It is written in a folder of its own beside its target, and moved into place when the disk has it. What a killed
    process left there is gone after the next save. Savers into the same folder take turns where the file system has
    locks.

    Args:
        target: the file; its folder is made if need be. A link stays one: the file behind it is written.
        write: writes the whole file.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    drafts = _drafts_of(target)
    with _alone_in(target.parent), _cleared(drafts):
        _clear(drafts)
        drafts.mkdir()
        draft = drafts / target.name
        draft.touch()
        mode = draft.stat().st_mode
        write(draft)
        draft.chmod(mode)  # some writers make files that only the owner can read
        _flush(draft)  # otherwise the move may reach the disk before the content
        draft.replace(target)


def clear_drafts(target: Path) -> None:
    """Remove what a process that was killed while it wrote a file has left beside it."""
    target = target.resolve()
    with _alone_in(target.parent), _cleared(_drafts_of(target)):
        pass


def _drafts_of(target: Path) -> Path:
    # A folder, since writers may have temporary files of their own, under any name.
    return target.parent / f".{target.name}.part"


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _clear(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


@contextlib.contextmanager
def _cleared(folder: Path) -> Iterator[None]:
    """Remove a folder after the block, and once more in case an interruption hit that."""
    try:
        try:
            yield
        finally:
            _clear(folder)
    finally:
        _clear(folder)


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file in one move; a pipe or a device is written to as it is."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    write_file(path, lambda draft: draft.write_text(text, encoding="utf-8"))


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other savers out of a folder. On systems without locks, the user has to see to it."""
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
