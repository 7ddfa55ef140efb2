"""Checks whose answers are on a device, where waiting for them would stop the training."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from fxgraft._torch import FakeTensor
from fxgraft.errors import FxgraftError
from fxgraft.graph.runtime.recorders import recorded, values_of


class DeferredChecks:
    """Checks of a model's passes. Nobody waits for the answer of an accelerator: it is read in a later step."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Tensor, Any, FxgraftError]] = deque(maxlen=64)

    def check(self, wrong: Tensor | bool, error: FxgraftError) -> None:
        """Raise if something is wrong: at once on a CPU, else in the step after the device has found it out.

        Args:
            wrong: () bool.
            error: what to raise.
        """
        if recorded():
            return
        if isinstance(wrong, Tensor):
            wrong = values_of(wrong).any()
        if isinstance(wrong, bool) or wrong.device.type == "cpu":
            if not isinstance(wrong, FakeTensor) and wrong:
                raise error
            return
        if isinstance(wrong, FakeTensor) or wrong.is_meta or _capturing():
            return
        answer = torch.empty((), dtype=torch.bool, pin_memory=True)
        answer.copy_(wrong, non_blocking=True)
        done = torch.Event(wrong.device.type)
        done.record()
        self._waiting.append((answer, done, error))

    def answers(self) -> None:
        """Raise the first error that a device has found by now."""
        while self._waiting and self._waiting[0][1].query():
            answer, _, error = self._waiting.popleft()
            if answer:
                self._waiting.clear()
                raise error


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
