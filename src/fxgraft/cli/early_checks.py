"""Checks that run before torch is imported, which takes seconds: for mistyped methods and missing files."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from fxgraft.cli.method_facts import all_facts
from fxgraft.errors import ConfigError, no_method


def check_method(name: str) -> None:
    """Raise for an unknown method, as far as that is known without importing other packages' methods.

    Raises:
        UnknownGraftError: no such method; lists close matches.
    """
    if metadata.entry_points(group="fxgraft.patches"):  # may register under any name
        return
    known = all_facts()
    if name.replace("-", "_") not in known:
        raise no_method(name, known)


def check_there(path: Path, what: str) -> None:
    """Raise for a file or folder that is not there.

    Raises:
        ConfigError: it is not.
    """
    if not path.exists():
        raise ConfigError(f"{what} {str(path)!r} cannot be read: No such file or directory.\nCheck the path.")
