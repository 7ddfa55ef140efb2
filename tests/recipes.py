"""Recipes of saved files, for tests that change them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxgraft.io.recipe import recipe_digest


def read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the recipe and the tensors of a file."""
    with safe_open(file, framework="pt") as opened:
        return json.loads(opened.metadata()["fxgraft"]), {
            key: opened.get_tensor(key)
            for key in opened.keys()  # noqa: SIM118
        }


def write(file: Path, recipe: Any, tensors: dict[str, Tensor], *, signed: bool = True) -> None:
    """Write a file, by default with the digest that its content has."""
    if signed and isinstance(recipe, dict):
        recipe = {**recipe, "sha256": recipe_digest(recipe, tensors)}
    metadata = {"format": "pt", "fxgraft": json.dumps(recipe)}
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata)


def rewrite(file: Path, *, signed: bool = True, **changes: Any) -> None:
    """Change entries of a file's recipe; ``...`` takes one out."""
    recipe, tensors = read(file)
    recipe = {key: value for key, value in {**recipe, **changes}.items() if value is not ...}
    write(file, recipe, tensors, signed=signed)
