"""``fxgraft sites`` and ``fxgraft suggest``: where patches can go in a model, and which methods suit it."""

from __future__ import annotations

import json as json_module
from typing import Annotated, Any

import typer
from rich.console import Console

from fxgraft.cli.completion import complete_model

ModelArgument = Annotated[
    str,
    typer.Argument(help="resnet50, timm/resnet50, torchvision/resnet50, …", autocompletion=complete_model),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Write JSON in place of the table.")]


def show(table: Any, plain: str | None = None) -> None:
    """Print a table: as wide as the terminal, and in a pipe not cut to the 80 columns that rich assumes of one."""
    console = Console()
    if console.is_terminal:
        console.print(table)
    elif plain is not None:
        typer.echo(plain.rstrip())
    else:
        Console(width=110).print(table)


def sites(
    model: ModelArgument,
    pattern: Annotated[
        str | None, typer.Argument(help="Only these: a name or a glob; ** crosses dots.")
    ] = None,
    input_size: Annotated[
        int | None, typer.Option(help="Side of the images; the model's own without it.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also the rows that compute nothing.")] = False,
    json: JsonFlag = False,
) -> None:
    """List the places in a model where a patch can go, by stage, and which methods go there by default."""
    from fxgraft.cli import placing
    from fxgraft.models import build_model

    opened = placing.Placing(build_model(model, input_size=input_size), _shape(input_size))
    groups, left_out = placing.listing(opened, pattern, everything)
    if json:
        typer.echo(json_module.dumps(placing.sites_data(opened, groups), indent=1))
    else:
        show(placing.sites_table(opened, groups, left_out))


def suggest(
    model: ModelArgument,
    size: Annotated[int | None, typer.Option(help="Side of the images; the model's own without it.")] = None,
    classes: Annotated[
        int | None, typer.Option(help="Number of classes; the model's own without it.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Say for each method where it would go on a model, what it adds and costs, and whether it is advised there."""
    from fxgraft.cli.placing import Placing, table_of
    from fxgraft.models import build_model

    suggestions = Placing(build_model(model, classes, input_size=size), _shape(size)).suggestions()
    if json:
        typer.echo(json_module.dumps([suggestion.to_dict() for suggestion in suggestions], indent=1))
    else:
        show(table_of(suggestions, model if size is None else f"{model}, images of {size}×{size}"))


def _shape(side: int | None) -> tuple[int, int, int] | None:
    return None if side is None else (3, side, side)
