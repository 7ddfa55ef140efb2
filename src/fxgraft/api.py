"""The public calls: put patches on, take them off, and look at them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from fxgraft.arguments import check_arguments
from fxgraft.errors import (
    ConfigError,
    FxgraftWarning,
    MergeError,
    UnknownGraftError,
    because,
    candidates,
)
from fxgraft.graph.atomic import synchronized
from fxgraft.graph.grafting.graft import Graft
from fxgraft.graph.grafting.graft_registry import GraftRegistry, registry_of
from fxgraft.graph.grafting.lookup import (
    grafts_in,
    grafts_on,
    named_grafts,
    patched_inside,
    patched_parts,
    unwrapped,
)
from fxgraft.graph.names import class_name
from fxgraft.graph.structure.positions import position_sites
from fxgraft.graph.structure.site import Sites
from fxgraft.graph.structure.sites import list_sites
from fxgraft.graph.tracing.preserve import preserved_random_state
from fxgraft.graph.wrapped_models import check_model, without_wrappers
from fxgraft.inspection import Plan, Summary, plan_of, summary_of
from fxgraft.patches.base import Patch
from fxgraft.patches.options import is_number
from fxgraft.patches.preset import Preset
from fxgraft.patches.registry import build, check_beside
from fxgraft.spec import parse_grafts

M = TypeVar("M", bound=nn.Module)


@synchronized
def patch(
    model: M,
    method: str | Patch,
    *,
    preset: str | None = None,
    name: str | None = None,
    dry_run: bool = False,
    input_size: tuple[int, ...] | None = None,
    **options: Any,
) -> M | Plan:
    """Graft a method onto a model, in place.

    >>> import fxgraft, timm
    >>> model = timm.create_model("test_resnet", num_classes=4)
    >>> fxgraft.patch(model, "rsc", layer="layer4") is model
    True
    >>> print(fxgraft.patch(model, "selfnorm", dry_run=True).name)
    selfnorm

    The patched model is called as before, and also takes ``target``, the labels of the batch, and what its methods
    declare as `Patch.call_options`. The grafts read such an argument, given by name or, where the model's own forward
    has it, by position. The model gets it as well if its forward names it or takes ``**kwargs``. Where a call has no
    ``target`` and none is published (`targets`, `with_targets`), a model's own argument ``labels`` stands for it. A
    forward that names ``labels`` gets ``target`` only if it names that too.

    Args:
        model: a timm or torchvision backbone, or any module from one image batch to logits. It keeps its class
            (as a subclass of it), weights, hooks and ``state_dict`` keys.
        method: name of a method (see `fxgraft.methods`); a text with its options, ``"rsc:layer=layer4"``; several
            grafts, ``"rsc + selfnorm"``, which are put on all together or not at all (`fxgraft.spec` has the grammar);
            or the patch itself: ``fxgraft.RSC(layer=-1)``.
        preset: settings that the method's authors published, by name; ``fxgraft info METHOD`` lists them. Options
            given beside it win over the preset's. On a network of another structure than the published one it warns.
        name: what to call the graft, by default the method's name. Needed to use a method twice.
        dry_run: return the plan instead of carrying it out.
        input_size: (C, H, W) of the images, or (C, T, H, W) of clips and volumes, in the order in which the model takes
            them (transformers' take (T, C, H, W)), where the model's own default isn't the size it is trained at.
        **options: the method's options, with a method given by name.

    Returns:
        The same model; with ``dry_run``, the `Plan`.

    Raises:
        FxgraftError: what is wrong, why, and what to do; the model is then as it was.
    """
    check_model(model)
    arguments = {"preset": preset, "name": name, "input_size": input_size}
    check_arguments(patch, {"dry_run": dry_run})
    asked = _asked(method, {key: value for key, value in arguments.items() if value is not None} | options)
    registry = registry_of(model)
    wanted: list[Graft] = list(registry.grafts) if registry is not None else []
    present = len(wanted)
    for chosen, size, settings in asked:
        graft = Graft(chosen or settings.method, settings, input_size=size)
        _check_new(graft, wanted, chosen is not None)
        wanted.append(graft)
    if dry_run and len(asked) > 1:
        raise ConfigError(
            f"A dry run plans one graft, and {method!r} has {len(asked)}.\n"
            "Each is planned beside those that are on the model.\nPlan them one by one."
        )
    with _published(wanted[present:]):
        if dry_run:
            return _plan(model, wanted[-1])
        if registry is not None:
            registry.renew_stale(model)
        (registry or GraftRegistry()).install(model, wanted)
    return model


def _asked(
    method: str | Patch, options: dict[str, Any]
) -> list[tuple[str | None, tuple[int, ...] | None, Patch]]:
    """Read the arguments of `patch`: for each graft its name and input size, None by default, and its settings."""
    if isinstance(method, Patch):
        _check_own(options)
        further = {key: value for key, value in options.items() if key not in ("name", "input_size")}
        if further:
            raise ConfigError(
                f"{type(method).__name__} is given with its options; {', '.join(further)} cannot be added here.\n"
                f"Pass fxgraft.{type(method).__name__}({', '.join(f'{k}=...' for k in further)})."
            )
        return [(options.get("name"), _size(options.get("input_size")), method)]
    if not isinstance(method, str) or not set(method) & set(":+"):
        specs = [(method.strip() if isinstance(method, str) else method, dict(options))]
    else:
        parsed = parse_grafts(method)
        shared = options if len(parsed) == 1 else {k: v for k, v in options.items() if k == "input_size"}
        unclear = sorted(
            {*options} - {*shared} | {k for spec in parsed for k in spec.options.keys() & shared.keys()}
        )
        if unclear:
            raise ConfigError(
                f"{method!r} is given with its options, and {', '.join(unclear)} as well.\n"
                "Of several grafts, or of two values, it isn't clear which one is meant.\n"
                "Write them into the text, as METHOD:key=value."
            )
        specs = [(spec.method, {**spec.options, **shared}) for spec in parsed]
    for _, own in specs:
        _check_own(own)
    return [
        (own.pop("name", None), _size(own.pop("input_size", None)), build(known, own)) for known, own in specs
    ]


def _check_own(options: dict[str, Any]) -> None:
    """Hold what isn't an option of the method against the declared types of `patch`."""
    check_arguments(patch, {key: options[key] for key in ("preset", "name", "input_size") if key in options})


def _size(given: Any) -> Any:
    return tuple(int(length) for length in given) if isinstance(given, Iterable) else given


@contextmanager
def _published(grafts: Sequence[Graft]) -> Iterator[None]:
    """Warn where a preset was published for a network of another structure than the present one."""
    presets = [(graft, preset) for graft in grafts if (preset := graft.patch.published_as) is not None]
    known = [
        (graft, preset.structure, _source(graft, preset)) for graft, preset in presets if preset.structure
    ]
    with ExitStack() as reasons:
        for _, structure, what in known:
            reasons.enter_context(because(f"{what}, {structure}."))
        yield
    for graft, structure, what in known:
        built = graft.patch.built(graft)
        if built is not None and not structure.like(built):
            warnings.warn(
                f"{what}: {structure}. This network has {built}.\nThe same places are there, and the units are "
                "on them; what was published holds for the other network.",
                FxgraftWarning,
                stacklevel=5,
            )


def _source(graft: Graft, preset: Preset) -> str:
    network = str(preset.training.network).partition(", from ")[0]
    return f"The preset {preset.name!r} of {graft.patch.method!r} was published for {network}"


def _check_new(graft: Graft, present: Sequence[Graft], named: bool) -> None:
    if not graft.name.isidentifier():
        raise ConfigError(
            f"A graft's name must be an identifier, got {graft.name!r}.\nUse letters, digits, '_'."
        )
    for other in present:
        if other.patch == graft.patch:
            raise ConfigError(
                f"{graft.patch.method!r} is on the model already with these settings, as {other.name!r}.\n"
                "Twice the same would act twice at the same place.\nChange a setting, or unpatch it first."
            )
        if other.name == graft.name:
            hint = (
                "Choose another name." if named else f'Give the second one a name, as name="{graft.name}_2".'
            )
            raise ConfigError(f"There is a graft named {graft.name!r} on the model already.\n{hint}")
        check_beside(graft, other)


def _plan(model: nn.Module, graft: Graft) -> Plan:
    """Describe what a graft would do, and leave the model as it is."""
    planned = (registry_of(model) or GraftRegistry()).trial(model, graft)
    return plan_of(graft, planned.placed(graft))


@synchronized
def unpatch(model: M, *names: str | Graft) -> M:
    """Take grafts off a model, in place: its class, code and keys are those from before; trained weights stay.

    >>> import fxgraft, timm
    >>> model = fxgraft.patch(timm.create_model("test_resnet"), "rsc")
    >>> fxgraft.grafts(fxgraft.unpatch(model, "rsc"))
    []

    Args:
        model: a patched model.
        *names: which ones, by name or as returned by `grafts`, in any order; all of them when left out.

    Returns:
        The same model.

    Raises:
        UnknownGraftError: there is no such graft; nothing was taken off.
        ConfigError: what is given is neither a name nor a graft.
    """
    for item in names:
        if not isinstance(item, (str, Graft)):
            raise ConfigError(
                f"unpatch takes names or grafts, one after the other; got {item!r}.\n"
                "Write fxgraft.unpatch(model, *names), or leave them out to take off all."
            )
    registry = registry_of(model)
    present = registry.grafts if registry is not None else []
    patches = {graft.name: graft.patch for graft in present}
    for item in names:
        if isinstance(item, Graft) and patches.get(item.name, item.patch) != item.patch:
            raise UnknownGraftError(
                f"The graft {item.name!r} that was given is another model's.\n"
                f"On this {model._get_name()} that name is of {patches[item.name]!r:.200}.\n"
                "Pass one of fxgraft.grafts(model), or a name."
            )
    wanted = {item.name if isinstance(item, Graft) else item for item in names}
    inside = "" if registry is not None else patched_inside(model)
    elsewhere = f"{inside} is patched: unpatch that." if inside else ""
    for name in sorted(wanted - patches.keys()):
        raise UnknownGraftError(
            f"There is no graft {name!r} on this {model._get_name()}.\n"
            f"{elsewhere or candidates(name, [g.name for g in present])}"
        )
    if registry is None:
        if names:
            return model
        raise UnknownGraftError(
            f"There is no graft on this {model._get_name()}.\n{elsewhere or 'Patch it first.'}"
        )
    registry.install(model, [g for g in present if names and g.name not in wanted])
    registry.tell()
    return model


def grafts(model: nn.Module) -> list[Graft]:
    """List the grafts of a model, in the order they were added; empty for a bare one.

    Looks through DistributedDataParallel and torch.compile, and into a model of your own for the patched backbones in
    it, as `loss`, `losses`, `extra_loss`, `set_progress`, `summary`, `merge` and `activations` do. Those of the model
    itself come first, then those of its parts, in the order of ``named_modules``.
    """
    return grafts_in(model)


@synchronized
def sites(
    model: nn.Module, pattern: str | None = None, *, input_size: tuple[int, ...] | None = None
) -> Sites:
    """List where a model can be patched: module outputs and the values between them, in running order.

    >>> import fxgraft, timm
    >>> fxgraft.sites(timm.create_model("test_resnet"), "layer*").names
    ['layer1', 'layer2', 'layer3', 'layer4']

    Args:
        model: bare or patched, wrapped or not; the listing is that of the bare model.
        pattern: a name or a glob: ``*`` within one part of a name, ``**`` across parts; or "residual" for
            every residual join with its positions.
        input_size: (C, H, W) to show shapes at; the model's own by default.

    Raises:
        SiteError: nothing matches; lists close matches.
    """
    check_arguments(sites, {"pattern": pattern, "input_size": input_size})
    model = without_wrappers(model)  # what can be patched, by its names there
    look, _ = (registry_of(model) or GraftRegistry()).look(model)
    trace = look.trace(_size(input_size))
    with preserved_random_state():
        listed = position_sites(trace) if pattern == "residual" else list_sites(trace, pattern)
    return Sites(listed, f"{class_name(model)}, batch of 2")


def summary(
    model: nn.Module, optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None
) -> Summary:
    """Summarise the grafts of a model: what each does where, its parameters, and what to look out for.

    Grafts of a patched part of the model are listed under the part's name: ``backbone.rsc``.

    >>> import fxgraft, timm, torch
    >>> model = timm.create_model("test_resnet")
    >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
    >>> fxgraft.patch(model, "selfnorm") is model
    True
    >>> "parameters of it are not in the optimizer" in str(fxgraft.summary(model, optimizer))
    True

    Args:
        model: bare, patched, or with patched parts.
        optimizer: what trains the model, or several. The summary then says of which grafts it does not hold parameters
            that are to be trained, as where it was built before the patch.

    Raises:
        ConfigError: ``optimizer`` is none, or holds no parameter of this model.
    """
    optimizers = () if optimizer is None else optimizer
    several = [*optimizers] if isinstance(optimizers, Iterable) else [optimizers]
    return summary_of(unwrapped(model), named_grafts(model), several)


def set_progress(model: nn.Module, fraction: float) -> None:
    """Tell the schedules of a model's grafts how much of the training is done.

    Args:
        model: a patched model, or one with patched parts, all of which are told; a bare one is left alone.
        fraction: share that is done, in [0, 1]: epoch / epochs at the start of every epoch, counted from 0, or
            step / steps before every step. Not epoch / (epochs - 1), which has schedules at their end during all of
            the last epoch: a model that is trained on at 1 warns.

    Raises:
        ConfigError: outside [0, 1].
    """
    single = is_number(fraction) or (isinstance(fraction, torch.Tensor) and fraction.numel() == 1)
    if not single or not 0.0 <= fraction <= 1.0:
        raise ConfigError(
            f"Progress is the share of training done, in [0, 1]; got {fraction!r}.\n"
            "Pass epoch / epochs at the start of every epoch, counted from 0, or step / steps before every step."
        )
    for part in patched_parts(model).values():
        registry = registry_of(part)
        if registry is not None:
            registry.set_progress(float(fraction))


@synchronized
def merge(model: M) -> M:
    """Return a copy of a patched model, its parts included, with every graft folded into stock weights or gone.

    >>> import fxgraft, timm
    >>> model = fxgraft.patch(timm.create_model("test_resnet"), "mixmo")
    >>> type(fxgraft.merge(model)).__name__
    'ResNet'

    The copy has the original class and keys, loads into a fresh model with ``strict=True``, and knows nothing
    of fxgraft. The patched model is left alone.

    Raises:
        MergeError: a graft cannot be folded; names it. Or the model cannot be copied.
    """
    for graft in grafts(model):
        if type(graft.patch).merge is Patch.merge:
            graft.patch.merge(graft, model)
    try:
        merged = copy.deepcopy(model)
    except RuntimeError as error:
        raise MergeError(
            f"This {model._get_name()} cannot be copied, which merge does: {error}\n"
            "Some of its tensors were computed in a pass and still have their graph, as pruned weights and those of "
            "weight_norm do after a training step.\n"
            "Call the model once under torch.no_grad(), and merge then."
        ) from error
    for part in reversed(patched_parts(merged).values()):  # from the inside
        for graft in grafts_on(part):
            graft.patch.merge(graft, part)
        unpatch(part)
    return merged
