"""What the learning benchmarks share: arguments, the runner, and result files that survive an interruption."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fxgraft.experiments.domains import Domain
from fxgraft.experiments.environment import environment
from fxgraft.experiments.loading import load_domains
from fxgraft.files import write_text

FORMAT = 1


def argument_parser(description: str, name: str) -> argparse.ArgumentParser:
    """Arguments that every learning benchmark takes; `name` is the stem of its result file."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--quick", action="store_true", help="small protocol, sized for two CPU cores")
    size.add_argument("--full", action="store_true", help="the protocol to quote, for a GPU")
    parser.add_argument("--data", type=Path, required=True, help="directory with the data")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of those of the protocol")
    parser.add_argument(
        "--out", type=Path, help=f"result file; by default results/{name}_quick.json or _full.json"
    )
    parser.add_argument(
        "--shard",
        type=shard,
        default=(1, 1),
        metavar="I/N",
        help="do every N-th part, from the I-th, into a file of its own; afterwards the same command "
        "without --shard collects the parts, and does what is missing",
    )
    return parser


def shard(text: str) -> tuple[int, int]:
    """Read ``2/4``: the second of four."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 1 <= I <= N, such as 2/4")
    return int(index), int(count)


def result_path(arguments: argparse.Namespace, name: str) -> Path:
    """The file that the whole benchmark writes to, whatever the shard."""
    size = "quick" if arguments.quick else "full"
    return arguments.out or Path(__file__).parent / "results" / f"{name}_{size}.json"


class Results:
    """A result file to which finished runs are added one by one.

    An existing file of the same protocol is carried on: its runs count as done. One of another protocol
    is refused, since a table over both would compare what cannot be compared.

    Args:
        path: the JSON file.
        protocol: everything that decides the outcome of a run of a given key.
        key: the fields of a run that say which run it is.
        device: recorded with the versions.
        part: shard (index, count); anything but (1, 1) goes to ``<stem>.shard<I>of<N>.json``.
    """

    def __init__(
        self,
        path: Path,
        protocol: dict[str, Any],
        key: tuple[str, ...],
        device: str,
        part: tuple[int, int] = (1, 1),
    ) -> None:
        # Through JSON and back, so that tuples compare equal to the lists of a file.
        self.protocol = json.loads(json.dumps(protocol))
        self.key = key
        self.environments: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        whole = part == (1, 1)
        self.path = path if whole else path.with_suffix(f".shard{part[0]}of{part[1]}.json")
        for source in [path, *sorted(path.parent.glob(f"{path.stem}.shard*of*.json"))]:
            # A shard leaves out what others have finished, but only the whole takes it over.
            self._read(source, keep=whole or source == self.path)
        self.environments.append(environment(device))

    def _read(self, source: Path, keep: bool) -> None:
        if not source.exists():
            return
        found = json.loads(source.read_text(encoding="utf-8"))
        differing = sorted(
            name
            for name in {*found["protocol"], *self.protocol}
            if found["protocol"].get(name) != self.protocol.get(name)
        )
        if differing:
            raise SystemExit(
                f"{source} holds runs of another protocol (different: {', '.join(differing)}).\n"
                "Move it away, or write elsewhere with --out."
            )
        shift = len(self.environments)
        self.environments += found["environments"]
        for run in found["runs"]:
            if not self.done(run):
                self.runs.append({**run, "environment": run["environment"] + shift, "own": keep})

    def done(self, run: dict[str, Any]) -> bool:
        """Whether a run with the same key is there."""
        return any(all(known[name] == run[name] for name in self.key) for known in self.runs)

    def add(self, run: dict[str, Any]) -> None:
        """Add a finished run and write the file, in one move so that it is never half written."""
        self.runs.append({**run, "environment": len(self.environments) - 1, "own": True})
        self.write()

    def write(self) -> None:
        """Write what belongs to this file."""
        own = [run for run in self.runs if run["own"]]
        used = sorted({run["environment"] for run in own})
        content = {
            "format": FORMAT,
            "protocol": self.protocol,
            "environments": [self.environments[index] for index in used],
            "runs": [
                {
                    **{k: v for k, v in run.items() if k != "own"},
                    "environment": used.index(run["environment"]),
                }
                for run in sorted(own, key=lambda run: [str(run[name]) for name in self.key])
            ],
        }
        write_text(self.path, json.dumps(content, indent=1) + "\n")

    def carry_out(
        self,
        runs: Sequence[dict[str, Any]],
        run_one: Callable[[dict[str, Any]], dict[str, Any]],
        shown: Callable[[dict[str, Any]], float],
    ) -> None:
        """Do the runs that are not there yet, and write each as it ends.

        Args:
            runs: the fields of the key.
            run_one: from these to what is to be recorded; the time it took is added.
            shown: from what was recorded to the score to print, as a share.
        """
        todo = [run for run in runs if not self.done(run)]
        for number, run in enumerate(todo, 1):
            began = time.perf_counter()
            outcome = run_one(run)
            seconds = round(time.perf_counter() - began, 1)
            self.add({**run, **outcome, "seconds": seconds})
            which = ", ".join(f"{name} {run[name]}" for name in self.key)
            print(
                f"[{number}/{len(todo)}] {which}: {100 * shown(outcome):.1f} % after {seconds:.0f} s",
                flush=True,
            )
        self.write()

    def present(
        self,
        table: Callable[[list[dict[str, Any]]], Table],
        plot: Callable[[list[dict[str, Any]], Path], None],
    ) -> None:
        """Print the table and draw the picture, once all parts are together."""
        if ".shard" not in self.path.name:
            Console(width=110).print(table(self.runs))
            plot(self.runs, self.path.with_suffix(".png"))


def part_of(runs: Sequence[Any], part: tuple[int, int]) -> list[Any]:
    """Every N-th of the runs, from the I-th; for a part I of N."""
    return list(runs[part[0] - 1 :: part[1]])


def cell(values: Sequence[float], digits: int = 1) -> str:
    """Write values of several seeds as mean and standard deviation."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def step_ratio(runs: Sequence[dict[str, Any]], variant: str, by: Sequence[str] = ("seed",)) -> float:
    """Median of the step time against that of the bare run with the same fields ``by``."""

    def which(run: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(run[name] for name in by)

    bare = {which(run): run["step_seconds"] for run in runs if run["variant"] == "bare"}
    ratios = [
        run["step_seconds"] / bare[which(run)]
        for run in runs
        if run["variant"] == variant and which(run) in bare
    ]
    return statistics.median(ratios) if ratios else math.nan


def read_cifar10(data: Path, protocol: dict[str, Any]) -> dict[str, Domain]:
    """Images and labels for "train" and "test", from tars or folders ``cifar10_train``, ``cifar10_test``."""
    return {
        split: load_domains(
            data / f"cifar10_{split}*",
            protocol["size"],
            limit=protocol["limit_per_class" if split == "train" else "test_per_class"],
            seed=protocol["split_seed"],
        )[0]
        for split in ("train", "test")
    }
