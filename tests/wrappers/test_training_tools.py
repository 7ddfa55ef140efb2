"""The tools of training around a patched model: autocast, memory format, EMA, checkpointing, trainers."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxgraft
from fxgraft.patches.rsc.patch import record

SIZE = 64
SMALL: dict[str, dict[str, Any]] = {
    "resnet18": {"channels": (8, 16, 16, 24)},  # 2×2 positions at the end
    "test_vit": {"img_size": SIZE},
    "test_convnext": {},
}
PLACES = [
    ("resnet18", "layer4"),
    ("resnet18", "layer2"),
    ("test_convnext", "stages.3"),
    ("test_vit", "blocks.2"),
]
places = pytest.mark.parametrize(("name", "layer"), PLACES)


def backbone(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **SMALL[name])


def patched(name: str, layer: str, **options: Any) -> nn.Module:
    options = {"scope": "spatial", "batch_share": 1.0, **options}
    return fxgraft.patch(backbone(name), "rsc", layer=layer, input_size=(3, SIZE, SIZE), **options)


def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, SIZE, SIZE, generator=g), torch.randint(5, (4,), generator=g)


def step(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A training step: loss and gradients."""
    model.zero_grad()
    out = model(x, target=y)
    loss = fxgraft.loss(model, out.float(), y)
    loss.backward()
    return loss.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@places
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(name: str, layer: str, dtype: torch.dtype) -> None:
    x, y = batch()
    bare = backbone(name)
    model = patched(name, layer)
    with torch.autocast("cpu", dtype=dtype):
        expected = bare(x)
        with record(model) as records:
            out = model(x, target=y)
    assert out.dtype == expected.dtype == dtype
    fxgraft.loss(model, out.float(), y).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    # As many positions are muted as in full precision, and mostly the same ones.
    (full,) = _masks(patched(name, layer), x, y)
    (half,) = records
    assert (half.mask == 0).sum() >= 0.9 * (full.mask == 0).sum() > 0
    assert (half.mask == full.mask).float().mean() > 0.7
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        bare.load_state_dict(model.state_dict())
        assert torch.equal(model.eval()(x), bare.eval()(x))


def _masks(model: nn.Module, x: Tensor, y: Tensor) -> list[Any]:
    with record(model) as records:
        model(x, target=y)
    return records


@places
def test_half_precision_models(name: str, layer: str) -> None:
    x, y = batch()
    model = patched(name, layer).to(torch.bfloat16)
    out = model(x.bfloat16(), target=y)
    assert out.dtype == torch.bfloat16
    fxgraft.loss(model, out, y).backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("name", "layer"), PLACES[:3])
@pytest.mark.parametrize("when", ["before", "after"])
def test_channels_last_is_kept(name: str, layer: str, when: str) -> None:
    x, y = batch()
    x = x.contiguous(memory_format=torch.channels_last)
    seen: dict[str, list[Tensor]] = {"bare": [], "patched": []}
    model = backbone(name)
    if when == "before":
        model = model.to(memory_format=torch.channels_last)
    fxgraft.patch(model, "rsc", layer=layer, scope="spatial", batch_share=1.0, input_size=(3, SIZE, SIZE))
    if when == "after":
        model = model.to(memory_format=torch.channels_last)
    bare = backbone(name).to(memory_format=torch.channels_last)
    for key, each in (("bare", bare), ("patched", model)):
        each.get_submodule(layer).register_forward_hook(lambda _, args, out, to=seen[key]: to.append(out))
        each(x, **({"target": y} if each is model else {}))
    assert seen["patched"][-1].is_contiguous(memory_format=torch.channels_last)
    assert seen["patched"][-1].stride() == seen["bare"][-1].stride()
    mine = {k: p.stride() for k, p in model.named_parameters()}
    assert mine == {k: p.stride() for k, p in bare.named_parameters()}


def test_channels_last_trains_as_contiguous() -> None:
    x, y = batch()
    loss, gradients = step(patched("resnet18", "layer2"), x, y)
    other = patched("resnet18", "layer2").to(memory_format=torch.channels_last)
    other_loss, other_gradients = step(other, x.contiguous(memory_format=torch.channels_last), y)
    torch.testing.assert_close(other_loss, loss, rtol=1e-4, atol=1e-5)
    for key, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[key], gradient, rtol=1e-3, atol=1e-4)


