"""Warns of a training loop that leaves out the share which grafts have in the loss."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxgraft.errors import FxgraftWarning
from fxgraft.graph.runtime.living import note_change
from fxgraft.graph.runtime.pass_records import Outputs
from fxgraft.graph.tracing.observe import tensors

STEPS = 2
"""So many backward passes of losses of somebody else are a training; one may be somebody looking at gradients."""

FIRST = 20
"""So many of the first passes have the model searched again: it may be inside another one by now."""


class LossWatch:
    """Warns once when a model is trained and the loss of its grafts is never asked for.

    Until it has warned, a hook on the output of training passes notes that gradients came back. That costs next to
    nothing and waits for no accelerator. Counting passes would not do: one loss may be of several.

    Attributes:
        asked: whether the loss was ever asked for, in any thread, or the warning was given.
        unasked: number of training passes since the loss was asked for; None while the loss is computed.
    """

    def __init__(self) -> None:
        self.asked = False
        self.unasked: int | None = 0
        self._most = 0
        self._passes = 0
        self._warned = False
        self._trained: set[int] = set()

    def note(self, model: nn.Module, grafts: Sequence[str], out: Any) -> None:
        """Take note of a training pass.

        Args:
            model: the model that made it.
            grafts: names of the grafts with a share in the loss.
            out: what the pass returned.

        Warns:
            FxgraftWarning: gradients came back to two passes before this one, and nobody asked for the loss.
        """
        if self.unasked is not None:
            self.unasked += 1
            if self.unasked >= 2 * max(self._most, 1):  # ever less often: some steps have several passes
                self._most = self.unasked
                note_change()  # the model may have been put into another one in a way that no hook sees
        if self.asked:
            return
        if len(self._trained) < STEPS:
            self._passes += 1
            if self._passes <= FIRST:
                note_change()  # the model may have been put into another one in a way that no hook sees
            for tensor in tensors(out):
                if tensor.requires_grad:
                    tensor.register_hook(partial(self._seen, self._passes))
            return
        self._warn_of_none(model, grafts)

    def look_back(self, model: nn.Module, grafts: Sequence[str], outputs: Outputs) -> None:
        """Take note of training passes in compiled code, which `note` has not seen.

        Args:
            model: the model that made them.
            grafts: names of the grafts with a share in the loss.
            outputs: the outputs of the model.
        """
        if grafts and not self.asked and outputs.trained():
            self._warn_of_none(model, grafts)

    def _warn_of_none(self, model: nn.Module, grafts: Sequence[str]) -> None:
        self.asked = True
        warnings.warn(
            f"{', '.join(map(repr, grafts))} on this {model._get_name()} has a share in the loss, and the model is "
            "trained without it: fxgraft.loss, losses and extra_loss were never called.\n"
            "Take fxgraft.loss(model, out, y) for the loss, or add fxgraft.extra_loss(model, out, y) to your own.",
            FxgraftWarning,
            stacklevel=4,
        )

    def warn_of_no_gradients(self, model: nn.Module) -> None:
        """Warn once that the loss of a model in training mode was asked for while no gradients are recorded."""
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
