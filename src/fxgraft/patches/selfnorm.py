"""SelfNorm: learned gates on the channel statistics of maps.

With mean μ and deviation σ = √(unbiased variance + 1e-12) per instance and channel of a map x (B, C, *S),

    g = sigmoid(BN(w_g · [μ, σ])),      y = x · g                                 (one gate)
    f = sigmoid(BN(w_f · [μ, σ])),      y = x · g + μ · (f − g)                   (two gates)

so that with two gates g scales the deviation and f the mean. w is one pair of numbers per channel.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxgraft._torch import BatchNorm
from fxgraft.extend import (
    Backbone,
    BlockPatch,
    FxgraftWarning,
    Graft,
    Layout,
    Make,
    Panel,
    PassView,
    Picture,
    Placement,
    Preset,
    Structure,
    Training,
    Unit,
    View,
    acted_on,
    preserved_modes,
    presets_by_name,
    register,
)
from fxgraft.functional.modulation import modulated

GateFunction = Callable[[Tensor, Tensor], Tensor]
"""From mean and deviation, (B, C) each, to a gate (B, C)."""

EPS = 1e-12


RELEASE = "release, github.com/amazon-science/crossnorm-selfnorm"
# folder of the scripts, network, epochs, weight decay, structure; places without CrossNorm and with it
NETWORKS: dict[str, tuple[str, str, int, str, Structure, dict[str, str]]] = {
    "wrn": (
        "wideresnet", "WRN-40-2", 100, "5e-4", Structure(blocks="residual blocks", units=18, convolutions=2),
        {"cifar10": "pre", "cifar100": "post", "cnsn": "post"},
    ),
    "resnext": (
        "resnext", "ResNeXt-29 (4×32)", 200, "5e-4",
        Structure(blocks="residual blocks", units=9, convolutions=3, groups=4),
        {"cifar10": "pre_with_projection", "cifar100": "residual", "cnsn": "output"},
    ),
    "densenet": (
        "densenet", "DenseNet-40 (k = 12, no bottleneck)", 200, "1e-4",
        Structure(blocks="dense layers", units=36, convolutions=1),
        {"cifar10": "conv1_post", "cifar100": "conv1_pre", "cnsn": "conv1_pre"},
    ),
    "allconv": (
        "allconv", "AllConv", 100, "5e-4", Structure(blocks="conv sites", units=9),
        {"cifar10": "conv", "cifar100": "conv", "cnsn": "conv"},
    ),
}  # fmt: skip
RESNET = Structure(blocks="residual blocks", units=16, convolutions=3)
IBN = Structure(blocks="residual blocks", units=16, convolutions=3, instance_norm=True)
CNSN = {"_cnsn": "cnsn", "_cnsn_consistency": "cnsn-consist", "_cnsn_augmix": "cnsn-augmix"}


def _preset(name: str, position: str, script: str, structure: Structure, **training: Any) -> Preset:
    return Preset(
        name=name,
        options={"position": position, "gates": 1, "init": "authors"},
        source=f"{RELEASE}, {script}",
        training=Training(**training),
        structure=structure,
    )


def _cifar(data: str, key: str, kind: str) -> Preset:
    """Return a preset of CIFAR; ``..._cnsn`` is trained as CrossNorm's of the same name, which says how."""
    folder, network, epochs, decay, structure, places = NETWORKS[key]
    name = f"{data}_{key}{kind}"
    script = f"{data}-scripts/{folder}/run-{CNSN.get(kind, 'sn')}.sh"
    if kind:
        return _preset(name, places["cnsn"], script, structure, network=network, note=_together(name))
    return _preset(
        name, places[data], script, structure, network=f"{network}, from scratch",
        data=f"CIFAR-{data.removeprefix('cifar')}, 32 px, normalised by mean 0.5 and deviation 0.5",
        optimiser="SGD 0.1, momentum 0.9, Nesterov", schedule="cosine to 1e-6, step by step", epochs=epochs, batch=128,
        weight_decay=f"{decay}, on every parameter", augmentation="flip, crop 32 with padding 4",
    )  # fmt: skip


def _together(name: str) -> str:
    return f"with crossnorm's preset {name!r}, and trained as that"


