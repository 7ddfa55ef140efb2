"""How much of the zoo each method fits: every architecture of timm and torchvision, side by side, resumable.

    python -m benchmarks zoo --minutes 60
    python -m benchmarks zoo --filter "timm/resnet*" --out /tmp/zoo
    python -m benchmarks zoo --places --minutes 60

Architectures that differ in the number and the width of their blocks alone stand for one another. The smallest of
every structure comes first, those structures first that most architectures have; then the largest of each, which take
longest to plan; then the rest.
"""

from __future__ import annotations

import fnmatch
import json
import multiprocessing
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from benchmarks.coverage import Record, architectures, examine, lacking, meta_dirichlet, structure
from benchmarks.places import check_places
from fxgraft.environment import environment
from fxgraft.errors import ConfigError
from fxgraft.io.atomic_write import write_text

PROTOCOL = (
    "each method with its example options and the default stack, a training step and an evaluation of two images at "
    "the network's own size, on the meta device; architectures of one structure stand for one another"
)
WRITE_EVERY = 20  # seconds
_KEPT: list[Any] = []  # a kernel goes with what it was registered through


class Zoo:
    """What is known of the zoo, in a file that grows.

    Args:
        path: the file; carried on where it is there.

    Attributes:
        structures: what each architecture is made of (`benchmarks.coverage.structure`).
        records: what came of those that were tried (`benchmarks.coverage.examine`).
        places: whether methods are in their places on those that were checked (`benchmarks.places.check_places`).
        environments: the machines and versions that they are from.

    Raises:
        ConfigError: there is another file in its place.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.structures: dict[str, Record] = {}
        self.records: dict[str, Record] = {}
        self.places: dict[str, Record] = {}
        self.environments: list[dict[str, Any]] = []
        if path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                self.structures, self.records = dict(found["structures"]), dict(found["tried"])
                self.places = dict(found.get("places", {}))
                self.environments, known = list(found["environments"]), found["protocol"]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{path} isn't a file of this benchmark ({error!r}).\nMove it away."
                ) from error
            if known != PROTOCOL:
                raise ConfigError(f"{path} is of another protocol: {known}.\nMove it away, or use --out.")

    def unseen(self, pattern: str = "*") -> list[str]:
        """Return the architectures whose structure is not known yet, or not how many parameters they have."""
        return [
            name
            for name in architectures()
            if not {"parameters", "unbuilt"} & self.structures.get(name, {}).keys()
            and fnmatch.fnmatch(name, pattern)
        ]

    def missing(self, pattern: str = "*") -> list[str]:
        """Return the architectures that were not tried yet, in the order to try them."""
        groups: dict[str, list[str]] = defaultdict(list)
        for name, what in self.structures.items():
            if "structure" in what and fnmatch.fnmatch(name, pattern):
                groups[what["structure"]].append(name)
        for names in groups.values():
            names.sort(key=lambda name: self.structures[name]["modules"])
        common = sorted(groups.values(), key=len, reverse=True)
        untried = [names for names in common if not self.records.keys() & set(names)]
        order = [names[0] for names in untried] + [names[-1] for names in common]
        order += [name for names in common for name in names]
        return [name for name in dict.fromkeys(order) if name not in self.records]

    def incomplete(self, pattern: str = "*") -> list[str]:
        """Return the architectures that were tried when there were fewer methods, the commonest structures first."""
        names = [
            name
            for name, record in self.records.items()
            if lacking(record) and fnmatch.fnmatch(name, pattern)
        ]
        return self._commonest_first(names)

    def unchecked(self, pattern: str = "*") -> list[str]:
        """Return the architectures whose places were not checked yet, the smallest of each structure.

        The smallest has the fewest parameters, since networks are computed here. One of each model file comes first,
        then the commonest structures. Encoders without classes have no logits to check by.
        """
        alone = {name for name, record in self.known().items() if record["bare"] is not None}
        known = {self.structures[name].get("structure") for name in self.places if name in self.structures}
        smallest: dict[str, str] = {}
        for name in sorted(self.structures, key=lambda name: self.structures[name].get("parameters", 0)):
            what = self.structures[name].get("structure")
            if (
                what is not None
                and what not in known
                and name not in alone
                and fnmatch.fnmatch(name, pattern)
            ):
                smallest.setdefault(what, name)
        files = {self.structures[name]["family"] for name in self.places if name in self.structures}
        first: dict[str, str] = {}
        for name in smallest.values():
            if (family := self.structures[name]["family"]) not in files:
                first.setdefault(family, name)
        return [*dict.fromkeys([*first.values(), *self._commonest_first(smallest.values(), "parameters")])]

    def _commonest_first(self, names: Iterable[str], size: str = "modules") -> list[str]:
        """Sort architectures whose structure many have before others, and small ones before large ones."""
        counts = Counter(each.get("structure") for each in self.structures.values())

        def rank(name: str) -> tuple[int, int]:
            own = self.structures[name]
            return -counts[own["structure"]], own[size]

        return sorted(names, key=rank)

    def known(self) -> dict[str, Record]:
        """Return what is known by architecture: its own record, or that of the smallest tried of its structure."""
        tried: dict[str, Record] = {}
        for name in sorted(self.records, key=lambda name: self.structures[name]["modules"]):
            tried.setdefault(self.structures[name]["structure"], self.records[name])
        found = {}
        for name, what in self.structures.items():
            record = self.records.get(name) or tried.get(what.get("structure", ""))
            if record is not None:
                found[name] = {**record, "family": what["family"]}
        return found

    def write(self) -> None:
        """Write the file, in one move."""
        here = environment("cpu")
        if not any({**each, "date": ""} == {**here, "date": ""} for each in self.environments):
            self.environments.append(here)
        head = json.dumps({"protocol": PROTOCOL, "environments": self.environments})
        parts = [
            f'"{title}": {{\n'
            + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(each.items()))
            for title, each in (
                ("structures", self.structures),
                ("tried", self.records),
                ("places", self.places),
            )
        ]
        # A line for each architecture, so that a difference of two files can be read.
        write_text(self.path, head[:-1] + ", " + "\n},\n".join(parts) + "\n}}\n")


def run(
    zoo: Zoo, console: Console, pattern: str, workers: int, minutes: float | None, places: bool = False
) -> None:
    """Try what is missing, until it is done or the time is over; write from time to time.

    With ``places`` it is checked whether methods are in their places, which computes each network, and nothing else.
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start)
    written = time.monotonic()
    stages: list[tuple[str, Callable[..., Record], Callable[[str], list[str]], dict[str, Record]]]
    stages = [("structures", structure, zoo.unseen, zoo.structures)]
    if places:
        stages.append(("places", check_places, zoo.unchecked, zoo.places))
    else:
        stages.append(("new methods", examine, zoo.incomplete, zoo.records))
        stages.append(("architectures", examine, zoo.missing, zoo.records))
    with pool, progress_bar(console) as bar:
        for title, task, todo, found in stages:
            names = todo(pattern)
            line = bar.add_task(title, total=len(names))
            known = zoo.records if title == "new methods" else {}
            for name, result in _results(pool, workers, task, names, known, deadline):
                found[name] = result
                bar.advance(line)
                if time.monotonic() - written > WRITE_EVERY:
                    zoo.write()
                    written = time.monotonic()
    zoo.write()


def _results(
    pool: Executor,
    workers: int,
    task: Callable[..., Record],
    names: list[str],
    known: Mapping[str, Record],
    deadline: float | None,
) -> Iterator[tuple[str, Record]]:
    """Yield (name, result) as they come; a task gets what is known of its name. None begins after the deadline."""
    waiting: dict[Future[Record], str] = {}
    left = iter(names)
    while True:
        for name in left if deadline is None or time.monotonic() < deadline else ():
            waiting[pool.submit(task, name, *([known[name]] if name in known else []))] = name
            if len(waiting) > workers:
                break
        if not waiting:
            return
        for job in wait(waiting, return_when=FIRST_COMPLETED).done:
            yield waiting.pop(job), job.result()


def _start() -> None:
    start_worker()
    _KEPT.append(meta_dirichlet())


def start_worker() -> None:
    """Give a process one thread, and have it end with the one that started it, however that one ends."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def progress_bar(console: Console) -> Progress:
    """Make the bar of a long run: how many are done, how long it took, how long it will take."""
    columns: Sequence[Any] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    return Progress(*columns, console=console, speed_estimate_period=3600)
