"""Train a patched backbone with Lightning: one callback, and fxgraft.loss in the step.

python examples/lightning_module.py --quick
"""

import argparse
import tempfile

import lightning
import timm
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

import fxgraft
from fxgraft.integrations.lightning import Grafts


class Classifier(lightning.LightningModule):
    def __init__(self, name: str, classes: int, size: int) -> None:
        super().__init__()
        self.model = timm.create_model(name, num_classes=classes)
        fxgraft.patch(self.model, "rsc + selfnorm", input_size=(3, size, size))

    def training_step(self, batch, _index):
        x, y = batch
        loss = fxgraft.loss(self.model, self.model(x), y)  # the callback hands the labels over
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, _index):
        x, y = batch
        self.log("val_accuracy", (self.model(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small network and a few random images")
    quick = parser.parse_args().quick
    name, size, images = ("test_resnet", 32, 32) if quick else ("resnet50", 224, 512)
    data = TensorDataset(torch.randn(images, 3, size, size), torch.randint(7, (images,)))
    loader = DataLoader(data, batch_size=16, num_workers=0)
    folder = tempfile.mkdtemp() if quick else "logs"
    trainer = lightning.Trainer(
        max_epochs=1 if quick else 10,
        callbacks=[Grafts(labels=1, log=True)],  # pictures=500: also pictures, every 500 steps
        accelerator="cpu" if quick else "auto",
        logger=CSVLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        log_every_n_steps=2,
    )
    trainer.fit(Classifier(name, 7, size), loader, loader)
    print({key: round(float(value), 4) for key, value in trainer.callback_metrics.items()})


if __name__ == "__main__":
    main()
