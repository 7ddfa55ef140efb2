"""``fxgraft show``: what a patch changes in a model, and what a method does with an image."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from fxgraft.cli.completion import complete_method, complete_model, complete_shown
from fxgraft.cli.early_checks import check_method, check_there
from fxgraft.cli.graft_options import GraftFileOption, GraftOption, PatchOption, chosen_grafts
from fxgraft.cli.method_facts import all_facts
from fxgraft.errors import ConfigError
from fxgraft.spec import PatchSpec

MAPS = "maps"
"""Another name for the picture of the diversification block: class maps."""


class Mode(str, Enum):
    """Which of its two graphs a module runs."""

    training = "training"
    evaluation = "evaluation"


class _Show(TyperGroup):
    """Takes ``fxgraft show resnet50 ...`` and ``fxgraft show rsc photo.jpg ...`` too, as before there were two."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["either", *args]
        return super().parse_args(ctx, args)


show = typer.Typer(cls=_Show, no_args_is_help=True, help="Show what patches change, and what methods do.")

OutOption = Annotated[Path | None, typer.Option(help="The picture to write: .svg, .html, .png, .pdf.")]
ModeOption = Annotated[Mode, typer.Option(help="Whose graph to show.")]
ImagesArgument = Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="What to look at.")]
NetworkOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="The model it is shown on.",
        show_default="tf_efficientnet_lite0 if its weights are installed, else resnet50",
        autocompletion=complete_model,
    ),
]
PretrainedOption = Annotated[
    bool, typer.Option("--pretrained", help="Download the library's weights; else they are random.")
]
WeightsOption = Annotated[
    Path | None, typer.Option(help="Your own weights: a state_dict, or a file of fxgraft.save.")
]
ClassesOption = Annotated[int | None, typer.Option(help="Number of classes of those weights.")]
SizeOption = Annotated[int | None, typer.Option(help="Side of the images; the model's own without it.")]
TopOption = Annotated[int, typer.Option(help="How many classes to draw, where a picture has some.")]
HeadOption = Annotated[str | None, typer.Option(help="The classifier, where there are several.")]
SeedOption = Annotated[int, typer.Option(help="Of what a method draws.")]
NamesOption = Annotated[
    str | None,
    typer.Option(help="Names of the classes: imagenet, or a file, a name a line; ImageNet's are known."),
]


@show.command()
def graph(
    model: Annotated[
        str, typer.Argument(help="resnet50, torchvision/resnet50, …", autocompletion=complete_model)
    ],
    graft: GraftOption = None,
    graft_file: GraftFileOption = None,
    out: OutOption = None,
    mode: ModeOption = Mode.training,
    size: SizeOption = None,
) -> None:
    """Show which lines of a model's code grafts change, and draw the graphs of these modules.

    fxgraft show graph resnet50 --graft rsc:layer=layer4 --out graph.svg
    """
    _show_model(model, chosen_grafts(graft, graft_file), out, mode, size)


@show.command()
def effect(
    method: Annotated[str, typer.Argument(help="A method, or maps.", autocompletion=complete_method)],
    images: ImagesArgument,
    graft: GraftOption = None,
    graft_file: GraftFileOption = None,
    out: OutOption = None,
    model: NetworkOption = None,
    pretrained: PretrainedOption = False,
    weights: WeightsOption = None,
    classes: ClassesOption = None,
    size: SizeOption = None,
    top: TopOption = 3,
    head: HeadOption = None,
    seed: SeedOption = 0,
    class_names: NamesOption = None,
) -> None:
    """Draw what a method does with images: METHOD.png, or what --out says.

    fxgraft show effect rsc photo.jpg --model resnet50 --pretrained
    """
    for path in (*images, *([] if weights is None else [weights])):
        check_there(path, "The file")
    check_method("diversification" if method == MAPS else method)
    texts = [*(spec.text for spec in chosen_grafts((), graft_file)), *(graft or ())]
    _show_method(
        method, images, texts, out, model=model, size=size, top=top, head=head, seed=seed, weights=weights,
        classes=classes, pretrained=pretrained, class_names=class_names,
    )  # fmt: skip


@show.command(hidden=True)
def either(
    what: Annotated[str, typer.Argument(autocompletion=complete_shown)],
    images: Annotated[list[Path] | None, typer.Argument()] = None,
    graft: GraftOption = None,
    graft_file: GraftFileOption = None,
    patch: PatchOption = None,
    out: OutOption = None,
    mode: ModeOption = Mode.training,
    model: NetworkOption = None,
    pretrained: PretrainedOption = False,
    weights: WeightsOption = None,
    classes: ClassesOption = None,
    size: SizeOption = None,
    top: TopOption = 3,
    head: HeadOption = None,
    seed: SeedOption = 0,
    class_names: NamesOption = None,
) -> None:
    """Show a model's graph, or a method's effect where there are images."""
    grafts = [*(graft or ()), *(patch or ())]
    if not images:
        graph(what, grafts, graft_file, out, mode, size)
    else:
        effect(
            what, images, grafts, graft_file, out, model, pretrained, weights, classes, size, top, head, seed,
            class_names,
        )  # fmt: skip


def _show_model(name: str, specs: list[PatchSpec], out: Path | None, mode: Mode, size: int | None) -> None:
    if name in (*all_facts(), MAPS):
        raise ConfigError(
            f"{name!r} is a method, and there is no image to show it on.\n"
            f"Give one: fxgraft show effect {name} photo.jpg. What it changes in a model: "
            f"fxgraft show graph resnet50 --graft {name if name != MAPS else 'diversification'}."
        )
    if not specs:
        raise ConfigError("Nothing to show: give at least one --graft, for example --graft rsc:layer=layer4.")
    import fxgraft
    from fxgraft.graph.grafting.views import view_grafts
    from fxgraft.models import build_model
    from fxgraft.viz.code_difference import differences
    from fxgraft.viz.drawing import check_ending

    if out is not None:
        check_ending(out)
    network = build_model(name, input_size=size)
    for spec in specs:
        shape = {} if size is None else {"input_size": (3, size, size)}
        fxgraft.patch(network, spec.method, **{**shape, **spec.options})
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

        draw_graph(parts, out, f"{name} with {', '.join(spec.text for spec in specs)}, in {mode.value}")
        typer.echo(f"\n{out}: the graphs of the grafted modules, {len(parts)} of different kinds")


def _show_method(
    method: str,
    images: list[Path],
    grafts: list[str],
    out: Path | None,
    *,
    model: str | None,
    size: int | None,
    top: int,
    head: str | None,
    seed: int,
    weights: Path | None,
    classes: int | None,
    pretrained: bool,
    class_names: str | None,
) -> None:
    from fxgraft.cli.shown_model import shown_model
    from fxgraft.spec import parse_grafts
    from fxgraft.viz.drawing import check_ending, save_picture
    from fxgraft.viz.pictures import (
        check_picture,
        picture_of,
        read_class_names,
        read_images,
        size_and_crop,
        still_clips,
    )

    path = Path(f"{method}.png") if out is None else out
    check_ending(path)
    wanted = "diversification" if method == MAPS else method.replace("-", "_")
    check_picture(wanted)
    options: dict[str, object] = {} if head is None else {"head": head}
    for text in grafts:
        if text.isdigit():
            options["patch"] = int(text)
            continue
        for spec in parse_grafts(text):
            if spec.method != wanted:
                raise ConfigError(f"--graft {text!r} is for {spec.method!r}, and {wanted!r} is shown.")
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
