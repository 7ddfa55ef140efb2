"""Fine-tune a network on a folder of domains with one held out, once bare and once with RSC.

python examples/finetune_folder.py DATA --hold-out sketch     # DATA/domain/class/image
python examples/finetune_folder.py --quick                    # on embedded digits, in seconds
"""

import argparse
from pathlib import Path

import timm
import torch
from torch.utils.data import ConcatDataset, DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import fxgraft


def loaders(data: Path, hold_out: str, size: int, batch: int) -> tuple[DataLoader, DataLoader, int]:
    to_tensor = [v2.ToImage(), v2.Resize((size, size)), v2.ToDtype(torch.float32, scale=True)]
    train = v2.Compose([*to_tensor, v2.RandomResizedCrop(size, scale=(0.8, 1.0))])
    domains = sorted(folder for folder in data.iterdir() if folder.is_dir())
    seen = [ImageFolder(folder, train) for folder in domains if folder.name != hold_out]
    unseen = ImageFolder(data / hold_out, v2.Compose(to_tensor))
    training = DataLoader(ConcatDataset(seen), batch, shuffle=True, drop_last=True)
    return training, DataLoader(unseen, batch), len(unseen.classes)


def train(model: torch.nn.Module, loader: DataLoader, epochs: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr)  # after fxgraft.patch
    model.train()
    for epoch in range(epochs):
        fxgraft.set_progress(model, epoch / epochs)
        for x, y in loader:
            loss = fxgraft.loss(model, model(x, target=y) if fxgraft.grafts(model) else model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: torch.nn.Module, loader: DataLoader) -> float:
    model.eval()
    right = [model(x).argmax(1) == y for x, y in loader]
    return torch.cat(right).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--hold-out", default="sketch")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    size, batch, epochs, options = 224, 32, 20, {"pretrained": True}
    if args.quick or args.data is None:
        from fxgraft.comparison.demo_data import write_digits

        args.data, args.model = write_digits(Path("digits-24"), 24), "test_resnet"
        size, batch, epochs, options = 24, 64, 1, {}
    training, test, classes = loaders(args.data, args.hold_out, size, batch)
    for graft in ("", "rsc"):
        torch.manual_seed(0)
        model = timm.create_model(args.model, num_classes=classes, **options)
        if graft:
            fxgraft.patch(model, graft, input_size=(3, size, size))
        train(model, training, epochs, lr=1e-3)
        print(f"{graft or 'bare'}: {accuracy(model, test):.1%} of {args.hold_out}, which it has not seen")


if __name__ == "__main__":
    main()
