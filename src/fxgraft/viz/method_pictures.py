"""Pictures of what methods do with images: ``fxgraft show effect METHOD IMAGE``, and those that a training logs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor

import fxgraft
from fxgraft.errors import ConfigError, FxgraftError, no_method
from fxgraft.graph.grafting.lookup import grafts_on, patched_parts
from fxgraft.graph.tracing.observe import default_input_size
from fxgraft.io.images import read_rgb
from fxgraft.patches.pictures import Panel, Picture, View

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation of the colours, for models that do not say what they were trained with."""

IMAGENET_NAMES = "imagenet"
"""What stands for the names of ImageNet's 1000 classes."""

UNTRAINED = "untrained weights: what is seen here is chance"


def methods_with_pictures() -> list[str]:
    """Name the methods that have a picture."""
    return [name for name, method in fxgraft.methods().items() if method.picture is not fxgraft.Patch.picture]


def check_picture(method: str) -> None:
    """Raise unless a method has a picture.

    Raises:
        UnknownGraftError: there is no such method.
        ConfigError: it has none; lists those that have one.
    """
    if method not in fxgraft.methods():
        raise no_method(method, fxgraft.methods())
    if method not in (known := methods_with_pictures()):
        raise ConfigError(
            f"{method!r} has no picture.\nThere are pictures of {', '.join(map(repr, known))}.\n"
            f"What it changes in a model: fxgraft show graph MODEL --graft {method}."
        )


def read_images(paths: Sequence[Path], size: int, crop: float = 1.0) -> Tensor:
    """Read images as squares of one size: (B, 3, size, size), colours in [0, 1].

    Args:
        paths: the paths of the files.
        size: side of the squares.
        crop: share of the shorter side that is kept, around the centre.

    Raises:
        ConfigError: no size, or a file that isn't an image.
    """
    if size < 1:
        raise ConfigError(f"--size must be at least 1 pixel, got {size}.")
    return squares([read_rgb(path, repr(str(path))) for path in paths], size, crop)


def squares(images: Sequence[Image.Image], size: int, crop: float = 1.0) -> Tensor:
    """Crop images about their centres to squares of one size: (B, 3, size, size), colours in [0, 1]."""
    side = round(size / crop)
    border = (side - size) // 2
    box = (border, border, border + size, border + size)
    fitted = [
        ImageOps.fit(image, (side, side), method=Image.Resampling.BICUBIC).crop(box) for image in images
    ]
    return torch.stack([pil_to_tensor(image) for image in fitted]).float() / 255


