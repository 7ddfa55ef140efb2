"""Metrics of an ensemble and its members: accuracy, likelihood, calibration, disagreement."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxgraft.extend import ConfigError, TargetError, is_count, is_number
from fxgraft.functional.binary import two_classes
from fxgraft.patches.mixmo.calibration import IGNORED, fit_temperature, scaled

Average = Literal["logits", "probabilities"]
"""What the ensemble averages over its members."""

Temperature = float | Mapping[str, float] | Literal["fit"] | None
"""Of the scaled metrics: one for all, one by name, fitted on what is counted, or no such metrics."""


def disagreement(member_logits: Tensor) -> Tensor:
    """Share of the samples on which two members decide differently, averaged over all pairs of members.

    Args:
        member_logits: (M, B, K), of K classes of which one holds. A single logit says yes or no by its sign.

    Returns:
        A scalar in [0, 1]; 0 for a single member.

    Raises:
        TargetError: logits of another number of dimensions.
    """
    _check_members(member_logits)
    return _row_disagreement(member_logits).mean()


def ensemble_entropy(member_logits: Tensor, average: Average = "logits") -> Tensor:
    """Entropy of the ensemble's prediction for every sample: how unsure the members are together.

    Args:
        member_logits: (M, B, K), of K classes of which one holds. A single logit is that of yes and no.
        average: the ensemble is the softmax of the members' mean logits (MixMo's, and that of its merged network),
            or the mean of their softmaxes.

    Returns:
        (B,), in nats: from 0 to log K, for a single logit to log 2.

    Raises:
        TargetError: logits of another number of dimensions.
        ConfigError: no such average.
    """
    _check_members(member_logits)
    _check_average(average)
    return torch.special.entr(_log_probabilities(member_logits, average).exp()).sum(-1)


def _check_members(member_logits: Tensor) -> None:
    if not isinstance(member_logits, Tensor) or member_logits.ndim != 3:
        given = (
            tuple(member_logits.shape) if isinstance(member_logits, Tensor) else type(member_logits).__name__
        )
        raise TargetError(
            f"Members are compared by their logits (M, B, K), and were given as {given}.\n"
            "Without a dimension of members, images would be counted as members.\n"
            "Take fxgraft.mixmo.member_logits(model, x), or torch.stack the logits of each member."
        )


def _check_average(average: object) -> None:
    if average not in ("logits", "probabilities"):
        raise ConfigError(f"average must be 'logits' or 'probabilities', got {average!r}.")


def _row_disagreement(member_logits: Tensor) -> Tensor:
    votes = _classes(member_logits).argmax(-1)
    members = len(votes)
    differ = (votes.unsqueeze(0) != votes.unsqueeze(1)).sum((0, 1))
    return differ / max(members * (members - 1), 1)


def _classes(member_logits: Tensor) -> Tensor:
    """Return logits of classes: of yes and no for a single logit."""
    return two_classes(member_logits, -1) if member_logits.shape[-1] == 1 else member_logits


def _log_probabilities(member_logits: Tensor, average: Average) -> Tensor:
    wide = _classes(member_logits.to(torch.promote_types(member_logits.dtype, torch.float32)))
    if average == "logits":
        return wide.mean(0).log_softmax(-1)
    # Rounding can lift the mean of M ones above 1, which isn't a probability.
    return (wide.log_softmax(-1).logsumexp(0) - math.log(len(wide))).clamp(max=0)


class EnsembleMetrics(nn.Module):
    """Metrics of an ensemble over a data set, from torchmetrics (the extra ``fxgraft[metrics]``).

    ``member_i/…`` for every member and ``ensemble/…`` for all together: ``accuracy`` (share of samples), ``nll``
    (negative log-likelihood in nats, per sample) and ``ece`` (expected calibration error). For all together also
    ``ensemble/entropy``, the mean of `ensemble_entropy`, and ``disagreement``.

    With a temperature also ``…/temperature``, and ``…/nll_scaled`` and ``…/ece_scaled`` of what is said at that
    temperature. All together are scaled after they are averaged. A temperature is to be fitted on validation data:

    >>> import fxgraft, torch
    >>> fitted = fxgraft.mixmo.EnsembleMetrics(4, 2, temperature="fit")  # of the validation set: 2 members, 4 classes
    >>> fitted.update(torch.randn(2, 8, 4), torch.arange(8) % 4)
    >>> metrics = fxgraft.mixmo.EnsembleMetrics(4, 2, temperature=fitted.temperatures())  # of the test set

    One class holds for every sample, of K. ``num_classes=1`` is a single logit, that of yes: it is measured as two
    classes, with labels 0 and 1. Several labels for each sample are refused: each of them is a data set of its own.

    As a module it moves with the model that holds it, and it adds nothing to a state dict. Among several
    processes `compute` gathers from all of them, as torchmetrics does.

    Args:
        num_classes: K, the number of logits.
        members: M.
        average: see `ensemble_entropy`.
        n_bins: bins of the confidence for the calibration error.
        temperature: above 0, one for all; a dictionary with one for each of ``member_0``, ... and ``ensemble``, as
            `temperatures` gives it; "fit" fits each on the very samples that are counted, whose logits are all
            kept for that; None leaves the scaled metrics out.

    Raises:
        ConfigError: torchmetrics is not installed; numbers of members, bins or classes below 1, no such average,
            temperatures that are not above 0 or not one for each.
    """

    def __init__(
        self,
        num_classes: int,
        members: int,
        *,
        average: Average = "logits",
        n_bins: int = 15,
        temperature: Temperature = None,
    ) -> None:
        super().__init__()
        if not all(map(is_count, (num_classes, members, n_bins))):
            raise ConfigError(
                "An ensemble is measured with whole numbers of members, bins and classes, 1 or more; got "
                f"members={members!r}, n_bins={n_bins!r}, num_classes={num_classes!r}."
            )
        _check_average(average)
        try:
            from torchmetrics import CatMetric, MeanMetric
            from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError
        except ImportError as error:
            raise ConfigError(
                "The metrics of an ensemble come from torchmetrics, which is not installed.\n"
                'Install it with: pip install "fxgraft[metrics]". '
                "`disagreement` and `ensemble_entropy` work without it."
            ) from error
        self.num_classes, self.members, self.n_bins = num_classes, members, n_bins
        self.average: Average = average
        self.names = (*(f"member_{i}" for i in range(members)), "ensemble")
        classes = max(num_classes, 2)  # a single logit tells two apart
        self._temperatures = _each_temperature(self.names, temperature)
        self._metrics = nn.ModuleDict()
        self._seen = nn.ModuleDict()
        self._filled = False
        if temperature == "fit":
            for name in ("logits", "target"):
                self._seen[name] = CatMetric(nan_strategy="disable")
            return
        for name in self.names:
            self._metrics[f"{name}/accuracy"] = MulticlassAccuracy(
                classes, average="micro", validate_args=False
            )
            for suffix in ("", "_scaled") if self._temperatures else ("",):
                self._metrics[f"{name}/nll{suffix}"] = MeanMetric(nan_strategy="disable")
                self._metrics[f"{name}/ece{suffix}"] = MulticlassCalibrationError(
                    classes, n_bins=n_bins, validate_args=False
                )
        self._metrics["ensemble/entropy"] = MeanMetric(nan_strategy="disable")
        self._metrics["disagreement"] = MeanMetric(nan_strategy="disable")

    @torch.no_grad()
    def update(self, member_logits: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            member_logits: (M, B, K).
            target: (B,) class indices, of any integer type. Rows labelled -100 are left out, as cross-entropy does.
                Where K is 1 the others are 0 and 1, of any dtype, also (B, 1).

        Raises:
            TargetError: no tensors, logits or labels of another shape, soft targets, several labels for each sample,
                or (on the CPU) indices out of range.
        """
        if not isinstance(member_logits, Tensor) or not isinstance(target, Tensor):
            kinds = f"{type(member_logits).__name__} and {type(target).__name__}"
            raise TargetError(
                f"Metrics are counted of tensors, and were given {kinds}.\n"
                "Pass torch.as_tensor(...) of logits (M, B, K) and class indices (B,)."
            )
        if self.num_classes == 1:
            target = _answers(target)
        expected = (self.members, len(target), self.num_classes)
        if tuple(member_logits.shape) != expected or target.ndim != 1 or target.is_floating_point():
            raise TargetError(
                f"Metrics of {self.members} members and {self.num_classes} classes take logits (M, B, K) = "
                f"({self.members}, B, {self.num_classes}) and class indices (B,); "
                f"got {tuple(member_logits.shape)} and {tuple(target.shape)} of {target.dtype}.\n"
                "One class holds for every sample. Measure several labels one by one: a single logit, num_classes=1."
            )
        target = target.long()
        if not target.is_meta:
            counts = target != IGNORED
            member_logits, target = member_logits[:, counts], target[counts]
        if not len(target):
            return
        if target.device.type == "cpu" and not 0 <= int(target.min()) <= int(target.max()) < max(
            self.num_classes, 2
        ):
            raise TargetError(
                f"Metrics of {self.num_classes} classes were given class indices from {int(target.min())} to "
                f"{int(target.max())}.\nOnly rows labelled {IGNORED} are left out.\n"
                f"Check num_classes, and relabel what does not count to {IGNORED}."
            )
        self._filled = True
        if self._seen:
            self._update("logits", member_logits.transpose(0, 1).float())
            self._update("target", target)
            return
        scores = self._scores(member_logits)
        for name, score in scores.items():
            # Probabilities, since the calibration error takes what lies outside [0, 1] for logits.
            self._update(f"{name}/accuracy", score.exp(), target)
            self._count(name, "", score, target)
            if self._temperatures:
                self._count(name, "_scaled", scaled(score, self._temperatures[name]), target)
        self._update("ensemble/entropy", torch.special.entr(scores["ensemble"].exp()).sum(-1))
        self._update("disagreement", _row_disagreement(member_logits))

    def compute(self) -> dict[str, Tensor]:
        """The metrics of all batches since the last `reset`, scalars by name.

        Raises:
            ConfigError: nothing was counted.
        """
        self._check_filled()
        if self._seen:
            logits, target = self._all_seen()
            fitted = EnsembleMetrics(
                self.num_classes,
                self.members,
                average=self.average,
                n_bins=self.n_bins,
                temperature=self._fitted(logits, target),
            ).to(logits.device)
            fitted.update(logits, target)
            return fitted.compute()
        values = {name: metric.compute() for name, metric in self._named()}
        device = values["disagreement"].device
        temperatures = {
            f"{k}/temperature": torch.tensor(t, device=device) for k, t in self._temperatures.items()
        }
        return values | temperatures

    def temperatures(self) -> dict[str, float]:
        """The temperature of every member and of all together, by name: as given, or as fitted to all batches.

        Raises:
            ConfigError: there are none, or nothing was counted to fit them to.
        """
        if not self._seen:
            if not self._temperatures:
                raise ConfigError(
                    'These metrics have no temperatures.\nFit them on validation data: pass temperature="fit".'
                )
            return dict(self._temperatures)
        self._check_filled()
        return self._fitted(*self._all_seen())

    def reset(self) -> None:
        """Forget every batch."""
        self._filled = False
        for _, metric in self._named():
            metric.reset()

    def _check_filled(self) -> None:
        if not self._filled:
            raise ConfigError("There is nothing to compute: call update(member_logits, target) first.")

    def _scores(self, member_logits: Tensor) -> dict[str, Tensor]:
        """Log-probabilities (B, K) of every member and of all together."""
        members = [_log_probabilities(member.unsqueeze(0), "logits") for member in member_logits]
        return dict(zip(self.names, [*members, _log_probabilities(member_logits, self.average)], strict=True))

    def _all_seen(self) -> tuple[Tensor, Tensor]:
        kept: Any = self._seen
        return kept["logits"].compute().transpose(0, 1), kept["target"].compute().long()

    def _fitted(self, logits: Tensor, target: Tensor) -> dict[str, float]:
        return {name: fit_temperature(scores, target).item() for name, scores in self._scores(logits).items()}

    def _count(self, name: str, suffix: str, scores: Tensor, target: Tensor) -> None:
        self._update(f"{name}/ece{suffix}", scores.exp(), target)
        self._update(f"{name}/nll{suffix}", F.nll_loss(scores, target, reduction="none"))

    def _update(self, name: str, *values: Tensor) -> None:
        dict(self._named())[name].update(*values)

    def _named(self) -> list[tuple[str, Any]]:
        return [*self._metrics.items(), *self._seen.items()]


