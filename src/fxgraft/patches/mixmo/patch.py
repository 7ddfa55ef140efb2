"""MixMo: the patch, the units at both ends of the network, and those around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from fxgraft.extend import (
    Backbone,
    BypassError,
    ConfigError,
    Graft,
    Make,
    Patch,
    Picture,
    Placement,
    SiteError,
    Stem,
    TargetError,
    Unit,
    View,
    WrappedModelError,
    apply_layer,
    because,
    check_count,
    check_criterion,
    check_positive,
    check_share,
    grafts_on,
    is_derived,
    register,
)
from fxgraft.patches.mixmo import tensors as core
from fxgraft.patches.mixmo.ensemble_metrics import disagreement
from fxgraft.patches.mixmo.folding import LayerCopies, copies_key, fold
from fxgraft.patches.mixmo.masks import BY_CHANNEL, WITHOUT_POSITIONS, Mixing
from fxgraft.patches.mixmo.members import Members
from fxgraft.patches.mixmo.pairing import PAIRING, MixMoInput, Pairing, check_labels, known_pairing
from fxgraft.patches.mixmo.picture import mixture_panels
from fxgraft.patches.mixmo.presets import PRESETS

INPUTS, RETURN = "inputs", "members"

M = TypeVar("M", bound="MemberUnit")


@register("mixmo")
@dataclass(frozen=True, kw_only=True)
class MixMo(Patch):
    """MixMo: several inputs and outputs through one network, folded back into the stock network at the end.

    Ramé, Sun, Cord: "MixMo: Mixing Multiple Inputs for Multiple Outputs via Deep Subnetworks", ICCV 2021; MIMO
    (Havasi et al., ICLR 2021) is its mixing by sums. In training M encoders in place of the first layer take M images
    of the batch, a mixture of their outputs goes through the network, and M classifiers in place of the last one tell
    what each of the images was:

        l = M · Σ_i mask_i · conv(x_i; W_i),
        loss = Σ_i w_i · CE(y_i, d_i(l)),    w_i = M · κ_i^{1/r} / Σ_j κ_j^{1/r}.

    Evaluation gives every encoder the same image under masks of 1/M and averages the logits. Both ends are linear,
    so that is one pass of the bare network with the weights Σ_i W_i and mean_i D_i, which it computes again in every
    pass; `fxgraft.merge` writes them into the stock tensors.

    It costs the encoders and the mixing at the stem. It needs capacity: on a network that is narrow for its data the
    members compete, and the paper's gains are from wide ones, trained with every batch repeated.

    A batch of one image (a micro-batch, or a last batch) has no other to pair: its members see the same image, of which
    a warning tells once.

    A training pass returns one row of logits per member, (M, B, K), and `fxgraft.loss` gives their weighted sum.
    An evaluation pass returns (B, K), with ``members=True`` in the call (M, B, K). In a structured output that is the
    entry with the logits.

    The stock stem and classifier stay where they are and are member 0; the tensors of the others sit beside them,
    as ``<layer>.graft_mixmo.weight_1`` and so on. How they stand to the paper's W_i depends on ``init``:

    - "pretrained": the tensors V_i start as copies of the stock ones, and W_i = (V_i ± Δ_i) / M with offsets Δ_i
      that cancel over the members and are not trained (buffers ``offset_0``, ...); the heads have such offsets too.
      Evaluation has mean_i V_i as its stem: it starts as the bare network, bit by bit, though the members do not
      start alike. Their length is ``spread`` times that of the weights.
    - "random": W_i = V_i, as in the paper. The members from 1 on are drawn with mean and deviation of the stock
      tensors. The mixture is M · Σ_i mask_i · conv(x_i; V_i), evaluation has Σ_i V_i: an untrained network whose
      stem is not the stock one.

    Without a spread only the pairing of the batch tells the members apart. On a small ResNet-18 (500 digits, then two
    members on 900 others, means of 3 seeds) spreads of 0, 0.05, 0.1 and 0.2 left them disagreeing on 2.9, 4.6, 5.0 and
    7.4 % of the test images after one epoch, the merged network at 85 to 88 %; after five epochs on 1 to 2 %, at 96 %.

    A stem's bias is one of the tensors and follows the same rule, as does the gain of one whose weight is standardised;
    what is averaged there are the standardised weights. Where the image enters through stems of several sizes, the
    ratios are those of the first, and the others show each member in the same place of the image.

    The members' tensors stand in the layer that they serve: ``get_classifier()`` has all heads, and what goes by
    modules or by the beginning of a name (freezing, layer decay) treats them as the layer. So do weight-decay rules by
    dimension, and the model's ``no_weight_decay()``. What goes by the order of parameters cannot know them:
    ``timm.models.model_parameters(model, exclude_head=True)``, for adaptive gradient clipping, drops the last two,
    those of the last member's head. ``fxgraft.integrations.timm.grafting.model_parameters`` drops all heads;
    scripts under ``python -m fxgraft.timm`` get that one. To freeze a layer later, call
    ``layer.requires_grad_(False)``.

    `fxgraft.unpatch` leaves the tensors of member 0 in the stock layers, without its offset; to keep what was trained,
    `fxgraft.merge` first.

    Every member has the criterion that is given to `fxgraft.loss`, row by row: with several labels for each image
    binary cross-entropy over (B, K) labels of 0 and 1, with one logit binary cross-entropy or a loss of numbers.
    Cross-entropy of one logit is refused, since it is 0.

    Args:
        members: M, at least 1. One member trains as the bare model.
        mixing: "cut" (a box of one image in the other, of clips and volumes a cuboid), "tube" (a box in every frame of
            a clip), "linear", "sum" (MIMO, equal parts), "cow",
            "patchup_hard", "patchup_soft", "horizontal", "vertical", "channel", "stack_channel" or "noise"; with more
            than two members those beyond the first share what it leaves, linearly.
        p: probability of that mixing in a batch, else it is linear; in [0, 1].
        decay: last share of training over which p falls to 0; read from `fxgraft.set_progress`.
        epochs: length of the training in epochs; p then falls from epoch to epoch, as in the release, to exactly 0 in
            the last one. Default: with every `fxgraft.set_progress`.
        alpha: parameter of the Dirichlet distribution of the mixing ratios, above 0. Large values mix evenly.
        r: root of the ratios that weighs the losses, above 0; larger values weigh more evenly.
        repetitions: how often every image of the batch, as it was augmented, occurs, in as many mixtures; the output
            is then (M, repetitions · B, K). The authors repeat in the loader: `fxgraft.mixmo.paired_loader` has each
            member's image augmented by itself, `fxgraft.mixmo.RepeatedBatchSampler` each copy of the batch, which the
            members share.
        kept: share of the rows in which all members get the same image.
        shuffle_roles: deal in every batch again whose image is the one that is cut out.
        visible_labels: weigh the two labels of `MixedLabels` (images mixed before, by `fxgraft.mixmo.input_cutmix`) by
            what the mask leaves visible of each, as the authors do, instead of by their share of the image.
        init: "pretrained": evaluation starts as the bare network, bit by bit, and the members a little apart;
            "random": the members from 1 on are drawn again, for networks trained from scratch.
        spread: how far apart the members start with init="pretrained", as a share of the weights' length; in [0, 1].
            The offsets are drawn from torch's generator.
        output: which entry of a structured output holds the logits (a key, an attribute or a position). The model's
            output keeps its class and its other entries, which are of the mixtures.

    Raises:
        ConfigError: an option outside its range, or a mixing that the stem has no positions for.
        StructureError: no linear stem that all of the image goes through, or no linear classifier.
    """

    title = "MixMo"
    paper = (
        "Ramé, Sun, Cord: MixMo: Mixing Multiple Inputs for Multiple Outputs via Deep Subnetworks. ICCV 2021"
    )
    url = "https://arxiv.org/abs/2103.06132"
    where = "the stem and the classifier"
    cost = "training: stem and classifier run once per member, and the stem's outputs are mixed; evaluation: none"
    idea = (
        "Several networks are trained inside one: each has its own first layer and classifier, and the "
        "middle sees a mixture of their images. Evaluation is one pass of one network."
    )
    equation = (
        "l = M · Σ_i mask_i · conv(x_i; W_i); loss = Σ_i w_i · CE(y_i, d_i(l)) with w_i = M · κ_i^(1/r) / "
        "Σ_j κ_j^(1/r); evaluation: Σ_i W_i and the mean of the d_i"
    )
    works_with = (
        "linear stems and classifiers; RSC, CrossNorm, SelfNorm, GAM, taps; Mixup and CutMix in front. Not the "
        "diversification block, which leaves the classifier out, no second method that pairs labels, no DataParallel"
    )
    hurts = "networks that are narrow for their data, where the members compete; short trainings"
    measures = MappingProxyType(
        {
            "agreement": "share of the rows on which two members say the same class; their images differ in training",
        }
    )
    needs_labels = True
    adds_parameters = True
    pairs_labels = "mixes images again in every pass"
    presets = PRESETS
    call_options = ("members",)

    members: int = 2
    mixing: Mixing = "cut"
    p: float = 0.5
    decay: float = 1 / 12
    epochs: int | None = None
    alpha: float = 2.0
    r: float = 3.0
    repetitions: int = 1
    kept: float = 0.0
    shuffle_roles: bool = True
    visible_labels: bool = True
    init: Literal["pretrained", "random"] = "pretrained"
    spread: float = 0.1
    output: str | int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "p", "decay", "kept", "spread")
        check_count(self, "members", "repetitions", *(["epochs"] if self.epochs is not None else []))
        check_positive(self, "alpha", "r")

    @property
    def gain(self) -> float:
        """Factor of the mixture: 1 where the members' weights stand for W_i / M, M where for W_i."""
        return 1.0 if self.init == "pretrained" else float(self.members)

    def schedules(self) -> tuple[str, ...]:
        """Name ``decay``, where there is a probability to decay."""
        falls = self.mixing not in ("linear", "sum") and self.members > 1 and self.p > 0 and self.decay > 0
        return ("decay",) if falls else ()

    def place(self, backbone: Backbone, make: Make) -> Iterator[Placement]:
        """Put encoders in place of the stems, heads in place of the classifiers, and units around the model."""
        with because(
            "Several stems and classifiers fold into one only where the image enters through linear layers and the "
            "logits, one row per image, are linear in the classifiers' weights."
        ):
            heads, stems = backbone.classifiers(self.output), backbone.stems()
        self._check_stems(stems)
        inputs = make(INPUTS, Inputs, self)
        inputs.bind(classifier=heads[0])
        yield backbone.before(inputs, INPUTS)
        yield backbone.after(make(RETURN, Members, self.members, self.output), RETURN)
        for stem in stems:
            unit = self._member_unit(backbone, make, stem.path, Encoders)
            unit.bind(stem=stem)
            yield backbone.instead(stem.path, unit)
        for path in heads:
            yield backbone.instead(path, self._member_unit(backbone, make, path, Heads))

    def _member_unit(self, backbone: Backbone, make: Make, path: str, kind: type[M]) -> M:
        module = backbone.module(path)
        # A layer of another size that took the place of this one gets units of its own.
        unit = make(copies_key(path, module), kind, self, module)
        unit.serve(path, module)
        return unit

    def _check_stems(self, stems: Sequence[Stem]) -> None:
        if self.mixing in ("linear", "sum"):
            return
        for stem in stems:
            if stem.layout.name == "NC" and self.mixing not in WITHOUT_POSITIONS:
                raise ConfigError(
                    f"MixMo: mixing={self.mixing!r} needs positions, and {stem.path!r} gives one vector per image.\n"
                    f"Pass mixing={' or '.join(map(repr, WITHOUT_POSITIONS))}."
                )
        widths = {
            stem.path: stem.layout.canonical(torch.empty(stem.shape, device="meta")).shape[1]
            for stem in stems
        }
        if self.mixing in BY_CHANNEL and len(set(widths.values())) > 1:
            raise ConfigError(
                f'MixMo: mixing="{self.mixing}" needs stems of one width, and there are {widths}.\n'
                "One mask says for all of them which channels a member has.\nPass another mixing."
            )

    def describe(self, graft: Graft) -> str:
        """Name the two ends, the number of members and the mixing."""
        kinds = {kind: [unit.path for unit in graft.units_of(kind)] for kind in (Encoders, Heads)}
        often = f" with probability {self.p:g}" if self.mixing not in ("linear", "sum") else ""
        repeated = f", each batch {self.repetitions} times" if self.repetitions > 1 else ""
        return (
            f"{self.members} encoders at {', '.join(kinds[Encoders])} and heads at {', '.join(kinds[Heads])}, "
            f"{self.mixing} mixing{often}{repeated}"
        )

    def diagnostics(self, graft: Graft) -> Mapping[str, Any]:
        """Count on how many rows two members agree, by the logits of the last training pass."""
        measured = graft.measured().items()
        return {name: torch.stack([1 - disagreement(value) for value in values]) for name, values in measured}

    def criterion(self, graft: Graft, criterion: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return the weighted sum of the members' losses, for what a training pass returned."""

        def members(out: Tensor, y: Any) -> Tensor:
            check_criterion(criterion, out.shape[-1])
            if out.ndim < 3:
                if out.requires_grad and graft.recall(out) is not None:
                    raise TargetError(
                        f"{graft.name!r} was asked for the loss of {tuple(out.shape)}, computed from the logits of "
                        "several members in a training pass.\n"
                        "Each member saw the samples in an order of its own, so a mean over members, or one of them, "
                        "has other labels than the batch.\n"
                        "Call fxgraft.loss on what the pass returned, (M, B, K)."
                    )
                return criterion(out, y)
            record = known_pairing(graft.recall(out), out)
            targets = record.soft_labels(y, self.visible_labels)
            weights = out.new_ones(out.shape[1::-1]) if record.weights is None else record.weights
            return core.member_losses(
                criterion, out, targets, weights, record.weights is None or record.even, graft.doubt
            ).sum(0)

        return members

    def picture(self, graft: Graft, view: View) -> Picture:
        """Show one mixture: images, masks, sum."""
        return mixture_panels(view, graft, self.members)

    def merge(self, graft: Graft, model: nn.Module) -> None:
        """Write the folded stem and classifier into the stock tensors."""
        fold(model, graft.units_of(MemberUnit))


class Inputs(Unit):
    """Pairs the images of a pass, in front of the model."""

    optional = True
    classifier: str

    def __init__(self, config: MixMo) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Any) -> Tensor:
        """Return the images that go through the model as member 0's, (repetitions · B, C, *S)."""
        run, config = self.current, self.config
        if run is None or not run.training:
            if isinstance(x, MixMoInput):
                raise ConfigError(
                    "MixMoInput pairs inputs for training, and the model is in evaluation mode.\n"
                    "There every member sees the same image.\nPass a tensor, or call model.train()."
                )
            return x
        if getattr(run.model, "_is_replica", False):
            raise WrappedModelError(
                f"{self.graft!r} cannot train under DataParallel, which would join the members of its replicas' "
                "outputs (M, B, K) along M.\nUse DistributedDataParallel; evaluation works under both."
            )
        if run.read_by_model and config.members > 1:
            raise TargetError(
                f"{self.graft!r} gives a row of logits for each member, and the model's own forward was given the "
                "labels of the batch.\nThe rows of all members but the first are for other images, with other labels.\n"
                "Call model(x) under `with fxgraft.targets(y):`, or take the labels out of the model's forward."
            )
        if config.members > 1:
            run.check_images_alone(
                "All members but the first see other images, and would see them with the same of these.",
            )
        own: tuple[Tensor, ...] = x.inputs if isinstance(x, MixMoInput) else ()
        images: Tensor = own[0] if own else x  # type: ignore[assignment]
        head: Any = run.model.get_submodule(self.classifier)
        classes: int = head.weight.shape[0]
        check_labels(run, config.members, own, images.shape[0], classes)
        repetitions = 1 if own else config.repetitions
        batch, device = images.shape[0], images.device
        orders = (
            () if own else core.permutations(batch, config.members, repetitions, device, config.kept).unbind()
        )
        if repetitions > 1:
            images = torch.cat([images] * repetitions)
        size = tuple(images.shape[2:]) if images.ndim > 3 else (1, 1)
        pairing = Pairing(config.members, images.shape[0], size, classes, orders, own, run.target)
        run.put(PAIRING, pairing)
        return images