def size_and_crop(model: nn.Module) -> tuple[int, float]:
    """Return the side of the images that a model was made for, and the share of an image that it sees of them."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    return int((config.get("input_size") or (3, 224, 224))[-1]), float(config.get("crop_pct") or 0.875)


def still_clips(images: Tensor, model: nn.Module) -> Tensor:
    """Repeat images (B, 3, S, S) in time for a model that takes clips, whose length is found; else return them."""
    frames = default_input_size(model)[1:-2]
    return images.unsqueeze(2).expand(-1, -1, *frames, -1, -1) if frames else images


def read_class_names(given: str) -> list[str]:
    """Read names of classes: those of ImageNet, as timm has them, or the lines of a file.

    Args:
        given: "imagenet", or the path of a text file with a name in each line, in the order of the classes.

    Raises:
        ConfigError: the file cannot be read.
    """
    if given == IMAGENET_NAMES:
        from timm.data.imagenet_info import ImageNetInfo

        info = ImageNetInfo()
        words = [info.index_to_description(index) for index in range(info.num_classes())]
        return [word.partition(",")[0] for word in words]
    try:
        return Path(given).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The names of classes in {given!r} cannot be read: {getattr(error, 'strerror', None) or error}.\n"
            f"Give a text file with a name in each line, or {IMAGENET_NAMES!r}."
        ) from error


def picture_of(
    model: nn.Module,
    method: str,
    images: Tensor,
    options: Mapping[str, Any] | None = None,
    *,
    top: int = 3,
    seed: int = 0,
    names: Sequence[str] = (),
    trained: bool = True,
) -> Picture:
    """Patch a model with one method and have it show what it does with images.

    Args:
        model: it is used up. On a bare one the method is put; of a patched one a graft of that method is shown as it
            is, and where there is none, or options are given, all of its grafts are taken off first.
        method: name of the method.
        images: (B, 3, S, S), of clips (B, 3, T, S, S), colours in [0, 1]. Of clips the middle frame is drawn.
        options: options of the method.
        top: how many classes to show, highest score first, where a picture shows some.
        seed: the seed of all draws.
        names: names of the classes, in the order of the model's outputs; numbers stand for them without.
        trained: whether the model's weights are; the picture says so where they are not.

    Raises:
        ConfigError: the method has no picture, a number is out of range, or there are not as many names as classes.
        FxgraftError: the method does not go on the model.
    """
    check_picture(method)
    if top < 1:
        raise ConfigError(f"There must be at least one class to draw, got top={top}.")
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    mean, std = (config.get(key) or default for key, default in zip(("mean", "std"), IMAGENET, strict=True))
    count, images = len(images), _at_least_two(images)
    mean, std = (torch.tensor(each).view(-1, *[1] * (images.ndim - 2)) for each in (mean, std))
    inputs = (images - mean) / std
    with torch.no_grad():
        logits = model.eval()(inputs)
    if names and len(names) != logits.shape[1]:
        raise ConfigError(
            f"There are {len(names)} names of classes, and the model has {logits.shape[1]} classes.\n"
            "Names are taken in the order of the model's outputs.\nGive one for each, or leave them out."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        present = fxgraft.grafts(model)
        own = [] if options else [graft for graft in present if graft.patch.method == method][:1]
        if len(present) > len(own):
            fxgraft.unpatch(model, *(graft for graft in present if graft not in own))
        if not own:
            fxgraft.patch(model, method, **{"input_size": tuple(images.shape[1:]), **(options or {})})
        (graft,) = fxgraft.grafts(model)
        layouts = _layouts(model, images)
        view = View(model, images, inputs, logits.argmax(1), count, top, seed, names, layouts)
        picture = _middle_frame(graft.patch.picture(graft, view))
    notes = [] if trained else [UNTRAINED]
    return replace(picture, note="; ".join([*notes, *([picture.note] if picture.note else [])]))


def pictures_of_grafts(model: nn.Module, inputs: Tensor) -> dict[str, Picture]:
    """Have the grafts of a model show what they do with images, with the weights that it has now.

    The model is left as it is: a copy of each patched part, on the CPU, is used up. Grafts without a picture, and
    those that cannot draw one of these images, are left out.

    Args:
        model: patched, or with patched parts that take images and return logits.
        inputs: (B, C, H, W), or clips or volumes (B, C, T, H, W), as the model takes them; two are drawn, their values
            stretched to [0, 1], of clips and volumes the middle frame.

    Returns:
        Pictures by the names of the grafts, with the part's name before it where it is on a part.
    """
    shown = inputs[:2].detach().cpu().float()
    ones = [1] * (shown.ndim - 1)
    low, high = (getattr(shown.flatten(1), which)(1).values.view(-1, *ones) for which in ("min", "max"))
    colours, count = _at_least_two((shown - low) / (high - low).clamp(min=1e-6)), len(shown)
    shown = shown if count > 1 else torch.cat((shown, -shown.flip(-1)))
    pictures: dict[str, Picture] = {}
    for path, part in patched_parts(model).items():
        for graft in grafts_on(part):
            if type(graft.patch).picture is fxgraft.Patch.picture:
                continue
            alone = copy.deepcopy(part).cpu().float().eval()
            others = [other.name for other in grafts_on(alone) if other.name != graft.name]
            if others:
                fxgraft.unpatch(alone, *others)
            (own,) = grafts_on(alone)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                try:
                    with torch.no_grad():
                        labels = alone(shown).argmax(1)
                    layouts = _layouts(alone, shown)
                    view = View(alone, colours, shown, labels, count, layouts=layouts)
                    picture = _middle_frame(own.patch.picture(own, view))
                except (FxgraftError, AttributeError, RuntimeError, ValueError):
                    continue  # the part's output isn't logits, or the site has no positions
            pictures[".".join(filter(None, (path, graft.name)))] = picture
    return pictures


def _layouts(model: nn.Module, images: Tensor) -> Callable[[], dict[str, str]]:
    """Return a function that lists the layouts of a model's sites, by name."""
    size: Any = tuple(images.shape[1:])
    return lambda: {site.name: site.layout for site in fxgraft.sites(model, input_size=size)}


def _middle_frame(picture: Picture) -> Picture:
    """Keep of every clip its middle frame, with what is laid over it there, and say so."""
    clips = [
        panel.image
        for row in picture.rows
        for panel in row
        if panel.image is not None and panel.image.ndim > 3
    ]
    if not clips:
        return picture
    rows = [[_frame(panel) for panel in row] for row in picture.rows]
    length = clips[0].shape[1]
    said = f"the middle frame, {length // 2 + 1} of {length}"
    note = "; ".join(filter(None, (picture.note, said)))
    return Picture(rows, f"{picture.caption}; {said}", note)


def _frame(panel: Panel) -> Panel:
    if panel.image is None or panel.image.ndim < 4:
        return panel
    cut: dict[str, Any] = {"image": panel.image[:, panel.image.shape[1] // 2]}
    for name in ("heat", "hatched"):
        cells = getattr(panel, name)
        if cells is not None:
            cut[name] = cells[len(cells) // 2]
            if panel.cross is not None:
                cut["cross"] = panel.cross[1:] if panel.cross[0] == len(cells) // 2 else None
    return replace(panel, **cut)


def _at_least_two(images: Tensor) -> Tensor:
    """Add to a single image its negative, mirrored: methods that exchange something need a second one."""
    return images if len(images) > 1 else torch.cat((images, 1 - images.flip(-1)))
