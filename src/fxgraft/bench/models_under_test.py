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
from fxgraft.bench.report import shown_sides, sides_of
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
            f"{type(bare).__name__} does not run on {shown_sides(size)} {what}: {error}"
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
    # Copied before anything is patched: the same weights, and no trace of the patch in the control.
    contestants = [
        _bare(BARE, copy.deepcopy(bare), images, labels, compiled),
        _bare(CONTROL, copy.deepcopy(bare), images, labels, compiled),
    ]
    if rival is not None:
        contestants.append(_rival(copy.deepcopy(bare), rival, images, labels))
    if patches:
        contestants.append(_patched(bare, patches, images, labels, compiled))
    return contestants


def _bare(
    name: str, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, compiled: bool
) -> Contestant:
    run = _runner(model, compiled)

    def loss() -> torch.Tensor:
        return F.cross_entropy(run(images), labels)

    return Contestant(name, _forward(run, images), _training_step(model, loss), model)


def _rival(
    model: nn.Module, rival: Callable[[nn.Module], Loss], images: torch.Tensor, labels: torch.Tensor
) -> Contestant:
    # Not compiled: what its loss does around the model is its own matter.
    loss = rival(model)
    return Contestant(
        RIVAL, _forward(model, images), _training_step(model, lambda: loss(images, labels)), model
    )


def _runner(model: nn.Module, compiled: bool) -> Callable[..., Any]:
    return torch.compile(model, fullgraph=True) if compiled else model


def _patched(
    model: nn.Module,
    patches: Sequence[tuple[str, Mapping[str, Any]]],
    images: torch.Tensor,
    labels: torch.Tensor,
    compiled: bool,
) -> Contestant:
    began = time.perf_counter()
    for method, options in patches:
        fxgraft.patch(model, method, **{"input_size": tuple(images.shape[1:]), **options})
    seconds = time.perf_counter() - began

    run = _runner(model, compiled)

    def loss() -> torch.Tensor:
        return fxgraft.loss(model, run(images, target=labels), labels)

    return Contestant(PATCHED, _forward(run, images), _training_step(model, loss), model, seconds)


def _forward(run: Callable[..., Any], images: torch.Tensor) -> Call:
    def forward() -> None:
        with torch.no_grad():
            run(images)

    return forward


def _training_step(model: nn.Module, loss: Callable[[], torch.Tensor]) -> Call:
    # At a learning rate of 0 every kernel of the update runs and the weights stay: on random labels they
    # would otherwise drift apart between the networks, and into values whose arithmetic takes another time.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return step
