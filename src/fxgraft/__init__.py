"""fxgraft: graft published training methods onto timm and torchvision backbones, and take them off again."""

from importlib.metadata import PackageNotFoundError as _NotFound
from importlib.metadata import version as _version

from fxgraft.api import (
    Plan,
    Summary,
    grafts,
    loss,
    losses,
    merge,
    patch,
    set_progress,
    sites,
    summary,
    unpatch,
)
from fxgraft.consistency import jensen_shannon
from fxgraft.errors import (
    BypassError,
    ConfigError,
    DuplicateGraftError,
    FxgraftError,
    FxgraftWarning,
    MergeError,
    RecipeError,
    SiteError,
    StructureError,
    TargetError,
    TraceError,
    UnknownGraftError,
    UnknownMethodError,
    WrappedModelError,
)
from fxgraft.graph.context import targets, with_targets
from fxgraft.graph.ledger import Graft
from fxgraft.graph.sites import Site, Sites
from fxgraft.losses import GradientBoostingCrossEntropy, gradient_boosting_cross_entropy
from fxgraft.patches.base import Patch, methods, register
from fxgraft.patches.crossnorm import CrossNorm
from fxgraft.patches.diversification import Diversification
from fxgraft.patches.rsc import RSC
from fxgraft.patches.selfnorm import SelfNorm
from fxgraft.recipe import load, save

try:
    __version__ = _version("fxgraft")
except _NotFound:  # a source tree that was never installed
    __version__ = "0.0.0"

__all__ = [
    "RSC",
    "BypassError",
    "ConfigError",
    "CrossNorm",
    "Diversification",
    "DuplicateGraftError",
    "FxgraftError",
    "FxgraftWarning",
    "GradientBoostingCrossEntropy",
    "Graft",
    "MergeError",
    "Patch",
    "Plan",
    "RecipeError",
    "SelfNorm",
    "Site",
    "SiteError",
    "Sites",
    "StructureError",
    "Summary",
    "TargetError",
    "TraceError",
    "UnknownGraftError",
    "UnknownMethodError",
    "WrappedModelError",
    "__version__",
    "gradient_boosting_cross_entropy",
    "grafts",
    "jensen_shannon",
    "load",
    "loss",
    "losses",
    "merge",
    "methods",
    "patch",
    "register",
    "save",
    "set_progress",
    "sites",
    "summary",
    "targets",
    "unpatch",
    "with_targets",
]
