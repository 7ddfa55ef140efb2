"""What editors see of `fxgraft.patch`: an overload for each built-in method, with its options and presets.

    python -m tools.stubs --write    # after a change to a method's options
    python -m tools.stubs --check    # fails where __init__.pyi says something else

Methods of other packages take any options there, as they do where the name isn't a literal.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Annotated, Any

import typer

import fxgraft
from fxgraft.io.atomic_write import write_text
from fxgraft.patches.options import option_hints
from tools.readme import own_methods

STUB = Path(fxgraft.__file__).parent / "__init__.pyi"

_HEAD = """\
# What type checkers and editors see: the names that __init__.py imports when they are asked for, and the options of
# every method. Written by python -m tools.stubs
import collections.abc
from typing import Any, Literal, TypeVar, overload

import torch

{imports}

__version__: str

_M = TypeVar("_M", bound=torch.nn.Module)
"""

_FORM = """\
@overload
def patch(
    model: {model},
    method: {method},
    *,
    name: str | None = ...,
    dry_run: Literal[{dry}]{given},
    input_size: tuple[int, ...] | None = ...,
{options}) -> {returned}: ...
"""
_ANY = "    preset: str | None = ...,\n    **options: Any,\n"


def stub() -> str:
    """Return the text of ``__init__.pyi``."""
    # Each as itself, which hands it on; `patch` is declared here alone.
    modules = vars(fxgraft)["_MODULE_OF"]
    imports = [f"from {modules[name]} import {name} as {name}" for name in sorted(modules) if name != "patch"]
    parts = [_HEAD.format(imports="\n".join(imports))]
    for name, method in own_methods().items():
        options = {"preset": _presets(method), **_options(method)}
        lines = "".join(f"    {option}: {hint} = ...,\n" for option, hint in options.items())
        parts.append(_overload(f'Literal["{name}"]', lines))
    parts += [_overload("Patch", ""), _overload("str", _ANY), _overload("str | Patch", _ANY, planned=True)]
    return "".join(parts)


def _overload(method: str, options: str, planned: bool = False) -> str:
    """Write one overload: of a call that patches, or of one that plans."""
    dry, given, returned = (True, "", "Plan") if planned else (False, " = ...", "_M")
    model = "torch.nn.Module" if planned else "_M"
    return _FORM.format(model=model, method=method, options=options, dry=dry, given=given, returned=returned)


def _presets(method: type[fxgraft.Patch]) -> str:
    names = ", ".join(f'"{name}"' for name in method.presets)
    return f"Literal[{names}] | None" if names else "None"


def _options(method: Any) -> dict[str, str]:
    """List the options of a method with their types, as the stub writes them."""
    hints = option_hints(method)
    options = {field.name: _written(hints[field.name]) for field in dataclasses.fields(method) if field.init}
    if "layer" in inspect.signature(method).parameters:
        options["layer"] = options["layers"]
    return options


def _written(hint: Any) -> str:
    text = inspect.formatannotation(hint).replace("torch.nn.modules.module.Module", "torch.nn.Module")
    text = re.sub(r"Optional\[((?:[^][]|\[[^][]*\])*)\]", r"\1 | None", text)
    return re.sub(r"'([^']*)'", r'"\1"', text)


def main(
    write: Annotated[bool, typer.Option("--write/--check", help="Write, or only compare.")] = False,
) -> None:
    """Write the stub again, or check that it is up to date."""
    if write:
        write_text(STUB, stub())
    elif STUB.read_text(encoding="utf-8") != stub():
        typer.echo(f"{STUB} is not what the registry says: python -m tools.stubs --write", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
