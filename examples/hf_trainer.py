"""Train a classifier of transformers with a graft: one callback in transformers' Trainer.

python examples/hf_trainer.py --quick
"""

import argparse
import tempfile

import torch
from torch.utils.data import Dataset
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

import fxgraft
from fxgraft.integrations.transformers import Grafts


class RandomImages(Dataset):
    def __init__(self, images: int, size: int) -> None:
        self.pixels = torch.randn(images, 3, size, size)
        self.labels = torch.randint(7, (images,))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small network and a few random images")
    quick = parser.parse_args().quick
    size = 64 if quick else 224
    small = (
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
        if quick
        else {}
    )
    model = ResNetForImageClassification(ResNetConfig(num_labels=7, **small))
    fxgraft.patch(model, "rsc", input_size=(3, size, size))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=1,
            per_device_train_batch_size=8,
            report_to=[],
            save_strategy="no",
            use_cpu=quick,
            disable_tqdm=True,
            logging_steps=2,
            remove_unused_columns=False,
        )
        data = RandomImages(32 if quick else 512, size)
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[Grafts()])
        trainer.train()
        print(trainer.state.log_history)


if __name__ == "__main__":
    main()
