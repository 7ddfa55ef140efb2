"""The file of a patched model: safetensors, with a recipe in its metadata. How it is read, and checked.

Nothing saved here is code. A recipe names methods of the registry with their options, and a constructor of timm,
torchvision or transformers with its arguments. It is checked against its digest before anything is built from it,
and against the model before anything is changed.

A file has the tensors, and in its metadata, under "fxgraft", a JSON object:
    format, version: "fxgraft-recipe" and 2.
    versions: of the libraries that wrote it.
    build: how the model was made (`Constructor`), or in words why that isn't known.
    architecture: the model's class, and a digest of the names and shapes of its tensors.
    progress: share of the training done, in [0, 1].
    weights: "all", or "grafts" for those alone that grafts added.
    grafts: name, method, options and input size of each.
    placements: where their units are.
    sha256: digest of all the other entries and of the tensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fxgraft.arguments import path_at
from fxgraft.errors import FxgraftWarning, RecipeError
from fxgraft.graph.grafting.state import state_of
from fxgraft.io.atomic_write import digest_of
from fxgraft.io.constructor import Constructor
from fxgraft.io.header import Header

FILE = "fxgraft.safetensors"
"""Name of the file in a folder or a repository."""

ENTRY = "fxgraft"
"""What the recipe stands under in the metadata."""

FORMAT = {"format": "pt"}  # what readers of safetensors files expect beside it
_UPGRADE = "Upgrade fxgraft, or load it with the release that wrote it."
HEADER = Header(
    "fxgraft-recipe",
    2,
    what="recipe of fxgraft",
    instead="Pass a file that fxgraft.save wrote.",
    upgrade=_UPGRADE,
)
FORMER = dataclasses.replace(HEADER, version=1)
"""Of the folders with recipe.json and weights.safetensors that development versions wrote."""

_KINDS = {"architecture": dict, "progress": (int, float), "weights": str, "grafts": list, "placements": list}
_ENTRIES = {"name": str, "method": str, "options": dict}
_KNOWN = {"format", "version", "versions", "build", *_KINDS}
_LARGEST_SIDE = 100_000
_FEW = 10_000


def file_at(path: str | Path) -> Path:
    """Return the file for a path: the path itself, or `FILE` in a folder (which exists, or has no suffix).

    A "~" at its start is the user's home.

    Raises:
        RecipeError: no system has files of that name.
    """
    target = path_at(path, RecipeError)
    return target / FILE if target.is_dir() or not target.suffix else target


def architecture_of(model: nn.Module, own: Set[str] = frozenset()) -> dict[str, str]:
    """Fingerprint a backbone: its class, and a digest of its tensors' names and shapes.

    Args:
        model: the backbone, bare or patched.
        own: names of the tensors that the grafts added, which are left out.
    """
    state = state_of(model)
    cls = state.base if state is not None else type(model)
    lines = [f"{key} {tuple(value.shape)}" for key, value in model.state_dict().items() if key not in own]
    digest = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
    return {"class": cls.__name__, "tensors": digest}


def content_digest(content: Any) -> str:
    """Digest nested dictionaries and lists, tensors by their bytes."""
    digest = hashlib.sha256()
    waiting: list[Any] = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            digest.update(f"{{{len(value)}".encode())
            waiting += [part for item in value.items() for part in item]
        elif isinstance(value, (tuple, list)):
            digest.update(f"[{len(value)}".encode())
            waiting += value
        elif isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        else:
            digest.update(f"{type(value).__name__} {value!r}\n".encode())
    return digest.hexdigest()


def recipe_digest(recipe: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Digest the entries of a recipe, without the digest itself, and the tensors beside it."""
    text = json.dumps({key: value for key, value in recipe.items() if key != "sha256"}, sort_keys=True)
    return content_digest([text, sorted(tensors.items(), key=lambda item: item[0])])


def is_recipe(path: Path) -> bool:
    """Say whether something is what `save` wrote, without reading more than its header."""
    if path.is_dir():
        return (path / FILE).is_file() or (path / "recipe.json").is_file()
    try:
        with safe_open(path, framework="pt") as opened:
            return ENTRY in (opened.metadata() or {})
    except (SafetensorError, OSError):
        return False


