"""Temperature scaling (Guo, Pleiss, Sun, Weinberger, ICML 2017): one number that calibrates a network."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BOUNDS = (1e-2, 1e2)
STEPS = 50
IGNORED = -100
"""The label of rows that do not count, as in cross-entropy."""


@torch.no_grad()
def fit_temperature(logits: Tensor, target: Tensor) -> Tensor:
    """Fit the temperature T under which softmax(logits / T) makes the labels most likely.

    Fit it on validation data, and use it on others: on the samples it was fitted to it looks better than it is.

    Args:
        logits: (N, K), logits or log-probabilities.
        target: (N,) class indices; rows labelled -100 are left out.

    Returns:
        (), float64, in [0.01, 100]; at the lower end where every sample is classified as it should be, at the
        upper one where the logits are no better than chance.
    """
    counts = target != IGNORED
    wide, target = logits[counts].double(), target[counts].long()
    excess = wide - wide.gather(1, target.unsqueeze(1))
    # The likelihood is concave in 1/T, so its slope has one zero, which halving finds: always the same one.
    low, high = (excess.new_tensor(math.log(bound)) for bound in BOUNDS)
    for _ in range(STEPS):
        middle = (low + high) / 2
        overconfident = (excess * (excess / middle.exp()).softmax(1)).sum(1).mean() > 0
        low, high = torch.where(overconfident, middle, low), torch.where(overconfident, high, middle)
    return ((low + high) / 2).exp()


def scaled(log_probabilities: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (N, K) at a temperature: those of the logits divided by it."""
    return (log_probabilities / temperature).log_softmax(-1)
