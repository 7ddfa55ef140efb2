"""Lightning around a patched model, with the callback and without."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import lightning
import pytest
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import CombinedLoader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fxgraft
from fxgraft.integrations.lightning import Grafts
from models.tiny import BATCHES, assert_trained, batches, by_hand, loader, patched

# The trainer's advice on loaders, and its use of what torch deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
]


class Module(lightning.LightningModule):
    """A user's module: the step knows nothing of fxgraft but the loss."""

    def __init__(self, model: nn.Module, target: bool = False) -> None:
        super().__init__()
        self.model = model
        self.target = target

    def training_step(self, batch: Any) -> Tensor:
        x, y = batch.values() if isinstance(batch, dict) else batch
        torch.manual_seed(1 + self.global_step)
        out = self.model(x, target=y) if self.target else self.model(x)
        return fxgraft.loss(self.model, out, y)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, *callbacks: Any, **options: Any) -> lightning.Trainer:
    return lightning.Trainer(
        callbacks=list(callbacks),
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"max_epochs": 1, "logger": False, **options},
    )


def keyed() -> DataLoader[Any]:
    """The batches as dictionaries."""
    return DataLoader([{"image": x, "label": y} for x, y in batches()], batch_size=None)  # type: ignore[arg-type]


def expected() -> dict[str, Tensor]:
    return by_hand(patched())


