"""Tables and pictures over the runs of a study: scores by variant, and gains over the bare network in pairs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from benchmarks.results import Results
from benchmarks.study import BARE, Claim, Run, Study
from fxgraft.spec import describe

LEVEL = 0.05
"""Below this, a paired t-test is taken to show a difference."""


@dataclass(frozen=True)
class Gain:
    """A variant against another, over pairs of runs that differ in nothing else.

    Attributes:
        before, after: mean scores of the two.
        mean: of the differences.
        deviation: standard deviation of the differences; nan for a single pair.
        pairs: how many.
        p: two-sided paired t-test; nan below three pairs.
        step_ratio: median over pairs of what a training step took against the other's.
    """

    before: float
    after: float
    mean: float
    deviation: float
    pairs: int
    p: float
    step_ratio: float


def gain(study: Study, runs: Sequence[Run], variant: str, score: str, against: str = BARE) -> Gain | None:
    """Compare two variants by a score; None if there is no pair of runs yet."""
    keys = [name for name in study.key if name != "variant"]

    def of(wanted: str) -> dict[tuple[object, ...], Run]:
        return {
            tuple(run[name] for name in keys): run
            for run in runs
            if run["variant"] == wanted and score in run["scores"]
        }

    theirs, mine = of(against), of(variant)
    pairs = [(theirs[key], run) for key, run in mine.items() if key in theirs]
    if not pairs:
        return None
    before = [left["scores"][score] for left, _ in pairs]
    after = [right["scores"][score] for _, right in pairs]
    differences = [b - a for a, b in zip(before, after, strict=True)]
    return Gain(
        before=statistics.fmean(before),
        after=statistics.fmean(after),
        mean=statistics.fmean(differences),
        deviation=statistics.stdev(differences) if len(pairs) > 1 else math.nan,
        pairs=len(pairs),
        p=_p(before, after),
        step_ratio=statistics.median(right["step_seconds"] / left["step_seconds"] for left, right in pairs)
        if all(run.get("step_seconds") for pair in pairs for run in pair)
        else math.nan,
    )


def _p(before: Sequence[float], after: Sequence[float]) -> float:
    if len(before) < 3 or len({b - a for a, b in zip(before, after, strict=True)}) == 1:
        return math.nan
    from scipy.stats import ttest_rel

    return float(ttest_rel(after, before).pvalue)


def scores_table(results: Results) -> Table:
    """Mean ± standard deviation of every score of every variant, in groups of what the runs differ in."""
    study, runs = results.study, results.runs
    groups = [name for name in study.key if name not in ("seed", "variant")]
    drawn = Table(title=f"{results.path.stem}: mean ± deviation over seeds")
    for name in (*groups, "score"):
        drawn.add_column(name)
    variants = variants_of(results)
    for name in variants:
        drawn.add_column(name, justify="right")
    for group in dict.fromkeys(tuple(run[name] for name in groups) for run in runs):
        mine = [run for run in runs if tuple(run[name] for name in groups) == group]
        for score in dict.fromkeys(score for run in mine for score in run["scores"]):
            cells = [
                cell(
                    study,
                    score,
                    [r["scores"][score] for r in mine if r["variant"] == name and score in r["scores"]],
                )
                for name in variants
            ]
            drawn.add_row(*map(str, group), score, *cells)
    return drawn


def variants_of(results: Results) -> list[str]:
    """Return the variants there are runs of, in the order of the protocol."""
    found = {run["variant"] for run in results.runs}
    known = [run["variant"] for run in results.study.runs(results.protocol, (0,))]
    return [name for name in dict.fromkeys(known) if name in found]


def cell(study: Study, score: str, values: Sequence[float]) -> str:
    """Write scores as mean ± standard deviation, in per cent unless the score has a unit of its own."""
    if not values:
        return "-"
    factor, digits = (1.0, 3) if score in study.plain else (100.0, 1)
    spread = f" ± {factor * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{factor * statistics.fmean(values):.{digits}f}{spread}"


def verdict(study: Study, claim: Claim, found: Gain) -> str:
    """Say in a word what the pairs show."""
    better = found.mean < 0 if claim.score in study.lower_is_better else found.mean > 0
    if not found.p < LEVEL:  # nan too
        return "not shown"
    return "helps" if better else "hurts"


def help_table(all_results: Sequence[Results]) -> str:
    """Write the table "does it help?" in Markdown: a row per claim, from committed runs alone."""
    rows = [
        "| patched | the paper says | tried on | score | from → to | gain ± deviation (pairs, p) | shown? |",
        "|---|---|---|---|---|---|---|",
    ]
    for results in all_results:
        for claim in results.study.claims:
            runs = [run for run in results.runs if claim.only.items() <= run.items()]
            found = gain(results.study, runs, claim.variant, claim.score, claim.against)
            if found is None:
                continue
            plain = claim.score in results.study.plain
            factor, digits, unit = (1.0, 3, "") if plain else (100.0, 1, " %")
            spread = "" if math.isnan(found.deviation) else f" ± {factor * found.deviation:.{digits}f}"
            level = "" if math.isnan(found.p) else f", p = {found.p:.2g}"
            specs = [describe(*each) for each in results.study.patches(results.protocol, claim.variant)]
            start = "" if claim.against == BARE else f"{claim.against} "
            rows.append(
                f"| {' + '.join(f'`{each}`' for each in specs or [claim.method])} | {claim.paper} "
                f"| {'; '.join([results.study.about, *map(str, claim.only.values())])} | {claim.score} "
                f"| {start}{factor * found.before:.{digits}f} → {factor * found.after:.{digits}f}{unit} "
                f"| {factor * found.mean:+.{digits}f}{spread} ({found.pairs}{level}) "
                f"| {verdict(results.study, claim, found)} |"
            )
    return "\n".join(rows)
