"""transformers: a Trainer that hands labels and progress to the patched models in a model, and takes their loss.

Needs ``pip install transformers accelerate``, and is loaded by its name alone:
``from fxgraft.integrations.transformers import Trainer``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fxgraft.api import set_progress
from fxgraft.errors import ConfigError, TargetError
from fxgraft.graph.grafting.lookup import unwrapped
from fxgraft.training_loss import loss

try:
    import transformers
except ImportError as error:
    raise ImportError(
        "fxgraft.integrations.transformers is a Trainer of transformers, which is not installed.\n"
        "Install it with: pip install transformers accelerate."
    ) from error


class Trainer(transformers.Trainer):
    """transformers' Trainer around a patched model: of timm, of torchvision, of transformers, or around one of these.

    The loss is `fxgraft.loss` of the logits. With gradient accumulation it is that of the whole batch: every
    micro-batch counts by its labels, also where the last one is short. Labels of -100 are left out. What a method does
    with a batch (RSC's share of samples, permutations, BatchNorm) it does with the micro-batch.

    Args:
        *args: of transformers' Trainer.
        criterion: called as ``criterion(logits, labels)``, a mean over the batch; by default cross-entropy, with
            the smoothing of ``TrainingArguments(label_smoothing_factor=...)``.
        **kwargs: of transformers' Trainer.

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
        name = next((each for each in ("labels", *(self.label_names or ())) if each in inputs), None)
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
        kinds = {each.kind for each in taken.values()}
        if inspect.Parameter.VAR_KEYWORD in kinds or images.keys() <= taken.keys() or len(images) != 1:
            out = model(**images, target=labels)
        else:  # a model that has another name for its images
            out = model(*images.values(), target=labels)
        found = loss(model, out, labels, self.criterion)
        if num_items_in_batch is not None and model.training:
            found = found * self._share(labels, num_items_in_batch)
        return (found, out if isinstance(out, dict) else {"logits": out}) if return_outputs else found

    def _share(self, labels: Tensor, counted: Tensor | int) -> Tensor:
        """Return the share of a micro-batch in the batch, times the number of processes that average gradients."""
        total = counted.flatten()[0] if isinstance(counted, Tensor) else counted
        share = labels.ne(-100).sum() / total
        parallel = getattr(self, "get_tp_size", lambda: 1)()
        if self.args.average_tokens_across_devices:
            return share * (self.accelerator.num_processes // parallel)
        return share / max(self.args.n_gpu, 1)


__all__ = ["Trainer"]
