"""transformers: its Trainer around a patched model, and its image classifiers as the patched model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset

import fxgraft
from fxgraft.patches.rsc import record
from sweeping import some
from trainers.hugging_face import CONFIGS, SIDE, batch, classifier
from trainers.tiny import assert_trained, by_hand, dataset, patched


class Trainer(transformers.Trainer):
    """The labels stay in the batch; three lines of ``compute_loss`` are all there is to change."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        torch.manual_seed(1 + self.state.global_step)
        fxgraft.set_progress(model, self.state.global_step / self.state.max_steps)
        out = model(inputs["pixel_values"], target=inputs["labels"])
        loss = fxgraft.loss(model, out, inputs["labels"])
        return (loss, {"logits": getattr(out, "logits", out)}) if return_outputs else loss


class Items(Dataset):
    """A data set whose items are dictionaries, as transformers has them."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, y = self.data[index]
        return {"pixel_values": x, "labels": y}


def arguments(folder: Path, **options: Any) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        dataloader_pin_memory=False,
        **{"num_train_epochs": 1, **options},
    )


class InOrder(Trainer):
    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def test_the_trainer_trains_as_a_loop_by_hand(tmp_path: Path) -> None:
    model = patched()
    data = Items(dataset())
    trainer = InOrder(model=model, args=arguments(tmp_path), train_dataset=data, eval_dataset=data)
    trainer.train()
    assert_trained(model.state_dict(), by_hand(patched()))
    assert torch.tensor(trainer.evaluate()["eval_loss"]).isfinite()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_classifier_in_the_stock_trainer(name: str, tmp_path: Path) -> None:
    """Nothing is changed: the model computes its loss from its ``labels``, and the patch finds them there."""
    model = fxgraft.patch(classifier(name), "rsc", batch_share=1.0, input_size=(3, SIDE, SIDE))
    x, y = batch()
    data = Items(list(zip(x, y, strict=True)))
    with record(model) as records:
        trainer = transformers.Trainer(
            model=model,
            args=arguments(tmp_path),
            train_dataset=data,
            eval_dataset=data,
        )
        trainer.train()
    assert len(records) == 1, "the labels reached the patch"
    assert torch.tensor(trainer.evaluate()["eval_loss"]).isfinite()


class OwnLoss(transformers.Trainer):
    """The model computes its loss, and what the patches contribute is added: three lines again."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        fxgraft.set_progress(model, self.state.global_step / self.state.max_steps)
        out = model(**inputs, target=inputs["labels"])
        loss = out.loss + fxgraft.extra_loss(model, out, inputs["labels"])
        return (loss, out) if return_outputs else loss


def test_a_classifier_and_what_the_patches_contribute(tmp_path: Path) -> None:
    options = {"p": 1.0, "consistency": True, "input_size": (3, SIDE, SIDE)}
    model = fxgraft.patch(classifier("convnext"), "crossnorm", **options)
    data = Items(list(zip(*batch(), strict=True)))
    trainer = OwnLoss(model=model, args=arguments(tmp_path), train_dataset=data, eval_dataset=data)
    assert trainer.train().training_loss > 0
    assert torch.tensor(trainer.evaluate()["eval_loss"]).isfinite()


METHODS = {
    "rsc": {},
    "crossnorm": {"p": 1.0, "consistency": True},
    "selfnorm": {},
    "taps": {"layers": -1},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", some(CONFIGS, 2))
def test_a_classifier_that_computes_its_own_loss(name: str, method: str) -> None:
    model = fxgraft.patch(classifier(name), method, input_size=(3, SIDE, SIDE), **METHODS[method])
    x, y = batch()
    out = model(pixel_values=x, labels=y, target=y)
    (out.loss + fxgraft.extra_loss(model, out, y)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    model.eval()
    with torch.no_grad():
        assert model(x).logits.shape == (4, 5)
        assert model(x, labels=y).loss.isfinite()
        assert isinstance(model(x, return_dict=False), tuple)
        if fxgraft.methods()[method].train_only:
            assert torch.equal(model(x).logits, fxgraft.merge(model)(x).logits)
    fxgraft.unpatch(model)
    assert type(model) is type(classifier(name))


def test_where_rsc_goes_by_default() -> None:
    """The map or the tokens that are averaged; before a class token is read alone, the last block that feeds it."""
    where = {}
    for name in CONFIGS:
        (graft,) = fxgraft.grafts(fxgraft.patch(classifier(name), "rsc", input_size=(3, SIDE, SIDE)))
        where[name] = graft.patch.describe(graft).partition(";")[0]
    assert where == {
        "resnet": "resnet.encoder.stages.1 (NCHW",
        "vit": "vit.layers.0 (NLC, 1 prefix",
        "swin": "swin.layernorm (NLC",
        "convnext": "convnext.encoder.stages.2 (NCHW",  # the last has a single position
    }


def test_a_pooled_value_has_its_channels_in_front() -> None:
    model = fxgraft.patch(classifier("swin"), "gam", layers="swin.pooler", input_size=(3, SIDE, SIDE))
    (graft,) = fxgraft.grafts(model)
    assert "swin.pooler (NCL)" in graft.patch.describe(graft)


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_under_the_name_of_its_own_class(name: str, tmp_path: Path) -> None:
    model = fxgraft.patch(classifier(name), "rsc", input_size=(3, SIDE, SIDE)).eval()
    own = fxgraft.merge(model)
    model.save_pretrained(tmp_path)
    assert model.config.architectures == [type(own).__name__]
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert type(again) is type(own)
    with torch.no_grad():
        assert torch.equal(again(batch()[0]).logits, model(batch()[0]).logits)


def test_logits_alone_for_methods_that_fold_classifiers() -> None:
    """MixMo wants one tensor of logits, which a wrapper of three lines takes out of what the model returns."""

    class Logits(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: Tensor) -> Tensor:
            return self.model(pixel_values).logits

    with pytest.raises(fxgraft.StructureError, match="returns several values, and not one tensor of logits"):
        fxgraft.patch(classifier("resnet"), "mixmo", input_size=(3, SIDE, SIDE))
    model = fxgraft.patch(Logits(classifier("resnet")), "mixmo", input_size=(3, SIDE, SIDE))
    x, y = batch()
    out = model(x, target=y)
    assert out.shape == (2, 4, 5)
    fxgraft.loss(model, out, y).backward()


def test_the_class_of_a_patched_model_makes_and_loads_bare_ones(tmp_path: Path) -> None:
    model = fxgraft.patch(classifier("convnext"), "rsc", input_size=(3, SIDE, SIDE)).eval()
    x, _ = batch()
    expected = model(x).logits
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert fxgraft.grafts(loaded) == fxgraft.grafts(type(model)(model.config)) == []
    assert torch.equal(loaded(x).logits, expected)
