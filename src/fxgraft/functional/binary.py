"""One logit for a question of yes or no, as the two logits of its answers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Probability = Literal["softmax", "sigmoid"]
"""How logits become probabilities: of classes of which one holds, or of the answer to a question for each logit."""


def two_classes(logits: Tensor, dim: int = 1) -> Tensor:
    """Return the logits of no and yes, −z/2 and z/2, for the one logit z of yes.

    Their softmax is 1 − sigmoid(z) and sigmoid(z), and each answer has a score that grows with its probability.

    Args:
        logits: with size 1 along ``dim``.
        dim: where the classes are.

    Returns:
        The same with size 2 along ``dim``.
    """
    half = logits / 2
    return torch.cat((-half, half), dim)


def questions(logits: Tensor, probability: Probability | None) -> Tensor:
    """Bring logits (B, K, ...) to a form whose softmax over dimension 1 gives the probabilities.

    Args:
        logits: (B, K) or (B, K, ...).
        probability: "softmax" over the K classes; "sigmoid", where each of the K logits is a question of its own; None
            for softmax, or sigmoid where K is 1.

    Returns:
        The logits, or those of two classes with the questions behind: (B, 2, K, ...).
    """
    if probability == "sigmoid" or (probability is None and logits.shape[1] == 1):
        return two_classes(logits.unsqueeze(1))
    return logits
