"""What can be refused before torch is imported, which takes seconds: mistyped methods, files that are not there."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from fxgraft.errors import ConfigError, UnknownGraftError, candidates

_REGISTERS = re.compile(r"""^@register\("(\w+)"\)$""", re.MULTILINE)


def own_method_names() -> set[str]:
    """Read the names of the built-in methods from their source, which is not imported."""
    package = find_spec("fxgraft")
    homes = [] if package is None else package.submodule_search_locations or []
    sources = [file for home in homes for file in Path(home, "patches").rglob("*.py")]
    return {name for file in sources for name in _REGISTERS.findall(file.read_text(encoding="utf-8"))}


def check_method(name: str) -> None:
    """Raise for a method that nobody has, as far as that is known without importing what other packages offer.

    Raises:
        UnknownGraftError: no such method; lists close matches.
    """
    if metadata.entry_points(group="fxgraft.patches"):  # may register under any name
        return
    registry = sys.modules.get("fxgraft.patches.registry")
    known = sorted(own_method_names() | set(getattr(registry, "_registry", ())))
    if known and name.replace("-", "_") not in known:
        raise UnknownGraftError(
            f"There is no method {name!r}. {candidates(name, known)}\nfxgraft info lists them with what they do."
        )


def check_there(path: Path, what: str) -> None:
    """Raise for a file or folder that is not there.

    Raises:
        ConfigError: it is not.
    """
    if not path.exists():
        raise ConfigError(f"{what} {str(path)!r} cannot be read: No such file or directory.\nCheck the path.")
