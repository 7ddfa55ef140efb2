"""Train a patched network in a loop of accelerate, on whatever devices its launcher gives.

accelerate launch examples/accelerate_loop.py
python examples/accelerate_loop.py --quick
"""

import argparse

import timm
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import fxgraft


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="a small network and a few random images, on the CPU"
    )
    quick = parser.parse_args().quick
    name, size, images, epochs = ("test_resnet", 32, 32, 1) if quick else ("resnet50", 224, 512, 10)
    data = TensorDataset(torch.randn(images, 3, size, size), torch.randint(7, (images,)))

    accelerator = Accelerator(cpu=quick)
    model = timm.create_model(name, num_classes=7)
    fxgraft.patch(
        model, "selfnorm + crossnorm", input_size=(3, size, size)
    )  # before prepare and the optimizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(
        model, optimizer, DataLoader(data, batch_size=8, shuffle=True)
    )
    steps = epochs * len(loader)
    for epoch in range(epochs):
        for number, (x, y) in enumerate(loader):
            fxgraft.set_progress(model, (epoch * len(loader) + number) / steps)
            loss = fxgraft.loss(model, model(x, target=y), y)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
        accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}, {fxgraft.diagnostics(model)}")


if __name__ == "__main__":
    main()
