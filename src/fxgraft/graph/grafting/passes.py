"""What one pass through a patched model shares with its grafts."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fxgraft.errors import TargetError
from fxgraft.graph.grafting.labels import _ambient


class Context:
    """The state of one patched model's current pass.

    Every graft of a model refers to the same context. Between passes all fields but ``progress`` are
    empty, so that compiled code guards on constants only.

    Attributes:
        root: the patched model while it runs, else None.
        target: the labels of this pass, or None.
        inputs: the model's positional tensor arguments.
        options: keyword arguments of this pass that a patch declared as its own.
        values: what `Capture` units recorded in this pass, by key.
        visited: the owners reached in this pass.
        recording: where taps put their values during a pass; None outside of one and while a graft looks ahead.
        recorded: what the taps of the last pass recorded, until it is fetched or the next pass begins.
        progress: share of training done, in [0, 1].
        remember: whether a graft runs the model again; then the arguments of the last pass outlive it.
        last: the model and the arguments of the last training pass, or None.
    """

    def __init__(self) -> None:
        self.root: nn.Module | None = None
        self.target: Tensor | None = None
        self.stale = False
        self.inputs: tuple[Any, ...] = ()
        self.options: dict[str, Any] = {}
        self.values: dict[str, Any] = {}
        self.visited: dict[str, bool] = {}
        self.recording: dict[str, Any] | None = None
        self.recorded: dict[str, Any] | None = None
        self.progress = 0.0
        self.remember = False
        self.last: tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None = None

    def begin(
        self,
        root: nn.Module,
        target: Tensor | None,
        inputs: tuple[Any, ...],
        named: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        """Start a pass of ``root``; explicit labels win over those set from outside."""
        self.root = root
        self.inputs = inputs
        self.options = options or {}
        self.recording, self.recorded = {}, None
        if self.remember:
            self.last = (root, inputs, named or {}) if root.training else None
        if target is None and _ambient:
            labels = _ambient[-1]
            target = labels.value
            if root.training:
                self.stale = labels.used and not labels.reusable
                labels.used = True
        self.target = target

    def end(self) -> None:
        """Forget everything that belonged to the pass."""
        self.root = None
        self.target = None
        self.stale = False
        self.inputs = ()
        self.options = {}
        self.values = {}
        self.visited = {}
        self.recording = None

    def labels(self, graft: str, batch: int) -> Tensor:
        """Return the labels of this pass, or raise what is wrong with them.

        Args:
            graft: name of the graft that needs them, for the message.
            batch: batch size at the graft's site.

        Raises:
            TargetError: no labels, labels that served an earlier batch, or another batch size.
        """
        if self.target is None:
            raise TargetError(
                f"{graft!r} needs the labels of the batch in training, and none were given.\n"
                "Call model(x, target=y), or wrap the call in `with fxgraft.targets(y):`, or iterate over "
                "fxgraft.with_targets(loader); model.eval() needs none."
            )
        if self.stale:
            raise TargetError(
                f"{graft!r} was given labels left over from an earlier pass.\n"
                "Labels set by fxgraft.with_targets serve one training pass, so that no batch is ever "
                "paired with another batch's labels.\n"
                "Call model(x, target=y), or use `with fxgraft.targets(y):` around several passes of one batch."
            )
        if not isinstance(self.target, Tensor):
            raise TargetError(
                f"{graft!r} was given labels of type {type(self.target).__name__}.\n"
                "It takes a tensor of class indices (B,) or of soft targets (B, K)."
            )
        if self.target.ndim == 0 or self.target.shape[0] != batch:
            raise TargetError(
                f"{graft!r} was given labels for {self.target.shape[0] if self.target.ndim else 'no'} "
                f"samples with a batch of {batch}.\n"
                "Labels and inputs must be of the same batch; labels set earlier may have been left over."
            )
        if self.target.is_floating_point() and self.target.ndim < 2:
            raise TargetError(
                f"{graft!r} was given one floating-point number per sample as labels.\n"
                "Class indices are integers (B,), soft targets are floating-point (B, K).\n"
                "Pass y.long() if these are indices."
            )
        return self.target
