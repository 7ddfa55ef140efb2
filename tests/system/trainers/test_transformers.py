"""transformers: its Trainer around a patched model, and its image classifiers as the patched model."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers.modeling_outputs import ImageClassifierOutput

import fxgraft
import fxgraft.integrations.transformers
from fxgraft.integrations.transformers import Grafts
from fxgraft.patches.rsc import record
from models.tiny import assert_trained, by_hand, dataset, patched
from sweeping import some
from system.trainers.hugging_face import CONFIGS, SIDE, batch, classifier


class Trainer(transformers.Trainer):
    """The labels stay in the batch; a few lines of ``compute_loss`` are all there is to change."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        torch.manual_seed(1 + self.state.global_step)
        fxgraft.set_progress(model, self.state.global_step / self.state.max_steps)
        out = model(inputs["pixel_values"], target=inputs["labels"])
        loss = fxgraft.loss(model, out, inputs["labels"])
        if num_items_in_batch is not None:
            loss = loss * len(inputs["labels"]) / num_items_in_batch
        return (loss, {"logits": getattr(out, "logits", out)}) if return_outputs else loss


class InOrder:
    """Takes the items in their order."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]


class Recipe(InOrder, Trainer):
    pass


class Ready(InOrder, fxgraft.integrations.transformers.Trainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(1 + self.state.global_step)
        return super().compute_loss(*args, **kwargs)


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
    usual: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "disable_tqdm": True,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
        "dataloader_pin_memory": False,
        "num_train_epochs": 1,
    }
    return transformers.TrainingArguments(output_dir=str(folder), **{**usual, **options})


@pytest.mark.parametrize("kind", [Recipe, Ready])
def test_the_trainer_trains_as_a_loop_by_hand(kind: type[transformers.Trainer], tmp_path: Path) -> None:
    model = patched()
    data = Items(dataset())
    trainer = kind(model=model, args=arguments(tmp_path), train_dataset=data, eval_dataset=data)
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
    """The model computes its loss, and what the patches contribute is added, as in the README."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        fxgraft.set_progress(model, self.state.global_step / self.state.max_steps)
        out = model(**inputs, target=inputs["labels"])
        loss = out.loss + fxgraft.extra_loss(model, out, inputs["labels"])
        if num_items_in_batch is not None:
            loss = loss * len(inputs["labels"]) / num_items_in_batch
        return (loss, out) if return_outputs else loss


def test_a_classifier_and_what_the_patches_contribute(tmp_path: Path) -> None:
    options = {"p": 1.0, "consistency": True, "input_size": (3, SIDE, SIDE)}
    model = fxgraft.patch(classifier("convnext"), "crossnorm", **options)
    data = Items(list(zip(*batch(), strict=True)))
    trainer = OwnLoss(model=model, args=arguments(tmp_path), train_dataset=data, eval_dataset=data)
    assert trainer.train().training_loss > 0
    assert torch.tensor(trainer.evaluate()["eval_loss"]).isfinite()


class RecipeOfItsOwnLoss(InOrder, OwnLoss):
    pass


class Plain(nn.Module):
    """Without BatchNorm, so that micro-batches see what the batch sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(pixel_values)).mean((2, 3)))


class Renamed(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


PER_SAMPLE: dict[str, dict[str, Any]] = {
    "rsc": {"scope": "channel", "batch_share": 1.0, "layer": "conv"},
    "diversification": {"loss": "gradient_boosting", "p_peak": 1.0, "p_patch": 0.0, "patch": 1},
}


@pytest.mark.parametrize("images", [8, 7])
@pytest.mark.parametrize(
    ("kind", "network", "method"),
    [
        (Ready, Plain, "rsc"),
        (Ready, Renamed, "diversification"),
        (Ready, "convnext", "rsc"),
        (RecipeOfItsOwnLoss, "vit", "rsc"),
    ],
)
def test_accumulated_gradients_are_those_of_one_batch(
    kind: type[transformers.Trainer], network: Any, method: str, images: int, tmp_path: Path
) -> None:
    """Two steps: of four micro-batches, the last of them short, and of one batch."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(images, 3, SIDE, SIDE, generator=generator), torch.arange(images) % 5
    results = []
    for micro, accumulate in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        model = classifier(network) if isinstance(network, str) else network()
        options = {**PER_SAMPLE[method], **({"layer": -1} if isinstance(network, str) else {})}
        fxgraft.patch(model, method, input_size=(3, SIDE, SIDE), **options)
        options = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulate}
        data = Items(list(zip(x, y, strict=True)))
        args = arguments(tmp_path, num_train_epochs=2, **options)
        kind(model=model, args=args, train_dataset=data).train()
        results.append({name: p.detach() for name, p in model.named_parameters()})
    assert not torch.equal(
        results[0]["fc.weight" if not isinstance(network, str) else "classifier.weight"], 0 * y
    )
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-6)