@places
def test_ema(name: str, layer: str) -> None:
    x, y = batch()
    model = patched(name, layer)
    ema = ModelEmaV3(model, decay=0.5)
    before = {key: value.clone() for key, value in ema.module.state_dict().items()}
    assert [g.patch for g in fxgraft.grafts(ema.module)] == [g.patch for g in fxgraft.grafts(model)]
    assert not ema.module.training
    step(model, x, y)
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad
    ema.update(model)
    for key, value in ema.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (before[key] + model.state_dict()[key]) / 2)
    plain = backbone(name).eval()
    plain.load_state_dict(ema.module.state_dict())
    with torch.no_grad():
        assert torch.equal(ema(x), plain(x))
    step(ema.module.train(), x, y)  # the copy has its own grafts, which act


@pytest.mark.parametrize("when", ["before", "after", "between"])
@pytest.mark.parametrize(("name", "layer"), [p for p in PLACES if p[0] != "test_convnext"])
def test_checkpointing_changes_neither_loss_nor_gradients(name: str, layer: str, when: str) -> None:
    x, y = batch()
    torch.manual_seed(2)
    loss, gradients = step(patched(name, layer), x, y)
    model = backbone(name)
    if when == "before":
        model.set_grad_checkpointing(True)
    fxgraft.patch(model, "rsc", layer=layer, scope="spatial", batch_share=1.0, input_size=(3, SIZE, SIZE))
    if when == "between":
        step(copy.deepcopy(model), x, y)
    if when != "before":
        model.set_grad_checkpointing(True)
    reentered: list[Any] = []
    inner = model.get_submodule("layer1.0.conv1" if name == "resnet18" else "blocks.0.attn")
    inner.register_forward_hook(lambda *_: reentered.append(None))
    torch.manual_seed(2)
    with record(model) as records:
        checkpointed_loss, checkpointed = step(model, x, y)
    assert len(reentered) == 2, "the first block must be computed again in backward"
    assert len(records) == 1, "and the graft must not"
    assert torch.equal(checkpointed_loss, loss)
    assert checkpointed.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(checkpointed[key], gradient, rtol=1e-5, atol=1e-7)


def loader() -> DataLoader:
    x, y = batch()
    return DataLoader(TensorDataset(x, y), batch_size=2)


@pytest.mark.parametrize("way", ["target", "targets", "with_targets"])
def test_lightning(way: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = patched("resnet18", "layer4")

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            x, y = batch
            fxgraft.set_progress(self.model, self.current_epoch / self.trainer.max_epochs)
            if way == "target":
                out = self.model(x, target=y)
            elif way == "targets":
                with fxgraft.targets(y):
                    out = self.model(x)
            else:
                (out,) = (self.model(x) for x, _ in fxgraft.with_targets([batch]))
            return fxgraft.loss(self.model, out, y)

        def validation_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    before = copy.deepcopy(module.model.state_dict())
    with warnings.catch_warnings(), record(module.model) as records:
        warnings.simplefilter("ignore")  # the trainer's own advice
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, loader(), loader())
    assert len(records) == 2
    assert not torch.equal(module.model.conv1.weight, before["conv1.weight"])
    assert not [p for p in tmp_path.rglob("*.ckpt") if p.stat().st_size == 0]
    fxgraft.unpatch(module.model)


def test_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Trainer(transformers.Trainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
            out = model(inputs["x"], target=inputs["labels"])
            return fxgraft.loss(model, out, inputs["labels"])

    model = patched("resnet18", "layer4")
    before = model.conv1.weight.detach().clone()
    x, y = batch()
    data = [{"x": image, "labels": label} for image, label in zip(x, y, strict=True)]
    with warnings.catch_warnings(), record(model) as records:
        warnings.simplefilter("ignore")  # the trainer's own advice
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=4,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=data).train()
    assert len(records) == 1
    assert not torch.equal(model.conv1.weight, before)