class Told(lightning.Callback):
    """Writes down what the schedules are told."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.progress = model, []

    def on_train_batch_end(self, *args: Any) -> None:
        (graft,) = fxgraft.grafts(self.model)
        self.progress.append(graft.context.progress)


@pytest.mark.parametrize("target", [False, True], ids=["published", "handed over"])
def test_the_callback_trains_as_a_loop_by_hand(target: bool, tmp_path: Path) -> None:
    module = Module(patched(), target)
    told = Told(module.model)
    trainer(tmp_path, Grafts(labels=None if target else 1), told).fit(module, loader(), loader())
    assert_trained(module.model.state_dict(), expected())
    assert told.progress == [step / BATCHES for step in range(BATCHES)]
    with pytest.raises(fxgraft.TargetError, match="needs the labels"):  # they end with their step
        module.model.train()(batches()[0][0])
    fxgraft.unpatch(module.model)


@pytest.mark.parametrize(
    ("options", "progress"),
    [
        ({"max_epochs": 2}, [0, 0.25, 0.5, 0.75]),
        ({"max_epochs": -1, "max_steps": 3}, [0, 1 / 3, 2 / 3]),
        ({"max_epochs": 4, "max_steps": 2}, [0, 0.5]),
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, [0, 0.25, 0.5, 0.75]),
    ],
    ids=str,
)
def test_schedules_are_told_the_share_that_is_done(
    options: dict[str, int], progress: list[float], tmp_path: Path
) -> None:
    module = Module(patched())
    told = Told(module.model)
    trainer(tmp_path, Grafts(), told, **options).fit(module, loader())
    assert told.progress == pytest.approx(progress)


@pytest.mark.parametrize(
    "options", [{"max_epochs": -1}, {"max_epochs": -1, "limit_train_batches": 1}], ids=str
)
def test_a_training_without_an_end(options: dict[str, int], tmp_path: Path) -> None:
    class Stops(lightning.Callback):
        def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
            trainer.should_stop = True

    module = Module(patched(start=0.5))
    with pytest.warns(
        fxgraft.FxgraftWarning, match=r"start of 'model.rsc': .*no end(.|\n)*max_epochs=\.\.\."
    ):
        trainer(tmp_path, Grafts(), Stops(), **options).fit(module, loader())
    trainer(tmp_path, Grafts(), Stops(), **options).fit(
        Module(patched()), loader()
    )  # nothing follows a schedule


def test_a_training_that_ends_by_time(tmp_path: Path) -> None:
    module = Module(patched(start=0.9))
    told = Told(module.model)
    trainer(tmp_path, Grafts(), told, max_epochs=-1, max_time={"seconds": 1}).fit(module, loader())
    assert told.progress == sorted(told.progress)
    assert 0 < told.progress[1] < 0.9 < told.progress[-1] <= 1


def test_labels_under_a_key(tmp_path: Path) -> None:
    module = Module(patched())
    data = keyed()
    trainer(tmp_path, Grafts(labels="label")).fit(module, data)
    assert_trained(module.model.state_dict(), expected())


def test_batches_without_labels_where_they_are_looked_for(tmp_path: Path) -> None:
    data = keyed()
    with pytest.raises(fxgraft.TargetError, match=r"a dict, has no entry 1 (?s:.*)Grafts\(labels=\.\.\.\)"):
        trainer(tmp_path, Grafts()).fit(Module(patched()), data)


class Semi(Module):
    """Labelled and unlabelled images in one step."""

    def __init__(self, model: nn.Module, unlabelled: bool = True) -> None:
        super().__init__(model)
        self.unlabelled = unlabelled

    def training_step(self, batch: Any) -> Tensor:
        (x, y), u = (
            (batch["l"], batch["u"][0]) if isinstance(batch, dict) else ((batch[0], batch[1]), batch[0] + 1)
        )
        torch.manual_seed(1 + self.global_step)
        out = self.model(x)
        self.model(x)  # the same input again, as closures of an optimiser do
        if self.unlabelled:
            self.model(u)
        return fxgraft.loss(self.model, out, y)


@pytest.mark.parametrize(
    ("combined", "match"),
    [
        (True, "'rsc' was given an input that these labels are not of"),
        (False, "'rsc' was given labels left over"),
    ],
)
def test_labels_are_those_of_one_input(combined: bool, match: str, tmp_path: Path) -> None:
    data: Any = CombinedLoader({"l": loader(), "u": loader()}, "min_size") if combined else loader()
    labels = ("l", 1) if combined else 1
    with pytest.raises(fxgraft.TargetError, match=match):
        trainer(tmp_path, Grafts(labels)).fit(Semi(patched()), data)
    module = Semi(patched(), unlabelled=False)
    trainer(tmp_path, Grafts(labels), max_steps=2).fit(module, data)
    assert module.global_step == 2


def test_loaders_that_are_combined_by_hand() -> None:
    model = patched()
    for batch, _, _ in fxgraft.with_targets(CombinedLoader({"l": loader(), "u": loader()}), (0, "l", 1)):
        fxgraft.loss(model, model(batch["l"][0]), batch["l"][1]).backward()
        with pytest.raises(fxgraft.TargetError, match="an input that these labels are not of"):
            model(batch["u"][0])


def test_a_step_that_fails_leaves_no_labels(tmp_path: Path) -> None:
    class Fails(Module):
        def training_step(self, batch: Any) -> Tensor:
            raise OSError("the disk is gone")

    model = patched()
    with pytest.raises(OSError, match="the disk is gone"):
        trainer(tmp_path, Grafts()).fit(Fails(model), loader())
    with pytest.raises(fxgraft.TargetError, match="needs the labels"):
        model(batches()[0][0])


def test_a_module_with_nothing_patched(tmp_path: Path) -> None:
    module = Module(fxgraft.unpatch(patched()))
    with pytest.raises(
        fxgraft.UnknownGraftError, match=r"No part of this Module is patched.\n.*\n.*fxgraft.patch"
    ):
        trainer(tmp_path, Grafts()).fit(module, loader())


@pytest.mark.parametrize("way", ["target", "targets", "with_targets"])
def test_without_the_callback(way: str, tmp_path: Path) -> None:
    class ByHand(Module):
        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            x, y = batch
            torch.manual_seed(1 + self.global_step)
            if way == "target":
                out = self.model(x, target=y)
            elif way == "targets":
                with fxgraft.targets(y):
                    out = self.model(x)
            else:
                (out,) = (self.model(x) for x, _ in fxgraft.with_targets([batch]))
            return fxgraft.loss(self.model, out, y)

    module = ByHand(patched())
    trainer(tmp_path).fit(module, loader(), loader())
    assert_trained(module.model.state_dict(), expected())


class Held(Logger):
    """Keeps what it is given, and takes pictures as the logger of Weights & Biases does."""

    name, version = "held", "0"

    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[tuple[int | None, dict[str, float]]] = []
        self.images: list[tuple[int, str, Any, str]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append((step, {k: v for k, v in metrics.items() if k != "epoch"}))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_image(self, key: str, images: list[Any], step: int, caption: list[str]) -> None:
        self.images += [(step, key, image, text) for image, text in zip(images, caption, strict=True)]


def test_diagnostics_and_pictures_are_logged(tmp_path: Path) -> None:
    held, board = Held(), TensorBoardLogger(tmp_path)
    model = fxgraft.patch(timm.create_model("test_resnet", num_classes=2), "rsc", input_size=(3, 32, 32))
    told: list[dict[str, float]] = []

    class Watch(lightning.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            told.append(fxgraft.diagnostics(model))

    data = DataLoader([(torch.randn(3, 32, 32), torch.tensor(i % 2)) for i in range(16)], batch_size=4)  # type: ignore[arg-type]
    grafts = Grafts(log=True, pictures=4)
    trainer(tmp_path, grafts, Watch(), logger=[held, board], log_every_n_steps=2).fit(Module(model), data)
    assert held.metrics == [
        (step, {f"model.{name}": value for name, value in told[step - 1].items()}) for step in (2, 4)
    ]
    ((step, key, image, caption),) = held.images
    assert (step, key) == (4, "grafts/model.rsc")
    assert caption.startswith("what RSC mutes at layer3 for class ")
    assert image.ndim == 3
    events = EventAccumulator(board.log_dir, size_guidance={"images": 0}).Reload()
    assert [each.step for each in events.Images("grafts/model.rsc")] == [4]
    assert [each.step for each in events.Scalars("model.rsc.muted")] == [2, 4]


def test_logging_without_a_logger_is_told(tmp_path: Path) -> None:
    with pytest.warns(
        fxgraft.FxgraftWarning, match=r"No diagnostics and pictures will be logged(.|\n)*TensorBoardLogger"
    ):
        trainer(tmp_path, Grafts(log=True, pictures=5)).fit(Module(patched()), loader())
    with pytest.raises(fxgraft.ConfigError, match="number of steps, or 0 for none; got -1"):
        Grafts(pictures=-1)


def test_without_lightning_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fxgraft.integrations.lightning")
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(ImportError, match="pip install lightning"):
        importlib.import_module("fxgraft.integrations.lightning")
