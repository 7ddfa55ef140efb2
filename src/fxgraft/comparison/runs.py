"""One run: a variant trained on one task with one seed, and what is recorded of it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

import fxgraft
from fxgraft._torch import BatchNorm
from fxgraft.comparison.corruptions import CORRUPTIONS, SEVERITIES, Corrupted
from fxgraft.comparison.data import Items, Task
from fxgraft.comparison.training import (
    SCORES,
    Fit,
    Images,
    Training,
    evaluate,
    fit,
    own_randomness,
    transform_of,
    unlabelled_batches,
)
from fxgraft.environment import processor
from fxgraft.errors import ConfigError
from fxgraft.models import Model, build_model, load_weights
from fxgraft.patches.options import is_number, plain_number
from fxgraft.spec import describe, parse_patch_spec, split_grafts

BARE = "bare"
ADAPT_BATCHNORM = "adapt_batchnorm"
Record = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """What one column of a comparison does to the backbone.

    Attributes:
        text: the variant as it was written, with normal spacing: "rsc + selfnorm".
        grafts: method and options of each graft that is on during training.
        adaptation: what is done after training with the target's images, without labels: None, "adapt_batchnorm",
            or the options of "gam".
    """

    text: str
    grafts: tuple[tuple[str, dict[str, Any]], ...] = ()
    adaptation: str | dict[str, Any] | None = None

    @property
    def trained(self) -> str:
        """Say what is trained; variants that share it share the training run."""
        return " + ".join(describe(*graft) for graft in self.grafts) or BARE


def parse_variant(text: str) -> Variant:
    """Read ``GRAFT + GRAFT + ...``, where a graft is ``METHOD:key=value,...``.

    "bare" stands for no graft. ``adapt_batchnorm`` and ``gam`` act after training, on images of the tested domain
    without labels; at most one of them, at the end.

    Raises:
        ConfigError: the text does not follow the grammar, or something stands behind an adaptation.
    """
    grafts: list[tuple[str, dict[str, Any]]] = []
    adaptation: str | dict[str, Any] | None = None
    parts = split_grafts(text)
    for part in parts:
        if part == BARE and (len(parts) == 1 or part is parts[0]):
            continue
        if adaptation is not None:
            raise ConfigError(
                f"{text!r} has {part!r} behind an adaptation.\n"
                "adapt_batchnorm and gam act once, after training.\nWrite the one that is wanted at the end."
            )
        if part == ADAPT_BATCHNORM:
            adaptation = part
            continue
        spec = parse_patch_spec(part)
        if spec.method.replace("-", "_") == "gam":
            adaptation = spec.options
        else:
            grafts.append((spec.method, spec.options))
    return Variant(" + ".join(parts), tuple(grafts), adaptation)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all runs of a comparison share.

    Attributes:
        model: the model, as `fxgraft.models.build_model` takes it.
        model_options: options of the constructor.
        pretrained: load the library's weights.
        weights: a checkpoint instead.
        classes: number of classes.
        size: side of the images in pixels.
        training: how every variant is trained.
        train: a training loop instead, called as ``train(model, images, validation, seed)``.
        measure: further numbers of a run, called as ``measure(model, validation, test)``.
        methods: classes of the methods that aren't fxgraft's own, by name.
        corrupt: score corrupted test images instead of clean ones.
        adapt_steps: steps of "gam".
        adapt_lr: its learning rate.
        readers: processes that read images for one run.
    """

    model: Model
    classes: int
    size: int
    training: Training
    model_options: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    weights: str | None = None
    train: Callable[..., Any] | None = None
    measure: Callable[..., Mapping[str, float]] | None = None
    methods: dict[str, type[Any]] = field(default_factory=dict)
    corrupt: bool = False
    adapt_steps: int = 1000
    adapt_lr: float = 2e-4
    readers: int = 0

    def build(self, variant: Variant, seed: int) -> nn.Module:
        """Build the backbone with the weights of a seed, and put the variant's grafts on it."""
        with own_randomness(seed):
            model = build_model(
                self.model,
                self.classes,
                pretrained=self.pretrained,
                input_size=self.size,
                **self.model_options,
            )
        if self.weights is not None:
            load_weights(model, self.weights, new_classifier=True)
        with own_randomness(seed):  # a method may have weights of its own to draw
            for method, options in variant.grafts:
                fxgraft.patch(model, method, **{"input_size": (3, self.size, self.size), **options})
        return model

    def check(self, variant: Variant) -> None:
        """Raise what `build` or the adaptation would raise in the middle of a comparison."""
        model = self.build(variant, 0)
        if isinstance(variant.adaptation, dict):
            fxgraft.patch(model, "gam", dry_run=True, **self._gam(variant.adaptation))
        elif variant.adaptation and not any(isinstance(module, BatchNorm) for module in model.modules()):
            raise ConfigError(
                f"{variant.text!r} adapts BatchNorm, and the model has none.\n"
                "It replaces the statistics of BatchNorm layers. Leave it out, or compare on a network with BatchNorm."
            )

    def _gam(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"input_size": (3, self.size, self.size), **options}


