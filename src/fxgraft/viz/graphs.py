"""Pictures of grafted modules: their graphs, with what a graft put there in colour and shapes on the edges."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fxgraft.graph.grafting.views import NodeView, PartView
from fxgraft.viz.pictures import matplotlib_figure, write_picture

Place = tuple[float, float]

GREY = "#e6e6e6"
COLOURS = ("#f4a582", "#92c5de", "#a6d96a", "#c2a5cf", "#fee08b", "#80cdc1")
"""Of the grafts, in order; they begin again where there are more."""

WIDTH, ROW = 3.4, 0.62
"""Inches of a column of the picture, and of a row."""

AROUND = 1.1
"""Inches that an edge goes around what lies between its ends."""


def draw_graph(parts: Sequence[PartView], path: Path, title: str) -> None:
    """Draw grafted modules side by side, each from its input down to its output.

    Args:
        parts: of `view_grafts`.
        path: the file: ``.svg``, ``.png`` or ``.pdf``, or ``.html`` with the picture in it.
        title: above the picture.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    grafts = list(dict.fromkeys(node.graft for part in parts for node in part.nodes if node.graft))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(grafts)}
    rows = max(max(_rows(part.nodes).values()) for part in parts) + 1
    figure = matplotlib_figure(figsize=(WIDTH * len(parts), ROW * rows + 1.1), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for axis, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        _draw_part(axis, part, colours, rows)
    write_picture(figure, path, title)


def _rows(nodes: Sequence[NodeView]) -> dict[str, int]:
    """Give every node the row below the last of its inputs."""
    rows: dict[str, int] = {}
    for node in nodes:
        rows[node.name] = max((rows[name] + 1 for name in node.inputs), default=0)
    return rows


def _draw_part(axis, part: PartView, colours: dict[str, str], total: int) -> None:
    rows = _rows(part.nodes)
    beside: dict[int, list[str]] = {}
    for name, row in rows.items():
        beside.setdefault(row, []).append(name)
    widest = max(map(len, beside.values()))
    places = {
        name: ((index + 0.5) / len(names) if widest > 1 else 0.5, -row)
        for row, names in beside.items()
        for index, name in enumerate(names)
    }
    shapes = {node.name: node.shape for node in part.nodes}
    for node in part.nodes:
        for source in node.inputs:
            _draw_edge(
                axis, places[source], places[node.name], shapes[source], rows[node.name] - rows[source]
            )
    for node in part.nodes:
        label = f"{node.label}\n({node.graft})" if node.graft else node.label
        box = {
            "boxstyle": "round,pad=0.35",
            "facecolor": colours.get(node.graft, GREY),
            "edgecolor": "#555555" if node.graft else "#999999",
        }
        axis.text(*places[node.name], label, ha="center", va="center", fontsize=7, bbox=box, zorder=3)
    names = [path or "(the model)" for path in part.paths]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    axis.set_title(f"{part.kind}\n{', '.join(names[:3])}{more}", fontsize=8)
    axis.set_xlim(-0.1, 1.1)
    axis.set_ylim(-total + 0.4, 0.6)
    axis.set_axis_off()


def _draw_edge(axis, start, end, shape, span: int) -> None:
    """Draw one edge; one that passes other rows by goes around them, as far for a long way as for a short one."""
    side = 0 if span == 1 else -1 if start[0] <= 0.5 else 1
    arrow = {"arrowstyle": "-|>", "color": "#777777", "shrinkA": 8, "shrinkB": 8}
    arrow["connectionstyle"] = f"arc3,rad={-2 * AROUND * side / (ROW * span)}"
    axis.annotate("", xy=end, xytext=start, arrowprops=arrow, zorder=1)
    if shape is None:
        return
    text = "×".join(map(str, shape[1:])) or "scalar"
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    style = {"fontsize": 5.5, "color": "#555555", "va": "center", "zorder": 2}
    if side:
        clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axis.text(x + side * AROUND * 1.2 / WIDTH, y, text, ha="center", bbox=clear, **style)
    else:
        axis.text(x + 0.02, y, text, **style)
