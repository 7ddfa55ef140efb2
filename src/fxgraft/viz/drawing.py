"""Drawing with matplotlib: pictures of methods, and files that are the same bytes each time."""

from __future__ import annotations

import io
from html import escape
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fxgraft.errors import ConfigError
from fxgraft.io.atomic_write import write_text
from fxgraft.patches.pictures import Panel, Picture

ENDINGS = (".svg", ".html", ".png", ".pdf")
"""Of the files that pictures are written to."""


def check_ending(path: Path) -> None:
    """Raise for a file that no picture can be written to.

    Raises:
        ConfigError: its name ends otherwise.
    """
    if path.suffix not in ENDINGS:
        raise ConfigError(
            f"A picture is written to {', '.join(ENDINGS)}, and {str(path)!r} ends otherwise.\n"
            f"Pass for example {str(path.with_suffix('.png'))!r}."
        )


def save_picture(picture: Picture, path: Path) -> None:
    """Draw a picture into a file: heat over images, cells hatched, a cross at a peak, and curves.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    write_picture(figure_of(picture), path, picture.caption)


def pixels(picture: Picture) -> Any:
    """Draw a picture as an array of NumPy, (H, W, 3), of bytes, as loggers take it.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    import numpy as np

    figure = figure_of(picture)
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def figure_of(picture: Picture) -> Any:
    """Draw a picture as a figure of matplotlib.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    rows = [row for row in picture.rows if row]
    columns = max(map(len, rows))
    bars = any(panel.heat is not None for row in rows for panel in row)
    figure = matplotlib_figure(
        figsize=((3.6 if bars else 3) * columns, 3.4 * len(rows)), layout="constrained"
    )
    grid = figure.add_gridspec(len(rows), columns)
    for index, row in enumerate(rows):
        # A row of curves alone is stretched over the width.
        wide = len(row) < columns and all(panel.image is None for panel in row)
        edges = [round(i * columns / len(row)) if wide else i for i in range(len(row) + 1)]
        for panel, start, end in zip(row, edges, edges[1:], strict=False):
            _draw(figure, figure.add_subplot(grid[index, start:end]), panel)
    signs = _signs([panel for row in rows for panel in row])
    if signs:
        figure.legend(handles=signs, loc="outside lower center", ncols=len(signs), fontsize=8, frameon=False)
    if picture.note:
        figure.suptitle(picture.note, fontsize=9, color="#b2182b", weight="bold")
    return figure


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
    """Write a figure in the format that the file's name asks for; the same figure gives the same bytes.

    Args:
        figure: a figure of matplotlib.
        path: the file: ``.svg``, ``.png`` or ``.pdf``, or ``.html`` with the picture in it.
        title: the title of the page, for ``.html``.

    Raises:
        ConfigError: it cannot be written.
    """
    from matplotlib import rc_context

    check_ending(path)
    undated = {".svg": {"Date": None}, ".html": {"Date": None}, ".pdf": {"CreationDate": None}}
    options: dict[str, Any] = {"dpi": 120, "metadata": undated.get(path.suffix)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with rc_context({"svg.hashsalt": "fxgraft"}):  # else ids are random
            if path.suffix != ".html":
                figure.savefig(path, **options)
                return
            held = io.StringIO()
            figure.savefig(held, format="svg", **options)
        svg = held.getvalue()
        page = f'<!doctype html>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        write_text(path, page + svg[svg.index("<svg") :])
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot write the picture {str(path)!r}: {error}.\nPass another file.") from error


def _draw(figure: Any, axis: Any, panel: Panel) -> None:
    axis.set_title(panel.title, fontsize=9, wrap=True)
    if panel.image is None:
        for (name, values), style in zip(panel.curves.items(), ("-", "-", "--", ":") * 4, strict=False):
            axis.plot(values.detach().numpy(), style, label=name, linewidth=1.2)
        axis.set_xlabel(panel.along, fontsize=8)
        axis.set_ylabel(panel.unit, fontsize=8)
        axis.tick_params(labelsize=7)
        if len(panel.curves) > 1:
            axis.legend(fontsize=8)
        return
    height, width = panel.image.shape[-2:]
    # Of one channel, or of more than colours, the mean is drawn in grey.
    image = panel.image if len(panel.image) == 3 else panel.image.mean(0, keepdim=True).expand(3, -1, -1)
    axis.imshow(image.permute(1, 2, 0).numpy())
    if panel.heat is not None:
        heat = panel.heat.detach()
        smooth = F.interpolate(heat[None, None], size=(height, width), mode="bilinear", align_corners=False)
        drawn = axis.imshow(smooth[0, 0].numpy(), cmap="viridis", alpha=0.6)
        bar = figure.colorbar(drawn, ax=axis, fraction=0.046, pad=0.03)
        bar.set_label(panel.unit, fontsize=7)
        bar.ax.tick_params(labelsize=6)
    if panel.hatched is not None:
        _hatch(axis, panel.hatched, height, width)
    if panel.cross is not None:
        cells = panel.hatched if panel.hatched is not None else panel.heat
        rows, columns = cells.shape if cells is not None else (height, width)
        row, column = panel.cross
        axis.plot(
            (column + 0.5) * width / columns - 0.5, (row + 0.5) * height / rows - 0.5, "rx", markersize=10
        )
    axis.set_axis_off()


def _hatch(axis: Any, cells: Tensor, height: int, width: int) -> None:
    from matplotlib.patches import Rectangle

    down, across = height / cells.shape[0], width / cells.shape[1]
    for row, column in cells.nonzero().tolist():
        corner = (column * across - 0.5, row * down - 0.5)
        cell = Rectangle(corner, across, down, fill=False, hatch="////", linewidth=0)
        cell.set_edgecolor("white")
        axis.add_patch(cell)


def _signs(panels: list[Panel]) -> list[Any]:
    """Return what a legend says of hatching and crosses, each meaning once."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    hatched = dict.fromkeys(panel.hatched_as for panel in panels if panel.hatched is not None)
    crossed = dict.fromkeys(panel.cross_as for panel in panels if panel.cross is not None)
    return [
        *(
            Patch(facecolor="#777777", edgecolor="white", hatch="////", label=f"hatched: {what}")
            for what in hatched
        ),
        *(
            Line2D([], [], color="red", marker="x", linestyle="none", label=f"cross: {what}")
            for what in crossed
        ),
    ]
