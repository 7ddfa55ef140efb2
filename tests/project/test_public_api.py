"""The public names and their signatures, against a committed listing: additions show up, losses fail.

To accept additions: python tests/project/test_public_api.py > tests/project/public_api.txt
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import fxgraft
from fxgraft import extend

LISTING = Path(__file__).parent / "public_api.txt"


def listing() -> list[str]:
    """One line per public name, and one per public attribute of a class."""
    lines = []
    for place in (fxgraft, fxgraft.mixmo, fxgraft.gam, extend):
        for name in sorted(place.__all__):
            thing = getattr(place, name)
            known = f"{place.__name__}.{name}"
            if inspect.ismodule(thing):
                inner = [each for each in vars(thing) if not each.startswith("_")]
                lines += [
                    f"{known}.{each}{inspect.signature(vars(thing)[each])}"
                    for each in sorted(inner)
                    if inspect.isfunction(vars(thing)[each])
                ]
            elif inspect.isclass(thing) and not issubclass(thing, BaseException):
                lines.append(f"{known}{_signature(thing)}")
                lines += [
                    f"{known}.{each}{_signature(value) if inspect.isfunction(value) else ''}"
                    for each, value in sorted(vars(thing).items())
                    if not each.startswith("_") and (inspect.isfunction(value) or isinstance(value, property))
                ]
            elif callable(thing):
                lines.append(f"{known}{_signature(thing)}")
            elif name != "__version__":
                lines.append(known)
    return lines


def _signature(thing: object) -> str:
    try:
        return re.sub(r" at 0x\w+", "", str(inspect.signature(thing)))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ""


def test_the_public_names_are_those_of_the_listing() -> None:
    kept, now = LISTING.read_text().splitlines(), listing()
    assert [line for line in kept if line not in now] == [], "public names were lost or changed"
    assert [line for line in now if line not in kept] == [], "new public names: add them to the listing"


if __name__ == "__main__":
    print("\n".join(listing()))  # noqa: T201
