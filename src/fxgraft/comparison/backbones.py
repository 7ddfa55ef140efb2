"""Which backbone is compared: by a library's name, by a function of one's own, with weights from a file."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxgraft.errors import ConfigError, RecipeError
from fxgraft.models import build_model

Model = str | Callable[..., nn.Module]


def build(
    model: Model,
    classes: int,
    *,
    size: int,
    seed: int,
    pretrained: bool = False,
    weights: str | Path | None = None,
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """Build the backbone; equal seeds give equal initial weights.

    Args:
        model: a name of timm or torchvision, ``"package.module:function"``, or a function; functions are called with
            ``num_classes=``.
        classes: outputs of the classifier.
        size: side of the images in pixels.
        seed: of what is initialised at random.
        pretrained: load the library's weights from its hub.
        weights: a checkpoint instead; a classifier of another number of classes in it is left out.
        options: of the constructor.

    Raises:
        ConfigError: no such model, or the function cannot be imported.
        RecipeError: the hub cannot be reached, the file cannot be read, or its tensors do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if callable(model) or (":" in model and not model.startswith(("hf-hub:", "hf_hub:", "local-dir:"))):
            function = model if callable(model) else imported(model)
            try:
                built = function(num_classes=classes, **(options or {}))
            except TypeError as error:
                raise ConfigError(
                    f"{model!r} could not be called with num_classes={classes}: {error}"
                ) from error
            if not isinstance(built, nn.Module):
                raise ConfigError(f"{model!r} returned a {type(built).__name__}, and not a torch.nn.Module.")
        else:
            built = _library(model, classes, size, pretrained, options or {})
    if weights is not None:
        _load(built, Path(weights))
    return built


def _library(model: str, classes: int, size: int, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    try:
        return build_model(model, classes, pretrained=pretrained, input_size=size, **options)
    except OSError as error:
        raise RecipeError(
            f"The weights of {model!r} cannot be fetched: {str(error).splitlines()[0]}\n"
            "They come from a hub, which this machine does not reach.\n"
            "Pass a checkpoint, weights=FILE (--weights FILE), or train from scratch without pretrained."
        ) from error


def imported(path: str) -> Any:
    """Return what ``package.module:name`` names; modules of the working directory are found too."""
    module, _, name = path.partition(":")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"Cannot import {path!r}: {error}\nWrite it as package.module:function.") from error
    finally:
        if added:
            sys.path.remove(here)


def _load(model: nn.Module, file: Path) -> None:
    from timm.models import load_state_dict

    if not file.is_file():
        raise RecipeError(f"There is no file {str(file)!r} with weights.")
    try:
        found = load_state_dict(str(file), device="cpu")
    except Exception as error:  # torch's and safetensors' own, of many classes
        raise RecipeError(f"{file} holds no weights that can be read: {error}") from error
    own = model.state_dict()
    head = {f"{name}.{kind}" for name in _classifiers(model) for kind in ("weight", "bias")}
    for name in head & set(found) & set(own):
        if found[name].shape != own[name].shape:
            del found[name]
    lacking = sorted(set(own) - set(found) - head)
    foreign = sorted(set(found) - set(own))
    shapes = [name for name in found if name in own and found[name].shape != own[name].shape]
    if lacking or foreign or shapes:
        parts = [
            f"{what} {', '.join(names[:4])}{', …' if len(names) > 4 else ''}"
            for what, names in (("it lacks", lacking), ("it adds", foreign), ("of another shape are", shapes))
            if names
        ]
        raise RecipeError(
            f"{file} does not fit the model: {'; '.join(parts)}.\nPass the checkpoint of this model."
        )
    model.load_state_dict(found, strict=False)


def _classifiers(model: nn.Module) -> list[str]:
    declared = getattr(model, "default_cfg", None) or {}
    named = declared.get("classifier", ()) if isinstance(declared, dict) else ()
    found: list[str] = [named] if isinstance(named, str) else list(named or ())
    return found or [name for name, each in model.named_modules() if isinstance(each, nn.Linear)][-1:]
