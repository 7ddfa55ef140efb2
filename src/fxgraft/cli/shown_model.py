"""The model that a method is shown on, with weights that make it worth looking at where there are any."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import fxgraft
from fxgraft.io import packaged_weights
from fxgraft.io.recipe import is_recipe
from fxgraft.models import build_model, load_weights, split_name
from fxgraft.viz.method_pictures import IMAGENET_NAMES, read_class_names


@dataclass(frozen=True)
class Shown:
    """A model to show a method on.

    Attributes:
        network: in evaluation mode.
        trained: whether it has weights that were trained.
        names: the names of its classes, where they are known to be ImageNet's; else empty.
    """

    network: nn.Module
    trained: bool
    names: list[str]


def shown_model(
    name: str | None,
    classes: int | None,
    pretrained: bool,
    weights: Path | None,
    size: int | None,
    seed: int = 0,
) -> Shown:
    """Build the model that a method is shown on.

    Without a name, and without weights, it is the one whose ImageNet weights are installed as a package, if they are.

    Args:
        name: name of the model, as `build_model` takes it; None for a usual one.
        classes: number of classes; None for the model's own.
        pretrained: take the library's weights.
        weights: a file to load: of weights, or of `fxgraft.save`, which brings its model and its grafts.
        size: side of the images; None for the model's own.
        seed: the seed of weights that are not loaded.

    Raises:
        ConfigError: no such model, or its weights cannot be fetched.
        RecipeError: the file isn't of this model.
    """
    chosen = name or (packaged_weights.MODEL if packaged_weights.installed() else "resnet50")
    plain = split_name(chosen) == ("timm", packaged_weights.MODEL)
    if plain and classes is None and not pretrained and weights is None and packaged_weights.installed():
        return Shown(packaged_weights.packaged_model().eval(), True, read_class_names(IMAGENET_NAMES))
    if weights is not None and is_recipe(weights):
        bare = None if name is None else build_model(name, classes, input_size=size)
        return Shown(fxgraft.load(weights, bare).eval(), True, [])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_model(chosen, classes, pretrained=pretrained, input_size=size).eval()
    if weights is not None:
        load_weights(network, weights)
    imagenet = pretrained and classes is None and getattr(network, "num_classes", 1000) == 1000
    names = read_class_names(IMAGENET_NAMES) if imagenet else []
    return Shown(network, pretrained or weights is not None, names)
