"""The duration of training steps, measured without making a GPU wait for the host."""

from __future__ import annotations

import time
from typing import Any

import torch


class Clock:
    """Times steps; on CUDA with events that are read once an epoch, so that no step waits for the host."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[Any, Any]] = []
        self.begun: Any = None

    def start(self) -> None:
        """Begin a step."""
        self.begun = self._now()

    def stop(self) -> None:
        """End it."""
        self.marks.append((self.begun, self._now()))

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> list[float]:
        """Return the seconds of the steps since the last reading."""
        if self.cuda:
            torch.cuda.synchronize()
            seconds = [begun.elapsed_time(ended) / 1e3 for begun, ended in self.marks]
        else:
            seconds = [ended - begun for begun, ended in self.marks]
        self.marks = []
        return seconds
