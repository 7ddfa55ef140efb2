"""``fxgraft merge``: folds the grafts of a trained model into a file of stock weights."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fxgraft
from fxgraft.errors import ConfigError, RecipeError
from fxgraft.io.atomic_write import write_file
from fxgraft.io.backbone_weights import WRAPPERS, differences
from fxgraft.io.constructor import Constructor
from fxgraft.io.recipe import file_at, is_recipe, read_recipe
from fxgraft.io.save_load import unshared
from fxgraft.models import LIBRARIES, build_model, split_name

RUN_FILES = ("model_best.pth.tar", "last.pth.tar")
"""What a run of timm's train.py leaves in its folder, the best first."""


@dataclass(frozen=True)
class Trained:
    """What a training has left.

    Attributes:
        file: the file that was read.
        weights: weights of the patched model.
        model: name of the architecture, if it is noted there.
        classes: number of classes, if noted.
        options: further arguments of the model's constructor that are noted.
    """

    file: Path
    weights: dict[str, Tensor]
    model: str | None = None
    classes: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


def merge_file(
    source: Path,
    out: Path,
    *,
    model: str | None = None,
    grafts: Sequence[str] = (),
    classes: int | None = None,
    input_size: int | None = None,
    ema: bool = False,
) -> str:
    """Fold the grafts of a trained model into stock weights, and write them as safetensors.

    Args:
        source: what `fxgraft.save` wrote, the output folder of timm's train.py, or a checkpoint.
        out: the file to write; its name ends in ``.safetensors``.
        model: name of the backbone; a checkpoint of timm's train.py knows it, and mostly a file of `fxgraft.save`.
        grafts: how the model was patched, as `fxgraft.patch` reads it; a file of `fxgraft.save` knows it.
        classes: number of classes; by default read from the checkpoint.
        input_size: side of the images that it was patched for.
        ema: take the averaged weights of the checkpoint.

    Returns:
        What was written, and how to build the model from it.

    Raises:
        ConfigError: a file that cannot be read or written, an unknown model, or grafts that do not go on it.
        RecipeError: the checkpoint is not that of this model with these grafts; lists the keys.
        MergeError: a graft cannot be folded.
    """
    if out.suffix != ".safetensors":
        named = out / "model.safetensors" if out.is_dir() else out.with_suffix(".safetensors")
        raise ConfigError(
            f"The file to write must end in .safetensors, got {str(out)!r}.\nPass {str(named)!r}."
        )
    if is_recipe(source):
        if grafts or ema:
            raise ConfigError(
                f"{str(source)!r} was written by fxgraft.save, and says itself which grafts and weights it holds.\n"
                "Leave --graft and --ema out."
            )
        network, name, options = _loaded(source, model, classes, input_size)
    else:
        trained = read_checkpoint(source, ema)
        name = _name(source, model or trained.model)
        classes = classes or trained.classes or _classes(name, trained.weights)
        network = build_model(name, classes, input_size=input_size, **trained.options)
        options = trained.options | ({} if classes is None else {"num_classes": classes})
        if grafts:
            size = None if input_size is None else (3, input_size, input_size)
            fxgraft.patch(network, " + ".join(grafts), input_size=size)
        _load(network, trained)
    merged = fxgraft.merge(network)
    folded = ", ".join(graft.name for graft in fxgraft.grafts(network)) or "no graft"
    tensors = unshared(merged.state_dict())
    try:
        write_file(out, lambda file: save_file(tensors, file, {"format": "pt"}))
    except OSError as error:
        raise ConfigError(
            f"Cannot write {str(out)!r}: {error.strerror or error}.\nPass another file to write."
        ) from error
    library, plain = split_name(name)
    how = str(Constructor("timm", plain, {**options, "checkpoint_path": str(out)}))
    return f"{out}: {name} with {folded} folded in, {len(tensors)} tensors" + (
        f"\n{how}" if library == "timm" else ""
    )


def _loaded(
    source: Path, model: str | None, classes: int | None, input_size: int | None
) -> tuple[nn.Module, str, dict[str, Any]]:
    """Load what `fxgraft.save` wrote, on the model that it says or the one that is named.

    Returns:
        The model, the name of its architecture, and arguments of its constructor.
    """
    recipe, weights = read_recipe(file_at(source))
    made = recipe["build"]
    if model is None and isinstance(made, Constructor) and made.library in LIBRARIES:
        return fxgraft.load(source), f"{made.library}/{made.name}", made.options
    name = _name(source, model)
    classes = classes or _classes(name, weights)
    network = build_model(name, classes, input_size=input_size)
    return fxgraft.load(source, network), name, {} if classes is None else {"num_classes": classes}


