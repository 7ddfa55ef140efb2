"""Training that leaves a graft's share of the loss out, without a word from anybody."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxgraft.errors import FxgraftWarning
from fxgraft.graph.tracing.observe import tensors

STEPS = 2
"""So many backward passes of losses of somebody else are a training; one may be somebody looking at gradients."""


class LossWatch:
    """Notices that a model is trained and the loss of its grafts is never asked for, and warns of it once.

    Until then a hook on what a training pass returns notes that gradients came back to it, which costs next to
    nothing and waits for no accelerator. Passes alone say little: one loss may be of several.

    Attributes:
        asked: whether the loss was ever asked for, in any thread, or the warning was given.
    """

    def __init__(self) -> None:
        self.asked = False
        self._passes = 0
        self._warned = False
        self._trained: set[int] = set()

    def note(self, model: nn.Module, grafts: Sequence[str], out: Any) -> None:
        """Take note of a training pass.

        Args:
            model: that made it.
            grafts: names of those with a share in the loss.
            out: what it returned.

        Warns:
            FxgraftWarning: gradients came back to two passes before this one, and nobody asked for the loss.
        """
        if self.asked:
            return
        if len(self._trained) < STEPS:
            self._passes += 1
            for each in tensors(out):
                if each.requires_grad:
                    each.register_hook(partial(self._seen, self._passes))
            return
        self.asked = True
        warnings.warn(
            f"{', '.join(map(repr, grafts))} on this {model._get_name()} has a share in the loss, and the model is "
            "trained without it: fxgraft.loss, losses and extra_loss were never called.\n"
            "Take fxgraft.loss(model, out, y) for the loss, or add fxgraft.extra_loss(model, out, y) to your own.",
            FxgraftWarning,
            stacklevel=2,
        )

    def warn_of_no_gradients(self, model: nn.Module) -> None:
        """Warn, once, that the loss of a model in training mode was asked for where no gradients are recorded."""
        if self._warned or torch.compiler.is_compiling():
            return
        self._warned = True
        warnings.warn(
            f"The loss of this {model._get_name()} was asked for in training mode with gradients switched off "
            "(torch.no_grad or inference_mode): its patches act, and nothing is learned.\n"
            "Leave that block to train; call model.eval() to evaluate.",
            FxgraftWarning,
            stacklevel=4,
        )

    def _seen(self, number: int, _gradient: Tensor) -> None:
        self._trained.add(number)
