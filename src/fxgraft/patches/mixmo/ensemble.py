"""What the members of an ensemble say, each and together: accuracy, likelihood, calibration, disagreement."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxgraft.errors import ConfigError, TargetError

Average = Literal["logits", "probabilities"]
"""What the ensemble averages over its members."""


def disagreement(member_logits: Tensor) -> Tensor:
    """Share of the samples on which two members decide differently, averaged over all pairs of members.

    Args:
        member_logits: (M, B, K).

    Returns:
        A scalar in [0, 1]; 0 for a single member.
    """
    return _row_disagreement(member_logits).mean()


def ensemble_entropy(member_logits: Tensor, average: Average = "logits") -> Tensor:
    """Entropy of the ensemble's prediction for every sample: how unsure the members are together.

    Args:
        member_logits: (M, B, K).
        average: the ensemble is the softmax of the members' mean logits (MixMo's, and that of its merged network),
            or the mean of their softmaxes.

    Returns:
        (B,), in nats: from 0 to log K.
    """
    return torch.special.entr(_log_probabilities(member_logits, average).exp()).sum(-1)


def _row_disagreement(member_logits: Tensor) -> Tensor:
    votes = member_logits.argmax(-1)
    members = len(votes)
    differ = (votes.unsqueeze(0) != votes.unsqueeze(1)).sum((0, 1))
    return differ / max(members * (members - 1), 1)


def _log_probabilities(member_logits: Tensor, average: Average) -> Tensor:
    wide = member_logits.to(torch.promote_types(member_logits.dtype, torch.float32))
    if average == "logits":
        return wide.mean(0).log_softmax(-1)
    # Rounding can lift the mean of M ones above 1, which is no probability.
    return (wide.log_softmax(-1).logsumexp(0) - math.log(len(wide))).clamp(max=0)


class EnsembleMetrics(nn.Module):
    """Metrics of an ensemble over a data set, from torchmetrics (the extra ``fxgraft[metrics]``).

    ``member_i/…`` for every member and ``ensemble/…`` for all together: ``accuracy`` (share of samples), ``nll``
    (negative log-likelihood in nats, per sample) and ``ece`` (expected calibration error). For all together also
    ``ensemble/entropy``, the mean of `ensemble_entropy`, and ``disagreement``.

    As a module it moves with the model that holds it, and it adds nothing to a state dict. Among several
    processes `compute` gathers from all of them, as torchmetrics does.

    Args:
        num_classes: K.
        members: M.
        average: see `ensemble_entropy`.
        n_bins: bins of the confidence for the calibration error.

    Raises:
        ConfigError: torchmetrics is not installed; fewer than 1 member or bin, fewer than 2 classes, no such average.
    """

    def __init__(
        self, num_classes: int, members: int, *, average: Average = "logits", n_bins: int = 15
    ) -> None:
        super().__init__()
        if num_classes < 2 or members < 1 or n_bins < 1:
            raise ConfigError(
                "An ensemble is measured with 1 or more members and bins and 2 or more classes; got "
                f"members={members!r}, n_bins={n_bins!r}, num_classes={num_classes!r}."
            )
        if average not in ("logits", "probabilities"):
            raise ConfigError(f"average must be 'logits' or 'probabilities', got {average!r}.")
        try:
            from torchmetrics import MeanMetric
            from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError
        except ImportError as error:
            raise ConfigError(
                "The metrics of an ensemble come from torchmetrics, which is not installed.\n"
                'Install it with: pip install "fxgraft[metrics]". '
                "`disagreement` and `ensemble_entropy` work without it."
            ) from error
        self.num_classes, self.members = num_classes, members
        self.average: Average = average
        self._metrics = nn.ModuleDict()
        for name in (*(f"member_{i}" for i in range(members)), "ensemble"):
            self._metrics[f"{name}/accuracy"] = MulticlassAccuracy(
                num_classes, average="micro", validate_args=False
            )
            self._metrics[f"{name}/nll"] = MeanMetric(nan_strategy="disable")
            self._metrics[f"{name}/ece"] = MulticlassCalibrationError(
                num_classes, n_bins=n_bins, validate_args=False
            )
        self._metrics["ensemble/entropy"] = MeanMetric(nan_strategy="disable")
        self._metrics["disagreement"] = MeanMetric(nan_strategy="disable")
        self._filled = False

    @torch.no_grad()
    def update(self, member_logits: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            member_logits: (M, B, K).
            target: (B,) class indices.

        Raises:
            TargetError: logits or labels of another shape, or soft targets.
        """
        expected = (self.members, len(target), self.num_classes)
        if tuple(member_logits.shape) != expected or target.ndim != 1 or target.is_floating_point():
            raise TargetError(
                f"Metrics of {self.members} members and {self.num_classes} classes take logits (M, B, K) = "
                f"({self.members}, B, {self.num_classes}) and class indices (B,); "
                f"got {tuple(member_logits.shape)} and {tuple(target.shape)} of {target.dtype}."
            )
        together = _log_probabilities(member_logits, self.average)
        members = [_log_probabilities(each.unsqueeze(0), "logits") for each in member_logits]
        for i, scores in enumerate(members):
            self._count(f"member_{i}", scores, target)
        self._count("ensemble", together, target)
        self._update("ensemble/entropy", torch.special.entr(together.exp()).sum(-1))
        self._update("disagreement", _row_disagreement(member_logits))
        self._filled = True

    def compute(self) -> dict[str, Tensor]:
        """The metrics of all batches since the last `reset`, scalars by name.

        Raises:
            ConfigError: nothing was counted.
        """
        if not self._filled:
            raise ConfigError("There is nothing to compute: call update(member_logits, target) first.")
        return {name: metric.compute() for name, metric in self._named()}

    def reset(self) -> None:
        """Forget every batch."""
        self._filled = False
        for _, metric in self._named():
            metric.reset()

    def _count(self, name: str, log_probabilities: Tensor, target: Tensor) -> None:
        # Probabilities, since the calibration error takes what lies outside [0, 1] for logits.
        probabilities = log_probabilities.exp()
        self._update(f"{name}/accuracy", probabilities, target)
        self._update(f"{name}/ece", probabilities, target)
        self._update(f"{name}/nll", F.nll_loss(log_probabilities, target, reduction="none"))

    def _update(self, name: str, *values: Tensor) -> None:
        metric: Any = self._metrics[name]
        metric.update(*values)

    def _named(self) -> list[tuple[str, Any]]:
        return list(self._metrics.items())