def _name(source: Path, name: str | None) -> str:
    if name is None:
        raise ConfigError(
            f"{str(source)!r} does not say which model it is of.\nGive it, as timm calls it: --model NAME."
        )
    return name


def read_checkpoint(source: Path, ema: bool = False) -> Trained:
    """Read a checkpoint: of timm's train.py, a plain state dict, or safetensors. No code in it is run.

    Args:
        source: the file, or the output folder of timm's train.py.
        ema: take the averaged weights.

    Raises:
        ConfigError: there is none, it cannot be read, or it has no averaged weights.
    """
    if source.is_dir():
        file = next((source / name for name in RUN_FILES if (source / name).is_file()), None)
        if file is None:
            raise ConfigError(
                f"There is nothing to merge in {str(source)!r}: neither what fxgraft.save writes, nor "
                f"{' or '.join(RUN_FILES)}, which timm's train.py does.\nPass the checkpoint itself."
            )
        source = file
    content = _read(source)
    key = "state_dict_ema" if ema else next((k for k in ("state_dict", "model") if k in content), None)
    if ema and content.get("state_dict_ema") is None:
        raise ConfigError(f"{str(source)!r} has no averaged weights.\nLeave --ema out.")
    weights = content if key is None else content[key]
    if not isinstance(weights, Mapping) or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise ConfigError(
            f"{str(source)!r} holds no weights that can be told: it has the entries "
            f"{', '.join(map(repr, list(content)[:8]))}.\n"
            "Pass a state dict, or a dictionary with one under 'state_dict'."
        )
    arguments = vars(content["args"]) if isinstance(content.get("args"), argparse.Namespace) else {}
    options = dict(arguments.get("model_kwargs") or {})
    if arguments.get("in_chans") is not None:
        options["in_chans"] = arguments["in_chans"]
    # Without arguments beside it, "arch" is the name of the class.
    return Trained(source, _unwrapped(weights), arguments.get("model"), arguments.get("num_classes"), options)


_CHECKPOINTS = "Pass a checkpoint of timm's train.py, a state dict that torch.save wrote, or safetensors."


def _read(file: Path) -> dict[str, Any]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm keeps its arguments in one
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises whatever bytes that are no checkpoint lead to
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(f"The checkpoint {str(file)!r} cannot be read: {reason}\n{_CHECKPOINTS}") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{str(file)!r} holds a {type(content).__name__}, not a dictionary of weights.\n{_CHECKPOINTS}"
        )
    return content


def _unwrapped(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take off what DistributedDataParallel and torch.compile put before the names."""
    unwrapped = dict(weights)
    while (
        prefix := next((w for w in WRAPPERS if all(k.startswith(w) for k in unwrapped)), None)
    ) and unwrapped:
        unwrapped = {key.removeprefix(prefix): value for key, value in unwrapped.items()}
    return unwrapped


def _classes(name: str, weights: Mapping[str, Tensor]) -> int | None:
    """Count the classes of a timm model's classifier; None where it cannot be told."""
    library, model = split_name(name)
    architecture = model.partition(".")[0]
    config = (
        timm.get_pretrained_cfg(architecture) if library == "timm" and timm.is_model(architecture) else None
    )
    layer = None if config is None else config.classifier
    weight = weights.get(f"{layer if isinstance(layer, str) else (layer or ('',))[0]}.weight")
    return None if weight is None else weight.shape[0]


def _load(network: nn.Module, trained: Trained) -> None:
    misfit = differences(network.state_dict(), trained.weights)
    if not misfit:
        network.load_state_dict(trained.weights)
        return
    have = {graft.name for graft in fxgraft.grafts(network)}
    there = {
        name for key in trained.weights for name in re.findall(r"\bgraft_([A-Za-z0-9_]+?)(?:_\d+)?\.", key)
    }
    unknown = sorted(there - have)
    raise RecipeError(
        f"{str(trained.file)!r} is not a checkpoint of this {type(network).__name__} with "
        f"{', '.join(sorted(have)) or 'no grafts'}: {misfit}.\n"
        + (
            f"It has tensors of {', '.join(map(repr, unknown))}: say how it was patched, "
            f"--graft {unknown[0]}:key=value,key=value."
            if unknown
            else "Give the model and the grafts that it was trained with: --model resnet50 --graft rsc:layer=layer4."
        )
    )
