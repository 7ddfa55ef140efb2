"""What a script takes from timm, with grafts on the model: the factory, loaders, losses and schedules."""

from __future__ import annotations

import functools
import gc
import importlib
import inspect
import logging
import math
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from typing import Any

import timm
import timm.data
import timm.loss
import timm.models
import timm.scheduler
import timm.utils
import torch
from timm.data.mixup import Mixup
from timm.loss.cross_entropy import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.loss.jsd import JsdCrossEntropy
from timm.scheduler.scheduler import Scheduler
from torch import nn

import fxgraft
from fxgraft.errors import ConfigError, FxgraftWarning, WrappedModelError
from fxgraft.graph.grafting.lookup import counterparts, unwrapped
from fxgraft.graph.runtime.published_labels import relabel
from fxgraft.spec import parse_grafts

_logger = logging.getLogger(__name__)


def model_parameters(model: nn.Module, exclude_head: bool = False) -> Iterable[nn.Parameter]:
    """List the parameters of a model, with or without its head's: ``timm.models.model_parameters`` for patched models.

    timm takes the last two parameters for the head's. Here they are the last two of the model's own, and what grafts
    have beside them of the same kind, such as the heads of MixMo's further members.

    Args:
        model: bare, patched, or with patched parts.
        exclude_head: leave the head's out, as adaptive gradient clipping wants it.
    """
    if not exclude_head:
        return model.parameters()
    model = unwrapped(model)
    grafted = {id(p) for graft in fxgraft.grafts(model) for p in graft.parameters()}
    named = [(name, p) for name, p in model.named_parameters() if id(p) not in grafted]
    head = {name for name, _ in named[-2:]}
    beside = {own for own, stock in counterparts(model).items() if stock in head}
    return [p for name, p in model.named_parameters() if name not in head | beside]


