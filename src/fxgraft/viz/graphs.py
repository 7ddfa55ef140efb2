"""Pictures of grafted modules: their graphs, with what a graft put there in colour and shapes on the edges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxgraft.graph.grafting.views import NodeView, PartView
from fxgraft.viz.drawing import matplotlib_figure, write_picture

Place = tuple[float, float]

GREY = "#e6e6e6"
COLOURS = ("#f4a582", "#92c5de", "#a6d96a", "#c2a5cf", "#fee08b", "#80cdc1")
"""Of the grafts, in order; they begin again where there are more."""

BESIDE, ROW = 1.8, 0.66
"""Inches from one box to the next beside it, and from one row to the next."""

LANE, NEXT_LANE = 1.05, 0.3
"""Inches from the outermost boxes to a shortcut beside them, and from that to the next one."""


def draw_graph(parts: Sequence[PartView], path: Path, title: str) -> None:
    """Draw grafted modules side by side, each from its input down to its output.

    Args:
        parts: what `view_grafts` returned.
        path: the file: ``.svg``, ``.png`` or ``.pdf``, or ``.html`` with the picture in it.
        title: above the picture.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    grafts = list(dict.fromkeys(node.graft for part in parts for node in part.nodes if node.graft))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(grafts)}
    plans = [_lay_out(part.nodes) for part in parts]
    rows = max(max(plan.rows.values()) for plan in plans) + 1
    widths = [plan.right - plan.left for plan in plans]
    figure = matplotlib_figure(figsize=(sum(widths) + 0.3, ROW * rows + 1.1), layout="constrained")
    figure.suptitle(title, fontsize=11, wrap=True)
    axes = figure.subplots(1, len(parts), squeeze=False, width_ratios=widths)[0]
    for axis, part, plan in zip(axes, parts, plans, strict=True):
        _draw_part(axis, part, plan, colours, rows)
    write_picture(figure, path, title)


@dataclass(frozen=True)
class _Plan:
    """Where the nodes of a graph are drawn, in inches from the middle and in rows, and where its shortcuts run.

    A shortcut is an edge that passes rows by; its lane is beside all boxes.
    """

    rows: dict[str, int]
    places: dict[str, Place]
    lanes: dict[tuple[str, str], float]
    left: float
    right: float


def _lay_out(nodes: Sequence[NodeView]) -> _Plan:
    """Give every node the row below the last of its inputs."""
    rows: dict[str, int] = {}
    for node in nodes:
        rows[node.name] = max((rows[name] + 1 for name in node.inputs), default=0)
    beside: dict[int, list[str]] = {}
    for name, row in rows.items():
        beside.setdefault(row, []).append(name)
    places: dict[str, Place] = {
        name: (BESIDE * (index - (len(names) - 1) / 2), -row)
        for row, names in beside.items()
        for index, name in enumerate(names)
    }
    furthest = max(x for x, _ in places.values())
    outer = {-1: -furthest - LANE, 1: furthest + LANE}
    lanes: dict[tuple[str, str], float] = {}
    for node in nodes:
        for source in node.inputs:
            if rows[node.name] - rows[source] > 1:
                side = -1 if places[source][0] <= 0 else 1
                lanes[source, node.name] = outer[side]
                outer[side] += side * NEXT_LANE
    return _Plan(rows, places, lanes, outer[-1], outer[1])


def _draw_part(axis: Any, part: PartView, plan: _Plan, colours: dict[str, str], total: int) -> None:
    places = plan.places
    shapes = {node.name: node.shape for node in part.nodes}
    boxes: dict[str, Any] = {}
    for node in part.nodes:
        label = f"{node.label}\n({node.graft})" if node.graft else node.label
        style = {
            "boxstyle": "round,pad=0.35",
            "facecolor": colours.get(node.graft, GREY),
            "edgecolor": "#555555" if node.graft else "#999999",
        }
        at = {"ha": "center", "va": "center", "fontsize": 7, "zorder": 3}
        boxes[node.name] = axis.text(*places[node.name], label, bbox=style, **at).get_bbox_patch()
    for node in part.nodes:
        for source in node.inputs:
            ends, shape = (boxes[source], boxes[node.name]), shapes[source]
            lane = plan.lanes.get((source, node.name))
            if lane is None:
                _draw_edge(axis, places[source], places[node.name], ends, shape)
            else:
                row = [x for x, y in places.values() if y == places[source][1]]
                beyond = min(row) if lane < 0 else max(row)
                covered = beyond != places[source][0]
                _draw_shortcut(axis, places[source], places[node.name], ends, shape, lane, covered)
    names = [path or "(the model)" for path in part.paths]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    axis.set_title(f"{part.kind}\n{', '.join(names[:3])}{more}", fontsize=8)
    axis.set_xlim(plan.left, plan.right)
    axis.set_ylim(-total + 0.4, 0.6)
    axis.set_axis_off()


# Arrows are drawn above the boxes, which know how large they are once they are drawn: heads end at their edges.
_ARROW: dict[str, Any] = {"arrowstyle": "-|>", "color": "#777777", "shrinkA": 0, "shrinkB": 1}
_SHAPE: dict[str, Any] = {"fontsize": 5.5, "color": "#555555", "va": "center", "zorder": 5}


def _draw_edge(
    axis: Any, start: Place, end: Place, boxes: tuple[Any, Any], shape: tuple[int, ...] | None
) -> None:
    """Draw an edge to the next row, from box to box."""
    arrow = {**_ARROW, "patchA": boxes[0], "patchB": boxes[1]}
    axis.annotate("", xy=end, xytext=start, arrowprops=arrow, zorder=4)
    if shape is not None:
        axis.text((start[0] + end[0]) / 2 + 0.06, (start[1] + end[1]) / 2, _size(shape), **_SHAPE)


def _draw_shortcut(
    axis: Any,
    start: Place,
    end: Place,
    boxes: tuple[Any, Any],
    shape: tuple[int, ...] | None,
    lane: float,
    covered: bool,
) -> None:
    """Draw an edge that passes rows by: out to a lane beside all boxes, down, and in from the side.

    Where another box is on the way out, the edge leaves below its own row.
    """
    out = start[1] - (0.42 if covered else 0)
    across, down = [start[0], start[0], lane, lane], [start[1], out, out, end[1]]
    axis.plot(across, down, color="#777777", linewidth=1, zorder=1)
    axis.annotate("", xy=end, xytext=(lane, end[1]), arrowprops={**_ARROW, "patchB": boxes[1]}, zorder=4)
    if shape is not None:
        clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axis.text(lane, (start[1] + end[1]) / 2, _size(shape), ha="center", bbox=clear, **_SHAPE)


def _size(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape[1:])) or "scalar"