@dataclass(frozen=True)
class Job:
    """One training run, and the variants that are scored of it.

    Attributes:
        variants: the variants that differ in their adaptation alone.
        task: what is trained on and tested.
        seed: the seed of weights, batches, transforms and methods.
        device: where to train.
        tuning: settings that replace those of the comparison; the run is then scored on validation images.
        training: the settings of the run.
        tuned: those of them that tuning chose.
    """

    variants: tuple[Variant, ...]
    task: Task
    seed: int
    device: str
    training: Training
    tuning: Mapping[str, Any] | None = None
    tuned: Mapping[str, Any] | None = None


def carry_out(setup: Setup, job: Job) -> list[Record]:
    """Train once and return a record for each variant of the job.

    The generators of the calling process are left as they were. On a CPU one thread computes: two that share a core
    wait for each other, and numbers do not depend on how many runs go side by side.
    """
    for name, cls in setup.methods.items():
        if name not in fxgraft.methods():  # this is a process in which nobody has registered it
            fxgraft.register(name)(cls)
    threads = torch.get_num_threads()
    if torch.device(job.device).type == "cpu":
        torch.set_num_threads(1)
    try:
        with own_randomness(job.seed):
            return _carry_out(replace(setup, training=job.training), job)
    finally:
        torch.set_num_threads(threads)


def _carry_out(setup: Setup, job: Job) -> list[Record]:
    first, began = job.variants[0], time.perf_counter()
    model = setup.build(first, job.seed).to(job.device)
    if setup.training.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.manual_seed(job.seed)
    fitted = _fitted(setup, model, job)
    trained = (
        {name: value.clone() for name, value in model.state_dict().items()} if len(job.variants) > 1 else {}
    )
    records = []
    for variant in job.variants:
        if trained:
            model.load_state_dict(trained)
        # What an adaptation draws does not depend on how many others there are.
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            record = _recorded(setup, job, variant, model, fitted)
        records.append({**record, "seconds": round(time.perf_counter() - began, 2)})
    return records


def _recorded(setup: Setup, job: Job, variant: Variant, model: nn.Module, fitted: Fit) -> Record:
    # What tunes is the training: behind an adaptation to the target, images of the source would say little of it.
    plain = fitted.diverged or job.tuning is not None
    adapted = model if plain else _adapted(setup, model, variant, job)
    record: Record = {
        "variant": variant.text,
        "task": job.task.name,
        "seed": job.seed,
        "epoch_loss": fitted.loss,
        "epoch_validation": fitted.validation,
        "epoch_diagnostics": fitted.diagnostics,
        "step_seconds": fitted.step_seconds,
        "steps": fitted.steps,
        "diverged": fitted.diverged,
        "device": processor(torch.device(job.device)),
    }
    if job.tuning is not None:
        scored = evaluate(adapted, job.task.validation, setup.training, **_loading(setup, job))
        record |= {"tuning": dict(job.tuning), "scores": scored["scores"]}
    else:
        record |= _scored(setup, adapted, job)
        if setup.measure is not None:
            sets = (_evaluated(setup, adapted, items) for items in (job.task.validation, job.task.test))
            record["measured"] = _measured(setup.measure(adapted, *sets))
        if job.tuned is not None:
            record["tuned"] = dict(job.tuned)
    record["diverged"] |= not record.pop("finite", True)
    return record


