"""fxgraft: graft published training methods onto timm and torchvision backbones, and take them off again."""

import importlib as _importlib
from importlib.metadata import PackageNotFoundError as _NotFound
from importlib.metadata import version as _version
from importlib.util import find_spec as _find_spec
from typing import Any as _Any

try:
    __version__ = _version("fxgraft")
except _NotFound:  # a source tree that was never installed
    __version__ = "0.0.0"

_PUBLIC = {
    "adaptation.batchnorm": ("adapt_batchnorm",),
    "adaptation.loop": ("adapt",),
    "api": ("grafts", "merge", "patch", "set_progress", "sites", "summary", "unpatch"),
    "comparison.experiment": ("compare",),
    "errors": (
        "BypassError",
        "ConfigError",
        "FxgraftError",
        "FxgraftWarning",
        "MergeError",
        "MethodError",
        "RecipeError",
        "SiteError",
        "StructureError",
        "TargetError",
        "TraceError",
        "UnknownGraftError",
        "WrappedModelError",
    ),
    "graph.grafting.graft": ("Graft",),
    "graph.runtime.labelled_loader": ("with_targets",),
    "graph.runtime.published_labels": ("targets",),
    "graph.structure.site": ("Site",),
    "inspection": ("Plan", "Summary", "diagnostics"),
    "io.backbone_weights": ("load_backbone",),
    "io.hub": ("push_to_hub",),
    "io.save_load": ("load", "save"),
    "patches.base": ("Patch",),
    "patches.crossnorm.patch": ("CrossNorm",),
    "patches.diversification.loss": ("GradientBoostingCrossEntropy", "gradient_boosting_cross_entropy"),
    "patches.diversification.patch": ("Diversification",),
    "patches.dsu": ("DSU",),
    "patches.gam.patch": ("GAM",),
    "patches.mixmo.patch": ("MixMo",),
    "patches.mixstyle": ("MixStyle",),
    "patches.registry": ("methods", "register"),
    "patches.rsc.patch": ("RSC",),
    "patches.selfnorm": ("SelfNorm",),
    "patches.taps": ("Taps", "activations", "tapped"),
    "training_loss": ("extra_loss", "loss", "losses"),
}
"""The public names, by the module that each comes from. A name is imported when it is first asked for."""

_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _PUBLIC.items() for name in names}
__all__ = sorted([*_MODULE_OF, "__version__"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> _Any:
    """Import a public name, or a module of this package, when it is first asked for."""
    if name in _MODULE_OF:
        globals()[name] = getattr(_importlib.import_module(_MODULE_OF[name]), name)
        return globals()[name]
    if not name.startswith("_") and _find_spec(f"{__name__}.{name}") is not None:
        return _importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names."""
    return __all__
