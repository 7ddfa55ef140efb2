"""Saving and loading: a JSON recipe of the grafts, and the weights as safetensors.

Nothing saved here is code, and loading evaluates none: a recipe names methods of the registry and their
options, and is checked against the model before anything is changed.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fxgraft.errors import FxgraftError, RecipeError
from fxgraft.files import Header, write_files
from fxgraft.graph.grafting.graft import Graft
from fxgraft.graph.grafting.ledger import Ledger
from fxgraft.graph.grafting.lookup import ledger_of
from fxgraft.graph.grafting.state import state_of
from fxgraft.graph.grafting.unit import Unit
from fxgraft.patches.registry import build

M = TypeVar("M", bound=nn.Module)

HEADER = Header(
    "fxgraft-recipe",
    1,
    what="recipe of fxgraft",
    instead="Pass the folder that fxgraft.save wrote.",
    upgrade="Upgrade fxgraft, or load it with the release that wrote it.",
)
RECIPE = "recipe.json"
WEIGHTS = "weights.safetensors"


def _architecture(model: nn.Module, own: set[str]) -> dict[str, str]:
    """Fingerprint a backbone: its class, and a digest of its tensors' names and shapes without the grafts'."""
    state = state_of(model)
    cls = state.base if state is not None else type(model)
    lines = [f"{key} {tuple(value.shape)}" for key, value in model.state_dict().items() if key not in own]
    digest = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
    return {"class": cls.__name__, "tensors": digest}


def _own_keys(model: nn.Module) -> set[str]:
    units = [name for name, each in model.named_modules(remove_duplicate=False) if isinstance(each, Unit)]
    return {key for key in model.state_dict() if any(key.startswith(f"{name}.") for name in units)}


def save(model: nn.Module, path: str | Path, *, weights: bool = True) -> Path:
    """Write a patched model to a folder: ``recipe.json`` and ``weights.safetensors``.

    Args:
        model: a patched model.
        path: the folder, made if need be; files of an earlier save in it are replaced.
        weights: write all weights; with False only those that grafts added, to sit beside a checkpoint of the
            backbone that you keep yourself.

    Returns:
        The folder.

    Raises:
        RecipeError: there is no graft on the model, or one that a recipe cannot hold.
    """
    ledger = ledger_of(model)
    if ledger is None:
        raise RecipeError(
            f"There is no graft on this {type(model).__name__}, so there is no recipe to save.\n"
            "Use torch.save(model.state_dict(), ...) for a bare model."
        )
    for graft in ledger.grafts:
        if not graft.patch.saves:
            raise RecipeError(
                f"{graft.name!r} ({graft.patch.title}) cannot be saved: a recipe holds options, and it works with "
                "networks besides.\n"
                f"Take it off first, fxgraft.unpatch(model, {graft.name!r}): what it has trained stays in the model."
            )
    own = _own_keys(model)
    recipe = {
        **HEADER.entries(),
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "architecture": _architecture(model, own),
        "progress": ledger.context.progress,
        "weights": "all" if weights else "grafts",
        "grafts": [_entry(graft) for graft in ledger.grafts],
    }
    try:
        text = json.dumps(recipe, indent=2)
    except TypeError as error:
        raise RecipeError(
            f"A graft has an option that JSON cannot hold: {error}.\nUse plain values."
        ) from error
    chosen = {k: v for k, v in model.state_dict().items() if weights or k in own}
    folder = Path(path)
    write_files(
        folder,
        {
            WEIGHTS: lambda file: save_file(_unshared(chosen), file),
            RECIPE: lambda file: file.write_text(text + "\n"),
        },
    )
    return folder


def _entry(graft: Graft) -> dict[str, Any]:
    options = {
        f.name: getattr(graft.patch, f.name)
        for f in dataclasses.fields(graft.patch)
        if f.init and getattr(graft.patch, f.name) != f.default
    }
    size = list(graft.input_size) if graft.input_size else None
    return {"name": graft.name, "method": graft.patch.method, "options": options, "input_size": size}


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give every tensor memory of its own, which safetensors asks for."""
    seen: set[int] = set()
    out = {}
    for key, value in tensors.items():
        value = value.detach().contiguous()
        if value.data_ptr() in seen:
            value = value.clone()
        seen.add(value.data_ptr())
        out[key] = value
    return out


