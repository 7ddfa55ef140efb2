"""What the demo reports: its runs as JSON and as a table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text

from fxgraft.experiments.surgery import Check

FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run.

    Attributes:
        variant: "bare", or the patch as it was written.
        held_out: the domain that was not trained on.
        seed: of weights, batches and patches.
        accuracy: share of that domain's images classified rightly, by the weights of the last epoch.
        step_seconds: median over the training steps.
        steps: number of training steps.
        train_seconds: the whole training.
        epoch_loss: mean training loss of every epoch.
    """

    variant: str
    held_out: str
    seed: int
    accuracy: float
    step_seconds: float
    steps: int
    train_seconds: float
    epoch_loss: list[float]


@dataclass(kw_only=True)
class DemoReport:
    """The outcome of a demo.

    Attributes:
        protocol: what was trained on what, and how.
        seeds: the seeds of the runs.
        environment: versions, device, threads and date.
        runs: one per seed, held-out domain and variant.
        surgery: what was done to a model before anything was compared, and whether each line held.
        picture: file name of the picture, None if nothing was muted that can be drawn.
    """

    protocol: dict[str, Any]
    seeds: list[int]
    environment: dict[str, Any]
    runs: list[Run] = field(default_factory=list)
    surgery: list[Check] = field(default_factory=list)
    picture: str | None = None

    @property
    def variants(self) -> list[str]:
        """The variants in the order of their first run."""
        return list(dict.fromkeys(run.variant for run in self.runs))

    @property
    def held_out(self) -> list[str]:
        """The held-out domains in the order of their first run."""
        return list(dict.fromkeys(run.held_out for run in self.runs))

    def accuracies(self, variant: str, held_out: str | None = None) -> list[float]:
        """One accuracy per seed: on one held-out domain, or the mean over all of them for None."""
        chosen = [r for r in self.runs if r.variant == variant and held_out in (None, r.held_out)]
        return [statistics.fmean(r.accuracy for r in chosen if r.seed == seed) for seed in self.seeds]

    def step_seconds(self, variant: str) -> float:
        """Median over the runs of the median step."""
        return statistics.median(run.step_seconds for run in self.runs if run.variant == variant)

    def step_ratio(self, variant: str) -> float:
        """Median of the ratio to the bare run of the same seed and held-out domain."""
        bare = {(r.seed, r.held_out): r.step_seconds for r in self.runs if r.variant == self.variants[0]}
        return statistics.median(
            r.step_seconds / bare[r.seed, r.held_out] for r in self.runs if r.variant == variant
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers."""
        summary = [
            {
                "variant": variant,
                "accuracy": statistics.fmean(self.accuracies(variant)),
                "accuracy_by_domain": {
                    name: statistics.fmean(self.accuracies(variant, name)) for name in self.held_out
                },
                "step_seconds": self.step_seconds(variant),
                "step_ratio": self.step_ratio(variant),
            }
            for variant in self.variants
        ]
        return {"format": FORMAT, **asdict(self), "summary": summary}

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def __rich__(self) -> Table:
        """Lay the outcome out as a table."""
        setting = (
            f"{self.protocol['data']}; {self.protocol['epochs']} epochs at {self.protocol['size']} px; "
            f"seeds {', '.join(map(str, self.seeds))}; {self.environment['device']}, "
            f"{self.environment['threads']} threads"
        )
        table = Table(
            title=Text(f"{self.protocol['model']} · accuracy on the domain it never saw, %"),
            caption=f"{setting}.\nStep: median of a training step; ratio to the bare run beside it.",
            caption_justify="left",
        )
        table.add_column("variant")
        # Of a single domain the mean says nothing new.
        mean: tuple[str | None, ...] = (None,) if len(self.held_out) > 1 else ()
        for name in (*self.held_out, *("mean" for _ in mean), "step, ms", "ratio"):
            table.add_column(Text(name), justify="right")
        for variant in self.variants:
            table.add_row(
                Text(variant),
                *(_percent(self.accuracies(variant, name)) for name in (*self.held_out, *mean)),
                f"{self.step_seconds(variant) * 1e3:.1f}",
                f"{self.step_ratio(variant):.2f}",
            )
        return table


def _percent(values: Sequence[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}"
