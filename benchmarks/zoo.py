"""How much of the zoo each method fits: every architecture of timm and torchvision, side by side, resumable.

    python -m benchmarks zoo --minutes 60
    python -m benchmarks zoo --filter "timm/resnet*" --out /tmp/zoo

The architectures come in a random order, always the same one, so that a run that was stopped is a fair sample.
"""

from __future__ import annotations

import fnmatch
import json
import multiprocessing
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.coverage import Record, architectures, category, examine, meta_dirichlet
from benchmarks.runner import progress_bar, start_worker
from fxgraft.cli.readme import markdown_table
from fxgraft.errors import ConfigError
from fxgraft.experiments.environment import environment
from fxgraft.files import write_text

PROTOCOL = "each method with its example options and the default stack, at the network's own size, on the meta device"
WRITE_EVERY = 20  # seconds
_KEPT: list[Any] = []  # a kernel goes with what it was registered through


class Zoo:
    """What is known of the zoo, in a file that grows.

    Args:
        path: the file; carried on where it is there.

    Attributes:
        records: by architecture.
        environments: the machines and versions that they are from.

    Raises:
        ConfigError: there is another file in its place.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        self.environments: list[dict[str, Any]] = []
        if path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                self.records, self.environments = dict(found["architectures"]), list(found["environments"])
                known = found["protocol"]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{path} is no file of this benchmark ({error!r}).\nMove it away."
                ) from error
            if known != PROTOCOL:
                raise ConfigError(f"{path} is of another protocol: {known}.\nMove it away, or use --out.")

    def missing(self, pattern: str = "*") -> list[str]:
        """Return the architectures that were not tried yet, in the order to try them."""
        names = architectures()
        random.Random(0).shuffle(names)
        return [name for name in names if name not in self.records and fnmatch.fnmatch(name, pattern)]

    def write(self) -> None:
        """Write the file, in one move."""
        here = environment("cpu")
        if here not in self.environments:
            self.environments.append(here)
        head = json.dumps({"protocol": PROTOCOL, "environments": self.environments})
        lines = [f"{json.dumps(name)}: {json.dumps(record)}" for name, record in sorted(self.records.items())]
        # A line for each, so that a difference of two files can be read.
        write_text(self.path, head[:-1] + ', "architectures": {\n' + ",\n".join(lines) + "\n}}\n")


def run(zoo: Zoo, console: Console, pattern: str, workers: int, minutes: float | None) -> None:
    """Try what is missing, until it is done or the time is over; write from time to time."""
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    todo = zoo.missing(pattern)
    context = multiprocessing.get_context("spawn")
    written = time.monotonic()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start)
    with pool, progress_bar(console) as bar:
        line = bar.add_task("architectures", total=len(todo))
        waiting = {}
        names = iter(todo)
        while True:
            for name in names if deadline is None or time.monotonic() < deadline else ():
                waiting[pool.submit(examine, name)] = name
                if len(waiting) > workers:
                    break
            if not waiting:
                break
            for job in wait(waiting, return_when=FIRST_COMPLETED).done:
                zoo.records[waiting.pop(job)] = job.result()
                bar.advance(line)
            if time.monotonic() - written > WRITE_EVERY:
                zoo.write()
                written = time.monotonic()
    zoo.write()


def _start() -> None:
    start_worker()
    _KEPT.append(meta_dirichlet())


def outcomes(records: dict[str, Record]) -> Iterator[tuple[str, str, str, Record]]:
    """Yield (architecture, family, method, what came of it); networks that do not run by themselves are left out."""
    for name, record in records.items():
        if "methods" in record and record["bare"] is None:
            for method, tried in {**record["methods"], "all together": record["stack"]}.items():
                yield name, record["family"], method, tried


def works(tried: Record) -> bool:
    """Say whether a method went on, trained and evaluated."""
    return tried.get("steps", "") is None


def shares(records: dict[str, Record]) -> dict[str, tuple[int, int]]:
    """Count (those that work, all) by method."""
    counts: dict[str, Counter[bool]] = defaultdict(Counter)
    for _, _, method, tried in outcomes(records):
        counts[method][works(tried)] += 1
    return {method: (count[True], count.total()) for method, count in counts.items()}


def summary(zoo: Zoo) -> str:
    """Write what is known in Markdown: shares, the slowest plans, refusals by category, families."""
    records = zoo.records
    tried = len({name for name, *_ in outcomes(records)})
    lines = [
        f"{tried} architectures of {len(architectures())}: {PROTOCOL}. "
        f"{len(records) - tried} more could not be built here or do not run by themselves.",
        "",
        markdown_table(
            ("method", "works", "of", "share", "median plan, s", "slowest plan, s"),
            [
                (method, str(good), str(total), f"{good / total:.1%}", *_times(records, method))
                for method, (good, total) in shares(records).items()
            ],
        ),
        "",
        "Slowest plans:",
        "",
        markdown_table(("architecture", "method", "s"), _slowest(records)),
        "",
        "What does not work, by category, with one text as the user sees it:",
        "",
        markdown_table(("method", "networks", "category", "for example", "the text"), _refusals(records)),
        "",
        "By model file:",
        "",
        markdown_table(("model file", *shares(records)), _families(records)),
    ]
    return "\n".join(lines) + "\n"


def _times(records: dict[str, Record], method: str) -> tuple[str, str]:
    plans = sorted(each["plan"] for _, _, name, each in outcomes(records) if name == method)
    return f"{plans[len(plans) // 2]:.2f}", f"{plans[-1]:.1f}"


def _slowest(records: dict[str, Record]) -> list[tuple[str, ...]]:
    single = [
        (each["plan"], name, method)
        for name, _, method, each in outcomes(records)
        if method != "all together"
    ]
    return [(name, method, f"{plan:.1f}") for plan, name, method in sorted(single, reverse=True)[:10]]


def _refusals(records: dict[str, Record]) -> list[tuple[str, ...]]:
    found: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for name, _, method, tried in outcomes(records):
        text = tried.get("refused") or tried.get("failed") or tried.get("steps")
        if text:
            kind = "" if "refused" in tried else "CRASH "
            found[method, kind + category(text)].append((name, text))
    ordered = sorted(found.items(), key=lambda item: (item[0][0], -len(item[1])))
    return [
        (method, str(len(cases)), kind, cases[0][0], "<br>".join(cases[0][1].splitlines()))
        for (method, kind), cases in ordered
    ]


def _families(records: dict[str, Record]) -> list[tuple[str, ...]]:
    cells: dict[str, dict[str, Counter[bool]]] = defaultdict(lambda: defaultdict(Counter))
    for _, group, method, tried in outcomes(records):
        cells[group][method][works(tried)] += 1
    return [
        (group, *(f"{row[method][True]}/{row[method].total()}" for method in shares(records)))
        for group, row in sorted(cells.items())
    ]


def plot(zoo: Zoo, path: Path) -> None:
    """Draw the matrix of model files and methods: the share of architectures that work."""
    from matplotlib.figure import Figure

    methods = list(shares(zoo.records))
    rows = _families(zoo.records)
    share = [[_share(cell) for cell in row[1:]] for row in rows]
    figure = Figure(figsize=(1.2 * len(methods) + 2, 0.22 * len(rows) + 2), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(share, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axis.set_xticks(range(len(methods)), methods, rotation=30, ha="right")
    axis.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=7)
    figure.colorbar(image, label="share of the architectures tried that plan, train and evaluate")
    figure.savefig(path, dpi=100)


def _share(cell: str) -> float:
    good, total = map(int, cell.split("/"))
    return good / total if total else float("nan")