PRESETS = presets_by_name(
    _preset(
        "imagenet", "post", "imagenet-scripts/run-sn.sh", RESNET, network="ResNet-50, from scratch",
        data="ImageNet, 224 px", optimiser="SGD 0.05 (0.1 · batch / 256), momentum 0.9",
        schedule="×0.1 at epochs 30 and 60", epochs=90, batch=128, weight_decay="1e-4, on every parameter",
        augmentation="random resized crop, flip",
    ),
    *(
        _preset(name, where, f"imagenet-scripts/run-{script}.sh", structure, network=network, note=_together(name))
        for name, where, script, structure, network in (
            ("imagenet_cnsn", "post", "cnsn", RESNET, "ResNet-50"),
            ("imagenet_cnsn_consistency", "post", "cnsn-consist", RESNET, "ResNet-50"),
            ("imagenet_cnsn_ibn_augmix", "residual", "cnsn-augmix", IBN, "ResNet-50-IBN-b"),
        )
    ),
    *(_cifar(data, key, kind) for key in NETWORKS for data in ("cifar10", "cifar100") for kind in ("", *CNSN)),
    _preset(
        "gtav_fcn_cnsn", "residual", "segmentation/config/gtav/gtav_fcn50_cnsn.yaml", RESNET,
        network="dilated FCN-ResNet-50", note=_together("gtav_fcn_cnsn"),
    ),
)  # fmt: skip