def _loading(setup: Setup, job: Job) -> dict[str, Any]:
    """Return how images are read and where they go, as `fit` and `evaluate` take it."""
    return {"size": setup.size, "device": job.device, "readers": setup.readers}


def _fitted(setup: Setup, model: nn.Module, job: Job) -> Fit:
    task = job.task
    if setup.train is None:
        return fit(
            model,
            task.train,
            task.validation,
            setup.training,
            seed=job.seed,
            **_loading(setup, job),
        )
    images = Images(
        task.train, transform_of(model, setup.training, setup.size, training=True), setup.size, job.seed
    )
    images.epoch = None
    losses = _losses(setup.train(model, images, _evaluated(setup, model, task.validation), job.seed))
    return Fit(loss=losses, diverged=not all(map(math.isfinite, losses)))


def _losses(returned: Any) -> list[float]:
    """Return the loss of each epoch, where a user's loop gives any."""
    if returned is None:
        return []
    try:
        return [float(loss) for loss in ([returned] if is_number(plain_number(returned)) else returned)]
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"train= returned {returned!r:.80}, which is no list of losses: {error}.\n"
            "Return the mean loss of each epoch, or nothing."
        ) from error


def _measured(returned: Any) -> dict[str, float]:
    try:
        return {name: float(value) for name, value in returned.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"measure= returned {returned!r:.80}, which is no dictionary of numbers: {error}.\n"
            'Return numbers by name, as {"margin": 0.3}.'
        ) from error


def _evaluated(setup: Setup, model: nn.Module, items: Items) -> Images:
    return Images(items, transform_of(model, setup.training, setup.size, training=False), setup.size)


def _adapted(setup: Setup, model: nn.Module, variant: Variant, job: Job) -> nn.Module:
    if variant.adaptation is None:
        return model
    target = unlabelled_batches(model, job.task.target, setup.training, size=setup.size, seed=job.seed)
    if isinstance(variant.adaptation, str):
        return fxgraft.adapt_batchnorm(model, target, device=job.device)
    source = unlabelled_batches(model, job.task.train, setup.training, size=setup.size, seed=job.seed)
    fxgraft.patch(model, "gam", **setup._gam(variant.adaptation))
    fxgraft.adapt(
        model, source, target, steps=setup.adapt_steps, lr=setup.adapt_lr, device=job.device, progress=False
    )
    return fxgraft.unpatch(model, fxgraft.grafts(model)[-1])


def _scored(setup: Setup, model: nn.Module, job: Job) -> Record:
    options = _loading(setup, job)
    if not setup.corrupt:
        return evaluate(model, job.task.test, setup.training, **options)
    by_corruption = {
        f"{name}, {severity}": evaluate(
            model, job.task.test, setup.training, **options, prepare=Corrupted(name, severity, setup.size)
        )
        for name in CORRUPTIONS
        for severity in SEVERITIES
    }
    outcomes = by_corruption.values()
    return {
        "scores": {name: statistics.fmean(out["scores"][name] for out in outcomes) for name in SCORES},
        "right": [sum(column) for column in zip(*(out["right"] for out in outcomes), strict=True)],
        "images": [sum(column) for column in zip(*(out["images"] for out in outcomes), strict=True)],
        "accuracy_by_corruption": {name: out["scores"]["accuracy"] for name, out in by_corruption.items()},
        "finite": all(out["finite"] for out in outcomes),
    }


def settings_of(training: Training, changes: Mapping[str, Any]) -> Training:
    """Return the settings with some replaced; unknown names and values out of range raise `ConfigError`."""
    unknown = sorted(set(changes) - set(asdict(training)))
    if unknown:
        raise ConfigError(f"Training has no setting {unknown[0]!r}. It has {', '.join(asdict(training))}.")
    return replace(training, **changes)
