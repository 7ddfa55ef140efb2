"""The peak memory of one call, above what was held before it."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

_CPU = 0  # the profiler's number for tensors that live in main memory


def memory_kind(device: torch.device) -> str:
    """Say what `peak_memory` counts on this device."""
    if device.type == "cuda":
        return "peak of torch.cuda.max_memory_allocated above what was allocated before the call"
    if device.type == "cpu":
        return "peak of torch's CPU allocations above those before the call (no library workspaces)"
    return "not measured on this device"


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Run the call once and return its peak memory in bytes, or None where there is no way to know.

    What the call frees that was there before (the gradients of an earlier step) hides part of its peak:
    free it first.
    """
    gc.collect()
    if device.type == "cuda":
        return _cuda_peak(call, device)
    if device.type == "cpu":
        return _cpu_peak(call)
    call()
    return None


def _cuda_peak(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(call: Callable[[], object]) -> int | None:
    # Counting what autograd saves would be lighter, but its hooks refuse to run beside torch.func.grad, which
    # patches use. The profiler sees every allocation, whoever asks for it.
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return peak_of_events(events)


def peak_of_events(events: list[dict]) -> int | None:
    """Return the highest running sum of the memory events of a profiler trace; None if there are none."""
    changes = [
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"].get("Device Type") == _CPU
    ]
    if not changes:
        return None
    held = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak
