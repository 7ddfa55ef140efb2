"""What a patch costs: the patched model against the bare one, in one process, in turns.

Three networks start from the same weights: the bare model, a second copy of it (the control, which shows
what the noise of the machine alone looks like) and the patched one. Every round times all of them, in an
order that turns and reverses from round to round, so that a machine that slows down favours nobody. A ratio
is taken within a round and the median over the rounds is reported: slow drift cancels, which it does not in
a ratio of two medians.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.benchmark import Timer

from fxgraft.arguments import checked_device
from fxgraft.bench.bare_and_patched import BARE, MEASURES, STEP, Call, Contestant, Loss, line_up
from fxgraft.bench.memory import memory_kind, peak_memory
from fxgraft.bench.overhead_report import OverheadReport, Row, Spread, sides_of
from fxgraft.environment import processor, versions
from fxgraft.errors import ConfigError
from fxgraft.models import build_model
from fxgraft.spec import describe

ALLOCATOR = (
    *("LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_CONF"),
    *("THP_MEM_ALLOC_ENABLE", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
)
"""Environment variables of glibc, of other allocators and of torch that decide how memory is allocated."""


def measure(
    model: str | Callable[[], nn.Module],
    patches: Sequence[tuple[str, Mapping[str, Any]]] = (),
    *,
    batch: int = 16,
    size: int | tuple[int, ...] = 224,
    device: str | torch.device = "cpu",
    what: Sequence[str] = MEASURES,
    rounds: int = 10,
    min_run_time: float = 0.2,
    threads: int | None = None,
    compiled: bool = False,
    progress: Callable[[int, int], None] | None = None,
    rival: Callable[[nn.Module], Loss] | None = None,
) -> OverheadReport:
    """Measure what the patches cost on a classifier.

    Args:
        model: a name for `fxgraft.models.build_model`, or a function that builds the model.
        patches: pairs of method and options, all grafted on one model, in this order. Without any, only the
            bare model and its control are measured.
        batch: images per call.
        size: side of the images, which are random; of clips and volumes (T, H, W).
        device: where to measure.
        what: which of "forward" (evaluation mode, no gradient) and "training step" (`STEP`) to measure.
        rounds: how often each network is timed; multiples of six balance the order exactly.
        min_run_time: seconds for which each timing repeats its call. The call runs at least once, after one
            that is not counted.
        threads: CPU threads of torch; None keeps the present number.
        compiled: run all networks through ``torch.compile(fullgraph=True)``, the bare one as well.
        progress: a function, called with the number of timings done and their total.
        rival: another way to the same, as the network "by hand": a function that changes a copy of the model and
            returns its loss of images and labels. Not with ``compiled``.

    Raises:
        ConfigError: an argument out of range, a device that is not there, or a model that isn't a classifier.
    """
    device = _check(batch, size, device, what, rounds, min_run_time, threads)
    if rival is not None and compiled:
        raise ConfigError(
            "A rival runs as it is, beside networks that are not compiled.\nPass one of the two."
        )
    threads = threads or torch.get_num_threads()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        bare = (
            build_model(model, input_size=size if isinstance(size, int) else None)
            if isinstance(model, str)
            else model()
        )
        contestants = line_up(bare.to(device), patches, batch, size, device, compiled, rival)
        rows: list[Row] = []
        with _frozen_garbage():
            for index, measured in enumerate(what):
                calls = {contestant.name: contestant.call(measured) for contestant in contestants}
                memory = {one.name: _warm_up(one, measured, device) for one in contestants}
                done = index * rounds * len(calls)
                total = len(what) * rounds * len(calls)
                seconds = _interleave(calls, rounds, min_run_time, threads, progress, done, total)
                rows += _rows(measured, seconds, memory)
    return OverheadReport(
        model=model if isinstance(model, str) else type(bare).__name__,
        patches=tuple(describe(method, options) for method, options in patches),
        batch=batch,
        size=size,
        device=str(device),
        processor=processor(device),
        threads=threads,
        compiled=compiled,
        rounds=rounds,
        min_run_time=min_run_time,
        training_step=STEP,
        memory_kind=memory_kind(device),
        versions=versions(),
        rows=tuple(rows),
        patch_seconds=contestants[-1].patch_seconds if patches else None,
        allocator={name: os.environ[name] for name in ALLOCATOR if os.environ.get(name)},
    )


def turn_order(names: Sequence[str], turn: int) -> list[str]:
    """Return the order of one round: rotated by one every second round, reversed in between."""
    shift = (turn // 2) % len(names)
    order = [*names[shift:], *names[:shift]]
    return order[::-1] if turn % 2 else order


def _warm_up(contestant: Contestant, what: str, device: torch.device) -> int | None:
    # The first calls allocate what stays (optimiser state, workspaces); the peak is read after them. Without
    # the gradients they leave, which the call would free and allocate again under the old peak.
    call = contestant.call(what)
    try:
        call()
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ConfigError(
            f"A training step leaves a BatchNorm with one value per channel, which has no variance: {error}\n"
            "Pass a larger batch, as batch= or --batch, or larger images."
        ) from error
    call()
    contestant.model.zero_grad(set_to_none=True)
    return peak_memory(call, device)


def _interleave(
    calls: Mapping[str, Call],
    rounds: int,
    min_run_time: float,
    threads: int,
    progress: Callable[[int, int], None] | None,
    done: int,
    total: int,
) -> dict[str, list[float]]:
    # The timer synchronises the device before it reads the clock.
    timers = {
        name: Timer("call()", globals={"call": call}, num_threads=threads) for name, call in calls.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in turn_order(list(calls), turn):
            seconds[name].append(timers[name].blocked_autorange(min_run_time=min_run_time).median)
            done += 1
            if progress is not None:
                progress(done, total)
    return seconds


def _rows(
    measured: str, seconds: Mapping[str, Sequence[float]], memory: Mapping[str, int | None]
) -> Iterator[Row]:
    for name, own in seconds.items():
        ratios = [mine / bare for mine, bare in zip(own, seconds[BARE], strict=True)]
        yield Row(
            what=measured,
            network=name,
            seconds=Spread.of(own),
            ratio=None if name == BARE else Spread.of(ratios),
            peak_bytes=memory[name],
        )


@contextlib.contextmanager
def _frozen_garbage() -> Iterator[None]:
    """Keep the collector from walking three models in the middle of a timing."""
    gc.collect()
    if gc.get_freeze_count():
        # Frozen by the caller: thawing at the end would undo that.
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _check(
    batch: int,
    size: int | tuple[int, ...],
    device: str | torch.device,
    what: Sequence[str],
    rounds: int,
    min_run_time: float,
    threads: int | None,
) -> torch.device:
    smallest = min(sides_of(size), default=0)
    for name, value in {"batch": batch, "size": smallest, "rounds": rounds, "threads": threads}.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}.")
    if not 0 <= min_run_time < math.inf:
        raise ConfigError(f"min_run_time is a number of seconds, 0 or more; got {min_run_time}.")
    if isinstance(what, str) or not what or not set(what) <= set(MEASURES):
        raise ConfigError(f"what must be one or more of {', '.join(map(repr, MEASURES))}, got {what!r}.")
    return checked_device(device)
