"""Pictures of what a method does with an image: ``fxgraft show METHOD IMAGE``, drawn with matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor

import fxgraft
from fxgraft.errors import ConfigError
from fxgraft.io.atomic_write import write_text
from fxgraft.io.images import read_rgb
from fxgraft.patches.pictures import Panel, Picture, View

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation of the colours, for models that do not say what they were trained with."""


IMAGENET_NAMES = "imagenet"
"""What stands for the names of ImageNet's 1000 classes."""


def methods_with_pictures() -> list[str]:
    """Name the methods that have a picture."""
    return [name for name, method in fxgraft.methods().items() if method.picture is not fxgraft.Patch.picture]


def check_picture(method: str) -> None:
    """Raise unless a method has a picture.

    Raises:
        ConfigError: it has none; lists those that have one.
    """
    if method not in (known := methods_with_pictures()):
        raise ConfigError(
            f"{method!r} has no picture.\nThere are pictures of {', '.join(map(repr, known))}.\n"
            f"What it changes in a model: fxgraft show MODEL --graft {method}."
        )


def read_images(paths: Sequence[Path], size: int) -> Tensor:
    """Read images as squares of one size: (B, 3, size, size), colours in [0, 1].

    Raises:
        ConfigError: no size, or a file that isn't an image.
    """
    if size < 1:
        raise ConfigError(f"--size must be at least 1 pixel, got {size}.")
    return squares([read_rgb(path, repr(str(path))) for path in paths], size)


def read_class_names(given: str) -> list[str]:
    """Read names of classes: those of ImageNet, as timm has them, or the lines of a file.

    Args:
        given: "imagenet", or the path of a text file with a name in each line, in the order of the classes.

    Raises:
        ConfigError: the file cannot be read.
    """
    if given == IMAGENET_NAMES:
        from timm.data.imagenet_info import ImageNetInfo

        info = ImageNetInfo()
        words = [info.index_to_description(index) for index in range(info.num_classes())]
        return [word.partition(",")[0] for word in words]
    try:
        return Path(given).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The names of classes in {given!r} cannot be read: {getattr(error, 'strerror', None) or error}.\n"
            f"Give a text file with a name in each line, or {IMAGENET_NAMES!r}."
        ) from error


def squares(images: Sequence[Image.Image], size: int) -> Tensor:
    """Crop images about their centres to squares of one size: (B, 3, size, size), colours in [0, 1]."""
    fitted = [ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC) for image in images]
    return torch.stack([pil_to_tensor(image) for image in fitted]).float() / 255


def picture_of(
    model: nn.Module,
    method: str,
    images: Tensor,
    options: Mapping[str, Any] | None = None,
    *,
    top: int = 3,
    seed: int = 0,
    names: Sequence[str] = (),
) -> Picture:
    """Patch a model with one method and have it show what it does with images.

    Args:
        model: bare; it is patched, and used up.
        method: name of the method.
        images: (B, 3, S, S), colours in [0, 1].
        options: of the method.
        top: how many classes to show, highest score first, where a picture shows some.
        seed: of all draws.
        names: of the classes, in the order of the model's outputs; numbers stand for them without.

    Raises:
        ConfigError: the method has no picture, a number is out of range, or there are not as many names as classes.
        FxgraftError: the method does not go on the model.
    """
    check_picture(method)
    if top < 1:
        raise ConfigError(f"There must be at least one class to draw, got top={top}.")
    size = (3, *images.shape[-2:])
    given = len(images)
    if given < 2:  # methods that exchange something between images need a second one
        images = torch.cat((images, 1 - images.flip(-1)))
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    mean, std = (config.get(key) or default for key, default in zip(("mean", "std"), IMAGENET, strict=True))
    inputs = (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    with torch.no_grad():
        logits = model.eval()(inputs)
    labels = logits.argmax(1)
    if names and len(names) != logits.shape[1]:
        raise ConfigError(
            f"There are {len(names)} names of classes, and the model has {logits.shape[1]} classes.\n"
            "Names are taken in the order of the model's outputs.\nGive one for each, or leave them out."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fxgraft.patch(model, method, **{"input_size": size, **(options or {})})
        (graft,) = fxgraft.grafts(model)
        view = View(model, images, inputs, labels, given=given, top=top, seed=seed, names=names)
        return graft.patch.picture(graft, view)


def save_picture(picture: Picture, path: Path) -> None:
    """Draw a picture: heat over images, cells hatched, a cross at a peak, and curves.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    rows = [row for row in picture.rows if row]
    columns = max(map(len, rows))
    figure = matplotlib_figure(figsize=(3 * columns, 3.4 * len(rows)), layout="constrained")
    grid = figure.add_gridspec(len(rows), columns)
    for index, row in enumerate(rows):
        # A row of curves alone is stretched over the width.
        wide = len(row) < columns and all(panel.image is None for panel in row)
        edges = [round(i * columns / len(row)) if wide else i for i in range(len(row) + 1)]
        for panel, start, end in zip(row, edges, edges[1:], strict=False):
            _draw(figure.add_subplot(grid[index, start:end]), panel)
    write_picture(figure, path)


def matplotlib_figure(**options: Any) -> Any:
    """Return an empty figure of matplotlib, which no window shows.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            'Pictures need matplotlib, which is not installed.\nInstall it with: pip install "fxgraft[viz]".'
        ) from error
    return Figure(**options)


def write_picture(figure: Any, path: Path, title: str = "") -> None:
    """Write a figure in the format that the file's name asks for.

    Args:
        figure: of matplotlib.
        path: the file: ``.svg``, ``.png`` or ``.pdf``, or ``.html`` with the picture in it.
        title: of the page, for ``.html``.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".html":
            figure.savefig(path, dpi=120)
            return
        held = io.StringIO()
        figure.savefig(held, format="svg")
        svg = held.getvalue()
        page = f'<!doctype html>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        write_text(path, page + svg[svg.index("<svg") :])
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot write the picture {str(path)!r}: {error}.") from error


def _draw(axis: Any, panel: Panel) -> None:
    axis.set_title(panel.title, fontsize=9, wrap=True)
    if panel.image is None:
        for (name, values), style in zip(panel.curves.items(), ("-", "-", "--", ":") * 4, strict=False):
            axis.plot(values.detach().numpy(), style, label=name, linewidth=1.2)
        axis.set_xlabel("channel")
        axis.legend(fontsize=8)
        return
    side = panel.image.shape[-1]
    axis.imshow(panel.image.permute(1, 2, 0).numpy())
    if panel.heat is not None:
        smooth = F.interpolate(
            panel.heat.detach()[None, None], size=(side, side), mode="bilinear", align_corners=False
        )
        axis.imshow(smooth[0, 0].numpy(), cmap="viridis", alpha=0.6)
    if panel.hatched is not None:
        _hatch(axis, panel.hatched, side)
    if panel.cross is not None:
        cells = panel.hatched if panel.hatched is not None else panel.heat
        height, width = cells.shape if cells is not None else (side, side)
        row, column = panel.cross
        axis.plot((column + 0.5) * side / width - 0.5, (row + 0.5) * side / height - 0.5, "rx", markersize=10)
    axis.set_axis_off()


def _hatch(axis: Any, cells: Tensor, side: int) -> None:
    from matplotlib.patches import Rectangle

    height, width = cells.shape
    for row, column in cells.nonzero().tolist():
        corner = (column * side / width - 0.5, row * side / height - 0.5)
        cell = Rectangle(corner, side / width, side / height, fill=False, hatch="////", linewidth=0)
        cell.set_edgecolor("white")
        axis.add_patch(cell)
