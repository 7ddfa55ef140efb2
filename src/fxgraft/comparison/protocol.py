"""The protocol of a comparison: what all runs of a folder share, in the words of its file."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from fxgraft.comparison.checks import SEEN
from fxgraft.comparison.data import Data
from fxgraft.comparison.runs import Setup
from fxgraft.io.atomic_write import digest_of
from fxgraft.io.recipe import architecture_of


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
    name = setup.model if isinstance(setup.model, str) else _path(setup.model)
    loop = None if setup.train is None else _path(setup.train)
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
        "training": asdict(setup.training) if loop is None else {"loop": loop, **_seen(setup.training)},
        "corrupt": setup.corrupt,
        "measure": None if setup.measure is None else _path(setup.measure),
        "adapt": {"steps": setup.adapt_steps, "lr": setup.adapt_lr},
        "tune": tune,
        "tune_each": tune_each,
        **limits,
    }


def _seen(training: Any) -> dict[str, Any]:
    return {name: getattr(training, name) for name in SEEN}


def _path(function: Callable[..., Any]) -> str:
    """Name a function so that another one isn't taken for it when the folder is opened again."""
    if isinstance(function, functools.partial):
        return f"partial({_path(function.func)}, {function.args!r}, {function.keywords!r})"
    named = function if hasattr(function, "__qualname__") else type(function)
    name = f"{named.__module__}:{named.__qualname__}"
    code = getattr(function, "__code__", None)
    # Lambdas, and functions that a function makes, all have the same name.
    return f"{name}#{_code_digest(code)[:12]}" if "<" in name and code is not None else name


def _code_digest(code: types.CodeType) -> str:
    held = [
        _code_digest(value) if isinstance(value, types.CodeType) else repr(value) for value in code.co_consts
    ]
    return hashlib.sha256(code.co_code + repr((held, code.co_names)).encode()).hexdigest()
