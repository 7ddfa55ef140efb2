"""transformers: a callback for its Trainer around a patched model of transformers, and a Trainer for any other model.

Needs ``pip install transformers accelerate``, and is loaded by its name alone:
``from fxgraft.integrations.transformers import Grafts, Trainer``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fxgraft.api import set_progress
from fxgraft.errors import ConfigError, TargetError, UnknownGraftError
from fxgraft.graph.grafting.lookup import named_grafts, patched_parts, unwrapped
from fxgraft.inspection import diagnostics
from fxgraft.training_loss import extra_loss, loss

try:
    import transformers
except ImportError as error:
    raise ImportError(
        "fxgraft.integrations.transformers works with the Trainer of transformers, which is not installed.\n"
        "Install it with: pip install transformers accelerate."
    ) from error


class Grafts(transformers.TrainerCallback):
    """Adds what grafts contribute to the loss that a model of transformers computes, in the stock Trainer.

        trainer = transformers.Trainer(model, args, train_dataset=data, callbacks=[Grafts()])

    The model takes ``labels`` and returns its loss, as all of transformers' for images do; the grafts find the labels
    in the call. While the Trainer trains, a forward hook adds `fxgraft.extra_loss` to that loss. Where a graft stands
    in for the criterion, the loss is `fxgraft.loss` with cross-entropy. With gradient accumulation every micro-batch
    counts by its labels. Schedules are told the share of steps that is done.

    Args:
        log: add `fxgraft.diagnostics` to what the Trainer logs. Reporters see what callbacks before them in the list
            have added, so give theirs behind this one: ``report_to="none"`` and
            ``callbacks=[Grafts(), TensorBoardCallback()]``. The history of the Trainer has it in any case.

    Raises:
        UnknownGraftError: (when the training starts) nothing in the model is patched.
        ConfigError: (when the training starts) the model takes no ``labels``, so that it computes no loss; (at a step)
            it returns a tuple.
        TargetError: (at a step) the Trainer keeps the labels from the model, as with ``label_smoothing_factor``.
    """

    def __init__(self, log: bool = True) -> None:
        self.log = log
        self._hook: RemovableHandle | None = None
        self._signature = inspect.Signature()
        self._inside = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Hook into the loss."""
        inner = unwrapped(model)
        if not patched_parts(inner):
            raise UnknownGraftError(
                f"No part of this {type(inner).__name__} is patched.\n"
                "The callback would have nobody to tell of the progress, and nothing to add to the loss.\n"
                "Call fxgraft.patch(model, ...) before the Trainer is made, or leave the callback out."
            )
        signature = inspect.signature(inner.forward)
        if "labels" not in signature.parameters:
            raise ConfigError(
                f"This {type(inner).__name__} takes no labels, so it computes no loss for the Trainer.\n"
                "The callback adds to the loss that a model of transformers returns.\n"
                "Use fxgraft.integrations.transformers.Trainer in place of transformers.Trainer, without the callback."
            )
        self._unhook()
        self._signature = signature
        self._hook = inner.register_forward_hook(self._add, with_kwargs=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Tell the schedules of the grafts what share of the steps is done."""
        set_progress(model, min(state.global_step / max(state.max_steps, 1), 1.0))

    def on_log(
        self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any
    ) -> None:
        """Add what the grafts did in the last training pass, to what is logged of the training."""
        if self.log and logs is not None and "loss" in logs:
            scalars = diagnostics(model)
            logs.update(scalars)
            state.log_history[-1].update(scalars)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Take the hook off the loss."""
        self._unhook()

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _add(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any], out: Any) -> Any:
        """Return what the model did, with the loss of the grafts in its loss."""
        if not model.training or self._inside:  # a pass that a method makes for its own loss
            return out
        labels = self._signature.bind(*args, **kwargs).arguments.get("labels")
        if labels is None:
            raise TargetError(
                "The Trainer called the model without labels.\n"
                "It keeps them where label_smoothing_factor or compute_loss_func is set, or where the batch has none; "
                "neither the grafts nor the callback see them then.\n"
                "Leave these settings out, or use fxgraft.integrations.transformers.Trainer, without the callback."
            )
        if not isinstance(out, dict):
            raise ConfigError(
                f"This {type(model).__name__} returns a {type(out).__name__}, in which the loss has no name.\n"
                "The callback changes the loss alone.\nSet model.config.return_dict = True."
            )
        if out.get("loss") is None:  # logits that a method looks ahead to
            return out
        counted = kwargs.get("num_items_in_batch")
        share: Any = 1.0 if counted is None else labels.ne(-100).sum() / counted
        self._inside = True
        try:
            if any(graft.patch.replaces_criterion() for graft in named_grafts(model).values()):
                total = loss(model, out, labels) * share
            else:
                total = out["loss"] + extra_loss(model, out, labels) * share
        finally:
            self._inside = False
        return type(out)(**{**out, "loss": total})


