"""Warns of schedules that a training loop leaves without progress, or with a progress that is not the training's."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from torch import nn

from fxgraft.errors import FxgraftWarning
from fxgraft.graph.runtime.living import note_change

PASSES = 20
"""So many training passes without a word on progress, and nobody is going to say one."""

STILL = 5000
"""So many training passes at one progress, or"""

ROUNDS = 5
"""so many evaluations between them, and nobody is going to set another one."""

OVER = 2
"""So many training passes after progress has come to 1, and the training is not over."""


class ProgressWatch:
    """Warns of schedules that get no progress, or none any more, and of those that end before the training does.

    Attributes:
        fed: whether progress was ever set.
    """

    def __init__(self) -> None:
        self.fed = False
        self._progress = 0.0
        self._passes = 0
        self._below = False
        self._over = 0
        self._since = self._rounds = self._looks = 0
        self._warned: set[str] = set()

    def told(self, fraction: float) -> None:
        """Take note of the progress that is set."""
        if fraction != self._progress or not self.fed:
            self._since = self._rounds = 0
        self.fed, self._progress = True, fraction

    def evaluated(self) -> None:
        """Take note of an evaluation pass. A single one between two of training may be part of a step."""
        self._looks += 1

    def note(self, model: nn.Module, schedules: Mapping[str, Sequence[str]]) -> None:
        """Take note of a training pass.

        Args:
            model: the model that makes it.
            schedules: options that follow the progress, by graft.

        Warns:
            FxgraftWarning: nobody has set the progress for `PASSES` passes; it stands still below 1 for `STILL`, or for
                `ROUNDS` evaluations of more than one pass; or it was at 1 for `OVER`, and came there from below.
        """
        if not schedules:
            return
        self._passes += 1
        if not self.fed:
            if self._passes > PASSES:
                self._warn(model, schedules, "unfed")
            else:
                note_change()  # the model may have been put into another one in a way that no hook sees
            return
        self._since += 1
        self._rounds += self._looks > 1
        self._looks = 0
        if self._progress < 1 and (self._since > STILL or self._rounds >= ROUNDS):
            self._warn(model, schedules, "still")
        self._below = self._below or self._progress < 1
        self._over = self._over + 1 if self._progress >= 1 else 0
        if self._below and self._over > OVER:
            self._warn(model, schedules, "over")

    def _warn(self, model: nn.Module, schedules: Mapping[str, Sequence[str]], what: str) -> None:
        if what in self._warned:
            return
        self._warned.add(what)
        options = ", ".join(f"{option} of {name!r}" for name, own in schedules.items() for option in own)
        follows = (
            f"{options} follow{'s' * (sum(map(len, schedules.values())) == 1)} the progress of the training"
        )
        texts = {
            "unfed": f"{follows}, and nobody has said in {PASSES} training passes of this {model._get_name()} how far "
            "it is: schedules stand still.\n"
            "Call fxgraft.set_progress(model, epoch / epochs) at the start of every epoch, counted from 0, or with "
            "step / steps at every step.",
            "still": f"{follows}, which stands at {self._progress:g} for {self._since} training passes of this "
            f"{model._get_name()}, with {self._rounds} evaluations between them: schedules stand still.\n"
            "Call fxgraft.set_progress again, with epoch / epochs (and not epoch // epochs) at the start of every "
            "epoch, counted from 0, or, where an epoch is as long as that, with step / steps at every step.",
            "over": f"{follows}, which is said to be over (1.0), and this {model._get_name()} is trained on: schedules "
            "came to their end too early.\n"
            "Progress is the share that is done: fxgraft.set_progress(model, epoch / epochs), epochs counted from 0, "
            "and not epoch / (epochs - 1) or (epoch + 1) / epochs.",
        }
        warnings.warn(texts[what], FxgraftWarning, stacklevel=2)
