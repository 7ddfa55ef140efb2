"""Further numbers of a run: those of a network of several members."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fxgraft


def member_scores(model: nn.Module, validation: Any, test: Any) -> dict[str, float]:
    """Measure the members and all together; temperatures are fitted on the validation images.

    Args:
        model: patched with MixMo, or bare: one member.
        validation: map-style data set of (image, label).
        test: the same.

    Returns:
        What `fxgraft.mixmo.EnsembleMetrics` gives, and "gain": accuracy of all together minus the mean of the members.
    """
    found, labels = _logits(model, validation)
    members, _, classes = found.shape
    fitted = fxgraft.mixmo.EnsembleMetrics(classes, members, temperature="fit")
    fitted.update(found, labels)
    metrics = fxgraft.mixmo.EnsembleMetrics(classes, members, temperature=fitted.temperatures())
    metrics.update(*_logits(model, test))
    numbers = {name: float(value) for name, value in metrics.compute().items()}
    own = sum(numbers[f"member_{index}/accuracy"] for index in range(members)) / members
    return {**numbers, "gain": numbers["ensemble/accuracy"] - own}


def _logits(model: nn.Module, images: Any) -> tuple[Tensor, Tensor]:
    """Return logits (M, N, K) and labels (N,)."""
    parts, labels = [], []
    with torch.no_grad():
        for rows in torch.arange(len(images)).split(256):
            pairs = [images[index] for index in rows.tolist()]
            x = torch.stack([image for image, _ in pairs])
            labels += [label for _, label in pairs]
            many = any(graft.name == "mixmo" for graft in fxgraft.grafts(model))
            parts.append(fxgraft.mixmo.member_logits(model, x).logits if many else model.eval()(x)[None])
    return torch.cat(parts, 1).float(), torch.tensor(labels)
