"""Training loops of other libraries around a patched model; skipped where those are not installed."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxgraft
from contract.cases import fresh, named
from fxgraft.patches.rsc import record

RESNET = named("timm/resnet18")


def patched() -> nn.Module:
    """With a method that needs labels."""
    return fxgraft.patch(fresh(RESNET), "rsc", batch_share=1.0, input_size=RESNET.input_size)


def batch() -> tuple[Tensor, Tensor]:
    return RESNET.inputs(), torch.arange(4)


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
            self.model = patched()

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

    model = patched()
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
