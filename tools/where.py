"""Drawings of where a method goes: a network as a column of its layers, with the method's units marked.

A drawing is SVG that stands in a page of the documentation. Its text is the page's text, its colours are those of the
theme, light or dark. What it shows is asked of fxgraft: the layers of `fxgraft.sites`, the units of a dry run.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import timm

import fxgraft
from fxgraft.cli.placing import NOTHING, first_to_last

WIDTH, ROW, BAR = 352, 30, 20
"""Of a drawing, from one row to the next, and of the bar in a row, in pixels."""

LEFT, CELL, LETTER, WIRE = 84, 17, 6.1, 92
"""Where bars begin, the width of a numbered cell and of a letter, and where the arrows run, in pixels."""

MARKS = {
    "on": "a unit acts on the value that passes here",
    "in": "units act inside the block",
    "instead": "a unit stands in place of the layer",
}
"""What each mark says, below a drawing."""


@dataclass(frozen=True)
class Row:
    """A layer of the network, drawn as a bar of one or more cells.

    Attributes:
        name: of the module; "" for the input and the output.
        label: what stands before the bar.
        cells: the modules in it, by name, with what is written into each.
        size: of what leaves it, without the batch.
    """

    name: str
    label: str
    cells: tuple[tuple[str, str], ...] = ()
    size: str = ""


@functools.cache
def network(name: str) -> Any:
    """Return a network of timm, bare; dry runs leave it as it is."""
    return timm.create_model(name)


@functools.cache
def planned(model: str, method: str) -> fxgraft.Plan:
    """Plan a method on a network, with the options that it cannot do without."""
    return fxgraft.patch(network(model), method, dry_run=True, **fxgraft.methods()[method].example)


@functools.cache
def rows(name: str) -> tuple[Row, ...]:
    """Return the layers of a network: its own children in running order, and their children as cells.

    What passes its input on is left out, as are functions between the layers.
    """
    model = network(name)
    size = model.pretrained_cfg["input_size"]
    found = []
    inner = [site for site in fxgraft.sites(model, "*.*") if site.path and site.op not in NOTHING]
    for site in fxgraft.sites(model, "*"):
        if site.path and site.op not in NOTHING:
            children = [each for each in inner if each.path.startswith(f"{site.path}.")]
            cells = [(each.path, each.path.rpartition(".")[2]) for each in children] or [(site.path, site.op)]
            found.append(Row(site.path, site.path, tuple(cells), _size(site.shape[1:] if site.shape else ())))
    return Row("", "input", size=_size(size)), *found, Row("", "output")


def _size(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


Marks = dict[str, list[str]]
"""Names of modules by mark; by "ends" those of "input" and "output" where units take the images or give the logits."""


def marks(plan: fxgraft.Plan, layers: Sequence[Row]) -> Marks:
    """Sort the modules that a plan names by how its units act there."""
    found: Marks = {"on": [], "in": [], "instead": [], "ends": []}
    for owner, what, _ in plan.actions:
        kind, *names = what.replace(",", "").split()[1:]
        if kind == "span":  # from one value of the owner to another: what lies between is replaced
            between = [row.name for row in layers]
            start, end = (f"{owner}.{name}".lstrip(".") for name in names)
            found["instead"] += between[between.index(start) + 1 : between.index(end) + 1]
        elif not owner:
            found["ends"].append(kind)
        else:
            found[{"output": "on", "instead": "instead"}.get(kind, "in")].append(owner)
    return {mark: list(dict.fromkeys(names)) for mark, names in found.items()}


def described(marked: Marks) -> str:
    """Say in words what a drawing shows."""
    said = {"on": "after {}", "in": "inside {}", "instead": "in place of {}", "ends": "at the model's {}"}
    return "; ".join(text.format(first_to_last(marked[mark])) for mark, text in said.items() if marked[mark])


def drawings(method: str, models: Sequence[str]) -> str:
    """Draw where a method goes on some networks, side by side, as HTML; where it does not, the error stands."""
    parts = []
    for model in models:
        try:
            shown = drawing(model, planned(model, method))
        except fxgraft.FxgraftError as error:
            text = "<br>".join(escape(line) for line in str(error).splitlines())
            shown = f"<p>It does not go there. {type(error).__name__}:</p>\n<p>{text}</p>"
        parts.append(
            f'<figure class="where"><figcaption>timm\'s <code>{model}</code></figcaption>\n{shown}</figure>'
        )
    return '<div class="wheres">\n' + "\n".join(parts) + "\n</div>"


def drawing(model: str, plan: fxgraft.Plan) -> str:
    """Draw a network with the units of a plan, and say below what the marks mean."""
    layers = list(rows(model))
    marked = marks(plan, layers)
    known = {name for row in layers for name in (row.name, *(cell for cell, _ in row.cells))}
    for name in marked["on"]:  # a layer that passes its input on is drawn where a unit sits at it
        if name not in known:
            layers = _inserted(layers, model, name)
    height = ROW * len(layers)
    used = [mark for mark in MARKS if marked[mark] or (mark == "on" and marked["ends"])]
    legend = "".join(f'<span><i class="{mark}"></i>{MARKS[mark]}</span>' for mark in used)
    label = escape(f"{plan.name} on {model}: {described(marked)}")
    box = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    shapes = "\n".join(_shapes(layers, marked))
    return f'<svg {box} role="img" aria-label="{label}">\n{shapes}\n</svg>\n<figcaption>{legend}</figcaption>'


def _inserted(layers: list[Row], model: str, name: str) -> list[Row]:
    """Put a layer in, behind those that run before it."""
    order = [site.path for site in fxgraft.sites(network(model), "*")]
    (site,) = fxgraft.sites(network(model), name)
    index = sum(1 for row in layers[1:-1] if order.index(row.name) < order.index(name)) + 1
    row = Row(name, name, ((name, site.op),), _size((site.shape or ())[1:]))
    return [*layers[:index], row, *layers[index:]]


def _shapes(layers: Sequence[Row], marked: Marks) -> Iterator[str]:
    dots: list[tuple[float, float]] = []
    for index, row in enumerate(layers):
        middle = ROW * index + ROW / 2
        top = middle - BAR / 2
        yield f'<text x="0" y="{middle + 4:g}">{escape(row.label)}</text>'
        yield f'<text class="size" x="{WIDTH}" y="{middle + 4:g}">{row.size}</text>'
        if index:  # the arrow from the row above
            start = middle - ROW + (BAR / 2 if layers[index - 1].cells else 0)
            end = top if row.cells else middle
            yield f'<path class="wire" d="M{WIRE} {start:g}V{end - 1:g}m-3 -4l3 4l3 -4"/>'
        at = float(LEFT)
        for name, text in row.cells:
            width = CELL if text.isdigit() else len(text) * LETTER + 10
            kind = next((mark for mark in ("instead", "in") if {name, row.name} & {*marked[mark]}), "layer")
            yield f'<rect class="{kind}" x="{at:g}" y="{top:g}" width="{width:g}" height="{BAR}"/>'
            yield f'<text class="cell {kind}" x="{at + width / 2:g}" y="{middle + 4:g}">{escape(text)}</text>'
            at += width
            if name in marked["on"] and name != row.name:
                dots.append((at, middle + BAR / 2))
        if row.name in marked["on"]:
            dots.append((WIRE, middle + ROW / 2))
        if row.label in marked["ends"]:
            dots.append((WIRE, middle))
    yield from (f'<circle cx="{x:g}" cy="{y:g}" r="4"/>' for x, y in dots)
