"""Lightning: a callback that hands the labels and the progress of a training to the patched models in a module.

Needs ``pip install lightning``, and is loaded by its name alone: ``from fxgraft.integrations.lightning import Grafts``.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any

from fxgraft.api import set_progress
from fxgraft.errors import ConfigError, FxgraftWarning, UnknownGraftError
from fxgraft.graph.grafting.lookup import named_grafts, patched_parts
from fxgraft.graph.runtime.labels import Entry
from fxgraft.graph.runtime.published_labels import batch_targets
from fxgraft.graph.tracing.observe import tensors
from fxgraft.inspection import diagnostics

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
        log: log `fxgraft.diagnostics` through the Trainer's loggers, every ``log_every_n_steps`` steps.
        pictures: log what the grafts do with the first images of a batch, every so many steps, through those loggers
            that take pictures (TensorBoard, and any with ``log_image``, such as Weights & Biases); 0 for never. Needs
            matplotlib, and makes a copy of the model on the CPU each time.

    Raises:
        UnknownGraftError: (when the training starts) nothing in the module is patched.
        TargetError: (at a training step) the batch has no such entry.

    Warns:
        FxgraftWarning: (when the training starts) options of grafts follow the progress of a training without an end,
            or there is no logger for what is to be logged.
    """

    def __init__(self, labels: Entry | None = 1, *, log: bool = False, pictures: int = 0) -> None:
        if pictures < 0:
            raise ConfigError(f"Grafts: pictures is a number of steps, or 0 for none; got {pictures!r}.")
        # Not as `log`: the Trainer gives callbacks a method of that name.
        self.labels, self.logs, self.pictures = labels, log, pictures
        self._logged = 0
        self._published = ExitStack()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise unless the module has patched parts that the callback can serve."""
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
        missing = [] if trainer.loggers or not self.logs else ["diagnostics"]
        if self.pictures and not any(map(_takes_pictures, trainer.loggers)):
            missing.append("pictures")
        if missing:
            warnings.warn(
                f"No {' and '.join(missing)} will be logged: this Trainer has no logger for it.\n"
                "Pass Trainer(logger=TensorBoardLogger(...)) or another one.",
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

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the labels back, and log what is due."""
        self._published.close()
        step, before = trainer.global_step, self._logged
        self._logged = step
        if step == before or not trainer.is_global_zero:  # gradients of this step are still accumulated
            return
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.logs and step % every == 0 and (scalars := diagnostics(pl_module)):
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step)
        if self.pictures and step % self.pictures == 0:
            _log_pictures(trainer, pl_module, batch, step)

    def on_train_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """Take the labels back where the last step was skipped."""
        self._published.close()

    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        """Take the labels back where the step failed."""
        self._published.close()


def _takes_pictures(logger: Any) -> bool:
    return hasattr(logger, "log_image") or hasattr(logger.experiment, "add_image")


def _log_pictures(trainer: Trainer, pl_module: LightningModule, batch: Any, step: int) -> None:
    """Hand pictures of the first images of a batch to the loggers that take them."""
    from fxgraft.viz.drawing import pixels
    from fxgraft.viz.method_pictures import pictures_of_grafts

    images = next(
        (tensor for tensor in tensors(batch) if tensor.ndim in (4, 5) and tensor.is_floating_point()), None
    )
    loggers: list[Any] = [logger for logger in trainer.loggers if _takes_pictures(logger)]
    if images is None or not loggers:
        return
    for name, picture in pictures_of_grafts(pl_module, images).items():
        drawn = pixels(picture)
        for logger in loggers:
            if hasattr(logger, "log_image"):
                logger.log_image(key=f"grafts/{name}", images=[drawn], step=step, caption=[picture.caption])
            else:
                logger.experiment.add_image(f"grafts/{name}", drawn, step, dataformats="HWC")


def progress(trainer: Trainer, batch: int) -> float:
    """Return the share of a training that is done, in [0, 1], by epochs, steps or time, whichever ends it first.

    Args:
        trainer: the trainer. One without an end (``max_epochs=-1`` alone) stays at 0.
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
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    return [timer for timer in timers if timer.time_remaining() is not None]