class Trainer(transformers.Trainer):
    """transformers' Trainer around a patched model: of timm, of torchvision, of transformers, or around one of these.

    The loss is `fxgraft.loss` of the logits. With gradient accumulation it is that of the whole batch: every
    micro-batch counts by its labels, also where the last one is short. Labels of -100 are left out. What a method does
    with a batch (RSC's share of samples, permutations, BatchNorm) it does with the micro-batch.

    Args:
        *args: positional arguments of transformers' Trainer.
        criterion: a function, called as ``criterion(logits, labels)``, a mean over the batch; by default
            cross-entropy, with the smoothing of ``TrainingArguments(label_smoothing_factor=...)``.
        **kwargs: keyword arguments of transformers' Trainer.

    Raises:
        ConfigError: ``compute_loss_func`` is given, which `fxgraft.loss` would not be part of.
        TargetError: (at a step) a batch holds no labels under "labels" or a name of ``label_names``.
    """

    def __init__(self, *args: Any, criterion: Callable[..., Tensor] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if getattr(self, "compute_loss_func", None) is not None:
            raise ConfigError(
                "compute_loss_func takes the place of the loss, and what the patches add would be missing.\n"
                "Pass criterion=..., called as criterion(logits, labels)."
            )
        smoothing = getattr(self.args, "label_smoothing_factor", 0.0)
        self.criterion = criterion or partial(F.cross_entropy, label_smoothing=smoothing)
        self.label_smoother = None
        # Labels of all micro-batches are then counted, and the loss of one is not divided by their number.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a micro-batch, as its share of the batch.

        Args:
            model: the model, wrapped or not.
            inputs: the images, under "pixel_values" or another name, and the labels.
            return_outputs: return (loss, outputs).
            num_items_in_batch: labels in all micro-batches of the step.
        """
        name = next((key for key in ("labels", *(self.label_names or ())) if key in inputs), None)
        if name is None:
            raise TargetError(
                f"The batch has no labels: it holds {', '.join(map(repr, inputs))}.\n"
                "The loss is computed from them, and patches may need them.\n"
                'Give them as "labels", or name them with TrainingArguments(label_names=[...]); '
                "remove_unused_columns=False keeps columns that the model does not name."
            )
        labels = inputs[name]
        images = {key: value for key, value in inputs.items() if key != name and key != "target"}
        if model.training:
            set_progress(model, min(self.state.global_step / max(self.state.max_steps, 1), 1.0))
        taken = inspect.signature(unwrapped(model).forward).parameters
        kinds = {parameter.kind for parameter in taken.values()}
        if inspect.Parameter.VAR_KEYWORD in kinds or images.keys() <= taken.keys() or len(images) != 1:
            out = model(**images, target=labels)
        else:  # a model that has another name for its images
            out = model(*images.values(), target=labels)
        own_loss = loss(model, out, labels, self.criterion)
        if num_items_in_batch is not None and model.training:
            own_loss = own_loss * self._share(labels, num_items_in_batch)
        return (own_loss, out if isinstance(out, dict) else {"logits": out}) if return_outputs else own_loss

    def _share(self, labels: Tensor, counted: Tensor | int) -> Tensor:
        """Return the share of a micro-batch in the batch, times the number of processes that average gradients."""
        total = counted.flatten()[0] if isinstance(counted, Tensor) else counted
        share = labels.ne(-100).sum() / total
        parallel = getattr(self, "get_tp_size", lambda: 1)()
        if self.args.average_tokens_across_devices:
            return share * (self.accelerator.num_processes // parallel)
        return share / max(self.args.n_gpu, 1)


__all__ = ["Grafts", "Trainer"]
