"""The members of an ensemble in one network, each by itself: what `fxgraft.MixMo` trained."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fxgraft.extend import SiteError, grafts_on, preserved_modes
from fxgraft.patches.mixmo.ensemble import disagreement, ensemble_entropy


@dataclass(frozen=True)
class MemberLogits:
    """What the members of a network say of a batch.

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
        logits = model.eval()(x, members=True)
    return MemberLogits(logits, logits.mean(0), disagreement(logits), ensemble_entropy(logits))
