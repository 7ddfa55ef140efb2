# What type checkers and editors see: the names that __init__.py imports when they are asked for, and the options of
# every method. Written by python -m tools.stubs
import collections.abc
from typing import Any, Literal, TypeVar, overload

import torch

from fxgraft.errors import BypassError as BypassError
from fxgraft.errors import ConfigError as ConfigError
from fxgraft.patches.crossnorm.patch import CrossNorm as CrossNorm
from fxgraft.patches.dsu import DSU as DSU
from fxgraft.patches.diversification.patch import Diversification as Diversification
from fxgraft.errors import FxgraftError as FxgraftError
from fxgraft.errors import FxgraftWarning as FxgraftWarning
from fxgraft.patches.gam.patch import GAM as GAM
from fxgraft.patches.diversification.loss import GradientBoostingCrossEntropy as GradientBoostingCrossEntropy
from fxgraft.graph.grafting.graft import Graft as Graft
from fxgraft.errors import MergeError as MergeError
from fxgraft.errors import MethodError as MethodError
from fxgraft.patches.mixmo.patch import MixMo as MixMo
from fxgraft.patches.mixstyle import MixStyle as MixStyle
from fxgraft.patches.base import Patch as Patch
from fxgraft.inspection import Plan as Plan
from fxgraft.patches.rsc.patch import RSC as RSC
from fxgraft.errors import RecipeError as RecipeError
from fxgraft.patches.selfnorm import SelfNorm as SelfNorm
from fxgraft.graph.structure.site import Site as Site
from fxgraft.errors import SiteError as SiteError
from fxgraft.errors import StructureError as StructureError
from fxgraft.inspection import Summary as Summary
from fxgraft.patches.taps import Taps as Taps
from fxgraft.errors import TargetError as TargetError
from fxgraft.errors import TraceError as TraceError
from fxgraft.errors import UnknownGraftError as UnknownGraftError
from fxgraft.errors import WrappedModelError as WrappedModelError
from fxgraft.patches.taps import activations as activations
from fxgraft.adaptation.loop import adapt as adapt
from fxgraft.adaptation.batchnorm import adapt_batchnorm as adapt_batchnorm
from fxgraft.comparison.experiment import compare as compare
from fxgraft.inspection import diagnostics as diagnostics
from fxgraft.training_loss import extra_loss as extra_loss
from fxgraft.patches.diversification.loss import gradient_boosting_cross_entropy as gradient_boosting_cross_entropy
from fxgraft.api import grafts as grafts
from fxgraft.io.save_load import load as load
from fxgraft.io.backbone_weights import load_backbone as load_backbone
from fxgraft.training_loss import loss as loss
from fxgraft.training_loss import losses as losses
from fxgraft.api import merge as merge
from fxgraft.patches.registry import methods as methods
from fxgraft.io.hub import push_to_hub as push_to_hub
from fxgraft.patches.registry import register as register
from fxgraft.io.save_load import save as save
from fxgraft.api import set_progress as set_progress
from fxgraft.api import sites as sites
from fxgraft.api import summary as summary
from fxgraft.patches.taps import tapped as tapped
from fxgraft.graph.runtime.published_labels import targets as targets
from fxgraft.api import unpatch as unpatch
from fxgraft.graph.runtime.labelled_loader import with_targets as with_targets

__version__: str

