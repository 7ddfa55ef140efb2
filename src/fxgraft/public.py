"""The public names, and where they come from: what ``fxgraft.name`` stands for."""

from fxgraft.adaptation.batchnorm import adapt_batchnorm
from fxgraft.adaptation.loop import AdaptationHistory, adapt
from fxgraft.api import grafts, merge, patch, set_progress, sites, summary, unpatch
from fxgraft.errors import (
    BypassError,
    ConfigError,
    FxgraftError,
    FxgraftWarning,
    MergeError,
    MethodError,
    RecipeError,
    SiteError,
    StructureError,
    TargetError,
    TraceError,
    UnknownGraftError,
    WrappedModelError,
)
from fxgraft.functional.divergence import jensen_shannon
from fxgraft.graph.grafting.graft import Graft
from fxgraft.graph.grafting.published import targets, with_targets
from fxgraft.graph.structure.sites import Site, Sites
from fxgraft.inspection import Plan, Summary, diagnostics
from fxgraft.io.backbone_weights import load_backbone
from fxgraft.io.save_load import load, save
from fxgraft.patches.base import Patch
from fxgraft.patches.crossnorm.patch import CrossNorm
from fxgraft.patches.diversification.loss import GradientBoostingCrossEntropy, gradient_boosting_cross_entropy
from fxgraft.patches.diversification.patch import Diversification
from fxgraft.patches.gam.patch import GAM
from fxgraft.patches.gam.step import gam_losses
from fxgraft.patches.mixmo.ensemble import EnsembleMetrics, disagreement, ensemble_entropy
from fxgraft.patches.mixmo.members import MemberLogits, member_logits
from fxgraft.patches.mixmo.pairing import MixMoInput
from fxgraft.patches.mixmo.patch import MixMo
from fxgraft.patches.mixmo.sampling import RepeatedBatchSampler, paired_loader
from fxgraft.patches.mixmo.tensors import MixedLabels, input_cutmix
from fxgraft.patches.registry import methods, register
from fxgraft.patches.rsc.patch import RSC
from fxgraft.patches.selfnorm import SelfNorm
from fxgraft.patches.taps import Taps, activations, tapped
from fxgraft.training_loss import extra_loss, loss, losses

__all__ = [
    "GAM",
    "RSC",
    "AdaptationHistory",
    "BypassError",
    "ConfigError",
    "CrossNorm",
    "Diversification",
    "EnsembleMetrics",
    "FxgraftError",
    "FxgraftWarning",
    "GradientBoostingCrossEntropy",
    "Graft",
    "MemberLogits",
    "MergeError",
    "MethodError",
    "MixMo",
    "MixMoInput",
    "MixedLabels",
    "Patch",
    "Plan",
    "RecipeError",
    "RepeatedBatchSampler",
    "SelfNorm",
    "Site",
    "SiteError",
    "Sites",
    "StructureError",
    "Summary",
    "Taps",
    "TargetError",
    "TraceError",
    "UnknownGraftError",
    "WrappedModelError",
    "activations",
    "adapt",
    "adapt_batchnorm",
    "diagnostics",
    "disagreement",
    "ensemble_entropy",
    "extra_loss",
    "gam_losses",
    "gradient_boosting_cross_entropy",
    "grafts",
    "input_cutmix",
    "jensen_shannon",
    "load",
    "load_backbone",
    "loss",
    "losses",
    "member_logits",
    "merge",
    "methods",
    "paired_loader",
    "patch",
    "register",
    "save",
    "set_progress",
    "sites",
    "summary",
    "tapped",
    "targets",
    "unpatch",
    "with_targets",
]
