"""One small training loop, shared by the demo and by the benchmarks that learn something.

It trains bare and patched models alike, so that a comparison of the two differs in the patch alone:
batch order and augmentation come from a generator of their own, drawn on the CPU before each epoch,
and are the same whatever the model does with torch's global generator.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay  # pyright: ignore[reportPrivateImportUsage]
from torch import nn

import fxgraft
from benchmarks.loops.augment import Augment
from benchmarks.loops.domains import ImagesAndLabels, checked_images
from benchmarks.loops.evaluation import autocast, evaluate
from benchmarks.loops.images import normalised, to_floats
from benchmarks.loops.resuming import keep, resume
from benchmarks.loops.timing import Clock
from fxgraft.errors import ConfigError


@dataclass
class History:
    """What a training run leaves behind.

    Attributes:
        step_seconds: duration of every step, in order; on CUDA between events, without a host wait.
        epoch_loss: mean loss of each epoch.
        validation: accuracy on the validation part after each epoch; empty without one.
        selected_epoch: the epoch, from 0, whose weights the model carries at the end.
    """

    step_seconds: list[float] = field(default_factory=list)
    epoch_loss: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    selected_epoch: int = -1

    @property
    def median_step(self) -> float:
        """Median seconds per step."""
        return statistics.median(self.step_seconds)


def train(
    model: nn.Module,
    train_set: ImagesAndLabels,
    *,
    epochs: int,
    batch_size: int = 64,
    repetitions: int = 1,
    lr: float = 0.01,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    decay_all: bool = False,
    warmup: float = 0.05,
    schedule: Literal["cosine", "step"] = "cosine",
    seed: int = 0,
    device: str | torch.device = "cpu",
    augment: Augment | None = None,
    amp: bool = False,
    channels_last: bool = False,
    validation: ImagesAndLabels | None = None,
    select: Literal["last", "best"] = "last",
    progress: Callable[[int, int], None] | None = None,
    checkpoint: Path | None = None,
) -> History:
    """Train a classifier in place, bare or patched.

    A patched model is called as ``model(x, target=y)`` with `fxgraft.loss`, and hears its progress
    through `fxgraft.set_progress`; a bare one is called plainly, with cross-entropy. Batches of the
    same seed are the same, image for image, for every model. torch's global generators are seeded for
    the run and put back as they were; they serve the model alone (dropout, the draws of a patch).

    The rate rises linearly over the first `warmup` of the steps, then falls to 0 on a half cosine or once to a
    tenth. A last batch that is not full is dropped (unless it is the only one), since a batch of one image stops
    BatchNorm.

    Args:
        model: moved to `device`.
        train_set: images uint8 (N, 3, S, S) and labels int64 (N,); moved to `device` as a whole.
        epochs: passes over the images.
        batch_size: images per step; no more than N are used.
        repetitions: how often each image is in its batch, augmented anew each time; an epoch has as many times the
            steps (batch repetition of MIMO and MixMo).
        lr: highest learning rate.
        optimizer: SGD with Nesterov momentum, or AdamW.
        momentum: of SGD.
        weight_decay: of either.
        decay_all: decay biases and norms as well.
        warmup: share of all steps, in [0, 1).
        schedule: "cosine", or "step": a tenth of the rate from 80 % of the steps on.
        seed: of the batch order, the augmentation and torch's global generators.
        device: where to train.
        augment: what to do to each batch; None leaves the images as they are.
        amp: run the forward pass under bfloat16 autocast.
        channels_last: train in that memory format.
        validation: images and labels kept out of training, from the same domains; scored after each epoch.
        select: "last" keeps the weights of the last epoch (the default: nothing is chosen by looking);
            "best" goes back to the epoch with the best validation accuracy, the earliest on a tie.
        progress: called after each step with the steps done and the steps in all.
        checkpoint: a file to which every finished epoch is written, whole or not at all, and from which a run
            with the same arguments goes on, to the same weights as one that was never interrupted. The caller
            deletes it. None keeps nothing.

    Returns:
        Step times, losses and validation accuracies.

    Raises:
        ConfigError: if an argument is out of range, "best" comes without validation, the labels do not
            match the images, or the loss stops being finite.
    """
    images, labels = checked_images(train_set)
    if epochs < 1 or batch_size < 1:
        raise ConfigError(f"epochs and batch_size must be at least 1, got {epochs} and {batch_size}.")
    if repetitions < 1 or batch_size % repetitions:
        raise ConfigError(f"repetitions must divide batch_size {batch_size}, got {repetitions}.")
    if lr <= 0 or not 0 <= warmup < 1:
        raise ConfigError(f"lr must be above 0 and warmup in [0, 1), got {lr} and {warmup}.")
    if schedule not in ("cosine", "step"):
        raise ConfigError(f'schedule must be "cosine" or "step", got {schedule!r}.')
    if select not in ("last", "best"):
        raise ConfigError(f'select must be "last" or "best", got {select!r}.')
    if select == "best" and validation is None:
        raise ConfigError('select="best" needs a validation part: pass validation=(images, labels).')
    device = torch.device(device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model.to(device).to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    images, labels = images.to(device), labels.to(device)
    shown = len(labels) * repetitions
    batch_size = min(batch_size, shown)
    steps = shown // batch_size
    groups = model.parameters() if decay_all else param_groups_weight_decay(model, weight_decay)
    chosen = _optimizer(groups, optimizer, lr, momentum, weight_decay)
    step = _Step(model, chosen, epochs * steps, warmup, schedule, amp)
    generator = torch.Generator().manual_seed(seed)
    augment = augment or Augment()
    history, clock, best = History(), Clock(device), None
    with _seeded(seed, device):
        if checkpoint is not None and checkpoint.exists():
            extra = resume(checkpoint, step.stateful(), generator, device)
            history, best, step.done = History(**extra["history"]), extra["best"], extra["done"]
        for epoch in range(len(history.epoch_loss), epochs):
            order = torch.randperm(len(labels), generator=generator).repeat_interleave(repetitions).to(device)
            drawn = {key: value.to(device) for key, value in augment.draw(shown, generator).items()}
            model.train()
            summed = torch.zeros((), device=device)
            for index in range(steps):
                clock.start()
                part = slice(index * batch_size, (index + 1) * batch_size)
                batch = augment.apply(to_floats(images[order[part]]), {k: v[part] for k, v in drawn.items()})
                summed += step(normalised(batch).contiguous(memory_format=layout), labels[order[part]])
                clock.stop()
                if progress is not None:
                    progress(step.done, step.total)
            history.step_seconds += clock.read()
            history.epoch_loss.append(summed.item() / steps)
            if not math.isfinite(history.epoch_loss[-1]):
                raise ConfigError(
                    f"The loss is not finite in epoch {epoch + 1} of {epochs}.\nTry a lower lr (now {lr})."
                )
            if validation is not None:
                history.validation.append(evaluate(model, *validation, amp=amp))
                if select == "best" and (best is None or history.validation[-1] > best[0]):
                    best = history.validation[-1], epoch, copy.deepcopy(model.state_dict())
            if checkpoint is not None:
                extra = {"history": asdict(history), "best": best, "done": step.done}
                keep(checkpoint, step.stateful(), generator, device, extra)
    history.selected_epoch = epochs - 1
    if best is not None:
        history.selected_epoch = best[1]
        model.load_state_dict(best[2])
    return history


class _Step:
    """One update of the weights, bare or patched, under a rate that warms up and then falls."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total: int,
        warmup: float,
        schedule: str,
        amp: bool,
    ) -> None:
        self.model, self.optimizer, self.amp = model, optimizer, amp
        self.done, self.total = 0, total
        self.patched = bool(fxgraft.grafts(model))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: _rate(step, total, warmup, schedule)
        )

    def stateful(self) -> dict[str, Any]:
        """Return the parts that a checkpoint holds."""
        return {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}

    def __call__(self, batch: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Train on images (B, 3, S, S) and labels (B,); return the loss, detached."""
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(batch.device, self.amp):
            if self.patched:
                fxgraft.set_progress(self.model, self.done / self.total)
                output = self.model(batch, target=target)
                loss = fxgraft.loss(self.model, output, target, criterion=F.cross_entropy)
            else:
                loss = F.cross_entropy(self.model(batch), target)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.done += 1
        return loss.detach()


def _optimizer(
    groups: Any, name: str, lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    # Groups that say nothing of their own take the weight decay given here.
    if name == "sgd":
        return torch.optim.SGD(
            groups, lr=lr, momentum=momentum, nesterov=momentum > 0, weight_decay=weight_decay
        )
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)
    raise ConfigError(f'optimizer must be "sgd" or "adamw", got {name!r}.')


def _rate(step: int, total: int, warmup: float, schedule: str) -> float:
    rising = warmup * total
    if step < rising:
        return (step + 1) / (math.ceil(rising) + 1)
    if schedule == "step":
        return 1.0 if step < 0.8 * total else 0.1
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


@contextmanager
def _seeded(seed: int, device: torch.device):
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
