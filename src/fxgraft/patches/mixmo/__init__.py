"""MixMo (Ramé, Sun, Cord, ICCV 2021), and MIMO (Havasi et al., ICLR 2021), its mixing by sums."""

from fxgraft.patches.mixmo.ensemble import EnsembleMetrics, disagreement, ensemble_entropy
from fxgraft.patches.mixmo.pairing import MixMoInput
from fxgraft.patches.mixmo.patch import MixMo
from fxgraft.patches.mixmo.sampling import RepeatedBatchSampler, paired_loader
from fxgraft.patches.mixmo.tensors import MixedLabels, input_cutmix

__all__ = [
    "EnsembleMetrics",
    "MixMo",
    "MixMoInput",
    "MixedLabels",
    "RepeatedBatchSampler",
    "disagreement",
    "ensemble_entropy",
    "input_cutmix",
    "paired_loader",
]
