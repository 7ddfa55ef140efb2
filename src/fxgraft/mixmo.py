"""What belongs to MixMo alone: its inputs and loaders, the members' logits, the ensemble's metrics."""

from fxgraft.patches.mixmo.ensemble_metrics import EnsembleMetrics, disagreement, ensemble_entropy
from fxgraft.patches.mixmo.members import MemberLogits, member_logits
from fxgraft.patches.mixmo.pairing import MixMoInput
from fxgraft.patches.mixmo.sampling import RepeatedBatchSampler, paired_loader
from fxgraft.patches.mixmo.tensors import MixedLabels, input_cutmix

__all__ = [
    "EnsembleMetrics",
    "MemberLogits",
    "MixMoInput",
    "MixedLabels",
    "RepeatedBatchSampler",
    "disagreement",
    "ensemble_entropy",
    "input_cutmix",
    "member_logits",
    "paired_loader",
]
