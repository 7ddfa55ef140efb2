"""Saving and loading: one safetensors file, with the model's recipe in its metadata; see `fxgraft.io.recipe`."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from fxgraft.errors import FxgraftError, FxgraftWarning, RecipeError
from fxgraft.graph.atomic import apply_atomically, synchronized
from fxgraft.graph.grafting.graft import Graft
from fxgraft.graph.grafting.graft_registry import GraftRegistry, registry_of
from fxgraft.graph.grafting.lookup import own_keys, patched_inside, patched_parts
from fxgraft.graph.grafting.placement import PlacementRecord
from fxgraft.graph.grafting.state import parts_without_model
from fxgraft.graph.grafting.transaction import restoring_parts
from fxgraft.graph.grafting.unit import Unit
from fxgraft.graph.tracing.preserve import preserved_random_state
from fxgraft.graph.wrapped_models import check_model
from fxgraft.io.atomic_write import write_file
from fxgraft.io.backbone_weights import Weights
from fxgraft.io.constructor import (
    Constructor,
    constructor_of,
    differences_from,
    few,
    given_constructor,
    load_constructed,
)
from fxgraft.io.recipe import ENTRY, FORMAT, HEADER, architecture_of, file_at, read_recipe, recipe_digest
from fxgraft.patches.registry import build

M = TypeVar("M", bound=nn.Module)

SCHEME = "hf-hub:"
"""What the address of a repository of the hub starts with."""


def save(
    model: nn.Module,
    path: str | Path,
    *,
    weights: bool = True,
    build: Mapping[str, Any] | None = None,
) -> Path:
    """Write a patched model to one safetensors file: its tensors, and the recipe of its grafts in the metadata.

    >>> import fxgraft, timm
    >>> model = fxgraft.patch(timm.create_model("test_resnet", num_classes=7), "rsc")
    >>> file = fxgraft.save(model, "run.safetensors")
    >>> fxgraft.grafts(fxgraft.load(file))[0].name
    'rsc'

    The recipe also says how the model was made, where that can be proved: for models of timm, torchvision and
    transformers, also with another classifier or changed rates. `load` then needs the file alone. A crash at any moment
    leaves the old file or the new one. Which parameters are frozen (``requires_grad``) isn't saved, as it isn't in a
    state dict: freeze them again after `load`.

    Args:
        model: a patched model.
        path: the file, with the suffix .safetensors; or a folder, for ``fxgraft.safetensors`` in it. Folders are made
            if need be, and an earlier file is replaced.
        weights: write all weights; with False only those that grafts added, to sit beside a checkpoint of the
            backbone that you keep yourself.
        build: how the model was made, where it isn't known: ``{"library": "python", "name": "my_models:build",
            "options": {"width": 8}}``, with "timm", "torchvision" or "transformers" for the names of those. It is
            carried out, and has to make the same model.

    Returns:
        The file.

    Raises:
        RecipeError: there is no graft on the model, or one that a recipe cannot hold, or there are no values in it; or
            the name of the file.
        ConfigError: ``build`` makes another model.
        OSError: the file cannot be written. An earlier one is then as it was.
    """
    registry = registry_of(model)
    if registry is None:
        inside = patched_inside(model)
        bare = "Use torch.save(model.state_dict(), ...) for a bare model."
        raise RecipeError(
            f"There is no graft on this {type(model).__name__}, so there is no recipe to save.\n"
            f"{f'{inside} is patched: save that.' if inside else bare}"
        )
    for graft in registry.grafts:
        if not graft.patch.saves:
            raise RecipeError(
                f"{graft.name!r} ({graft.patch.title}) cannot be saved: a recipe holds options, and it works with "
                "networks as well.\n"
                "Save what it folds into, fxgraft.merge(model), or the whole model by torch.save(model, ...). Without "
                f"it, fxgraft.unpatch(model, {graft.name!r}), the weights it trained stay, and what it does to the "
                "values in the model goes."
            )
    inner = [part for part in patched_parts(model) if part]
    if inner:
        raise RecipeError(
            f"Parts of this {type(model).__name__} have grafts of their own: {', '.join(map(repr, inner))}.\n"
            "A recipe holds the grafts of one model.\n"
            "Put all grafts on the whole model, merge the parts first, or save the whole by torch.save(model, ...)."
        )
    if str(path).startswith(SCHEME):
        raise RecipeError(
            f"{str(path)!r} is an address of the hub, and fxgraft.save writes a file.\n"
            "Call fxgraft.push_to_hub(model, ...) with the name of the repository."
        )
    own = {id(part) for graft in registry.grafts for unit in graft.units.values() for part in unit.modules()}
    for name, module in model.named_modules():
        if isinstance(module, Unit) and id(module) not in own:
            raise RecipeError(
                f"{name!r} belongs to a graft of another model, with which this {type(model).__name__} shares a part.\n"
                "A recipe holds the grafts of one model.\nGive each model parts of its own (copy.deepcopy)."
            )
    file = file_at(path)
    if file.suffix != ".safetensors" or file.is_dir():
        raise RecipeError(
            f"{str(path)!r} isn't a name for a safetensors file.\n"
            "Others know what is in a file by its name.\n"
            "Let it end in .safetensors, or pass a folder."
        )
    registry.renew_stale(model)
    own = own_keys(model)
    _check_has_values(model)
    made = constructor_of(model) if build is None else given_constructor(build, model)
    libraries = {"torch", "timm"} | ({made.library} - {"python"} if isinstance(made, Constructor) else set())
    recipe = {
        **HEADER.entries(),
        "versions": {name: importlib.metadata.version(name) for name in sorted(libraries)},
        "build": made.as_data() if isinstance(made, Constructor) else made,
        "architecture": architecture_of(model, own),
        "progress": registry.context.progress,
        "weights": "all" if weights else "grafts",
        "grafts": [_entry(graft) for graft in registry.grafts],
        "placements": [record.as_data() for record in registry.recorded()],
    }
    try:
        json.dumps(recipe)
    except TypeError as error:
        raise RecipeError(
            f"A graft has an option that JSON cannot hold: {error}.\nUse plain values."
        ) from error
    for graft, entry in zip(registry.grafts, recipe["grafts"], strict=True):
        _check_comes_back(graft, json.loads(json.dumps(entry["options"])))
    tensors = unshared({k: v for k, v in model.state_dict().items() if weights or k in own})
    metadata = {**FORMAT, ENTRY: json.dumps({**recipe, "sha256": recipe_digest(recipe, tensors)})}

    def write(draft: Path) -> None:
        try:
            save_file(tensors, draft, metadata)
            _sort_metadata(draft)
        except SafetensorError as error:  # the writer's own class, also for errors of the system
            raise OSError(
                f"{str(file)!r} cannot be written: {error}.\n"
                "The disk is full, perhaps, or the folder cannot be written to.\n"
                "What was saved there before is as it was."
            ) from error

    write_file(file, write)
    return file


def _sort_metadata(file: Path) -> None:
    """Write the entries of the metadata in order: safetensors hashes them, and the same model makes other bytes."""
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:  # another layout than today's safetensors writes: the file is right as it is
            opened.seek(8)
            opened.write(text.ljust(size))


def _entry(graft: Graft) -> dict[str, Any]:
    options = graft.patch.to_dict()
    size = list(graft.input_size) if graft.input_size else None
    return {"name": graft.name, "method": options.pop("method"), "options": options, "input_size": size}


def _check_comes_back(graft: Graft, read: dict[str, Any]) -> None:
    """Raise where options come back from JSON as other values: tuples in tuples, and keys that aren't text."""
    again = build(graft.patch.method, _options(read))
    for option in read:
        before, after = getattr(graft.patch, option), getattr(again, option)
        if before != after:
            raise RecipeError(
                f"{option}={before!r} of {graft.name!r} would come back from the file as {after!r}: JSON has lists "
                "and keys of text alone.\n"
                "Let the method take such values and convert them in its __post_init__."
            )


