"""Lightning: a callback that hands the labels and the progress of a training to the patched models in a module.

Needs ``pip install lightning``, and is loaded by its name alone: ``from fxgraft.integrations.lightning import Grafts``.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any

from fxgraft.api import set_progress
from fxgraft.errors import FxgraftWarning, UnknownGraftError
from fxgraft.graph.grafting.lookup import named_grafts, patched_parts
from fxgraft.graph.runtime.labels import Entry
from fxgraft.graph.runtime.published import batch_targets

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import Timer
except ImportError as error:
    raise ImportError(
        "fxgraft.integrations.lightning is a callback for Lightning, which is not installed.\n"
        "Install it with: pip install lightning."
    ) from error


_HOW = "Say where they are, Grafts(labels=...), or pass Grafts(labels=None) and call self.model(x, target=y)."


class Grafts(Callback):
    """Gives every training step its labels, and the schedules of the grafts the share of training done.

    The step may then call ``self.model(x)``; for the loss it calls ``fxgraft.loss`` or ``fxgraft.extra_loss``
    itself. Validation and test steps are left alone. Progress is set before every training batch, as the share of
    epochs, steps or time that is done, whichever ends the training first: the module does not call
    ``fxgraft.set_progress``. A Trainer with ``max_epochs=-1`` alone has no end, and schedules stand at their start.

    Args:
        labels: where in a batch the labels are, by default at 1: a position, a key, an attribute, or a path of these,
            as ``("labelled", 1)`` for the batches of a ``CombinedLoader``; None where the step hands them over itself,
            as ``self.model(x, target=y)``. They are those of the first input that a patch reads them for, as often
            as it passes; other inputs of the step need labels of their own.

    Raises:
        UnknownGraftError: (when the training starts) nothing in the module is patched.
        TargetError: (at a training step) the batch has no such entry.

    Warns:
        FxgraftWarning: (when the training starts) options of grafts follow the progress of a training without an end.
    """

    def __init__(self, labels: Entry | None = 1) -> None:
        self.labels = labels
        self._published = ExitStack()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that there is something to tell."""
        if not patched_parts(pl_module):
            raise UnknownGraftError(
                f"No part of this {type(pl_module).__name__} is patched.\n"
                "The callback would have nobody to tell of labels and progress.\n"
                "Call fxgraft.patch(self.model, ...) in the module's __init__, or leave the callback out."
            )
        named = named_grafts(pl_module).items()
        waiting = [f"{option} of {name!r}" for name, graft in named for option in graft.patch.schedules()]
        if waiting and not _ends(trainer):
            warnings.warn(
                f"{', '.join(waiting)}: schedules follow the progress of the training, and this Trainer has no end to "
                "measure it by (max_epochs=-1, no max_steps, no max_time).\n"
                "They stand at their start for all of it: what begins later never begins, what falls never falls.\n"
                "Pass Trainer(max_epochs=...), max_steps=... or max_time=..., or take the schedule off the patch.",
                FxgraftWarning,
                stacklevel=2,
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the progress, and publish the labels of the batch until its step is over."""
        set_progress(pl_module, progress(trainer, batch_idx))
        self._published.close()  # a step that was skipped has no end
        if self.labels is None:
            return
        self._published.enter_context(batch_targets(batch, self.labels, _HOW))

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Take the labels back."""
        self._published.close()

    def on_train_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """Take the labels back where the last step was skipped."""
        self._published.close()

    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        """Take the labels back where the step failed."""
        self._published.close()


def progress(trainer: Trainer, batch: int) -> float:
    """Return the share of a training that is done, in [0, 1], by epochs, steps or time, whichever ends it first.

    Args:
        trainer: that trains. One without an end (``max_epochs=-1`` alone) stays at 0.
        batch: index of the batch in its epoch.
    """
    done = 0.0
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        # An endless loader, whose length is inf, counts by whole epochs.
        done = (trainer.current_epoch + batch / max(trainer.num_training_batches, 1)) / trainer.max_epochs
    if trainer.max_steps > 0:
        done = max(done, trainer.global_step / trainer.max_steps)
    for timer in _timers(trainer):
        left, elapsed = timer.time_remaining() or 0.0, timer.time_elapsed()
        done = max(done, elapsed / (elapsed + left) if elapsed + left > 0 else 0.0)
    return min(done, 1.0)


def _ends(trainer: Trainer) -> bool:
    """Say whether something says how long a training takes."""
    return (trainer.max_epochs or 0) > 0 or trainer.max_steps > 0 or bool(_timers(trainer))


def _timers(trainer: Trainer) -> list[Timer]:
    """List the callbacks that end the training after a time, as ``max_time`` adds one."""
    timers = [each for each in trainer.callbacks if isinstance(each, Timer)]  # type: ignore[attr-defined]
    return [each for each in timers if each.time_remaining() is not None]
