"""Recipes as they are found in a file: read, and checked before anything is built from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fxgraft.errors import RecipeError
from fxgraft.io.atomic_write import Header

_KINDS = {"architecture": dict, "progress": (int, float), "weights": str, "grafts": list}
_ENTRIES = {"name": str, "method": str, "options": dict}
_KNOWN = {"format", "version", "versions", "sha256", "placements", *_KINDS}
_LARGEST_SIDE = 100_000
_FEW = 10_000


def read_recipe(file: Path, header: Header) -> dict[str, Any]:
    """Read a recipe and check that it is whole.

    Args:
        file: the recipe.
        header: what its first entries have to be.

    Raises:
        RecipeError: there is none, it is damaged, or it is of another version.
    """
    try:
        recipe = json.loads(file.read_text())
    except OSError as error:
        raise RecipeError(
            f"There is no recipe at {str(file)!r}: {error.strerror}.\n"
            "fxgraft.save writes a folder with recipe.json and weights.safetensors; pass that folder."
        ) from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(
            f"{str(file)!r} is damaged or no recipe: {error}.\nSave the model again, or restore the file."
        ) from error
    header.check(recipe, file)
    for key, kind in _KINDS.items():
        value = recipe.get(key)
        share = key != "progress" or (
            not isinstance(value, bool) and isinstance(value, kind) and 0 <= value <= 1
        )
        if not isinstance(value, kind) or not share:
            raise _damaged(file, f"{key!r} is missing or of the wrong kind")
    for entry in recipe["grafts"]:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(k), t) for k, t in _ENTRIES.items()):
            raise _damaged(file, "a graft in it is not whole")
        if not _is_size(entry.setdefault("input_size", None)):
            raise _damaged(file, f"the input_size of {entry['name']!r} is no (C, H, W)")
    names = [entry["name"] for entry in recipe["grafts"]]
    if not names or len(set(names)) < len(names) or not all(name.isidentifier() for name in names):
        raise _damaged(file, "its grafts are not named once each")
    if not {"class", "tensors"} <= set(recipe["architecture"]):
        raise _damaged(file, "its architecture is not whole")
    if recipe["weights"] not in ("all", "grafts"):
        raise _damaged(file, "'weights' is neither 'all' nor 'grafts'")
    unknown = sorted(set(recipe) - _KNOWN)
    if unknown:
        raise _damaged(file, f"it has an entry {unknown[0]!r}, which no recipe has")
    if "sha256" in recipe:  # recipes of earlier releases have none
        _check_digest(file, recipe)
    return recipe


def _damaged(file: Path, what: str) -> RecipeError:
    return RecipeError(f"{str(file)!r} is damaged: {what}.\nSave again.")


def _is_size(size: Any) -> bool:
    def side(n: Any) -> bool:
        return type(n) is int and 1 <= n <= _LARGEST_SIDE

    return size is None or (isinstance(size, list) and len(size) == 3 and all(map(side, size)))


def recipe_digest(recipe: Mapping[str, Any]) -> str:
    """Digest what a recipe says, but for its own digest."""
    signed = {key: value for key, value in recipe.items() if key != "sha256"}
    text = json.dumps([signed, recipe["sha256"]["weights"]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_digest(file: Path, recipe: Mapping[str, Any]) -> None:
    digests = recipe["sha256"]
    if not isinstance(digests, dict) or not {"weights", "recipe"} <= set(digests):
        raise _damaged(file, "its digests are not whole")
    if digests["recipe"] != recipe_digest(recipe):
        raise RecipeError(
            f"{str(file)!r} is damaged: it does not say what was saved.\n"
            "Its digest is that of another content.\n"
            "Save again. If you changed it on purpose, remove the entry 'sha256'."
        )


def check_counts(grafts: Sequence[Mapping[str, Any]], weights: Mapping[str, Tensor], folder: Path) -> None:
    """Raise for whole numbers in options that nothing in the weights is as large as.

    What an option counts (copies of a layer, channels) is there in the weights. A number beyond all of them
    would be built for hours before the weights are found not to fit.

    Args:
        grafts: entries of a recipe.
        weights: that were saved with it.
        folder: of both, for the message.
    """
    largest = max((_FEW, len(weights), *(side for value in weights.values() for side in value.shape)))
    for entry in grafts:
        for number in _numbers(entry["options"]):
            if abs(number) > largest:
                raise RecipeError(
                    f"The recipe in {str(folder)!r} has an option of {entry['name']!r} that is too large: more than "
                    f"{largest}.\nNothing in the weights beside it is of such a size.\n"
                    "It was damaged or changed; save the model again."
                )


def _numbers(value: Any) -> Iterator[int]:
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, (dict, list)):
            waiting += each.values() if isinstance(each, dict) else each
        elif isinstance(each, int):
            yield each
