"""``fxgraft show``: what a patch changes in a model, and what a method does with an image."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fxgraft.cli.completion import complete_model, complete_shown
from fxgraft.cli.early_checks import check_method, check_there
from fxgraft.cli.graft_options import GraftFileOption, GraftOption, PatchOption, chosen_grafts
from fxgraft.errors import ConfigError
from fxgraft.spec import PatchSpec

MAPS = "maps"
"""Another name for the picture of the diversification block: class maps."""


class Mode(str, Enum):
    """Which of its two graphs a module runs."""

    training = "training"
    evaluation = "evaluation"


def show(
    what: Annotated[
        str,
        typer.Argument(
            help="A model (resnet50, torchvision/resnet50, …), a method, or maps.",
            autocompletion=complete_shown,
        ),
    ],
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="[IMAGE]...", help="With a method: what to look at.")
    ] = None,
    graft: GraftOption = None,
    graft_file: GraftFileOption = None,
    patch: PatchOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The picture to write: .svg, .html, .png, .pdf. With a method, METHOD.png without it."
        ),
    ] = None,
    mode: Annotated[Mode, typer.Option(help="With a model: whose graph to show.")] = Mode.training,
    model: Annotated[
        str, typer.Option(help="With a method: the model it is shown on.", autocompletion=complete_model)
    ] = "resnet50",
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Download the library's weights; else they are random.")
    ] = False,
    weights: Annotated[Path | None, typer.Option(help="Weights of your own: a saved state_dict.")] = None,
    classes: Annotated[int | None, typer.Option(help="Number of classes of those weights.")] = None,
    size: Annotated[
        int | None, typer.Option(help="Side of the images; with a method, 224 without it.")
    ] = None,
    top: Annotated[int, typer.Option(help="With maps: how many classes to draw.")] = 3,
    head: Annotated[
        str | None, typer.Option(help="With maps: the classifier, where there are several.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what a method draws.")] = 0,
    class_names: Annotated[
        str | None,
        typer.Option(
            help="Names of the classes, for a picture of a method: imagenet, or a file, a name a line."
        ),
    ] = None,
) -> None:
    """Show what patches change in a model, or what a method does with an image.

    fxgraft show resnet50 --graft rsc:layer=layer4 --out graph.svg

    fxgraft show rsc photo.jpg --model resnet50 --pretrained

    fxgraft show maps photo.jpg
    """
    for path in (*(images or ()), *([] if weights is None else [weights])):
        check_there(path, "The file")
    if images:
        check_method("diversification" if what == MAPS else what)
        options = {
            "weights": weights,
            "classes": classes,
            "pretrained": pretrained,
            "class_names": class_names,
        }
        texts = [*(spec.text for spec in chosen_grafts((), graft_file)), *(graft or ()), *(patch or ())]
        _show_method(what, images, texts, out, model, size, top, head, seed, **options)
    else:
        _show_model(what, chosen_grafts(graft, graft_file, patch), out, mode, size)


def _show_model(name: str, specs: list[PatchSpec], out: Path | None, mode: Mode, size: int | None) -> None:
    import fxgraft
    from fxgraft.graph.grafting.views import view_grafts
    from fxgraft.models import build_model
    from fxgraft.viz.code_difference import differences

    if name in (*fxgraft.methods(), MAPS):
        raise ConfigError(
            f"{name!r} is a method, and there is no image to show it on.\n"
            f"Give one: fxgraft show {name} photo.jpg. What it changes in a model: "
            f"fxgraft show resnet50 --graft {name if name != MAPS else 'diversification'}."
        )
    if not specs:
        raise ConfigError("Nothing to show: give at least one --graft, for example --graft rsc:layer=layer4.")
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
    patches: list[str],
    out: Path | None,
    model: str,
    size: int | None,
    top: int,
    head: str | None,
    seed: int,
    *,
    weights: Path | None,
    classes: int | None,
    pretrained: bool,
    class_names: str | None,
) -> None:
    import fxgraft
    from fxgraft.errors import UnknownGraftError, candidates
    from fxgraft.models import build_model, load_weights
    from fxgraft.spec import parse_patch_spec
    from fxgraft.viz.pictures import check_picture, picture_of, read_class_names, read_images, save_picture

    wanted = "diversification" if method == MAPS else method
    if wanted not in fxgraft.methods():
        raise UnknownGraftError(f"There is no method {method!r}.\n{candidates(method, fxgraft.methods())}")
    check_picture(wanted)
    options: dict[str, object] = {} if head is None else {"head": head}
    for text in patches:
        if text.isdigit():
            options["patch"] = int(text)
            continue
        spec = parse_patch_spec(text)
        if spec.method != wanted:
            raise ConfigError(f"--graft {text!r} is for {spec.method!r}, and {wanted!r} is shown.")
        options |= spec.options
    side = 224 if size is None else size
    pixels = read_images(images, side)
    names = [] if class_names is None else read_class_names(class_names)
    network = build_model(model, classes, pretrained=pretrained, input_size=side).eval()
    if weights is not None:
        load_weights(network, weights)
    picture = picture_of(network, wanted, pixels, options, top=top, seed=seed, names=names)
    path = Path(f"{method}.png") if out is None else out
    save_picture(picture, path)
    typer.echo(f"{path}: {picture.caption}")
