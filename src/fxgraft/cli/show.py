"""``fxgraft show``: what grafts change in a model, and what a method does with images."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fxgraft.cli.completion import complete_method, complete_model
from fxgraft.cli.early_checks import check_method, check_there
from fxgraft.cli.graft_options import GraftFileOption, GraftOption, chosen_grafts
from fxgraft.errors import ConfigError

MAPS = "maps"
"""Another name for the picture of the diversification block: class maps."""


class Mode(str, Enum):
    """Which of its two graphs a module runs."""

    training = "training"
    evaluation = "evaluation"


show = typer.Typer(no_args_is_help=True, help="Show what patches change, and what methods do.")

OutOption = Annotated[Path | None, typer.Option(help="The picture to write: .svg, .html, .png, .pdf.")]
SizeOption = Annotated[int | None, typer.Option(help="Side of the images; the model's own without it.")]


@show.command()
def graph(
    model: Annotated[
        str, typer.Argument(help="resnet50, torchvision/resnet50, …", autocompletion=complete_model)
    ],
    graft: GraftOption = None,
    graft_file: GraftFileOption = None,
    out: OutOption = None,
    mode: Annotated[Mode, typer.Option(help="Whose graph to show.")] = Mode.training,
    size: SizeOption = None,
) -> None:
    """Show which lines of a model's code grafts change, and draw the graphs of these modules.

    fxgraft show graph resnet50 --graft rsc:layer=layer4 --out graph.svg
    """
    specs = chosen_grafts(graft, graft_file)
    if not specs:
        raise ConfigError("Nothing to show: give at least one --graft, for example --graft rsc:layer=layer4.")
    import fxgraft
    from fxgraft.graph.grafting.views import view_grafts
    from fxgraft.models import build_model
    from fxgraft.viz.code_difference import differences
    from fxgraft.viz.drawing import check_ending

    if out is not None:
        check_ending(out)
    network = build_model(model, input_size=size)
    wanted = " + ".join(spec.text for spec in specs)
    fxgraft.patch(network, wanted, input_size=None if size is None else (3, size, size))
    parts = view_grafts(network, training=mode is Mode.training)
    console = Console()
    summary = str(fxgraft.summary(network))
    if console.is_terminal:
        console.print(summary, differences(parts), sep="\n\n", highlight=False, markup=False)
    else:
        typer.echo(f"{summary}\n\n{differences(parts).plain}".rstrip())
    if not parts:
        typer.echo(f"In {mode.value} nothing is changed: the model runs its own code.")
    elif out is not None:
        from fxgraft.viz.graphs import draw_graph

        draw_graph(parts, out, f"{model} with {wanted}, in {mode.value}")
        typer.echo(f"\n{out}: the graphs of the grafted modules, {len(parts)} of different kinds")


@show.command()
def effect(
    method: Annotated[str, typer.Argument(help="A method, or maps.", autocompletion=complete_method)],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="What to look at.")],
    graft: GraftOption = None,
    graft_file: GraftFileOption = None,
    out: OutOption = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="The model it is shown on.",
            show_default="tf_efficientnet_lite0 if its weights are installed, else resnet50",
            autocompletion=complete_model,
        ),
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Download the library's weights; else they are random.")
    ] = False,
    weights: Annotated[
        Path | None, typer.Option(help="Your own weights: a state_dict, or a file of fxgraft.save.")
    ] = None,
    classes: Annotated[int | None, typer.Option(help="Number of classes of those weights.")] = None,
    size: SizeOption = None,
    top: Annotated[int, typer.Option(help="How many classes to draw, where a picture has some.")] = 3,
    head: Annotated[str | None, typer.Option(help="The classifier, where there are several.")] = None,
    seed: Annotated[int, typer.Option(help="Of what a method draws.")] = 0,
    class_names: Annotated[
        str | None,
        typer.Option(help="Names of the classes: imagenet, or a file, a name a line; ImageNet's are known."),
    ] = None,
) -> None:
    """Draw what a method does with images: METHOD.png, or what --out says.

    fxgraft show effect rsc photo.jpg --model resnet50 --pretrained
    """
    for path in (*images, *([] if weights is None else [weights])):
        check_there(path, "The file")
    wanted = "diversification" if method == MAPS else method.replace("-", "_")
    check_method(wanted)
    specs = chosen_grafts(graft, graft_file)
    from fxgraft.cli.shown_model import shown_model
    from fxgraft.viz.drawing import check_ending, save_picture
    from fxgraft.viz.method_pictures import (
        check_picture,
        picture_of,
        read_class_names,
        read_images,
        size_and_crop,
        still_clips,
    )

    path = Path(f"{method}.png") if out is None else out
    check_ending(path)
    check_picture(wanted)
    options: dict[str, object] = {} if head is None else {"head": head}
    for spec in specs:
        if spec.method != wanted:
            raise ConfigError(
                f"--graft {spec.text!r} is for {spec.method!r}, and {wanted!r} is shown.\n"
                f"Give options of {wanted!r}, as --graft {wanted}:option=value, or leave --graft out."
            )
        options |= spec.options
    shown = shown_model(model, classes, pretrained, weights, size, seed)
    own, crop = size_and_crop(shown.network)
    pixels = still_clips(read_images(images, own if size is None else size, crop), shown.network)
    names = shown.names if class_names is None else read_class_names(class_names)
    picture = picture_of(
        shown.network, wanted, pixels, options, top=top, seed=seed, names=names, trained=shown.trained
    )
    save_picture(picture, path)
    typer.echo(f"{path}: {picture.caption}" + (f"\n{picture.note}" if picture.note else ""))