def _check_has_values(model: nn.Module) -> None:
    """Raise where a model's tensors are on the device "meta", which has no memory."""
    empty = [key for key, value in model.state_dict().items() if value.is_meta]
    if empty:
        raise RecipeError(
            f"{len(empty)} tensors of this {type(model).__name__} are on the device 'meta', which holds no values; "
            f"the first is {empty[0]!r}.\n"
            'Give it memory first, as by model.to_empty(device="cpu"); and to save it, its weights.'
        )


def unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give every tensor memory of its own, which safetensors asks for.

    Args:
        tensors: a state dict.
    """
    seen: set[int] = set()
    out = {}
    for key, value in tensors.items():
        value = value.detach().contiguous()
        memory = value.untyped_storage().data_ptr()
        if memory in seen:
            value = value.clone()
        seen.add(memory)
        out[key] = value
    return out


@overload
def load(path: str | Path, model: None = None, *, trust: bool = False) -> nn.Module: ...
@overload
def load(path: str | Path, model: M, *, trust: bool = False) -> M: ...
@overload
def load(path: M, model: str | Path, *, trust: bool = False) -> M: ...
@synchronized
def load(path: Any, model: Any = None, *, trust: bool = False) -> Any:
    """Build a model as a saved one was, or take a bare one, put the grafts on it, and load the weights.

    Args:
        path: the file that `save` wrote, or its folder; or "hf-hub:owner/name", where `push_to_hub` put it.
        model: a bare model of the same architecture, to be changed in place; by default the recipe says how to make
            one. ``load(model, path)`` is the same.
        trust: make the model with a function of one's own that the recipe names. This runs code that the file chooses.

    Returns:
        The patched model, on the CPU and in training mode where it was made here.

    Raises:
        RecipeError: there is no recipe, it is damaged, of an unknown version, or made for another
            architecture; the model cannot be made, or is patched already. A given model is then as it was.

    Warns:
        FxgraftWarning: the given model has other attributes, or modules of other classes, than the one that was saved.
    """
    if isinstance(path, nn.Module):
        path, model = model, path
    if not isinstance(path, (str, Path)):
        raise RecipeError(
            f"fxgraft.load reads a file, and got {path!r}.\nPass what fxgraft.save returned: "
            'fxgraft.load("run.safetensors"), or fxgraft.load("run.safetensors", model=model).'
        )
    if model is not None and registry_of(model) is not None:
        raise RecipeError(
            "The model is patched already, and a recipe starts from a bare one.\nCall fxgraft.unpatch(model) first."
        )
    if model is not None:
        check_model(model)
    if isinstance(path, str) and path.startswith(SCHEME):
        from fxgraft.io.hub_client import fetch  # its client takes a while to import

        path = fetch(path)
    file = file_at(path)
    recipe, tensors = read_recipe(file)
    with preserved_random_state():  # constructors and units draw what they start from
        given = model is not None
        if model is None:
            model = _made(recipe, tensors, trust, file)
        _put_on(model, recipe, tensors, file)
        if given:
            _tell_differences(model, recipe["build"], trust, file)
    return model


def _tell_differences(model: nn.Module, made: Any, trust: bool, file: Path) -> None:
    """Warn where a model that weights were loaded into was built otherwise than the one that they are of."""
    if not isinstance(made, Constructor) or (made.library == "python" and not trust):
        return
    apart = differences_from(made, model)
    if apart:
        warnings.warn(
            f"The model in {str(file)!r} was made by {made}, and the one that was given differs from it in "
            f"{few(apart)}.\n"
            "The weights fit, and what the model computes from them may be something else.\n"
            "Build the model as it was built then, or leave model= out: fxgraft.load(file) makes it.",
            FxgraftWarning,
            stacklevel=4,
        )


def _made(recipe: Mapping[str, Any], tensors: Mapping[str, Tensor], trust: bool, file: Path) -> nn.Module:
    """Make the bare model of a recipe, with tensors of the types that were saved."""
    made = recipe["build"]
    if not isinstance(made, Constructor):
        raise RecipeError(
            f"{str(file)!r} does not say how its {recipe['architecture']['class']} was made: {made}\n"
            "The grafts go on a model of that architecture, which you have to build.\n"
            "Pass it: fxgraft.load(file, model=model). fxgraft.save(..., build=...) writes how it is made."
        )
    if recipe["weights"] != "all":
        raise RecipeError(
            f"{str(file)!r} holds the weights of the grafts alone (weights=False), and none of the model.\n"
            "A model that is made from it would start at random.\n"
            "Build the model, load your checkpoint into it, and pass it: fxgraft.load(file, model=model)."
        )
    model = load_constructed(made, trust, file)
    check_model(model)
    floats = {value.dtype for value in tensors.values() if value.is_floating_point()}
    if len(floats) == 1:
        model.to(floats.pop())
    for key, value in (*model.named_parameters(), *model.named_buffers()):
        if key in tensors:
            value.data = value.data.to(tensors[key].dtype)
    return model


def _put_on(model: nn.Module, recipe: Mapping[str, Any], tensors: dict[str, Tensor], file: Path) -> None:
    """Put the grafts and tensors of a recipe on a bare model; on failure it is as before."""
    _check_has_values(model)
    saved, present = recipe["architecture"], architecture_of(model)
    if saved != present:
        what = (
            f"{saved['class']}, not {present['class']}"
            if saved["class"] != present["class"]
            else f"a {saved['class']} with other layers or sizes"
        )
        made = recipe["build"]
        how = f" ({made})" if isinstance(made, Constructor) else ""
        raise RecipeError(
            f"The recipe in {str(file)!r} was made for another architecture: {what}.\n"
            f"Sites and weights are those of one architecture, of {_versions(recipe)}.\n"
            f"Build the model as it was built then (same name, num_classes and arguments){how}."
        )
    registry = GraftRegistry()
    registry.context.progress = float(recipe["progress"])
    kept = Weights(model)
    flags = [(module, module.training) for module in model.modules()]
    parts = restoring_parts(parts_without_model(model))
    try:
        _install(registry, model, recipe, file)
        _load_weights(model, tensors, recipe["weights"] == "all", file)
    except BaseException:
        if registry.plan is not None:
            registry.install(model, [])
            apply_atomically(parts)
        kept.put_back(model)
        for module, flag in flags:
            module.training = flag
        raise


def _versions(recipe: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in recipe.get("versions", {}).items())


def _install(registry: GraftRegistry, model: nn.Module, recipe: Mapping[str, Any], file: Path) -> None:
    """Build the grafts of a recipe and put them on. Any error of a method counts as a fault of the recipe."""
    try:
        wanted = [
            Graft(
                e["name"], build(e["method"], _options(e["options"])),
                input_size=tuple(e["input_size"]) if e["input_size"] else None,
            )
            for e in recipe["grafts"]
        ]  # fmt: skip
        registry.install(model, wanted, [PlacementRecord.of_data(record) for record in recipe["placements"]])
    except Exception as error:
        raise RecipeError(
            f"The recipe in {str(file)!r} asks for what this fxgraft does not have, or not on this model.\n"
            f"{error if isinstance(error, FxgraftError) else repr(error)}\n"
            f"It was written with {_versions(recipe)}. Install these, or register the methods that it names."
        ) from error


def _options(options: dict[str, Any]) -> dict[str, Any]:
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in copy.deepcopy(options).items()
    }


def _load_weights(model: nn.Module, tensors: dict[str, Tensor], whole: bool, file: Path) -> None:
    expected = model.state_dict()
    wanted = set(expected) if whole else own_keys(model)
    shapes = {key for key in wanted & set(tensors) if tensors[key].shape != expected[key].shape}
    if wanted != set(tensors) or shapes:
        odd = sorted((wanted ^ set(tensors)) | shapes)
        raise RecipeError(
            f"The weights in {str(file)!r} do not fit the recipe: {len(odd)} tensors differ, "
            f"the first is {odd[0]!r}.\n"
            "The method makes other tensors in this release, or the model has other layers.\nSave the model again."
        )
    try:
        model.load_state_dict(tensors, strict=whole)
    except RuntimeError as error:
        raise RecipeError(
            f"The weights in {str(file)!r} cannot be put into this model: {error}\n"
            "A layer refuses them, or tensors of the model share memory.\nBuild the model as it was built then."
        ) from error
