"""The result of a comparison: its runs, its verdicts, and a table of them."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fxgraft.arguments import path_at
from fxgraft.comparison.records import Record, finite
from fxgraft.comparison.statistics import Verdict, detectable, verdicts
from fxgraft.comparison.training import LOWER_IS_BETTER
from fxgraft.errors import ConfigError

_PLAIN = frozenset({"nll"})
"""Scores that aren't shares, and not written in per cent."""


@dataclass(kw_only=True)
class Comparison:
    """Runs in pairs, and the verdicts that follow from them.

    Attributes:
        protocol: data, model and training: what all runs share.
        environment: versions, device, threads and date of this call.
        variants: the variants as they were written, the baseline first.
        baseline: what the others are compared with.
        tasks: what is tested: held-out domains or test sets.
        seeds: the seeds of the runs.
        metric: the score of the verdicts.
        interest: the smallest difference that matters.
        level: error level of all verdicts together.
        records: every run of the folder, also of variants that this call does not compare.
        classes: names of the classes.
        tuned: the settings that tuning chose, by variant and task.
        command: what repeats the comparison on a command line.
        pictures: draws what the methods do to some of the images, for the report.
    """

    protocol: Mapping[str, Any]
    environment: Mapping[str, Any]
    variants: list[str]
    baseline: str
    tasks: list[str]
    seeds: list[int]
    metric: str
    interest: float
    level: float
    records: list[Record]
    classes: list[str]
    tuned: dict[str, dict[str, Mapping[str, Any]]] = field(default_factory=dict)
    command: str = ""
    pictures: Callable[[], Sequence[Any]] = field(default=tuple, repr=False)
    kept: int = field(default=0, init=False, repr=False)
    """How many of the records an earlier call left in the folder."""
    _found: dict[tuple[str, str, Any], Record] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.kept = len(self.records)
        for record in self.records:
            self._index(record)

    def _index(self, record: Record) -> None:
        which = _key(record["tuning"]) if "tuning" in record else record["seed"]
        self._found.setdefault((record["variant"], record["task"], which), record)

    def add(self, record: Record) -> None:
        """Take a finished run in."""
        self.records.append(record)
        self._index(record)

    def record(self, variant: str, task: str, seed: int) -> Record | None:
        """Return a run; None if it is not done."""
        return self._found.get((variant, task, seed))

    def tuning(self, variant: str, task: str, values: Mapping[str, Any]) -> Record | None:
        """Return a run that tried settings; None if it is not done."""
        return self._found.get((variant, task, _key(values)))

    def runs(self, variant: str, task: str | None = None) -> list[Record]:
        """Return the finished runs of a variant, of one task or of all, seed by seed."""
        found = [
            self.record(variant, t, seed) for seed in self.seeds for t in self.tasks if task in (None, t)
        ]
        return [record for record in found if record is not None]

    def pairs(self, variant: str, task: str | None = None) -> list[tuple[Record, Record]]:
        """Return the finished pairs (baseline, variant), of one task or of all."""
        return [
            (before, after)
            for after in self.runs(variant, task)
            if (before := self.record(self.baseline, after["task"], after["seed"])) is not None
        ]

    def score(self, record: Record) -> float:
        """Return the score of a run that the verdicts are about.

        Outputs that were not finite have an infinite loss. It counts as that of guessing, the logarithm of the number
        of classes, or as the worst of the other runs if that is worse; for "ece" it is 1. So one such run does not
        hide all others, and is better than none.
        """
        value = record["scores"][self.metric]
        if value is not None:
            return value
        if self.metric != "nll":
            return 1.0
        others = (other["scores"]["nll"] for name in self.variants for other in self.runs(name))
        return max([math.log(len(self.classes)), *(nll for nll in others if nll is not None)])

    def scores(self, variant: str, task: str | None = None) -> list[float]:
        """Return the scores of the finished runs of a variant, of one task or of all."""
        return [self.score(record) for record in self.runs(variant, task)]

    @property
    def complete(self) -> bool:
        """Whether every run is done."""
        wanted = len(self.tasks) * len(self.seeds)
        return all(len(self.runs(variant)) == wanted for variant in self.variants)

    @property
    def verdicts(self) -> list[Verdict]:
        """The verdict on each variant with a finished pair, over all tasks: every pair counts the same."""
        return self.verdicts_on(None)

    def verdicts_on(self, task: str | None) -> list[Verdict]:
        """Return the verdicts from the pairs of one task alone, corrected for the number of variants and of tasks.

        None stands for all tasks together.
        """
        pairs_of = {name: self.pairs(name, task) for name in self.variants if name != self.baseline}
        return verdicts(
            {
                name: ([self.score(before) for before, _ in pairs], [self.score(after) for _, after in pairs])
                for name, pairs in pairs_of.items()
            },
            interest=self.interest,
            level=self.level if task is None else self.level / len(self.tasks),
            lower_is_better=self.metric in LOWER_IS_BETTER,
            diverged={
                name: (
                    sum(before["diverged"] for before, _ in pairs),
                    sum(after["diverged"] for _, after in pairs),
                )
                for name, pairs in pairs_of.items()
            },
            baseline=self.baseline,
        )

    def step_ratio(self, variant: str) -> float:
        """Return the median over the pairs of the ratio of their median training steps."""
        ratios = [
            after["step_seconds"] / before["step_seconds"]
            for before, after in self.pairs(variant)
            if after["step_seconds"] and before["step_seconds"]
        ]
        return statistics.median(ratios) if ratios else math.nan

    @property
    def power_sentence(self) -> str:
        """The difference that so many pairs can show, in standard deviations and, once these are known, as a score."""
        pairs, tests = len(self.seeds) * len(self.tasks), len(self.variants) - 1
        level = self.level / tests
        if pairs < 2:
            return "One pair has no interval. Take three seeds or more."
        least = f"{detectable(1.0, pairs, level):.1f} standard deviations of the pairs' differences"
        text = f"{pairs} pairs show a true difference with 80 % power if it is at least {least}."
        seen = [verdict for verdict in self.verdicts if verdict.pairs > 1]
        if not seen:
            return text
        parts = ", ".join(f"{verdict.variant} {self.show(verdict.detectable)}" for verdict in seen)
        return f"{text} With the deviations seen here that is: {parts}."

    @property
    def factor(self) -> float:
        """What a score is multiplied with to be shown: 100 for shares."""
        return 1.0 if self.metric in _PLAIN else 100.0

    @property
    def unit(self) -> str:
        """The unit of a shown difference."""
        return "" if self.metric in _PLAIN else " points"

    def show(self, value: float, sign: bool = False) -> str:
        """Write a score or a difference as it is shown."""
        digits = 3 if self.metric in _PLAIN else 1
        return f"{self.factor * value:{'+' if sign else ''}.{digits}f}"

    def rows(self) -> list[list[str]]:
        """Return the table: a row for each variant, the baseline first."""
        judged = {verdict.variant: verdict for verdict in self.verdicts}
        table = []
        for name in self.variants:
            domains = [self._mean(name, task) for task in self.tasks] if len(self.tasks) > 1 else []
            row = [name, *domains, self._mean(name)]
            verdict = judged.get(name)
            if verdict is None:
                table.append([*row, "", "", "baseline" if name == self.baseline else "no pair yet"])
                continue
            interval = f"{self.show(verdict.low, True)} to {self.show(verdict.high, True)}"
            difference = self.show(verdict.difference, True) + (f" ({interval})" if verdict.pairs > 1 else "")
            table.append([*row, difference, str(verdict.pairs), verdict.sentence(self.factor, self.unit)])
        return table

    def _mean(self, variant: str, task: str | None = None) -> str:
        values = self.scores(variant, task)
        return self.show(statistics.fmean(values)) if values else "-"

    @property
    def header(self) -> list[str]:
        """The columns of `rows`."""
        domains = self.tasks if len(self.tasks) > 1 else []
        share = f"{100 * (1 - self.level):g} %" + (", Holm" if len(self.variants) > 2 else "")
        return [
            "variant",
            *domains,
            "mean" if domains else self.tasks[0] or "test",  # the one task of `test` has no name
            f"difference ({share})",
            "pairs",
            "verdict",
        ]

    @property
    def title(self) -> str:
        """One line on what is compared."""
        unit = "" if self.metric in _PLAIN else ", %"
        return f"{self.protocol['model']} on {self.protocol['data']}: {self.metric}{unit}"

    def to_dict(self) -> dict[str, Any]:
        """Return protocol, environment, runs and verdicts as plain dictionaries, lists, strings and numbers."""
        return {
            "protocol": dict(self.protocol),
            "environment": dict(self.environment),
            "metric": self.metric,
            "interest": self.interest,
            "level": self.level,
            "baseline": self.baseline,
            "tuned": {
                name: {task: dict(values) for task, values in by_task.items()}
                for name, by_task in self.tuned.items()
            },
            "verdicts": [
                {**vars(verdict), "verdict": verdict.sentence(self.factor, self.unit)}
                for verdict in self.verdicts
            ],
            "runs": [
                record
                for name in self.variants
                for task in self.tasks
                for seed in self.seeds
                if (record := self.record(name, task, seed)) is not None
            ],
        }

    def to_json(self) -> str:
        """Return `to_dict` as JSON text; numbers that are not finite become null."""
        return json.dumps(finite(self.to_dict()), indent=2, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """Return the table in Markdown, with protocol and power below it, for a paper's appendix."""
        lines = [self.header, ["---"] * len(self.header), *self.rows()]
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)
        return f"{self.title}\n\n{table}\n\n{self.power_sentence} {self._settings()}\n"

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the report: one file that needs no network.

        Args:
            path: the file.

        Raises:
            ConfigError: matplotlib is missing, or the file cannot be written.
        """
        from fxgraft.comparison.report import write_report

        file = path_at(path)
        if file.is_dir():
            raise ConfigError(f"{str(file)!r} is a folder.\nPass the name of a file, as report.html in it.")
        try:
            return write_report(self, file, self.pictures())
        except OSError as error:
            raise ConfigError(
                f"Cannot write the report {str(file)!r}: {error.strerror or error}.\nPass another file."
            ) from error

    def _settings(self) -> str:
        said = [f"{name} {value}" for name, value in self.training.items() if value not in (None, False)]
        tuned = "".join(f"; tuned, {where}: {values}" for where, values in self.tuned_rows())
        return (
            f"Seeds {', '.join(map(str, self.seeds))}; {self.protocol['size']} px; {', '.join(said)}{tuned}; "
            f"{self.devices}."
        )

    @property
    def training(self) -> dict[str, Any]:
        """The settings that all runs share: those of the protocol that were not tuned."""
        tuned = {name for by_task in self.tuned.values() for values in by_task.values() for name in values}
        return {name: value for name, value in self.protocol["training"].items() if name not in tuned}

    def tuned_rows(self) -> list[tuple[str, str]]:
        """Return what tuning chose: whose runs, and the settings."""
        each = len(self.tuned) > 1
        return [
            (
                ", ".join(part for part in (name if each else "all variants", task) if part),
                ", ".join(f"{key} {value}" for key, value in values.items()),
            )
            for name, by_task in self.tuned.items()
            for task, values in by_task.items()
        ]

    @property
    def devices(self) -> str:
        """The devices that the runs shown were made on, which a folder that is carried on elsewhere has several of."""
        used = [
            record.get("device", self.environment["device"])
            for record in self.records
            if record["variant"] in self.variants
        ]
        return ", ".join(dict.fromkeys(used)) or str(self.environment["device"])

    def __rich__(self) -> Table:
        """Lay the verdicts out as a table."""
        table = Table(title=Text(self.title), caption=Text(self.power_sentence), caption_justify="left")
        for index, name in enumerate(self.header):
            table.add_column(Text(name), justify="left" if index in (0, len(self.header) - 1) else "right")
        for row in self.rows():
            table.add_row(*map(Text, row))
        return table

    def __str__(self) -> str:
        console = Console(width=120, force_terminal=False)
        with console.capture() as text:
            console.print(self)
        return text.get()


def _key(values: Mapping[str, Any]) -> str:
    return json.dumps(finite(values), sort_keys=True)
