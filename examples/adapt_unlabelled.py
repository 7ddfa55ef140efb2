"""Adapt a trained network to another domain whose images have no labels: AdaBN first, then GAM.

python examples/adapt_unlabelled.py --quick
"""

import argparse
import copy

import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

import fxgraft
from fxgraft.comparison.demo_data import digits_domains


def train(model: torch.nn.Module, loader: DataLoader, epochs: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: torch.nn.Module, loader: DataLoader) -> float:
    model.eval()
    return torch.cat([model(x).argmax(1) == y for x, y in loader]).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="an epoch and a few steps, to see that it runs")
    quick = parser.parse_args().quick
    domains = {
        name: TensorDataset(images.float() / 255, labels)
        for name, (images, labels) in digits_domains(24).items()
    }
    source = DataLoader(domains["plain"], batch_size=64, shuffle=True, drop_last=True)
    target = DataLoader(
        domains["sketch"], batch_size=64, shuffle=True, drop_last=True
    )  # its labels are left unread

    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    train(model.train(), source, epochs=1 if quick else 12)
    print(f"trained on the source: {accuracy(model, target):.1%} of the target")

    normalised = fxgraft.adapt_batchnorm(copy.deepcopy(model), target)
    print(f"statistics of the target (AdaBN): {accuracy(normalised, target):.1%}")

    fxgraft.patch(model, "gam", layers=["global_pool"], input_size=(3, 24, 24))
    fxgraft.adapt(model, source, target, steps=4 if quick else 300)
    print(f"activations matched (GAM): {accuracy(fxgraft.merge(model), target):.1%}")


if __name__ == "__main__":
    main()
