"""The networks that an overhead measurement compares, and the calls that it times."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fxgraft
from fxgraft.bench.overhead_report import shown_sides, sides_of
from fxgraft.errors import ConfigError

FORWARD = "forward"
TRAINING_STEP = "training step"
MEASURES = (FORWARD, TRAINING_STEP)
BARE, CONTROL, PATCHED, RIVAL = "bare", "bare again", "patched", "by hand"
STEP = "zero_grad, forward with labels, loss, backward, SGD step with momentum (learning rate 0)"

Call = Callable[[], object]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Contestant:
    """One of the networks that are compared, with the calls that are timed.

    Attributes:
        name: "bare", "bare again", "patched" or "by hand".
        forward: evaluates a batch.
        step: makes a training step.
        model: the network.
        patch_seconds: what putting the patches on took.
    """

    name: str
    forward: Call
    step: Call
    model: nn.Module
    patch_seconds: float = 0.0

    def call(self, what: str) -> Call:
        """Put the network into the mode that `what` needs and return what is to be timed."""
        self.model.train(what == TRAINING_STEP)
        return self.step if what == TRAINING_STEP else self.forward


def line_up(
    bare: nn.Module,
    patches: Sequence[tuple[str, Mapping[str, Any]]],
    batch: int,
    size: int | tuple[int, ...],
    device: torch.device,
    compiled: bool,
    rival: Callable[[nn.Module], Loss] | None = None,
) -> list[Contestant]:
    """Return the bare model, its control and, where there are any, the rival and the patched model.

    Args:
        bare: the model; it is patched itself, after it was copied for the others.
        patches: pairs of method and options.
        batch: images per call.
        size: side of the images; of clips and volumes (T, H, W).
        device: where the model is.
        compiled: run all of them through ``torch.compile(fullgraph=True)``.
        rival: puts the method on a model in another way, and returns its loss of images and labels.

    Raises:
        ConfigError: the model isn't a classifier, or does not take such images.
    """
    images = torch.randn(batch, 3, *sides_of(size), device=device)
    try:
        with torch.no_grad():
            logits = bare.eval()(images)
    except (AssertionError, RuntimeError, ValueError) as error:
        what = "images" if len(sides_of(size)) < 3 else "clips"
        raise ConfigError(
            f"{type(bare).__name__} does not run on {shown_sides(size)} {what}: {error}\n"
            f"Pass the size of the {what} that it takes, as size= or --size."
        ) from error
    if not (isinstance(logits, torch.Tensor) and logits.ndim == 2 and len(logits) == batch):
        raise ConfigError(
            f"The overhead is measured on classifiers: {type(bare).__name__} should return logits of shape "
            f"({batch}, classes), it returned "
            + (
                f"a tensor of shape {tuple(logits.shape)}."
                if isinstance(logits, torch.Tensor)
                else f"{type(logits)}."
            )
        )
    labels = torch.randint(logits.shape[1], (batch,), device=device)

    def entered(
        name: str, model: nn.Module, loss: Callable[[Any], torch.Tensor], seconds: float = 0.0
    ) -> Contestant:
        run = torch.compile(model, fullgraph=True) if compiled else model
        # At a learning rate of 0 every kernel of the update runs and the weights stay: on random labels they
        # would otherwise drift apart between the networks, and into values whose arithmetic takes another time.
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)

        def forward() -> None:
            with torch.no_grad():
                run(images)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            loss(run).backward()
            optimizer.step()

        return Contestant(name, forward, step, model, seconds)

    # Copied before anything is patched: the same weights, and no trace of the patch in the control.
    contestants = [
        entered(name, copy.deepcopy(bare), lambda run: F.cross_entropy(run(images), labels))
        for name in (BARE, CONTROL)
    ]
    if rival is not None:
        other = copy.deepcopy(bare)
        rival_loss = rival(other)
        contestants.append(entered(RIVAL, other, lambda run: rival_loss(images, labels)))
    if patches:
        began = time.perf_counter()
        for method, options in patches:
            fxgraft.patch(bare, method, **{"input_size": tuple(images.shape[1:]), **options})
        seconds = time.perf_counter() - began

        def patched_loss(run: Any) -> torch.Tensor:
            return fxgraft.loss(bare, run(images, target=labels), labels)

        contestants.append(entered(PATCHED, bare, patched_loss, seconds))
    return contestants