def read_recipe(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file, and check that it is whole before anything is built from it.

    Returns:
        The recipe, its "build" as a `Constructor` if it is known, and the tensors.

    Raises:
        RecipeError: there is no recipe, it is damaged, or of another version.
    """
    former = file.parent / "recipe.json"
    if file.name == FILE and not file.exists() and former.exists():
        return _read_former(former)
    try:
        with safe_open(file, framework="pt") as opened:  # once, so that a save in between changes nothing
            metadata = opened.metadata() or {}
            text = metadata.get(ENTRY)
            if text is None:
                raise RecipeError(
                    f"There is no recipe in {str(file)!r}: it is a safetensors file of weights alone.\n"
                    "fxgraft.save writes the recipe into its metadata.\n"
                    "Load weights by model.load_state_dict, or those of a bare model by fxgraft.load_backbone."
                )
            recipe = _parsed(text, file)
            HEADER.check(recipe, file)
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - it isn't a dictionary
    except FileNotFoundError as error:
        raise RecipeError(
            f"There is no recipe at {str(file)!r}: no such file.\nPass the file that fxgraft.save wrote, or its folder."
        ) from error
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(
            f"{str(file)!r} cannot be read: {error}.\n"
            "It is damaged, cut short, or no safetensors file.\nSave the model again, or restore the file."
        ) from error
    if metadata != {**FORMAT, ENTRY: text}:
        raise _damaged(file, "its metadata holds something other than the format and the recipe")
    if recipe.pop("sha256", None) != recipe_digest(recipe, tensors):
        raise _damaged(file, "its digest is missing, or that of another content")
    check_recipe(recipe, file)
    made = recipe["build"]
    try:
        recipe["build"] = made if isinstance(made, str) else Constructor.of_data(made)
    except (TypeError, ValueError) as error:
        raise _damaged(file, str(error)) from error
    check_counts(recipe["grafts"], tensors, file)
    return recipe, tensors


def _read_former(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a folder of a development version: recipe.json, and the weights beside it."""
    weights = file.parent / "weights.safetensors"
    try:
        recipe = _parsed(file.read_text(), file)
        FORMER.check(recipe, file)
        digests = recipe.pop("sha256", None)
        own = digest_of(weights)
        signed = json.dumps([recipe, own], sort_keys=True)
        whole = {"weights": own, "recipe": hashlib.sha256(signed.encode()).hexdigest()}
        if digests != whole:
            raise _damaged(file, "its digests are missing, or those of another content or other weights")
        tensors = load_file(weights)
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(
            f"{str(file.parent)!r} cannot be read: {error}.\n"
            "It is damaged, or not whole.\nSave the model again, or restore the folder."
        ) from error
    recipe["build"] = "folders of that version do not say it."
    recipe.setdefault("placements", [])
    check_recipe(recipe, file)
    check_counts(recipe["grafts"], tensors, file)
    warnings.warn(
        f"{str(file.parent)!r} is a folder of a development version of fxgraft.\n"
        "Later releases will not read it.\nSave the model again, as one file: fxgraft.save(model, 'run.safetensors').",
        FxgraftWarning,
        stacklevel=5,
    )
    return recipe, tensors


def _parsed(text: str, file: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"its recipe isn't JSON ({error})") from error


def _damaged(file: Path, what: str) -> RecipeError:
    return RecipeError(
        f"{str(file)!r} is damaged: {what}.\n"
        "It was cut short or changed since it was saved.\nSave the model again, or restore the file."
    )


def check_recipe(recipe: dict[str, Any], file: Path) -> None:
    """Check that a recipe has its entries, each of its kind.

    Raises:
        RecipeError: one is missing, of the wrong kind, or unknown.
    """
    for key, kind in _KINDS.items():
        value: Any = recipe.get(key)
        share = key != "progress" or (
            not isinstance(value, bool) and isinstance(value, kind) and 0 <= value <= 1
        )
        if not isinstance(value, kind) or not share:
            raise _damaged(file, f"{key!r} is missing or of the wrong kind")
    for entry in recipe["grafts"]:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(k), t) for k, t in _ENTRIES.items()):
            raise _damaged(file, "a graft in it is not whole")
        if not _is_size(entry.setdefault("input_size", None)):
            raise _damaged(file, f"the input_size of {entry['name']!r} isn't a list of one to four sizes")
    names = [entry["name"] for entry in recipe["grafts"]]
    if not names or len(set(names)) < len(names) or not all(name.isidentifier() for name in names):
        raise _damaged(file, "its grafts are not named once each")
    if not {"class", "tensors"} <= set(recipe["architecture"]):
        raise _damaged(file, "its architecture is not whole")
    if recipe["weights"] not in ("all", "grafts"):
        raise _damaged(file, "'weights' is neither 'all' nor 'grafts'")
    if not isinstance(recipe.get("build"), (str, dict)) or not isinstance(recipe.get("versions"), dict):
        raise _damaged(file, "it does not say what made it")
    unknown = sorted(set(recipe) - _KNOWN)
    if unknown:
        raise _damaged(file, f"it has an entry {unknown[0]!r}, which no recipe has")


def _is_size(size: Any) -> bool:
    def side(n: Any) -> bool:
        return type(n) is int and 1 <= n <= _LARGEST_SIDE

    return size is None or (isinstance(size, list) and 0 < len(size) < 5 and all(map(side, size)))


def check_counts(grafts: Sequence[Mapping[str, Any]], weights: Mapping[str, Tensor], file: Path) -> None:
    """Raise for whole numbers in options that are larger than anything in the weights.

    What an option counts (copies of a layer, channels) is there in the weights. A number beyond all of them
    would be built for hours before the weights are found not to fit.

    Args:
        grafts: entries of a recipe.
        weights: the weights that were saved with it.
        file: the file that both are in, for the message.
    """
    largest = max((_FEW, len(weights), *(side for value in weights.values() for side in value.shape)))
    for entry in grafts:
        for number in _numbers(entry["options"]):
            if abs(number) > largest:
                raise RecipeError(
                    f"The recipe in {str(file)!r} has an option of {entry['name']!r} that is too large: more than "
                    f"{largest}.\nNothing in the weights beside it is of such a size.\n"
                    "It was damaged or changed; save the model again."
                )


def _numbers(value: Any) -> Iterator[int]:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, (dict, list)):
            waiting += item.values() if isinstance(item, dict) else item
        elif isinstance(item, int):
            yield item
