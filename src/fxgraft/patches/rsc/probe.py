"""The probe of RSC: what a prediction leans on, from one gradient through the rest of the network."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxgraft._torch import top_saved_tensors_hooks, transforms_active
from fxgraft.extend import (
    ConfigError,
    WrappedModelError,
    binary_labels,
    check_label_range,
    check_soft_labels,
    draws,
    gathered,
    look_ahead,
    tail_layer,
)
from fxgraft.functional.binary import two_classes
from fxgraft.patches.rsc import closed_form
from fxgraft.patches.rsc import tensors as core

if TYPE_CHECKING:
    from fxgraft.patches.rsc.patch import RSCUnit


class Probe:
    """Looks through the rest of the network from one value, and leaves no trace of having looked.

    Args:
        unit: the unit at the value's site, during a pass.
        z: the value, detached.
        target: the labels of the batch.
    """

    def __init__(self, unit: RSCUnit, z: Tensor, target: Tensor) -> None:
        self.run = unit.run
        self.config, self.rest, self.layout = unit.config, unit.rest, unit.layout
        self.z = z
        self.target = target
        tail, sizes = self.rest.tail, self.canonical.shape[2:]
        self.layer = None if tail is None else tail_layer(self.run.model, tail, sizes)
        self.logits: Tensor | None = None

    @property
    def canonical(self) -> Tensor:
        """The value as (B, C, *positions)."""
        return self.layout.canonical(self.z)

    def mask(self, scope: str) -> Tensor:
        """Mask the canonical map, (B, 1, *positions), (B, C, 1, ...) or, for vectors, (B, D)."""
        config = self.config
        gradient = self._gradient() if config.strategy in core.GRADIENT_STRATEGIES else None
        if scope == "vector":
            ranked = core.saliency(self.z, gradient, "channel", strategy=config.strategy)
            if config.strategy == "random_top_half":
                return core.random_top_half_mask(ranked, config.vector_drop).to(self.z.dtype)
            return core.vector_keep_mask(ranked, config.vector_drop).to(self.z.dtype)
        if scope == "either":
            spatial, channel = self._scored("spatial", gradient), self._scored("channel", gradient)
            return torch.where(torch.rand((), device=self.z.device) < 0.5, spatial, channel)
        return self._scored("spatial" if scope == "spatial" else "channel", gradient)

    def _scored(self, scope: core.Scope, gradient: Tensor | None) -> Tensor:
        config = self.config
        z = self.canonical
        if gradient is not None and gradient.ndim == 2 and z.ndim > 2:
            scores = core.pooled_saliency(z, gradient, scope, kind=config.saliency)
        else:
            scores = core.saliency(z, gradient, scope, kind=config.saliency, strategy=config.strategy)
        share = config.spatial_drop if scope == "spatial" else config.channel_drop
        return core.feature_mask(scores, z, scope, share, strategy=config.strategy)

    def _gradient(self) -> Tensor:
        """Differentiate the label's logit by the map, in canonical form; (B, C) where it is equal everywhere."""
        if self.layer is not None:
            weight = gathered(self.layer.weight.detach())
            classes = weight.shape[0]
            target = self.target
            if self._binary(classes):
                # Yes weighs a half and no minus a half, as in `two_classes`.
                yes, counts = self._answers(torch.Size((len(target), classes)))
                target = ((yes - 0.5) * counts).to(weight.dtype)
            else:
                target = self._checked(classes)
            return closed_form.linear_tail_gradient(weight, target, self.canonical.shape[2:].numel())
        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            raise WrappedModelError(
                f"torch.export and torch.jit.trace cannot hold a training pass of {self.run.graft!r} at "
                f"{self.rest.site.name!r}.\n"
                "It looks through the layers behind it with a gradient, and they take no gradient inside of a pass.\n"
                "Export model.eval(), whose graph is the bare model's, or choose a site that only pooling and a linear "
                "layer follow: there the gradient has a closed form. torch.compile takes any site."
            )
        if draws.as_data() or transforms_active():
            # torch.func.grad compiles into the same graph, and nests in transforms; torch.autograd.grad does neither.
            gradient, self.logits = torch.func.grad(self._score, has_aux=True)(self.z.clone())
        else:
            # Tensors made in inference mode cannot be differentiated; their copies made outside of it can.
            gradient = self._differentiated()
        return self.layout.canonical(gradient)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _differentiated(self) -> Tensor:
        leaf = self.z.clone().requires_grad_()
        if self.target.is_inference():
            self.target = self.target.clone()
        # Hooks of activation checkpointing, which drop what is saved and compute it again, are not meant for this.
        hooked = top_saved_tensors_hooks() is not None
        keeping = (
            torch.autograd.graph.saved_tensors_hooks(_same, _same) if hooked else contextlib.nullcontext()
        )
        with keeping:
            score, logits = self._score(leaf)
        (gradient,) = torch.autograd.grad(score, leaf)
        self.logits = logits.detach()
        return gradient

    def _score(self, z: Tensor) -> tuple[Tensor, Tensor]:
        # The clone keeps an in-place first layer from writing to the leaf.
        logits = look_ahead(self.run, self.rest, z.clone())
        flat, target, counts = self._rows(logits)
        return core.label_score(flat * counts.unsqueeze(1), target), logits

    def probabilities(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the label's probability before and after muting, (B,) each."""
        if self.layer is not None:
            weight = gathered(self.layer.weight.detach())
            bias = None if self.layer.bias is None else gathered(self.layer.bias.detach())
            before = closed_form.linear_tail_logits(self.canonical, None, weight, bias)
            after = closed_form.linear_tail_logits(self.canonical, mask, weight, bias)
        else:
            before = self.logits
            if before is None:
                before = look_ahead(self.run, self.rest, self.z.clone())
            after = look_ahead(self.run, self.rest, self.layout.multiply(self.z, mask))
        return self._probability(before), self._probability(after)

    def _probability(self, logits: Tensor) -> Tensor:
        return core.sample_probability(*self._rows(logits), len(logits))

    def _rows(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bring logits and labels to rows; see `core.label_rows`. A question of yes or no is a row of two classes."""
        if logits.ndim == 1:  # of one logit, squeezed
            logits = logits.unsqueeze(1)
        if not self._binary(logits.shape[1]):
            # Not kept, since under torch.func.grad it belongs to the transform.
            target = self._checked(logits.shape[1], logits.ndim - 2)
            return core.label_rows(logits, target, self.config.ignore_index)
        yes, counts = self._answers(logits.shape)
        rows = two_classes(logits.reshape(-1, 1))
        yes = yes.reshape(-1, 1).to(rows.dtype)
        return rows, torch.cat((1 - yes, yes), 1), counts.flatten().to(rows.dtype)

    def _binary(self, classes: int) -> bool:
        """Say whether each logit is a question of its own."""
        probability = self.config.probability
        if probability == "softmax" and classes == 1:
            raise ConfigError(
                f'{self.run.graft!r} was made with probability="softmax", and the model has one logit.\n'
                "The softmax of a single logit is 1, whatever the logit is, so that nothing would ever be muted.\n"
                'Leave probability= out, or pass probability="sigmoid".'
            )
        return probability == "sigmoid" or (probability is None and classes == 1)

    def _answers(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        return binary_labels(self.run.graft, self.target, shape, self.config.ignore_index)

    def _checked(self, classes: int, spatial: int = 0) -> Tensor:
        """Check the labels, and return those that lookups may use."""
        target, ignored = self.target, None
        if target.ndim > 1 and not target.is_floating_point():
            ignored = target == self.config.ignore_index
            target = target.where(~ignored, torch.zeros_like(target))
        target = check_label_range(self.run.graft, target, classes, spatial, self.run.doubt)
        check_soft_labels(self.run.graft, target)
        return target if ignored is None else self.target.where(ignored, target)


def _same(tensor: Tensor) -> Tensor:
    return tensor
