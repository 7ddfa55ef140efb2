"""Train a segmentation network with RSC: labels are maps, and pixels of class -100 are left out.

python examples/segmentation.py --quick
"""

import argparse

import torch
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

import fxgraft


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two steps on small images")
    quick = parser.parse_args().quick
    size, steps = (64, 2) if quick else (320, 200)

    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=7)
    fxgraft.patch(model, "rsc", input_size=(3, size, size))  # before the layers that predict classes
    print(fxgraft.summary(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for step in range(steps):
        fxgraft.set_progress(model, step / steps)
        x, masks = torch.randn(4, 3, size, size), torch.randint(7, (4, size, size))
        masks[:, :4] = -100  # a border that nobody labelled
        loss = fxgraft.loss(model, model(x, target=masks), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"loss {loss.item():.3f}, {fxgraft.diagnostics(model)}")


if __name__ == "__main__":
    main()