class Stock(InOrder, transformers.Trainer):
    """transformers' own Trainer; the callback is all that knows of fxgraft."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(1 + self.state.global_step)
        return super().compute_loss(*args, **kwargs)


class Seeded(InOrder, OwnLoss):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(1 + self.state.global_step)
        return super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize("name", some(["convnext", "vit"], 1))
@pytest.mark.parametrize(
    ("method", "options"), [("crossnorm", {"p": 1.0, "consistency": True}), ("rsc", {"batch_share": 1.0})]
)
def test_the_callback_trains_as_a_loss_by_hand(
    name: str, method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    data, results = Items(list(zip(*batch(), strict=True))), []
    for kind, callbacks in ((Seeded, []), (Stock, [Grafts()])):
        model = fxgraft.patch(classifier(name), method, input_size=(3, SIDE, SIDE), **options)
        args = arguments(
            tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=2
        )
        trainer = kind(model=model, args=args, train_dataset=data, eval_dataset=data, callbacks=callbacks)
        trainer.train()
        results.append((model.state_dict(), trainer.evaluate()["eval_loss"]))
        assert not model._forward_hooks
    assert_trained(results[1][0], results[0][0])
    assert results[1][1] == results[0][1]


class WithLoss(Plain):
    """Computes its loss as models of transformers do."""

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        logits = super().forward(pixel_values)
        found = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=found, logits=logits)


def test_the_callback_where_a_graft_stands_in_for_the_criterion(tmp_path: Path) -> None:
    x, y = batch()
    options = {"p_peak": 0.0, "p_patch": 0.0, "patch": 1, "loss": "gradient_boosting", "loss_k": 2}
    model = fxgraft.patch(WithLoss(), "diversification", input_size=(3, SIDE, SIDE), **options)
    out = model(x, labels=y, target=y)
    expected = fxgraft.gradient_boosting_cross_entropy(out.logits, y, k=2)
    assert not torch.isclose(expected, out.loss)
    args = arguments(tmp_path, logging_steps=1, learning_rate=0.0)
    data = Items(list(zip(x, y, strict=True)))
    trainer = Stock(model=model, args=args, train_dataset=data, callbacks=[Grafts()])
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=1e-4)


def test_reporters_behind_the_callback_see_the_diagnostics(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, *args: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    model = fxgraft.patch(classifier("convnext"), "rsc", input_size=(3, SIDE, SIDE))
    data = Items(list(zip(*batch(), strict=True)))
    args = arguments(tmp_path, logging_steps=1)
    trainer = Stock(model=model, args=args, train_dataset=data, callbacks=[Grafts(), Reporter()])
    trainer.train()
    assert {"loss", "rsc.muted", "rsc.samples"} <= seen[0].keys()
    assert seen[0]["rsc.muted"] == trainer.state.log_history[0]["rsc.muted"]
    assert "rsc.muted" not in seen[-1], "what is logged at the end is of the whole training"


def test_the_callback_says_what_it_cannot_do(tmp_path: Path) -> None:
    data = Items(list(zip(*batch(), strict=True)))
    args = arguments(tmp_path)
    for model, error, message in (
        (
            classifier("convnext"),
            fxgraft.UnknownGraftError,
            "No part of this ConvNextForImageClassification is patched",
        ),
        (patched(), fxgraft.ConfigError, r"takes no labels(.|\n)*transformers.Trainer, without the callback"),
    ):
        with pytest.raises(error, match=message):
            Stock(model=model, args=args, train_dataset=data, callbacks=[Grafts()]).train()
    model = fxgraft.patch(classifier("convnext"), "selfnorm", input_size=(3, SIDE, SIDE))
    callback = Grafts()
    callback.on_train_begin(None, None, None, model=model)
    with pytest.raises(fxgraft.ConfigError, match="returns a tuple, in which the loss has no name"):
        model(batch()[0], labels=batch()[1], return_dict=False)
    callback.on_train_end()
    assert isinstance(model(batch()[0], labels=batch()[1], return_dict=False), tuple)
    smooth = arguments(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(fxgraft.TargetError, match=r"without labels(.|\n)*label_smoothing_factor"):
        Stock(model=model, args=smooth, train_dataset=data, callbacks=[Grafts()]).train()


def test_the_ready_trainer_says_what_it_cannot_do(tmp_path: Path) -> None:
    model = patched()
    with pytest.raises(fxgraft.ConfigError, match=r"takes the place of the loss(.|\n)*criterion="):
        Ready(model=model, args=arguments(tmp_path), compute_loss_func=lambda *_, **__: None)
    trainer = Ready(model=model, args=arguments(tmp_path))
    with pytest.raises(fxgraft.TargetError, match="has no labels: it holds 'pixel_values'"):
        trainer.compute_loss(model, {"pixel_values": batch()[0]})


def test_smoothing_and_criteria_of_the_ready_trainer(tmp_path: Path) -> None:
    model, (x, y) = classifier("convnext"), batch()
    fxgraft.patch(model, "taps", layers=-1, input_size=(3, SIDE, SIDE))
    inputs = {"pixel_values": x, "labels": y}
    smooth = Ready(model=model, args=arguments(tmp_path, label_smoothing_factor=0.2))
    expected = F.cross_entropy(model(x).logits, y, label_smoothing=0.2)
    torch.testing.assert_close(smooth.compute_loss(model, inputs, num_items_in_batch=16), expected / 4)
    found, outputs = smooth.compute_loss(model.eval(), inputs, return_outputs=True, num_items_in_batch=16)
    torch.testing.assert_close(found, expected)
    assert torch.equal(outputs["logits"], model(x).logits)
    own = Ready(model=model, args=arguments(tmp_path), criterion=lambda logits, y: logits.sum() * 2)
    torch.testing.assert_close(own.compute_loss(model, inputs), 2 * model(x).logits.sum())


def test_without_transformers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fxgraft.integrations.transformers")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers"):
        importlib.import_module("fxgraft.integrations.transformers")


@pytest.mark.parametrize("method", ["selfnorm", "crossnorm"])
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_keywords_that_a_layer_does_not_use(name: str, method: str, tmp_path: Path) -> None:
    """The stock Trainer hands layers ``use_cache``, and the number of labels."""
    model = fxgraft.patch(classifier(name), method, input_size=(3, SIDE, SIDE))
    x, y = batch()
    expected = model.eval()(x, labels=y).loss
    data = Items(list(zip(x, y, strict=True)))
    trainer = transformers.Trainer(
        model=model, args=arguments(tmp_path, learning_rate=0.0), train_dataset=data
    )
    assert model.config.use_cache is False
    trainer.train()
    torch.testing.assert_close(model.eval()(x, labels=y, num_items_in_batch=8).loss, expected / 2)


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
        "swin": "swin.transpose (NCL",
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


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_members_in_an_output_that_keeps_its_class(name: str) -> None:
    model = classifier(name).eval()
    x, y = batch()
    expected = model(x)
    fxgraft.patch(model, "mixmo", input_size=(3, SIDE, SIDE))
    assert torch.equal(model(x).logits, expected.logits)
    assert model(x, members=True).logits.shape == (2, 4, 5)
    assert fxgraft.mixmo.member_logits(model, x).logits.shape == (2, 4, 5)
    for call in (model.train(), torch.compile(model, fullgraph=True, backend="aot_eager")):
        out = (
            call(pixel_values=x, target=y, output_hidden_states=True) if call is model else call(x, target=y)
        )
        assert type(out) is type(expected)
        assert out.logits.shape == (2, 4, 5)
        assert call is not model or len(out.hidden_states) > 1
        fxgraft.loss(model, out, y).backward()
    with pytest.raises(fxgraft.TargetError, match="the model's own forward was given the labels"):
        model(pixel_values=x, labels=y)


def test_members_in_the_entry_that_is_named() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = classifier("resnet")

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            out = self.model(x).logits
            return out.detach().mean(1), out

    x, y = batch()
    with pytest.raises(fxgraft.StructureError, match="Say which one holds the logits, as output="):
        fxgraft.patch(Pair(), "mixmo", input_size=(3, SIDE, SIDE))
    model = fxgraft.patch(Pair(), "mixmo", output=1, input_size=(3, SIDE, SIDE)).train()
    out = model(x, target=y)
    assert [tuple(each.shape) for each in out] == [(8,), (2, 4, 5)]
    fxgraft.loss(model, out, y).backward()


@pytest.mark.parametrize("name", ["resnet", "swin", "convnext"])
def test_class_maps_where_a_module_holds_map_and_pooling(name: str) -> None:
    torch.manual_seed(0)
    bare = classifier(name)
    bare.config = copy.deepcopy(bare.config)  # which all models of the kind share here
    bare.config.problem_type = "single_label_classification"
    model = copy.deepcopy(bare)
    fxgraft.patch(model, "diversification", alpha=1.0, patch=1, input_size=(3, SIDE, SIDE))
    x, y = batch()
    torch.manual_seed(1)
    expected = bare(x, labels=y)
    torch.manual_seed(1)
    out = model(pixel_values=x, labels=y)
    assert type(out) is type(expected)
    torch.testing.assert_close(out.logits, expected.logits)
    torch.testing.assert_close(out.loss, expected.loss)
    out.loss.backward()
    expected.loss.backward()
    for mine, own in zip(model.parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, own.grad)
    torch.compiler.reset()  # or sizes count as dynamic, for the models of other tests: minutes of guards on a Swin
    torch.compile(model, fullgraph=True, backend="aot_eager")(x, target=y)
    bare.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x).logits, bare.eval()(x).logits)


def test_class_maps_of_a_body_that_is_frozen_in_evaluation() -> None:
    model = fxgraft.patch(classifier("resnet"), "diversification", patch=1, input_size=(3, SIDE, SIDE))
    x, y = batch()
    model.resnet.eval()
    with pytest.raises(fxgraft.StructureError, match="saw no map in this training pass"):
        model(x, target=y)


def test_a_loss_of_its_own_that_the_graph_does_not_hold() -> None:
    """The kind of loss is chosen in the forward by the labels, unless the configuration names it."""
    model = classifier("resnet")
    model.config = copy.deepcopy(model.config)  # which all models of the kind share here
    model.config.problem_type = None
    fxgraft.patch(model, "diversification", patch=1, input_size=(3, SIDE, SIDE))
    x, y = batch()
    with pytest.raises(fxgraft.BypassError, match=r"fxgraft.loss\(model, out, y\)"):
        model(pixel_values=x, labels=y)


def test_the_class_of_a_patched_model_makes_and_loads_bare_ones(tmp_path: Path) -> None:
    model = fxgraft.patch(classifier("convnext"), "rsc", input_size=(3, SIDE, SIDE)).eval()
    x, _ = batch()
    expected = model(x).logits
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert fxgraft.grafts(loaded) == fxgraft.grafts(type(model)(model.config)) == []
    assert torch.equal(loaded(x).logits, expected)
