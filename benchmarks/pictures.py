"""Result files as pictures: gains over the bare network, pair by pair, and how the training losses fell."""

from __future__ import annotations

import statistics
import textwrap
from pathlib import Path
from typing import Any

from benchmarks.evidence import variants_of
from benchmarks.results import Results
from benchmarks.study import BARE


def plot(results: Results, path: Path) -> None:
    """Draw the gain of every variant, and where they were recorded the training losses beside it."""
    from matplotlib.figure import Figure

    variants = variants_of(results)
    if variants in ([], [BARE]):  # nothing to compare yet
        return
    scores = [
        s for s in dict.fromkeys(s for r in results.runs for s in r["scores"]) if s not in results.study.plain
    ]
    losses = all("epoch_loss" in run for run in results.runs)
    width = 1.5 + 1.1 * max(4, len(scores) * (len(variants) - 1))
    figure = Figure(figsize=(width + 4 * losses, 4), layout="constrained")
    axes = figure.subplots(1, 1 + losses, squeeze=False, width_ratios=[width, 4][: 1 + losses])[0]
    _draw_gains(axes[0], results, scores, [name for name in variants if name != BARE])
    if losses:
        _draw_losses(axes[1], results.runs, variants)
    figure.suptitle(textwrap.fill(results.study.about, int(9 * (width + 4 * losses))), fontsize="medium")
    figure.savefig(path, dpi=120)


def _draw_gains(axis: Any, results: Results, scores: list[str], variants: list[str]) -> None:
    """A dot per pair, the mean as a bar, by score."""
    keys = [name for name in results.study.key if name != "variant"]
    bare = {tuple(run[name] for name in keys): run for run in results.runs if run["variant"] == BARE}
    width = 0.8 / len(variants)
    for place, variant in enumerate(variants):
        for index, score in enumerate(scores):
            x = index + (place - (len(variants) - 1) / 2) * width
            differences = [
                100 * (run["scores"][score] - bare[key]["scores"][score])
                for run in results.runs
                if run["variant"] == variant and (key := tuple(run[name] for name in keys)) in bare
            ]
            if differences:
                label = variant if index == 0 else None
                colour = f"C{place}"
                axis.bar(x, statistics.fmean(differences), width * 0.9, color=colour, alpha=0.5, label=label)
                axis.plot([x] * len(differences), differences, "o", color=colour, markersize=4)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(scores)), scores)
    axis.set_ylabel("gain over bare, points")
    axis.legend()


def _draw_losses(axis: Any, runs: list[dict[str, Any]], variants: list[str]) -> None:
    """The mean over all runs of a variant, in the colour of its gains."""
    colours = {name: f"C{place}" for place, name in enumerate(each for each in variants if each != BARE)}
    for variant in variants:
        curves = [run["epoch_loss"] for run in runs if run["variant"] == variant]
        mean = [statistics.fmean(losses) for losses in zip(*curves, strict=True)]
        axis.plot(range(1, len(mean) + 1), mean, color=colours.get(variant, "0.4"), label=variant)
    axis.set_yscale("log")
    axis.set_xlabel("epoch")
    axis.set_ylabel("training loss, mean over runs")
    axis.legend()