_M = TypeVar("_M", bound=torch.nn.Module)
@overload
def patch(
    model: _M,
    method: Literal["crossnorm"],
    *,
    name: str | None = ...,
    dry_run: Literal[False] = ...,
    input_size: tuple[int, ...] | None = ...,
    preset: Literal["imagenet", "imagenet_cnsn", "imagenet_cnsn_consistency", "imagenet_cnsn_ibn_augmix", "cifar10_wrn", "cifar10_wrn_cnsn", "cifar10_wrn_cnsn_consistency", "cifar10_wrn_cnsn_augmix", "cifar100_wrn", "cifar100_wrn_cnsn", "cifar100_wrn_cnsn_consistency", "cifar100_wrn_cnsn_augmix", "cifar10_resnext", "cifar10_resnext_cnsn", "cifar10_resnext_cnsn_consistency", "cifar10_resnext_cnsn_augmix", "cifar100_resnext", "cifar100_resnext_cnsn", "cifar100_resnext_cnsn_consistency", "cifar100_resnext_cnsn_augmix", "cifar10_densenet", "cifar10_densenet_cnsn", "cifar10_densenet_cnsn_consistency", "cifar10_densenet_cnsn_augmix", "cifar100_densenet", "cifar100_densenet_cnsn", "cifar100_densenet_cnsn_consistency", "cifar100_densenet_cnsn_augmix", "cifar10_allconv", "cifar10_allconv_cnsn", "cifar10_allconv_cnsn_consistency", "cifar10_allconv_cnsn_augmix", "cifar100_allconv", "cifar100_allconv_cnsn", "cifar100_allconv_cnsn_consistency", "cifar100_allconv_cnsn_augmix", "gtav_fcn_cnsn"] | None = ...,
    layers: str | int | collections.abc.Sequence[str | int] | None = ...,
    position: Literal["pre", "pre_with_projection", "residual", "identity", "post", "output", "conv1_pre", "conv1_post", "conv2_post", "conv", "norm", "act"] | None = ...,
    layout: Literal["NCHW", "NHWC", "NLC", "NCL", "NCDHW", "NDHWC"] | None = ...,
    p: float = ...,
    active: int | None = ...,
    mode: Literal["two-instance", "one-instance", "both"] = ...,
    crop: Literal["neither", "content", "style", "both"] = ...,
    beta: float = ...,
    threshold: float = ...,
    lam: float = ...,
    skip_last: bool = ...,
    detach: bool = ...,
    consistency: bool = ...,
    consistency_weight: float = ...,
    views: int = ...,
    output: str | int | None = ...,
    probability: Literal["softmax", "sigmoid"] | None = ...,
    layer: str | int | collections.abc.Sequence[str | int] | None = ...,
) -> _M: ...
@overload
def patch(
    model: _M,
    method: Literal["diversification"],
    *,
    name: str | None = ...,
    dry_run: Literal[False] = ...,
    input_size: tuple[int, ...] | None = ...,
    preset: Literal["block", "paper"] | None = ...,
    alpha: float = ...,
    p_peak: float = ...,
    p_patch: float = ...,
    patch: int | tuple[int, ...] = ...,
    border: Literal["skip", "partial"] = ...,
    ties: Literal["first", "all"] = ...,
    head: str | None = ...,
    output: str | int | None = ...,
    loss: Literal["gradient_boosting"] | None = ...,
    loss_k: int = ...,
    loss_start: float = ...,
    return_maps: bool = ...,
) -> _M: ...
@overload
def patch(
    model: _M,
    method: Literal["dsu"],
    *,
    name: str | None = ...,
    dry_run: Literal[False] = ...,
    input_size: tuple[int, ...] | None = ...,
    preset: Literal["pacs", "office_home"] | None = ...,
    layers: str | int | collections.abc.Sequence[str | int] | None = ...,
    p: float = ...,
    factor: float = ...,
    layer: str | int | collections.abc.Sequence[str | int] | None = ...,
) -> _M: ...
@overload
def patch(
    model: _M,
    method: Literal["gam"],
    *,
    name: str | None = ...,
    dry_run: Literal[False] = ...,
    input_size: tuple[int, ...] | None = ...,
    preset: Literal["digits", "segmentation"] | None = ...,
    layers: str | int | collections.abc.Sequence[str | int] | None = ...,
    source: torch.nn.Module | None = ...,
    task: Literal["classification", "dense"] = ...,
    matching: Literal["gaussian"] | None = ...,
    match_in: Literal["network", "discriminators"] = ...,
    statistics: Literal["batch", "running"] = ...,
    momentum: float = ...,
    eps: float = ...,
    gan: Literal["jsd", "lsgan"] | None = ...,
    invert: Literal["target", "both"] = ...,
    weights: collections.abc.Sequence[float] | None = ...,
    drift: float | None = ...,
    drift_convention: Literal["mean", "sum"] = ...,
    discriminator: collections.abc.Callable[[tuple[int, ...]], torch.nn.Module] | None = ...,
    hidden: int = ...,
    activation: Literal["relu", "leaky"] = ...,
    layout: Literal["NCHW", "NHWC", "NLC", "NCL", "NC", "NCDHW", "NDHWC"] | None = ...,
    output: str | int | None = ...,
    layer: str | int | collections.abc.Sequence[str | int] | None = ...,
) -> _M: ...
@overload
def patch(
    model: _M,
    method: Literal["mixmo"],
    *,
    name: str | None = ...,
    dry_run: Literal[False] = ...,
    input_size: tuple[int, ...] | None = ...,
    preset: Literal["cifar_linear", "cifar_cut", "cifar_mimo", "tiny_imagenet_linear", "tiny_imagenet_cut"] | None = ...,
    members: int = ...,
    mixing: Literal["linear", "sum", "cut", "tube", "cow", "patchup_hard", "patchup_soft", "horizontal", "vertical", "channel", "stack_channel", "noise"] = ...,
    p: float = ...,
    decay: float = ...,
    epochs: int | None = ...,
    alpha: float = ...,
    r: float = ...,
    repetitions: int = ...,
    kept: float = ...,
    shuffle_roles: bool = ...,
    visible_labels: bool = ...,
    init: Literal["pretrained", "random"] = ...,
    spread: float = ...,
    output: str | int | None = ...,
) -> _M: ...
@overload
def patch(
    model: _M,
    method: Literal["mixstyle"],
    *,
    name: str | None = ...,
    dry_run: Literal[False] = ...,
    input_size: tuple[int, ...] | None = ...,
    preset: Literal["pacs", "pacs_domains", "office_home", "office_home_domains", "reid", "efdmix_pacs", "efdmix_pacs_single"] | None = ...,
    layers: str | int | collections.abc.Sequence[str | int] | None = ...,
    p: float = ...,
    stages: int = ...,
    alpha: float = ...,
    mix: Literal["random", "crossdomain"] = ...,
    match: Literal["moments", "histogram"] = ...,
    layer: str | int | collections.abc.Sequence[str | int] | None = ...,
) -> _M: ...
@overload
def patch(
    model: _M,
    method: Literal["rsc"],
    *,
    name: str | None = ...,
    dry_run: Literal[False] = ...,
    input_size: tuple[int, ...] | None = ...,
    preset: Literal["pacs", "imagenet", "domainbed"] | None = ...,
    layers: str | int | collections.abc.Sequence[str | int] | None = ...,
    scope: Literal["both", "spatial", "channel"] = ...,
    strategy: Literal["top_gradient", "random_top_half", "top_activation", "random"] = ...,
    saliency: Literal["grad_cam", "gradient"] = ...,
    spatial_drop: float = ...,
    channel_drop: float = ...,
    vector_drop: float = ...,
    batch_share: float = ...,
    batch_schedule: Literal["constant", "authors", "imagenet"] = ...,
    epochs: int | None = ...,
    start: float = ...,
    layout: Literal["NCHW", "NHWC", "NLC", "NCL", "NC", "NCDHW", "NDHWC"] | None = ...,
    output: str | int | None = ...,
    ignore_index: int = ...,
    probability: Literal["softmax", "sigmoid"] | None = ...,
    layer: str | int | collections.abc.Sequence[str | int] | None = ...,
) -> _M: ...
@overload
def patch(
    model: _M,
    method: Literal["selfnorm"],
    *,
    name: str | None = ...,
    dry_run: Literal[False] = ...,
    input_size: tuple[int, ...] | None = ...,
    preset: Literal["imagenet", "imagenet_cnsn", "imagenet_cnsn_consistency", "imagenet_cnsn_ibn_augmix", "cifar10_wrn", "cifar10_wrn_cnsn", "cifar10_wrn_cnsn_consistency", "cifar10_wrn_cnsn_augmix", "cifar100_wrn", "cifar100_wrn_cnsn", "cifar100_wrn_cnsn_consistency", "cifar100_wrn_cnsn_augmix", "cifar10_resnext", "cifar10_resnext_cnsn", "cifar10_resnext_cnsn_consistency", "cifar10_resnext_cnsn_augmix", "cifar100_resnext", "cifar100_resnext_cnsn", "cifar100_resnext_cnsn_consistency", "cifar100_resnext_cnsn_augmix", "cifar10_densenet", "cifar10_densenet_cnsn", "cifar10_densenet_cnsn_consistency", "cifar10_densenet_cnsn_augmix", "cifar100_densenet", "cifar100_densenet_cnsn", "cifar100_densenet_cnsn_consistency", "cifar100_densenet_cnsn_augmix", "cifar10_allconv", "cifar10_allconv_cnsn", "cifar10_allconv_cnsn_consistency", "cifar10_allconv_cnsn_augmix", "cifar100_allconv", "cifar100_allconv_cnsn", "cifar100_allconv_cnsn_consistency", "cifar100_allconv_cnsn_augmix", "gtav_fcn_cnsn"] | None = ...,
    layers: str | int | collections.abc.Sequence[str | int] | None = ...,
    position: Literal["pre", "pre_with_projection", "residual", "identity", "post", "output", "conv1_pre", "conv1_post", "conv2_post", "conv", "norm", "act"] | None = ...,
    layout: Literal["NCHW", "NHWC", "NLC", "NCL", "NCDHW", "NDHWC"] | None = ...,
    gates: Literal[1, 2] = ...,
    init: Literal["identity", "authors"] = ...,
    layer: str | int | collections.abc.Sequence[str | int] | None = ...,
) -> _M: ...
@overload
def patch(
    model: _M,
    method: Literal["taps"],
    *,
    name: str | None = ...,
    dry_run: Literal[False] = ...,
    input_size: tuple[int, ...] | None = ...,
    preset: None = ...,
    layers: str | int | collections.abc.Sequence[str | int] | None = ...,
    detach: bool = ...,
    copy: bool = ...,
    layer: str | int | collections.abc.Sequence[str | int] | None = ...,
) -> _M: ...
@overload
def patch(
    model: _M,
    method: Patch,
    *,
    name: str | None = ...,
    dry_run: Literal[False] = ...,
    input_size: tuple[int, ...] | None = ...,
) -> _M: ...
@overload
def patch(
    model: _M,
    method: str,
    *,
    name: str | None = ...,
    dry_run: Literal[False] = ...,
    input_size: tuple[int, ...] | None = ...,
    preset: str | None = ...,
    **options: Any,
) -> _M: ...
@overload
def patch(
    model: torch.nn.Module,
    method: str | Patch,
    *,
    name: str | None = ...,
    dry_run: Literal[True],
    input_size: tuple[int, ...] | None = ...,
    preset: str | None = ...,
    **options: Any,
) -> Plan: ...