def load(model: M, path: str | Path) -> M:
    """Patch a bare model as a saved one was, and load its weights.

    Args:
        model: a bare model of the same architecture.
        path: the folder that `save` wrote.

    Returns:
        The same model, patched.

    Raises:
        RecipeError: the folder is no recipe, or damaged, or of an unknown version, or made for another
            architecture; or the model is patched already. The model is then as it was.
    """
    folder = Path(path)
    recipe = _read_recipe(folder)
    if ledger_of(model) is not None:
        raise RecipeError(
            "The model is patched already, and a recipe starts from a bare one.\nCall fxgraft.unpatch(model) first."
        )
    saved, present = recipe["architecture"], _architecture(model, set())
    if saved != present:
        what = (
            f"{saved['class']}, not {present['class']}"
            if saved["class"] != present["class"]
            else f"a {saved['class']} with other layers or sizes"
        )
        raise RecipeError(
            f"The recipe in {str(folder)!r} was made for another architecture: {what}.\n"
            "Sites and weights are those of one architecture.\n"
            "Build the model as it was built then (same name, num_classes and arguments)."
        )
    try:
        weights = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError, ValueError) as error:
        raise RecipeError(
            f"The weights in {str(folder / WEIGHTS)!r} cannot be read: {error}.\n"
            "The file is damaged, cut short, or no safetensors file.\nSave the model again."
        ) from error
    try:
        wanted = [
            Graft(
                e["name"], build(e["method"], _options(e["options"])),
                input_size=tuple(e["input_size"]) if e["input_size"] else None,
            )
            for e in recipe["grafts"]
        ]  # fmt: skip
    except FxgraftError as error:
        raise RecipeError(
            f"The recipe in {str(folder)!r} asks for what this fxgraft does not have.\n{error}\n"
            "It was damaged, or written by another release or with other methods registered."
        ) from error
    ledger = Ledger()
    ledger.context.progress = recipe["progress"]
    ledger.install(model, wanted)
    try:
        _load_weights(model, weights, recipe["weights"] == "all", folder)
    except FxgraftError:
        ledger.install(model, [])
        raise
    return model


def _options(options: dict[str, Any]) -> dict[str, Any]:
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in copy.deepcopy(options).items()
    }


def _load_weights(model: nn.Module, weights: dict[str, Tensor], whole: bool, folder: Path) -> None:
    expected = model.state_dict()
    wanted = set(expected) if whole else _own_keys(model)
    shapes = {key for key in wanted & set(weights) if weights[key].shape != expected[key].shape}
    if wanted != set(weights) or shapes:
        odd = sorted((wanted ^ set(weights)) | shapes)
        raise RecipeError(
            f"The weights in {str(folder)!r} do not fit the recipe: {len(odd)} tensors differ, "
            f"the first is {odd[0]!r}.\nThe two files were not saved together.\nSave the model again."
        )
    model.load_state_dict(weights, strict=whole)


def _read_recipe(folder: Path) -> dict[str, Any]:
    file = folder / RECIPE
    try:
        recipe = json.loads(file.read_text())
    except OSError as error:
        raise RecipeError(
            f"There is no recipe at {str(file)!r}: {error.strerror}.\n"
            "fxgraft.save writes a folder with recipe.json and weights.safetensors; pass that folder."
        ) from error
    except ValueError as error:
        raise RecipeError(
            f"{str(file)!r} is damaged or no recipe: {error}.\nSave the model again, or restore the file."
        ) from error
    HEADER.check(recipe, file)
    kinds = {"architecture": dict, "progress": (int, float), "weights": str, "grafts": list}
    for key, kind in kinds.items():
        if not isinstance(recipe.get(key), kind):
            raise RecipeError(
                f"{str(file)!r} is damaged: {key!r} is missing or of the wrong kind.\nSave again."
            )
    entries = {"name": str, "method": str, "options": dict}
    for entry in recipe["grafts"]:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(k), t) for k, t in entries.items()):
            raise RecipeError(f"{str(file)!r} is damaged: a graft in it is not whole.\nSave again.")
        entry.setdefault("input_size", None)
    names = [entry["name"] for entry in recipe["grafts"]]
    if len(set(names)) < len(names) or not all(name.isidentifier() for name in names):
        raise RecipeError(f"{str(file)!r} is damaged: its grafts are not named once each.\nSave again.")
    if not {"class", "tensors"} <= set(recipe["architecture"]):
        raise RecipeError(f"{str(file)!r} is damaged: its architecture is not whole.\nSave again.")
    return recipe
