"""The report of a comparison: one HTML file with its figures inside, which asks no network for anything."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from fxgraft.io.atomic_write import write_text
from fxgraft.viz.drawing import figure_of, matplotlib_figure

if TYPE_CHECKING:
    from fxgraft.comparison.result import Comparison
    from fxgraft.comparison.runs import Setup, Variant

_INK = "#123456"
"""Stands for the colour of the text in figures, until it becomes the page's own, light or dark."""
_COLOURS = ("#3b82c4", "#d9822b", "#2f9e63", "#b653a6", "#c2493d", "#7a7f87")
_CLASSES_SHOWN = 10


@dataclass(frozen=True)
class Figure:
    """A chart: its heading, what it shows, and its SVG."""

    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Rows:
    """A table: heading, caption, columns, rows."""

    title: str
    caption: str
    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Photo:
    """A picture of what a method does: its caption, and a PNG in base64."""

    caption: str
    png: str


def write_report(result: Comparison, path: Path, pictures: Sequence[Photo] = ()) -> Path:
    """Write the report.

    Args:
        result: what was found.
        path: the file.
        pictures: of the methods, from `method_pictures`.
    """
    source = resources.files("fxgraft.comparison").joinpath("report.html").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    count = len(result.tasks)
    weighting = "Every pair counts the same" + (
        f", and so does each of the {count} domains." if count > 1 else "."
    )
    text = page.render(
        result=result,
        weighting=weighting,
        figures=list(_figures(result)),
        tables=list(_tables(result)),
        pictures=pictures,
        protocol=list(
            _flat(
                {
                    **result.protocol,
                    "training": result.training,
                    "seeds": result.seeds,
                    "device": result.devices,
                }
            )
        )
        + [(f"tuned, {where}", values) for where, values in result.tuned_rows()],
        call=list(_flat({name: value for name, value in result.environment.items() if name != "device"})),
    )
    write_text(path, text.encode("utf-8", "replace").decode("utf-8"))  # names of files may be no text
    return path


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name} ")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            yield f"{before}{name}".replace("_", " "), text


def _figures(result: Comparison) -> Iterator[Figure]:
    if result.verdicts:
        yield _differences(result)
    if any(record["epoch_loss"] for record in result.records):
        yield _curves(result)
    diagnostics = _diagnostics(result)
    if diagnostics is not None:
        yield diagnostics


def _differences(result: Comparison) -> Figure:
    verdicts = result.verdicts
    figure = matplotlib_figure(figsize=(7.5, 1.2 + 0.55 * len(verdicts)), layout="constrained")
    axis = figure.add_subplot()
    for row, verdict in enumerate(verdicts):
        for index, task in enumerate(result.tasks):
            values = [
                result.factor * (result.score(after) - result.score(before))
                for before, after in result.pairs(verdict.variant, task)
            ]
            shift = (index - (len(result.tasks) - 1) / 2) * 0.12
            axis.plot(
                values,
                [row + shift] * len(values),
                "o",
                color=_COLOURS[index % len(_COLOURS)],
                markersize=4.5,
                alpha=0.75,
                label=_label(task) if row == 0 else None,
            )
        if verdict.pairs > 1:
            low, high = result.factor * verdict.low, result.factor * verdict.high
            axis.plot([low, high], [row + 0.3] * 2, "-", color=_INK, linewidth=1.6)
        axis.plot([result.factor * verdict.difference], [row + 0.3], "D", color=_INK, markersize=5)
    axis.axvline(0, color=_INK, linewidth=0.8)
    axis.set_yticks(range(len(verdicts)), [v.variant for v in verdicts])
    axis.set_ylim(len(verdicts) - 0.4, -0.6)
    axis.set_xlabel(f"difference to {result.baseline}: {result.metric}{result.unit and ',' + result.unit}")
    if len(result.tasks) > 1:
        axis.legend(fontsize=8, ncols=min(4, len(result.tasks)), loc="upper left", bbox_to_anchor=(0, -0.35))
    return Figure(
        "Paired differences",
        "Each dot is a pair; the diamond is their mean, with its interval.",
        _svg(figure),
    )


