"""
Adapt to images without labels
==============================

You have a network that was trained on one domain, the *source*. It will be used on another, the *target*. You
have images of the target, but no labels. Two tools adapt the network. Try them in this order.

.. code-block:: bash

   pip install -e ".[demo]"
"""

# %%
# Two domains
# -----------
# Scikit-learn's digits have to do as images. The source are plain ones. The target are thick, turned and
# coloured ones. No digit is in both.

import matplotlib.pyplot as plt
import torch
from torch.utils.data import DataLoader, TensorDataset

from fxgraft.comparison.demo_data import digits_domains

domains = {
    name: TensorDataset(images.float() / 255, labels)
    for name, (images, labels) in digits_domains(size=24).items()
}
torch.manual_seed(0)
source = DataLoader(domains["plain"], batch_size=64, shuffle=True, drop_last=True)
target = DataLoader(domains["thick"], batch_size=64, shuffle=True, drop_last=True)
test = DataLoader(domains["thick"], batch_size=64)

figure, axes = plt.subplots(2, 10, figsize=(8, 2.2), layout="constrained")
for row, name in zip(axes, ("plain", "thick"), strict=True):
    for axis, (image, _) in zip(row, domains[name], strict=False):
        axis.imshow(image.permute(1, 2, 0))
        axis.set(xticks=[], yticks=[])
    row[0].set_ylabel({"plain": "source", "thick": "target"}[name])
figure.supxlabel("the data alone: no network, no weights", fontsize=8)
plt.show()

# %%
# Train on the source
# -------------------
# A small network from random weights. It learns the source, and knows little about the target.

import timm


@torch.no_grad()
def accuracy(model):
    """Return the share of right answers on the target; its labels are read here alone."""
    model.eval()
    return torch.cat([model(x).argmax(1) == y for x, y in test]).float().mean().item()


model = timm.create_model("test_resnet", num_classes=10, output_stride=16)
optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
model.train()
for _epoch in range(12):
    for x, y in source:
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
found = {"trained on the source": accuracy(model)}
print(f"{found['trained on the source']:.0%} of the target")

# %%
# AdaBN: new statistics
# ---------------------
# BatchNorm layers keep the mean and variance of the images that they were trained on. ``adapt_batchnorm``
# measures both again on the target images. It takes one pass over them and trains nothing. It changes the
# model in place, so we give it a copy.

import copy

import fxgraft

normalised = fxgraft.adapt_batchnorm(copy.deepcopy(model), target)
found["AdaBN"] = accuracy(normalised)
print(f"{found['AdaBN']:.0%} of the target")

# %%
# GAM: matched activations
# ------------------------
# GAM trains your network so that its activations on target images look like those on source images. It keeps
# a frozen copy of the trained network, which sees source images. Your network sees target images. At each
# place in ``layers=`` a small network, the discriminator, learns to tell the activations of the two apart,
# and your network learns to fool it. GAM also shifts and scales the channels of your network there.

fxgraft.patch(model, "gam", layers=["global_pool", "fc"], input_size=(3, 24, 24))
history = fxgraft.adapt(model, source, target, steps=100)
found["GAM"] = accuracy(model)
print(f"{found['GAM']:.0%} of the target")

# %%
# ``adapt`` reads no labels, even where the batches hold some. With ``checkpoint="adaptation.pt"`` an
# interrupted call goes on where it stopped and gives exactly the same result.
#
# On the right is the share of activations that the discriminators told apart. At 50 % they only guess; at 100
# % they always win. ``adapt`` warns when either lasts for 200 steps, because your network then learns nothing
# from it.

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
left.bar_label(left.bar(list(found), list(found.values())), fmt="{:.0%}")
left.set(title="accuracy on the target", ylim=(0, 1))
left.tick_params("x", labelsize=8)
for place, shares in history.accuracy.items():
    right.plot(shares, label=f"discriminator at {place}")
right.axhline(0.5, color="0.8")
right.set(title="told apart", xlabel="step", ylim=(0, 1.05))
right.legend(fontsize=8)
figure.supxlabel(
    "timm's test_resnet, trained on this page from random weights", fontsize=8
)
plt.show()

# %%
# These are the numbers of one short run on digits. :doc:`Does it help on my data? <does_it_help>` compares
# both tools on yours.
#
# A stock model again
# -------------------
# ``merge`` folds the shifts and scales into the weights. What it returns is a plain timm model.

plain = fxgraft.merge(model)
print(
    type(plain).__name__, fxgraft.grafts(plain), f"{accuracy(plain):.0%} of the target"
)

# %%
# To write the loop yourself, see :doc:`adapt in a loop of your own </how-to/adaptation>`.