class MemberUnit(LayerCopies):
    """A layer with one set of tensors per member.

    Args:
        config: the options.
        module: the stock layer, whose own tensors are member 0's.
    """

    def __init__(self, config: MixMo, module: nn.Module) -> None:
        super().__init__(module, config.members, config.init, config.spread)
        self.config = config

    def stale(self, model: nn.Module) -> bool:
        """Say whether the layer computes its weight from other parameters by now, which this unit doesn't."""
        return is_derived(model.get_submodule(self.path))

    def pairing(self) -> Pairing:
        """Return the pairing of the pass."""
        run = self.current
        pairing = None if run is None else run.get(PAIRING)
        if pairing is None:
            raise SiteError(
                f"{self.graft!r} acts inside a training pass of its model.\nCall the model, not its parts, and "
                "put all of it into the mode you want, with model.train() or model.eval()."
            )
        return pairing


class Encoders(MemberUnit):
    """Runs a stem once per member and mixes; in evaluation, once."""

    stem: Stem

    def folded(self, module: nn.Module, gain: float | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the weight and bias of the one layer that evaluation runs."""
        return super().folded(module, self.config.gain if gain is None else gain)

    def set_progress(self, fraction: float) -> None:
        """Follow the schedule of the probability. A tensor, since compiled code would guard on a number."""
        self.chance = torch.tensor(
            core.cut_probability(self.config.p, fraction, self.config.decay, self.config.epochs)
        )

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return the mixture of the members' encodings."""
        # By the layer's own mode: other grafts look ahead through it in evaluation, in the middle of a pass.
        if not module.training:
            return apply_layer(module, x, *self.folded(module))
        config, pairing, layout = self.config, self.pairing(), self.stem.layout
        members = zip(self._inputs(pairing, x), self.spread_out(module), strict=True)
        encodings = [apply_layer(module, z, *own) for z, own in members]
        if config.members == 1:
            return encodings[0]
        maps = [layout.canonical(encoding) for encoding in encodings]
        if pairing.masks is None:
            pairing.draw(
                maps[0],
                config.mixing,
                self.chance,
                alpha=config.alpha,
                r=config.r,
                shuffled=config.shuffle_roles,
            )
            self._tell_others(pairing)
        return layout.restore(encodings[0], core.mix(maps, pairing.masks_for(maps[0]), config.gain))

    def _inputs(self, pairing: Pairing, x: Tensor) -> list[Tensor]:
        """List what every member's copy of the layer gets."""
        if not pairing.inputs:
            # Member 0 sees the batch in its order.
            return [x, *(x[order] for order in pairing.permutations[1:])]
        before, model = self.stem.before, self.run.model
        hooked = self.stem.hooked(model)
        if hooked:
            raise BypassError(
                f"{self.graft!r} was given an input for each member, and {', '.join(map(repr, hooked))} has forward "
                "pre-hooks, which saw that of the first alone.\n"
                "The other members would get their images as they are.\n"
                "Remove the hooks, or write what they do as a layer in front of the model."
            )
        others = pairing.inputs[1:]
        return [x, *(others if before is None else (before(model, other) for other in others))]

    def _tell_others(self, pairing: Pairing) -> None:
        """Give the model's other grafts mixed labels, since they see mixtures."""
        run = self.run
        if len(grafts_on(run.model)) > 1:
            run.relabel(pairing.mixed_label())


class Heads(MemberUnit):
    """Runs a classifier once per member; in evaluation once for all, or per member where the call asks for them."""

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return logits, those of the members one after the other along the batch."""
        run = self.current
        asked = run is not None and run.options.get("members") and not run.training
        if not (module.training or asked):
            return apply_layer(module, x, *self.folded(module))
        if module.training:
            self.pairing()
        return torch.cat([apply_layer(module, x, *own) for own in self.spread_out(module)])
