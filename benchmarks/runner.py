"""Carrying out what is missing of a study: side by side in processes of one thread each, resumable."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import MutableMapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
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

from benchmarks.results import Results
from benchmarks.study import Job, Run, identity


class OutOfTimeError(Exception):
    """The time that was given is over; the run goes on from its last epoch next time."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How runs are carried out; nothing here decides their outcome.

    Attributes:
        data: directory with the data.
        device: where to train.
        workers: runs side by side.
        minutes: stop after this long, in the middle of a run if need be; None is never.
        seeds: instead of those of the study.
    """

    data: Path
    device: str = "cpu"
    workers: int = 1
    minutes: float | None = None
    seeds: tuple[int, ...] | None = None


def carry_out(results: Results, settings: Settings, console: Console) -> bool:
    """Do the runs that are missing, and write each as it ends.

    A run that is cut off leaves its finished epochs beside the result file and goes on from there.

    Returns:
        Whether all is done; False if the time ran out.
    """
    todo = results.missing(settings.seeds)
    if not todo:
        return True
    results.study.check(settings.data)
    deadline = None if settings.minutes is None else time.time() + 60 * settings.minutes
    folder = results.path.parent / ".unfinished"
    complete = True
    # Spawned: a forked process inherits torch's threads half alive, and cannot use CUDA.
    context = multiprocessing.get_context("spawn")
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(settings.workers, mp_context=context, initializer=start_worker) as pool,
        progress_bar(console) as bar,
    ):
        shares: MutableMapping[str, float] = manager.dict()
        line = bar.add_task(results.path.stem, total=len(todo))
        jobs = [
            pool.submit(_one, results.study.name, results.size, run, settings, folder, deadline, shares)
            for run in todo
        ]
        waiting = set(jobs)
        while waiting:
            finished, waiting = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
            for job in finished:
                complete &= _take(job, results, settings.device, bar)
            done = sum(job.done() for job in jobs)
            bar.update(line, completed=done + sum(shares.values()))
    return complete


def _take(job: Future[Run], results: Results, device: str, bar: Progress) -> bool:
    try:
        run = job.result()
    except OutOfTimeError:
        return False
    results.add(run, device)
    which = ", ".join(f"{name} {run[name]}" for name in results.study.key)
    found = ", ".join(f"{name} {value:.4g}" for name, value in list(run["scores"].items())[:3])
    bar.console.print(f"{results.path.stem}: {which}: {found} after {run['seconds']:.0f} s", soft_wrap=True)
    return True


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


def _one(
    study: str,
    size: str,
    run: Run,
    settings: Settings,
    folder: Path,
    deadline: float | None,
    shares: MutableMapping[str, float],
) -> Run:
    """Carry out one run, in a process of its own."""
    from benchmarks.studies import STUDIES

    chosen = STUDIES[study]
    name = identity(run, chosen.key)
    own = folder / f"{study}_{size}-{name}"

    last = 0.0

    def progress(step: int, total: int) -> None:
        nonlocal last
        if deadline is not None and time.time() > deadline:
            raise OutOfTimeError
        if time.time() - last > 1:
            last = time.time()
            shares[name] = step / total

    if deadline is not None and time.time() > deadline:
        raise OutOfTimeError
    began = time.perf_counter()
    job = Job(
        protocol=chosen.protocols[size],
        run=run,
        data=settings.data,
        device=settings.device,
        folder=own,
        progress=progress,
    )
    try:
        record: dict[str, Any] = chosen.carry_out(job)
    finally:
        shares.pop(name, None)
    shutil.rmtree(own, ignore_errors=True)
    return {**run, **record, "seconds": round(time.perf_counter() - began, 1)}


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
