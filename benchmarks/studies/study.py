"""What a study is: a comparison that is fixed before its first run, and the claims that it answers.

A study is a client of `fxgraft.compare`. Everything that decides an outcome stands in its declaration; the number of
seeds follows from the deviation of a pilot and the smallest gain that is worth knowing. Studies of one protocol share
a folder, and so the runs of the bare network.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fxgraft
from fxgraft.comparison.result import Comparison
from fxgraft.comparison.statistics import LEVEL, Verdict, pairs_needed
from fxgraft.errors import ConfigError
from fxgraft.io.atomic_write import write_text

FOLDER = Path(__file__).parents[1] / "results" / "studies"
ONE_TEST_SET = ("test",)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a paper says, and which variant of the study answers.

    Attributes:
        variant: as the study writes it.
        paper: the claim, with the figure reported.
        against: what the variant is compared with; a variant of the study, or "bare".
        headline: whether the README shows it, whatever its runs say: one claim of each method that was tried.
    """

    variant: str
    paper: str
    against: str = "bare"
    headline: bool = False


@dataclass(frozen=True, kw_only=True)
class Study:
    """A comparison that is fixed before it runs.

    Attributes:
        name: on the command line.
        about: data and network in a few words.
        claims: what it answers.
        seeds: number of seeds.
        deviation: standard deviation of the differences within pairs, from a pilot on other seeds or from the study
            that went before; see ``pilot``.
        gain: the smallest gain that is worth knowing, in the unit of the score: most often half of the paper's.
        pilot: where the deviation is from.
        data: the place of the images, from the data folder and a folder for what has to be unpacked.
        needs: files that the data folder must hold.
        options: of `fxgraft.compare`: model, training, what is held out.
        tasks: what is tested.
        folder: of the runs; the study's name without it.
        unit: of the score, where it isn't a share of images: "mean IoU".
        closed: why nothing can be added to the runs.
    """

    name: str
    about: str
    claims: tuple[Claim, ...]
    seeds: int
    deviation: float
    gain: float
    pilot: str
    data: Callable[[Path, Path], str | Path] = lambda data, cache: data
    needs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...] = ONE_TEST_SET
    folder: str = ""
    unit: str = "accuracy"
    closed: str = ""

    @property
    def grafts(self) -> list[str]:
        """The variants, in the order of the claims; those that claims are measured against first."""
        named = [each for claim in self.claims for each in (claim.against, claim.variant)]
        return [each for each in dict.fromkeys(named) if each != "bare"]

    @property
    def pairs(self) -> int:
        """Number of pairs when it is complete."""
        return self.seeds * len(self.tasks)

    @property
    def needed(self) -> int:
        """Number of pairs that show the gain with 80 % power, after the correction for several variants."""
        return pairs_needed(self.deviation, self.gain, LEVEL / len(self.claims))

    def missing(self, data: Path) -> str:
        """Say what the data folder lacks; empty if nothing."""
        lacking = [name for name in self.needs if not (data / name).exists()]
        return f"{self.name}: no {', '.join(lacking)} in {data}" if lacking else ""

    def run(self, data: Path, out: Path = FOLDER, **options: Any) -> Comparison:
        """Do the runs that are missing, and write the table.

        Args:
            data: folder with the data.
            out: folder of the studies.
            options: of `fxgraft.compare` that decide no outcome: workers, device, progress.

        Raises:
            ConfigError: the data is not there, or the study is closed.
        """
        if self.closed:
            raise ConfigError(f"{self.name} is closed: {self.closed}")
        if lacking := self.missing(data):
            raise ConfigError(lacking)
        here = out / (self.folder or self.name)
        place = self.data(data, out / ".data")
        result = fxgraft.compare(
            place,
            grafts=self.grafts,
            seeds=self.seeds,
            interest=self.gain,
            out=here,
            **self.options,
            **options,
        )
        write_text(here / f"{self.name}.md", f"{self.about}.\n\n{result.to_markdown()}")
        return result

    def read(self, out: Path = FOLDER) -> dict[str, Comparison]:
        """Return what the committed runs say, by what they are compared with; empty if there are none."""
        here = out / (self.folder or self.name)
        if not (here / "runs.jsonl").exists():
            return {}
        protocol = json.loads((here / "protocol.json").read_text(encoding="utf-8"))
        lines = (here / "runs.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        found = {}
        for against in dict.fromkeys(claim.against for claim in self.claims):
            variants = [claim.variant for claim in self.claims if claim.against == against]
            found[against] = Comparison(
                protocol=protocol,
                environment={"device": "CPU"},  # of old runs, which do not say
                variants=[against, *variants],
                baseline=against,
                tasks=list(self.tasks),
                seeds=list(range(self.seeds)),
                metric="accuracy",
                interest=self.gain,
                level=LEVEL,
                records=records,
                classes=protocol["classes"],
            )
        return found


def progress_line(study: Study) -> Callable[[Comparison, float], None]:
    """Make a callback that says what each run found."""

    def said(result: Comparison, left: float) -> None:
        record = result.records[-1]
        score = result.score(record)
        print(
            f"{study.name}: {record['variant']}, {record['task']}, seed {record['seed']}: {score:.4f} "
            f"after {record['seconds']:.0f} s; {left / 3600:.1f} h left",
            flush=True,
        )

    return said


PAPER = "the paper says"
HEADER = (
    "patched",
    PAPER,
    "tried on",
    "accuracy, from → to",
    "gain (95 % interval)",
    "pairs",
    "smallest gain it could show",
    "verdict",
)
MOST_ROWS = 10


def evidence_table(studies: Iterable[Study], out: Path = FOLDER, *, headlines: bool = False) -> str:
    """Write the table "does it help?" in Markdown, from committed runs alone.

    A row for each claim with a verdict; what too few pairs say isn't evidence and isn't shown.

    Args:
        studies: in the order of the rows.
        out: folder of the studies.
        headlines: the claims that the README shows, without what the papers say.
    """
    header = [name for name in HEADER if not headlines or name != PAPER]
    table = [header, ["---"] * len(header)]
    for study in studies:
        for against, result in study.read(out).items():
            claims = {claim.variant: claim for claim in study.claims if claim.against == against}
            for verdict in result.verdicts:
                claim = claims[verdict.variant]
                if verdict.word == "too few pairs" or (headlines and not claim.headline):
                    continue
                row = _row(study, against, result, verdict, claim.paper)
                table.append([cell for name, cell in zip(HEADER, row, strict=True) if name in header])
    return "\n".join("| " + " | ".join(row) + " |" for row in table)


def _row(study: Study, against: str, result: Comparison, verdict: Verdict, paper: str) -> list[str]:
    start = "" if against == "bare" else f"`{against}` "
    unit = "" if study.unit == "accuracy" else f" {study.unit}"
    interval = f"{result.show(verdict.low, True)} to {result.show(verdict.high, True)}"
    whole = verdict.pairs == study.pairs
    return [
        f"`{verdict.variant}`",
        paper,
        study.about,
        f"{start}{result.show(verdict.bare)} → {result.show(verdict.patched)} %" + unit,
        f"{result.show(verdict.difference, True)} ({interval})",
        f"{verdict.pairs}" if whole else f"{verdict.pairs} of {study.pairs}",
        result.show(verdict.detectable),
        verdict.word,
    ]
