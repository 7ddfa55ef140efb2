"""The logits of every member of a network that `fxgraft.MixMo` trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxgraft.extend import (
    SiteError,
    StructureError,
    Unit,
    grafts_on,
    preserved_modes,
    take_logits,
    with_logits,
)
from fxgraft.patches.mixmo.ensemble_metrics import disagreement, ensemble_entropy
from fxgraft.patches.mixmo.pairing import PAIRING, Pairing


@dataclass(frozen=True)
class MemberLogits:
    """The logits of a network's members for a batch.

    Attributes:
        logits: (M, B, K), of each member.
        ensemble: (B, K), their mean: what the model says in evaluation.
        disagreement: () share of the samples on which two members decide differently, over all pairs.
        entropy: (B,) of the ensemble's prediction, in nats.
    """

    logits: Tensor
    ensemble: Tensor
    disagreement: Tensor
    entropy: Tensor


def member_logits(model: nn.Module, x: Tensor) -> MemberLogits:
    """Ask every member of a network in evaluation, in one pass through the shared part.

    Gradients are recorded as in any call; wrap it in ``torch.no_grad()`` where none are needed.

    Args:
        model: a model with a graft that has members, such as "mixmo"; its mode is put back afterwards.
        x: the images (B, C, H, W).

    Raises:
        SiteError: there is no such graft.
    """
    if not any("members" in graft.patch.call_options for graft in grafts_on(model)):
        raise SiteError(
            f"This {model._get_name()} has no members.\n"
            'Call fxgraft.patch(model, "mixmo") first; what came out of fxgraft.merge is one network.'
        )
    with preserved_modes(model):
        out = model.eval()(x, members=True)
    names = [getattr(graft.patch, "output", None) for graft in grafts_on(model)]
    logits = take_logits(out, names)
    return MemberLogits(logits, logits.mean(0), disagreement(logits), ensemble_entropy(logits))


class Members(Unit):
    """Gives the members' logits a dimension of their own, behind the model, and keeps the pairing for the loss.

    Args:
        members: M.
        output: which entry of a structured output holds the logits.
    """

    optional = True

    def __init__(self, members: int, output: str | int | None = None) -> None:
        super().__init__()
        self.members, self.output = members, output

    def forward(self, out: Any) -> Any:
        """Return ``out`` with logits (M, B, K) in training and where the call asks for it, else as it is."""
        run, members = self.current, self.members
        if run is None or not run.training:
            asked = run is not None and run.options.get("members")
            return self._stacked(out, take_logits(out, (self.output,))) if asked else out
        pairing: Pairing = run.get(PAIRING)
        rows = take_logits(out, (self.output,))
        if rows.shape[0] != members * pairing.rows or (members > 1 and pairing.masks is None):
            raise StructureError(
                f"A training pass of {run.model._get_name()} gave {rows.shape[0]} rows of logits for {members} members "
                f"and {pairing.rows} mixtures.\nThe stem or the classifier was not in training mode, another "
                "patch acts in its place, or what follows the classifier does not treat every row by itself.\n"
                "Call model.train(); to freeze these layers, use requires_grad_(False)."
            )
        run.remember(pairing)
        stacked = self._stacked(out, rows)
        # Counted where somebody asks: `MixMo.diagnostics`.
        run.measure("agreement", take_logits(stacked, (self.output,)))
        return stacked

    def _stacked(self, out: Any, rows: Tensor) -> Any:
        # A copy, since FSDP warns of outputs that are views.
        return with_logits(out, torch.stack(rows.chunk(self.members)), self.output)