@register("selfnorm")
@dataclass(frozen=True, kw_only=True)
class SelfNorm(BlockPatch):
    """SelfNorm: gate each map by its own channel statistics.

    Tang, Gao, Zhu, Zhang, Li, Metaxas: "CrossNorm and SelfNorm for Generalization under Distribution Shifts",
    ICCV 2021. Every residual block gets a unit that recalibrates the statistics of its map by gates computed from
    the map's own means and deviations. It acts in training and in evaluation.

    A patched network starts as the bare one, exactly, by gates 2 · sigmoid(0), and keeps what it was trained to.
    The gates of the authors' release start around 0.5 (``init="authors"``): each block then halves its
    activations, and a pretrained ResNet-18 hands about 2⁻⁸ of them to its head, so patching one that way warns,
    and so does its first training pass (not inside compiled code).
    Where it goes: the options of `BlockPatch`.

    Args:
        gates: 1 (the released configurations) or 2 (the paper's form, one gate for mean and one for deviation).
        init: "identity", where a unit starts as the identity, or "authors", where a gate starts around 0.5.

    Raises:
        ConfigError: an option outside its range.
        StructureError: the model has no block with the position; says what it has.
        SiteError: no such layer, or one without maps or tokens.
    """

    title = "SelfNorm"
    paper = (
        "Tang, Gao, Zhu, Zhang, Li, Metaxas: CrossNorm and SelfNorm for Generalization under Distribution "
        "Shifts. ICCV 2021"
    )
    url = "https://arxiv.org/abs/2102.02811"
    cost = "one pass over each block's map for its statistics and one to scale it, in training and evaluation"
    idea = (
        "Learned gates look at the channel statistics of every map and recalibrate them, in training and "
        "in evaluation, so that unseen styles are brought back to known ones."
    )
    equation = (
        "y = x · g with g = sigmoid(BN(w · [μ, σ])); with two gates y = x · g + μ · (f − g), where g "
        "scales the deviation and f the mean"
    )
    works_with = (
        "residual blocks, dense blocks, plain stacks and vision transformers; CrossNorm, which acts in "
        "front of it; all other methods. It cannot be merged: keep the patched model"
    )
    hurts = (
        'init="authors" on trained weights, which halves the activations of every block at first; where '
        "every millisecond of evaluation counts"
    )
    smallest_map = 2
    measures = MappingProxyType(
        {
            "gate": "mean of the gates over all units",
            "gate.<site>": "mean of the gates at one site",
            "mean_gate": "mean of the second gate, which scales the mean",
            "mean_gate.<site>": "mean of the second gate at one site",
        }
    )
    adds_parameters = True
    presets = PRESETS
    order = ("style", 1)  # at one site after CrossNorm, in the authors' order

    gates: Literal[1, 2] = 1
    init: Literal["identity", "authors"] = "identity"

    def place(self, backbone: Backbone, make: Make) -> Iterator[list[Placement]]:
        """Put one unit in every block."""
        warned = self.init == "identity" or not _trained(backbone.model)

        def build(config: SelfNorm, channels: int) -> SelfNormUnit:
            nonlocal warned  # once, and only where a unit is new: not when the model is planned again
            if not warned:
                warned = True
                _warn(backbone.name)
            return SelfNormUnit(config, channels)

        for site in backbone.positions(self.position, self.layers):
            layout = backbone.layout(site, self.layout)
            unit = make(site.name, build, self, layout.canonical(site.value).shape[1])
            unit.bind(layout=layout, key=site.name)
            yield from self.put(backbone, make, site, unit)

    def on_first_training_pass(self, graft: Graft, model: nn.Module) -> None:
        """Warn where weights that were trained have come to the network since it was patched, or still are there."""
        if self._halves(graft, model):
            _warn(model._get_name())

    def picture(self, graft: Graft, view: View) -> Picture:
        """Show how far the gates open for each image: on the mean of each unit, and channel by channel."""
        units = graft.units_of(SelfNormUnit)
        images = {f"image {index + 1}": image for index, image in enumerate(view.images[: view.given])}
        opened: dict[str, list[Tensor]] = {}
        hooks = [
            gate.register_forward_hook(lambda _, args, out, key=key: opened.setdefault(key, []).append(out))
            for key in ("g", "f")
            for unit in units
            if (gate := getattr(unit, key)) is not None
        ]
        with torch.no_grad():
            view.model.eval()(view.inputs[: view.given])
        for hook in hooks:
            hook.remove()
        named = {key: f"gate {key}" if len(opened) > 1 else "gate" for key in opened}
        depth = {
            f"{named[key]}, {name}": torch.stack([gate[row].mean() for gate in gates])
            for key, gates in opened.items()
            for row, name in enumerate(images)
        }
        rows = [
            [Panel(name, image) for name, image in images.items()],
            [Panel("mean gate of each unit", curves=depth, unit="mean gate", along="unit, in running order")],
        ]
        shown = sorted({0, len(units) // 2, len(units) - 1})
        for key, gates in opened.items():
            order = [gates[index][0].argsort() for index in shown]
            rows.append(
                [
                    Panel(
                        f"{named[key]} at {units[index].key}",
                        curves={name: gates[index][row][by] for row, name in enumerate(images)},
                        unit="gate",
                        along="channel, sorted by the first's",
                    )
                    for index, by in zip(shown, order, strict=True)
                ]
            )
        start = "change nothing yet" if self.init == "identity" else "start around 0.5"
        fresh = f"untrained gates, which {start}" if all(unit.fresh for unit in units) else ""
        return Picture(rows, f"{', '.join(named.values())} of {len(units)} units", fresh)

    def describe(self, graft: Graft) -> str:
        """Say how many units there are, where, and how their gates start; on trained weights, what that does."""
        start = "start as the identity" if self.init == "identity" else "start around 0.5"
        gates = "gates" if self.gates == 2 else "gate"
        count = len(graft.units_of(SelfNormUnit))
        units = f"{count} units ({self.placed_at(graft)}), {self.gates} {gates} each, which {start}"
        model = graft.model()
        return units if model is None or not self._halves(graft, model) else f"{units}; {HALVED}"

    def _halves(self, graft: Graft, model: nn.Module) -> bool:
        """Say whether gates that never trained are about to halve what a trained network passes on."""
        return (
            self.init == "authors"
            and all(unit.fresh for unit in graft.units_of(SelfNormUnit))
            and _trained(model)
        )


HALVED = (
    "this network has been trained: every block will halve its activations, and what it has learned is lost until "
    "it is trained again"
)


def _warn(name: str) -> None:
    warnings.warn(
        f'SelfNorm: init="authors" opens each gate of this {name} to about 0.5, and {HALVED}. '
        'Use init="identity" (the default) to start from it as it is.',
        FxgraftWarning,
        stacklevel=3,
    )


def _trained(model: nn.Module) -> bool:
    """Say whether a network has seen images: one look at a BatchNorm, whose mean starts at zero."""
    for module in model.modules():
        mean = module.running_mean if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)) else None
        if mean is not None:
            return _holds_other_than_zero(mean)
    return False