class Grafting:
    """Grafts on the model that a script builds through timm, as long as the block lasts.

    In the block the functions and classes that timm's scripts work with do a little more:

    - ``create_model`` patches the model that it returns, so that the optimiser, averages of the weights and whatever
      wraps the model come after. The model that the script builds first is the one; while it lives others are left
      alone, and so are the teachers that timm's distillation tasks build.
    - Training loaders publish their labels, and ``Mixup`` those that it has mixed.
    - Losses, called on what the model in training has returned, are `fxgraft.loss`, with themselves as the criterion.
    - ``model_parameters``, and what tasks give to gradient clipping, know the head with what grafts have beside it.
    - Steps of a schedule of ``create_scheduler`` and ``create_scheduler_v2`` set the progress of the training.
    - ``update_summary`` writes `fxgraft.diagnostics` of the epoch's last pass into the summary, and to wandb.

    Args:
        grafts: what to put on the model, in order, as `parse_grafts` reads it.

    Raises:
        ConfigError: a graft cannot be read.
    """

    def __init__(self, grafts: Iterable[str]) -> None:
        self._specs = [spec for text in grafts for spec in parse_grafts(text)]
        self._model: weakref.ref[nn.Module] | None = None
        self._epochs = self._updates = 0
        self._judging = False
        self._undo = ExitStack()

    def __enter__(self) -> Grafting:
        with suppress(ImportError):  # older versions of timm have no tasks
            importlib.import_module("timm.task")  # takes the plain create_model with it, for its teachers
        with self._undo:
            self._replace(timm.models, "create_model", self._create_model, timm)
            for name in ("create_loader", "create_naflex_loader"):
                self._replace(timm.data, name, self._create_loader)
            factory = importlib.import_module("timm.scheduler.scheduler_factory")
            self._replace(factory, "create_scheduler_v2", self._create_scheduler, timm.scheduler)
            self._replace(Mixup, "__call__", self._mix)
            for task in _classes(sys.modules.get("timm.task"), nn.Module):
                if "Distillation" in task.__name__ and "__init__" in vars(task):
                    self._replace(task, "__init__", self._distil)
            self._replace(timm.models, "model_parameters", self._model_parameters)
            for task in _classes(sys.modules.get("timm.task"), nn.Module):
                if "get_clip_parameters" in vars(task):
                    self._replace(task, "get_clip_parameters", self._clip_parameters)
            for loss in _classes(timm.loss, nn.Module) | {nn.CrossEntropyLoss, nn.BCEWithLogitsLoss}:
                for name in {"forward", "__call__"} & vars(loss).keys():
                    self._replace(loss, name, self._judge)
            self._replace(timm.utils, "update_summary", self._update_summary)
            for schedule in _classes(timm.scheduler, Scheduler) | {Scheduler}:
                for name, wrapper in (("step", self._step), ("step_update", self._step_update)):
                    if name in vars(schedule):
                        self._replace(schedule, name, wrapper)
            self._undo = self._undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    @property
    def model(self) -> nn.Module | None:
        """The patched model, as long as the script has it."""
        return None if self._model is None else self._model()

    def check_used(self) -> None:
        """Raise unless a model was patched.

        Raises:
            ConfigError: the script never built one.
        """
        if self._model is None:
            raise ConfigError(
                "The script ended, and nothing was grafted: it built no model with timm.create_model.\n"
                "That is where the grafts are put on.\n"
                "In a script that builds its model another way, call fxgraft.patch(model, ...)."
            )

    def warn_unless_used(self) -> None:
        """Warn unless a model was patched, where it is too late to raise."""
        if self._model is None:
            warnings.warn(
                "Nothing was grafted: no model was built with timm.create_model after fxgraft.timm.auto was imported.",
                FxgraftWarning,
                stacklevel=2,
            )

    def _replace(self, home: Any, name: str, wrapper: Callable[..., Any], *others: Any) -> None:
        """Put a wrapper in place of a function or method, wherever a script may have it from."""
        original = getattr(home, name, None)
        if original is None:  # not in this version of timm
            return

        @functools.wraps(original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        for module in (home, *others, sys.modules["__main__"]):
            if vars(module).get(name) is original:
                setattr(module, name, replacement)
                self._undo.callback(setattr, module, name, original)

    def _create_model(self, create: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
        if kwargs.get("scriptable"):
            raise WrappedModelError(
                "The script asks for a model for TorchScript, which cannot compile grafts.\n"
                "Leave --torchscript out; --torchcompile compiles the model with its grafts."
            )
        patched_weights = None
        try:
            model = create(*args, **kwargs)
        except RuntimeError as error:
            patched_weights = kwargs.pop("checkpoint_path", None)
            if not patched_weights or "graft_" not in str(error):
                raise
            model = create(*args, **kwargs)
        if self.model is not None:
            gc.collect()  # a model that the script dropped is gone only once its reference cycles are collected
        if self.model is not None:
            self._say(f"left {model._get_name()} alone: {self.model._get_name()} has the grafts")
            return model
        for spec in self._specs:
            fxgraft.patch(model, spec.method, **spec.options)
        if patched_weights:
            timm.models.load_checkpoint(model, patched_weights)
        self._model = weakref.ref(model)
        self._say(f"grafted {', '.join(spec.text for spec in self._specs)} on {model._get_name()}")
        return model

    def _create_loader(self, create: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        loader = create(*args, **kwargs)
        arguments = inspect.signature(create).bind(*args, **kwargs).arguments
        return fxgraft.with_targets(loader) if arguments.get("is_training") else loader

    def _mix(self, mix: Callable[..., Any], mixup: Mixup, *args: Any, **kwargs: Any) -> Any:
        x, y = mix(mixup, *args, **kwargs)
        relabel(y, (x, y))
        return x, y

    def _model_parameters(self, listing: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        arguments = inspect.signature(listing).bind(*args, **kwargs).arguments
        return model_parameters(**arguments)

    def _clip_parameters(self, listing: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        arguments = inspect.signature(listing).bind(*args, **kwargs).arguments
        if not arguments.pop("exclude_head", False) or self.model is None:
            return listing(*args, **kwargs)
        kept = {id(p) for p in model_parameters(self.model, exclude_head=True)}
        own = {id(p) for p in self.model.parameters()}
        # Other parameters that a task trains are clipped as before.
        return [p for p in listing(*arguments.values()) if id(p) in kept or id(p) not in own]

    def _distil(self, start: Callable[..., None], task: nn.Module, *args: Any, **kwargs: Any) -> None:
        self._refuse_paired(
            "distillation compares each row with what a teacher says of the image in that row"
        )
        start(task, *args, **kwargs)

    def _judge(self, forward: Callable[..., Any], criterion: nn.Module, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        # A loss may call another one, and in evaluation losses stay as they are.
        if self._judging or model is None or not model.training or not torch.is_grad_enabled():
            return forward(criterion, *args, **kwargs)
        if isinstance(criterion, JsdCrossEntropy):
            self._refuse_paired(
                "the Jensen-Shannon loss compares the rows of one image in several augmentations"
            )
        out, y = inspect.signature(forward).bind(criterion, *args, **kwargs).args[1:]
        self._judging = True
        try:
            replaced = any(graft.patch.replaces_criterion() for graft in fxgraft.grafts(model))
            return fxgraft.loss(model, out, y, _in_torch(criterion) if replaced else criterion)
        finally:
            self._judging = False

    def _create_scheduler(self, create: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        schedule, self._epochs = create(*args, **kwargs)
        self._updates = kwargs.get("updates_per_epoch", 0)
        return schedule, self._epochs

    def _step(self, step: Callable[..., None], schedule: Any, epoch: int, *args: Any, **kwargs: Any) -> None:
        step(schedule, epoch, *args, **kwargs)
        self._set_progress(epoch, self._epochs)

    def _step_update(
        self, step: Callable[..., None], schedule: Any, num_updates: int, *args: Any, **kwargs: Any
    ) -> None:
        step(schedule, num_updates, *args, **kwargs)
        self._set_progress(num_updates, self._epochs * self._updates)

    def _update_summary(self, update: Callable[..., None], epoch: int, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(update).bind(epoch, *args, **kwargs)
        if self.model is not None:
            scalars = fxgraft.diagnostics(self.model)
            # The file has the columns of its first row: all that there may be, whatever a pass has measured.
            names = [
                f"{graft.name}.{name}"
                for graft in fxgraft.grafts(self.model)
                for name in graft.patch.measures
                if "<" not in name  # one of each site
            ]
            measured = {name: scalars.get(name, math.nan) for name in names}
            bound.arguments["train_metrics"] = {**bound.arguments["train_metrics"], **measured}
        update(*bound.args, **bound.kwargs)

    def _set_progress(self, done: int, total: int) -> None:
        if self.model is not None and total:
            fxgraft.set_progress(self.model, min(1.0, done / total))

    def _refuse_paired(self, why: str) -> None:
        """Raise if a graft has several images in a row of the output."""
        for graft in () if self.model is None else fxgraft.grafts(self.model):
            if graft.patch.pairs_labels:
                raise ConfigError(
                    f"{graft.name!r} has several images share the rows of the output in training, and {why}.\n"
                    f"Leave one of the two out: --graft {graft.patch.method}, or the script's option."
                )

    def _say(self, text: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            _logger.info(text)


def _classes(module: Any, kind: type) -> set[type]:
    """Collect the classes of a kind that a module offers; none if there is no such module."""
    offered = {} if module is None else vars(module)
    return {cls for cls in offered.values() if isinstance(cls, type) and issubclass(cls, kind)}


def _in_torch(criterion: nn.Module) -> nn.Module:
    """Return the same loss as torch has it, for methods with one of their own in the place of cross-entropy."""
    if type(criterion) is LabelSmoothingCrossEntropy:
        return nn.CrossEntropyLoss(label_smoothing=criterion.smoothing)
    return nn.CrossEntropyLoss() if type(criterion) is SoftTargetCrossEntropy else criterion
