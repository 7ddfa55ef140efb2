"""The protocol of a comparison: what all runs of a folder share, in the words of its file."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxgraft.comparison.checks import SEEN
from fxgraft.comparison.data import Data
from fxgraft.comparison.runs import Setup
from fxgraft.io.atomic_write import digest_of
from fxgraft.io.recipe import architecture_of, content_digest
from fxgraft.models import imported, is_own


def protocol_of(
    setup: Setup,
    images: Data,
    model: nn.Module,
    tune: Mapping[str, Sequence[Any]],
    tune_each: bool,
    limits: Mapping[str, int | None],
) -> dict[str, Any]:
    """Return the protocol.

    Args:
        setup: what the runs share.
        images: what is trained on and tested.
        model: a bare model of the setup.
        tune: values to try, by setting.
        tune_each: whether every variant is tuned.
        limits: largest numbers of images of a class.
    """
    # Of a function the code counts, too: edited between two calls it makes runs that are no pairs.
    own = imported(setup.model) if isinstance(setup.model, str) and is_own(setup.model) else setup.model
    name = own if isinstance(own, str) else _path(own)
    loop = None if setup.train is None else _path(setup.train)
    seen = {name: getattr(setup.training, name) for name in SEEN}
    return {
        "data": images.source.name,
        "kind": images.kind,
        "images": images.source.images,
        "digest": images.source.digest,
        "test": None if images.test is None else asdict(images.test),
        "target": None if images.target is None else asdict(images.target),
        "classes": list(images.classes),
        "model": name,
        "architecture": architecture_of(model),
        "model_options": setup.model_options,
        "pretrained": setup.pretrained,
        "weights_sha256": None if setup.weights is None else digest_of(Path(setup.weights)),
        "size": setup.size,
        "training": asdict(setup.training) if loop is None else {"loop": loop, **seen},
        "corrupt": setup.corrupt,
        "measure": None if setup.measure is None else _path(setup.measure),
        "adapt": {"steps": setup.adapt_steps, "lr": setup.adapt_lr},
        "tune": tune,
        "tune_each": tune_each,
        **limits,
    }


def _path(function: Callable[..., Any]) -> str:
    """Name a function so that another one isn't taken for it when the folder is opened again."""
    if isinstance(function, functools.partial):
        return f"partial({_path(function.func)})#{_digest(function)}"
    named = function if hasattr(function, "__qualname__") else type(function)
    # Lambdas, functions that a function makes, methods and objects have the same name and differ in what they hold.
    return f"{named.__module__}:{named.__qualname__}#{_digest(function)}"


def _digest(function: Callable[..., Any]) -> str:
    return hashlib.sha256(repr(_held(function, ())).encode()).hexdigest()[:12]


def _held(value: Any, around: tuple[int, ...]) -> Any:
    """Describe a value by its content, the same way in every process."""
    if id(value) in around:
        return "itself"
    inside = (*around, id(value))

    def all_of(values: Iterable[Any]) -> list[Any]:
        return [_held(item, inside) for item in values]

    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, Path, np.generic)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return all_of(value)
    if isinstance(value, Set):
        return sorted(map(repr, all_of(value)))
    if isinstance(value, Mapping):
        return [(repr(key), _held(item, inside)) for key, item in value.items()]
    if isinstance(value, (Tensor, np.ndarray)):
        return content_digest(torch.as_tensor(value))
    if isinstance(value, types.CodeType):
        return [value.co_code.hex(), value.co_names, all_of(value.co_consts)]
    if isinstance(value, functools.partial):
        return all_of((value.func, value.args, value.keywords))
    if isinstance(value, types.MethodType):
        return all_of((value.__func__, value.__self__))
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        name = f"{value.__module__}:{value.__qualname__}"
        return [name, *all_of((value.__code__, value.__defaults__, value.__kwdefaults__, cells))]
    if isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)):
        return value.__name__
    if isinstance(value, nn.Module):
        return [type(value).__qualname__, content_digest(dict(value.state_dict()))]
    return [type(value).__qualname__, _held(getattr(value, "__dict__", {}), inside)]