def _holds_other_than_zero(tensor: Tensor) -> bool:
    # Only a plain tensor can be asked: a fake one, or one on the meta device, has no values.
    return type(tensor) is Tensor and tensor.device.type != "meta" and bool(tensor.any())


class SelfNormUnit(Unit):
    """Gates the value at one site.

    Args:
        config: the options.
        channels: number of channels of the site.
    """

    layout: Layout
    key: str

    def __init__(self, config: SelfNorm, channels: int) -> None:
        super().__init__()
        self.g = Gate(channels, config.init)
        self.f = Gate(channels, config.init) if config.gates == 2 else None

    @property
    def fresh(self) -> bool:
        """Whether the gates have seen no training pass, here or in a checkpoint."""
        seen = self.g.norm.num_batches_tracked
        return seen is not None and not _holds_other_than_zero(seen)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, shaped as it is, gated."""
        run = self.current
        if run is not None:
            run.check_images_alone(
                "Statistics of channels would count positions that are padding.",
                all_positions=True,
            )
        if run is None or not self.training:
            g, f = self.g, self.f
        else:
            g = self._measuring(run, "gate", self.g)
            f = None if self.f is None else self._measuring(run, "mean_gate", self.f)
        return self.layout.restore(x, selfnorm(self.layout.canonical(x), g, f))

    def _measuring(self, run: PassView, name: str, gate: GateFunction) -> GateFunction:
        def measured(mean: Tensor, std: Tensor) -> Tensor:
            opened = gate(mean, std)
            run.measure(name, opened)
            run.measure(f"{name}.{self.key}", opened)
            return opened

        return measured


class Gate(nn.Module):
    """From means and deviations (B, C) to a gate (B, C). Its parameters are vectors of C numbers each.

    Args:
        channels: C.
        init: "identity" (the gate is 2 · sigmoid of a normalisation whose scale and offset start at 0: exactly 1)
            or "authors" (sigmoid of one whose scale starts at 1). Weights start uniform in ±1/√2 in both, as a
            convolution of kernel 2 does.
    """

    def __init__(self, channels: int, init: Literal["identity", "authors"] = "identity") -> None:
        super().__init__()
        self.factor = 2.0 if init == "identity" else 1.0
        bound = 0.5**0.5
        self.mean_weight = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))
        self.std_weight = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))
        self.norm = nn.BatchNorm1d(channels)
        if init == "identity":
            nn.init.zeros_(self.norm.weight)

    def forward(self, mean: Tensor, std: Tensor) -> Tensor:
        """Return the gate; a batch of one is normalised by the running statistics, in training too."""
        x = gate_input(mean, std, self.mean_weight, self.std_weight).to(self.mean_weight.dtype)
        norm = self.norm
        if not (norm.training and x.shape[0] == 1 and isinstance(norm, BatchNorm)):
            x = norm(x)
        elif not acted_on(norm):
            x = F.batch_norm(
                x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
            )
        else:
            with preserved_modes(norm):
                x = norm.eval()(x)
        gate = x.sigmoid()
        return gate if self.factor == 1.0 else gate * self.factor


def selfnorm(x: Tensor, g: GateFunction, f: GateFunction | None = None, *, eps: float = EPS) -> Tensor:
    """Gate a map by its own statistics.

    Args:
        x: (B, C, *S), floating point.
        g: gate of the deviation, or, alone, of everything.
        f: gate of the mean.
        eps: added to the variance under the root.

    Returns:
        (B, C, *S).
    """

    def coefficients(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor | None]:
        std = (var + eps).sqrt()
        scale = g(mean, std)
        return scale, None if f is None else mean * (f(mean, std) - scale)

    return modulated(x, coefficients)


def gate_input(mean: Tensor, std: Tensor, mean_weight: Tensor, std_weight: Tensor) -> Tensor:
    """W · [μ, σ] for every instance and channel: (B, C) from weights (C,)."""
    return torch.addcmul(mean * mean_weight, std, std_weight)
