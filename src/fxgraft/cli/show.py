"""``fxgraft show maps``: pictures of what a method sees."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxgraft.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="Draw what a method sees in an image.")


@app.command()
def maps(
    image: Annotated[Path, typer.Argument(help="The image.")],
    model: Annotated[str, typer.Option(help="resnet50, timm/resnet50, torchvision/resnet50, …")] = "resnet50",
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("maps.png"),
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Download the library's weights; else they are random.")
    ] = False,
    weights: Annotated[Path | None, typer.Option(help="Weights of your own: a saved state_dict.")] = None,
    classes: Annotated[int | None, typer.Option(help="Number of classes of those weights.")] = None,
    top: Annotated[int, typer.Option(help="How many classes to draw.")] = 3,
    size: Annotated[int, typer.Option(help="Side that the image is brought to.")] = 224,
    patch: Annotated[int, typer.Option(help="Side of the patches, in cells of the map.")] = 3,
    head: Annotated[str | None, typer.Option(help="The classifier, where there are several.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw of peaks and patches.")] = 0,
) -> None:
    """Draw the class maps of an image, with their peaks and what the diversification block damps."""
    from functools import partial

    from fxgraft.cli.pictures import look, read_weights, save_picture
    from fxgraft.experiments.backbones import build_model
    from fxgraft.experiments.images import decode, to_floats

    if size < 1:
        raise ConfigError(f"--size must be at least 1 pixel, got {size}.")
    pixels = to_floats(decode(repr(str(image)), partial(image.open, "rb"), size))
    network = build_model(model, classes, pretrained=pretrained, input_size=size).eval()
    if weights is not None:
        read_weights(network, weights)
    shown = look(network, pixels, top=top, patch=patch, seed=seed, head=head)
    save_picture(shown, out)
    scores = ", ".join(
        f"{index} ({score:.2f})" for index, score in zip(shown.classes, shown.scores, strict=True)
    )
    typer.echo(f"{out}: class maps of {shown.maps.shape[1]}×{shown.maps.shape[2]} for classes {scores}")
