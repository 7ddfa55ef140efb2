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

from fxgraft.api import check_model
from fxgraft.errors import FxgraftError, RecipeError
from fxgraft.graph.grafting.graft import Graft
from fxgraft.graph.grafting.graft_registry import GraftRegistry
from fxgraft.graph.grafting.lookup import own_keys, registry_of
from fxgraft.graph.grafting.placement import PlacementRecord
from fxgraft.graph.grafting.state import state_of
from fxgraft.graph.tracing.atomic import synchronized
from fxgraft.graph.tracing.preserve import preserved_random_state
from fxgraft.io.atomic_write import Header, digest_of, write_files
from fxgraft.io.backbone_weights import Weights
from fxgraft.io.reading import check_counts, read_recipe, recipe_digest
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
    registry = registry_of(model)
    if registry is None:
        raise RecipeError(
            f"There is no graft on this {type(model).__name__}, so there is no recipe to save.\n"
            "Use torch.save(model.state_dict(), ...) for a bare model."
        )
    for graft in registry.grafts:
        if not graft.patch.saves:
            raise RecipeError(
                f"{graft.name!r} ({graft.patch.title}) cannot be saved: a recipe holds options, and it works with "
                "networks besides.\n"
                "Save what it folds into, fxgraft.merge(model), or the whole model by torch.save(model, ...). Without "
                f"it, fxgraft.unpatch(model, {graft.name!r}), the weights it trained stay, and what it does to the "
                "values in the model goes."
            )
    registry.renew_stale(model)
    own = own_keys(model)
    recipe = {
        **HEADER.entries(),
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "architecture": _architecture(model, own),
        "progress": registry.context.progress,
        "weights": "all" if weights else "grafts",
        "grafts": [_entry(graft) for graft in registry.grafts],
        "placements": [each.as_data() for each in registry.recorded()],
    }
    try:
        json.dumps(recipe)
    except TypeError as error:
        raise RecipeError(
            f"A graft has an option that JSON cannot hold: {error}.\nUse plain values."
        ) from error
    chosen = {k: v for k, v in model.state_dict().items() if weights or k in own}
    folder = Path(path)

    def write_weights(file: Path) -> None:
        try:
            save_file(unshared(chosen), file)
        except SafetensorError as error:  # its own, also for what the system refuses
            raise OSError(
                f"The weights cannot be written to {str(folder)!r}: {error}.\n"
                "The disk is full, perhaps, or the folder cannot be written to.\n"
                "What was saved there before is as it was."
            ) from error
        recipe["sha256"] = {"weights": digest_of(file)}

    def write_recipe(file: Path) -> None:  # after the weights, in drafting and in moving
        recipe["sha256"]["recipe"] = recipe_digest(recipe)
        file.write_text(json.dumps(recipe, indent=2) + "\n")

    write_files(folder, {WEIGHTS: write_weights, RECIPE: write_recipe})
    return folder


def _entry(graft: Graft) -> dict[str, Any]:
    options = {
        f.name: getattr(graft.patch, f.name)
        for f in dataclasses.fields(graft.patch)
        if f.init and getattr(graft.patch, f.name) != f.default
    }
    size = list(graft.input_size) if graft.input_size else None
    return {"name": graft.name, "method": graft.patch.method, "options": options, "input_size": size}


def unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give every tensor memory of its own, which safetensors asks for.

    Args:
        tensors: a state dict.
    """
    seen: set[int] = set()
    out = {}
    for key, value in tensors.items():
        value = value.detach().contiguous()
        if value.data_ptr() in seen:
            value = value.clone()
        seen.add(value.data_ptr())
        out[key] = value
    return out


@synchronized
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
    if registry_of(model) is not None:
        raise RecipeError(
            "The model is patched already, and a recipe starts from a bare one.\nCall fxgraft.unpatch(model) first."
        )
    folder = Path(path)
    recipe = read_recipe(folder / RECIPE, HEADER)
    check_model(model)
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
    weights = _read_weights(folder / WEIGHTS, recipe)
    check_counts(recipe["grafts"], weights, folder)
    registry = GraftRegistry()
    registry.context.progress = float(recipe["progress"])
    kept = Weights(model)
    flags = [(module, module.training) for module in model.modules()]
    # Units are built before they are loaded, and draw what they start from.
    with preserved_random_state():
        try:
            _install(registry, model, recipe, folder)
            _load_weights(model, weights, recipe["weights"] == "all", folder)
        except BaseException:
            registry.install(model, [])
            kept.put_back(model)
            for module, flag in flags:
                module.training = flag
            raise
    return model


def _install(registry: GraftRegistry, model: nn.Module, recipe: dict[str, Any], folder: Path) -> None:
    """Build the grafts of a recipe and put them on; whatever a method makes of odd options is the recipe's fault."""
    try:
        wanted = [
            Graft(
                e["name"], build(e["method"], _options(e["options"])),
                input_size=tuple(e["input_size"]) if e["input_size"] else None,
            )
            for e in recipe["grafts"]
        ]  # fmt: skip
        # A recipe that was changed on purpose says by its options where the grafts go.
        records = recipe.get("placements", ()) if "sha256" in recipe else ()
        registry.install(model, wanted, [PlacementRecord.of_data(each) for each in records])
    except Exception as error:
        raise RecipeError(
            f"The recipe in {str(folder)!r} asks for what this fxgraft does not have, or not on this model.\n"
            f"{error if isinstance(error, FxgraftError) else repr(error)}\n"
            "It was damaged, or written by another release or with other methods registered."
        ) from error


def _read_weights(file: Path, recipe: dict[str, Any]) -> dict[str, Tensor]:
    try:
        if "sha256" in recipe and digest_of(file) != recipe["sha256"]["weights"]:
            raise RecipeError(
                f"The weights in {str(file)!r} do not fit the recipe beside them: their digest is another one.\n"
                "The two files were not saved together, a save was cut off between them, or one is damaged.\n"
                "Save the model again. For weights changed on purpose, remove the entry 'sha256' from the recipe."
            )
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(
            f"The weights in {str(file)!r} cannot be read: {error}.\n"
            "The file is damaged, cut short, or no safetensors file.\nSave the model again."
        ) from error


def _options(options: dict[str, Any]) -> dict[str, Any]:
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in copy.deepcopy(options).items()
    }


def _load_weights(model: nn.Module, weights: dict[str, Tensor], whole: bool, folder: Path) -> None:
    expected = model.state_dict()
    wanted = set(expected) if whole else own_keys(model)
    shapes = {key for key in wanted & set(weights) if weights[key].shape != expected[key].shape}
    if wanted != set(weights) or shapes:
        odd = sorted((wanted ^ set(weights)) | shapes)
        raise RecipeError(
            f"The weights in {str(folder)!r} do not fit the recipe: {len(odd)} tensors differ, "
            f"the first is {odd[0]!r}.\nThe two files were not saved together.\nSave the model again."
        )
    try:
        model.load_state_dict(weights, strict=whole)
    except RuntimeError as error:
        raise RecipeError(
            f"The weights in {str(folder)!r} cannot be put into this model: {error}\n"
            "A layer refuses them, or tensors of the model share memory.\nBuild the model as it was built then."
        ) from error