def _curves(result: Comparison) -> Figure:
    figure = matplotlib_figure(figsize=(7.5, 3.0), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, name, label in zip(
        axes,
        ("epoch_loss", "epoch_validation"),
        ("training loss", "accuracy on images set apart, %"),
        strict=True,
    ):
        for index, variant in enumerate(result.variants):
            means = _means([record[name] for record in result.runs(variant)])
            if means:
                factor = 1 if name == "epoch_loss" else 100
                values = [factor * mean for mean in means]
                colour = _COLOURS[index % len(_COLOURS)]
                axis.plot(
                    range(1, len(values) + 1), values, "o-", markersize=3, color=colour, label=_label(variant)
                )
        axis.set_xlabel("epoch")
        axis.set_title(label, fontsize=9)
        axis.locator_params(axis="x", integer=True)
    if axes[0].lines:
        axes[0].legend(fontsize=7)
    return Figure(
        "Learning curves",
        "Means over all runs. Images set apart are of the domains that training sees.",
        _svg(figure),
    )


def _label(name: str) -> str:
    """Return a name as a legend shows it, which leaves out those that begin with an underscore."""
    return f" {name}" if name.startswith("_") else name


def _means(runs: Sequence[Sequence[float | None]]) -> list[float]:
    """Return the mean of each epoch over the runs; a run that diverged ends early."""
    columns = ([value for value in column if value is not None] for column in zip_longest(*runs))
    return [statistics.fmean(column) for column in columns if column]


def _diagnostics(result: Comparison) -> Figure | None:
    means_of: dict[str, list[float]] = {}
    for variant in result.variants:
        runs = [record.get("epoch_diagnostics") or [] for record in result.runs(variant)]
        for name in dict.fromkeys(key for run in runs for epoch in run for key in epoch):
            means_of[f"{variant}: {name}"] = _means([[epoch.get(name) for epoch in run] for run in runs])
    if not means_of:
        return None
    figure = matplotlib_figure(figsize=(7.5, 1.9 * -(-len(means_of) // 3)), layout="constrained")
    for index, (name, means) in enumerate(means_of.items()):
        axis = figure.add_subplot(-(-len(means_of) // 3), 3, index + 1)
        axis.plot(range(1, len(means) + 1), means, "o-", markersize=3, color=_COLOURS[0])
        axis.set_title(name, fontsize=7, wrap=True)
        axis.tick_params(labelsize=7)
        axis.locator_params(axis="x", integer=True)
    return Figure(
        "Diagnostics",
        "What the methods did in the last step of each epoch, as means over all runs.",
        _svg(figure),
    )


def _tables(result: Comparison) -> Iterator[Rows]:
    if len(result.tasks) > 1 and result.verdicts:
        rows = []
        for task in result.tasks:
            for verdict in result.verdicts_on(task):
                low, high = result.show(verdict.low, True), result.show(verdict.high, True)
                difference = f"{result.show(verdict.difference, True)} ({low} to {high})"
                means = result.show(verdict.bare), result.show(verdict.patched)
                rows.append([f"{verdict.variant}, {task}", *means, difference, str(verdict.pairs)])
        yield Rows(
            "By domain",
            "Pairs of one domain alone; intervals are corrected for the number of variants and of domains.",
            ["variant, domain", result.baseline, "variant", "difference", "pairs"],
            rows,
        )
    if result.verdicts:
        yield from _by_class(result)
    costs = [[name, f"{result.step_ratio(name):.2f}"] for name in result.variants if result.pairs(name)]
    yield Rows(
        "Cost", "Median training step, as a ratio to the baseline's. Beside other work it is a rough figure.",
        ["variant", "ratio"], costs,
    )  # fmt: skip


def _by_class(result: Comparison) -> Iterator[Rows]:
    for verdict in result.verdicts:
        changes = []
        for index, name in enumerate(result.classes):
            pairs = [pair for pair in result.pairs(verdict.variant) if pair[0]["images"][index]]
            if pairs:
                shares = [
                    [100 * run["right"][index] / run["images"][index] for run in pair] for pair in pairs
                ]
                before, after = (statistics.fmean(column) for column in zip(*shares, strict=True))
                changes.append((after - before, name, before, after))
        changes.sort()
        chosen = changes if len(changes) <= _CLASSES_SHOWN else changes[:5] + changes[-5:]
        which = "" if len(chosen) == len(changes) else f" The five that lose and gain most of {len(changes)}."
        yield Rows(
            f"By class: {verdict.variant}",
            f"Images of each class that are classified rightly, %; means over the pairs, without a test.{which}",
            ["class", result.baseline, verdict.variant, "difference"],
            [
                [name, f"{before:.1f}", f"{after:.1f}", f"{change:+.1f}"]
                for change, name, before, after in chosen
            ],
        )


def method_pictures(setup: Setup, variants: Sequence[Variant], images: Sequence[Any]) -> list[Photo]:
    """Draw what each method of the variants does to images, with the network as it is before training.

    Args:
        setup: the setup of the comparison.
        variants: the variants whose methods are drawn, once each.
        images: decoded, two or more.
    """
    from fxgraft.viz.method_pictures import methods_with_pictures, picture_of, squares

    known = methods_with_pictures()
    batch = squares(images, setup.size)
    trained = bool(setup.pretrained or setup.weights)
    start = "pretrained weights" if trained else "untrained weights"
    photos: dict[str, Photo] = {}
    for variant in variants:
        for method, options in variant.grafts:
            if method not in known or method in photos:
                continue
            model = setup.build(type(variant)("bare"), 0)
            picture = picture_of(model, method, batch, options, trained=trained)
            drawn = io.BytesIO()
            figure_of(picture).savefig(drawn, format="png", dpi=120)
            png = base64.b64encode(drawn.getvalue()).decode("ascii")
            photos[method] = Photo(f"{method}, {start}: {picture.caption}", png)
    return list(photos.values())


def _svg(figure: Any) -> str:
    """Write a figure as SVG: without a ground, in the page's own colour of text, the same bytes every time."""
    import matplotlib
    from matplotlib.text import Text

    for text in figure.findobj(Text):  # a "$" in the name of a domain is no formula
        text.set_parse_math(False)
    for axis in figure.axes:
        axis.patch.set_visible(False)
        axis.tick_params(colors=_INK)
        for text in (axis.title, axis.xaxis.label, axis.yaxis.label):
            text.set_color(_INK)
        for spine in axis.spines.values():
            spine.set_color(_INK)
        axis.spines[["top", "right"]].set_visible(False)
        legend = axis.get_legend()
        if legend is not None:
            legend.get_frame().set_visible(False)
            for text in legend.get_texts():
                text.set_color(_INK)
    figure.patch.set_visible(False)
    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "fxgraft", "svg.fonttype": "none"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    text = drawn.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")