def _answers(target: Tensor) -> Tensor:
    """Return labels of a single logit as class indices (B,)."""
    flat = target[:, 0] if target.ndim == 2 and target.shape[1] == 1 else target
    if flat.ndim == 1 and not bool(((flat == 0) | (flat == 1) | (flat == IGNORED)).all()):
        raise TargetError(
            "A single logit is measured with labels 0 and 1, and was given others.\n"
            "It is a question of yes and no; a probability or a number to predict is neither right nor wrong.\n"
            "Round probabilities, or give the model one logit for each class."
        )
    return flat.long()


def _each_temperature(names: tuple[str, ...], given: Temperature) -> dict[str, float]:
    """Return the temperature of every name; an empty dictionary if none is given."""
    if given is None or given == "fit":
        return {}
    temperatures: dict[str, float] = dict(
        given if isinstance(given, Mapping) else dict.fromkeys(names, given)
    )
    if set(temperatures) != set(names) or not all(
        is_number(t) and 0 < t < math.inf for t in temperatures.values()
    ):
        raise ConfigError(
            f"temperature must be a finite number above 0, one for each of {', '.join(names)}, or 'fit'; "
            f"got {given!r}.\nWhat another `EnsembleMetrics` of as many members fitted is in its temperatures()."
        )
    return temperatures
