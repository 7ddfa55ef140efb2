"""What a learning benchmark says of itself: its protocols, its runs, and what each run is scored by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxgraft.errors import ConfigError

BARE = "bare"
SIZES = ("quick", "full")

Run = dict[str, Any]
Patches = list[tuple[str, dict[str, Any]]]
"""Methods with their options, as `fxgraft.patch` takes them."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run to carry out.

    Attributes:
        protocol: of the study.
        run: the fields that say which run it is; "seed" and "variant" among them.
        data: directory with the data.
        device: where to train.
        folder: where the run may keep how far it has come.
        progress: to be called with the steps done and the steps in all.
    """

    protocol: dict[str, Any]
    run: Run
    data: Path
    device: str
    folder: Path
    progress: Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a paper says a method gains, and which rows of the study answer to it.

    Attributes:
        method: its registered name, or that of a function of fxgraft.
        variant: of the study.
        score: which of the study's scores.
        paper: the claim, with the figure reported.
        against: the variant it is compared with.
        only: values that the runs have, by key; all runs by default.
    """

    method: str
    variant: str
    score: str
    paper: str
    against: str = BARE
    only: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Study:
    """A learning benchmark.

    Attributes:
        name: stem of the result files.
        about: data and network in a few words, for the table.
        needs: patterns of files that the data directory must hold.
        protocols: "quick" and "full": everything that decides the outcome of a run.
        key: the fields that say which run it is.
        runs: from a protocol and the seeds to the runs, pairs beside each other.
        patches: from a protocol and a variant to what that is patched with.
        seeds: by protocol.
        carry_out: does one run, and returns its record: "scores" by name, and what else is worth keeping.
        lower_is_better: scores that are.
        plain: scores in a unit of their own; the others are shares of one, shown in per cent.
        claims: what it tests.
    """

    name: str
    about: str
    needs: tuple[str, ...]
    protocols: Mapping[str, dict[str, Any]]
    key: tuple[str, ...]
    runs: Callable[[dict[str, Any], Sequence[int]], list[Run]]
    patches: Callable[[dict[str, Any], str], Patches]
    seeds: Mapping[str, Sequence[int]]
    carry_out: Callable[[Job], dict[str, Any]]
    claims: tuple[Claim, ...]
    lower_is_better: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()

    def check(self, data: Path) -> None:
        """Raise `ConfigError` if the data directory lacks what the study needs."""
        missing = [pattern for pattern in self.needs if not any(data.glob(pattern))]
        if missing:
            raise ConfigError(
                f"{self.name} needs {', '.join(missing)} in {data}, and there is no such file.\n"
                "Pass the directory that holds them with --data."
            )


def identity(run: Mapping[str, Any], key: Sequence[str]) -> str:
    """Return the name of a run, as a file may be called."""
    return "-".join(str(run[name]).replace("→", "_").replace(" ", "_").replace("+", "") for name in key)
