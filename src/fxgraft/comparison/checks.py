"""What `fxgraft.compare` finds out before the first training step: what a run would only stumble over later."""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxgraft.arguments import path_at
from fxgraft.comparison.data import Data
from fxgraft.comparison.runs import BARE, Setup, Variant
from fxgraft.comparison.training import SCORES, Training, own_randomness
from fxgraft.errors import ConfigError
from fxgraft.graph.structure.heads.outputs import take_logits
from fxgraft.models import is_own
from fxgraft.patches.options import plain_number

TUNING_SEED = 10_000
"""Seed of the runs that choose settings; no pair has it."""

SEEN = ("batch_size", "amp", "channels_last", "train_crop", "hflip", "color_jitter", "grayscale")
"""The settings that hold for a user's own loop, too: those of images and evaluation."""


def check_packages(backend: str) -> None:
    """Raise `ConfigError` where a package is missing that the comparison needs."""
    wanted = ("scipy", "joblib", "matplotlib")
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"Comparisons need {', '.join(missing)}, which is not installed.\n"
            'Install it with: pip install "fxgraft[compare]".'
        )
    if backend not in ("loky", "ray", "dask"):
        raise ConfigError(f'backend must be "loky", "ray" or "dask", got {backend!r}.')
    if backend != "loky" and importlib.util.find_spec(backend) is None:
        raise ConfigError(
            f"The backend {backend!r} needs the package {backend}, which is not installed.\n"
            'Install it, or leave backend at "loky", which runs on this machine.'
        )


def check_numbers(
    numbers: list[int],
    seeds: Any,
    metric: str,
    interest: float,
    level: float,
    workers: int | None,
    size: int | None,
) -> None:
    """Raise `ConfigError` for a number that is out of range."""
    if not numbers or len(set(numbers)) < len(numbers):
        raise ConfigError(f"seeds is a number of at least 1, or different numbers; got {seeds!r}.")
    if not all(0 <= seed < 2**32 for seed in numbers):
        raise ConfigError(f"A seed is a whole number from 0 to 2**32 - 1; got {seeds!r}.")
    if TUNING_SEED in numbers:
        raise ConfigError(
            f"The seed {TUNING_SEED} is that of tuning.\n"
            "Runs that choose settings must not be among those that are compared. Take another."
        )
    if metric not in SCORES:
        raise ConfigError(f"metric must be one of {', '.join(SCORES)}, got {metric!r}.")
    if not interest > 0 or not 0 < level < 1:
        raise ConfigError(f"interest must be above 0 and level in (0, 1); got {interest!r} and {level!r}.")
    if workers is not None and workers < 1:
        raise ConfigError(f"workers must be at least 1, got {workers!r}.")
    if size is not None and size < 1:
        raise ConfigError(f"size is the side of the images in pixels, at least 1; got {size!r}.")


def check_metric(metric: str, classes: int) -> None:
    """Raise `ConfigError` for a score that is the same whatever a network says."""
    if metric == "top5" and classes <= 5:
        raise ConfigError(
            f"The metric top5 is always 100 % with {classes} classes.\nTake accuracy, or another metric."
        )


def check_adaptation(steps: int, lr: float) -> None:
    """Raise `ConfigError` for numbers with which nothing could be adapted."""
    if steps < 1 or not 0 < lr < math.inf:
        raise ConfigError(
            f"adapt_steps must be at least 1 and adapt_lr a positive number; got {steps!r} and {lr!r}."
        )


def check_model_options(options: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for options that the comparison sets itself, or that its protocol cannot hold."""
    for name in ("num_classes", "pretrained"):
        if name in options:
            raise ConfigError(
                f"model_options holds {name}, which the comparison sets.\n"
                "The number of classes is that of the images; pretrained= is an argument of its own. Leave it out."
            )
    try:
        json.dumps(options)
    except TypeError as error:
        raise ConfigError(
            f"model_options holds what the protocol's file cannot: {error}.\n"
            "Pass numbers, texts and lists, or a function of your own as model=."
        ) from error


def values_to_try(values: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Check the values to try, by setting, and give them as a file holds them."""
    if not isinstance(values, Mapping):
        raise ConfigError(f'tune takes values to try, as {{"lr": [0.003, 0.01]}}; got {values!r}.')
    for name, tried in values.items():
        if isinstance(tried, str) or not isinstance(tried, Sequence) or not tried:
            raise ConfigError(f'tune takes values to try, as {{"lr": [0.003, 0.01]}}; got {name}={tried!r}.')
    return {name: [plain_number(value) for value in tried] for name, tried in values.items()}


def check_images(images: Data, settings: Training, train: Any, tuned: bool) -> None:
    """Raise `ConfigError` where images are too few for what is asked of them."""
    for task in images.tasks:
        if not task.test:
            raise ConfigError(
                f"No image is left to test {task.name or 'on'}.\nAdd images, or pass a test= of others."
            )
        if train is None and len(task.train) < settings.batch_size:
            raise ConfigError(
                f"{len(task.train)} training images do not fill a batch of {settings.batch_size}.\n"
                "Pass a smaller batch_size."
            )
        if not task.validation and (tuned or settings.select == "best"):
            asking = "tune=" if tuned else 'select="best"'
            raise ConfigError(
                f"{asking} needs images that are set apart, and every class has one image only.\n"
                f"Leave {asking} out, or pass more images of each class."
            )


def check_targets(images: Data, chosen: Sequence[Variant]) -> None:
    """Raise `ConfigError` where an adaptation has too few images of a domain."""
    adapting = [variant.text for variant in chosen if variant.adaptation is not None]
    for task in images.tasks:
        if adapting and len(task.target) < 2:
            raise ConfigError(
                f"{adapting[0]!r} adapts to a domain by statistics of its images, and there is {len(task.target)}.\n"
                "Pass a target= with more images, or leave the variant out."
            )


def check_own_loop(
    train: Callable[..., Any] | None,
    measure: Callable[..., Any] | None,
    settings: Training,
    tune: Mapping[str, Any],
) -> None:
    """Raise `ConfigError` where functions cannot be called as runs call them, or settings would have no effect."""
    for name, function, arguments in (
        ("train", train, ("model", "images", "validation", "seed")),
        ("measure", measure, ("model", "validation", "test")),
    ):
        if function is None:
            continue
        try:
            signature = inspect.signature(function)
        except ValueError:  # a builtin function need not have one
            continue
        try:
            signature.bind(*arguments)
        except TypeError as error:
            raise ConfigError(
                f"{name}= cannot be called as {name}({', '.join(arguments)}): {error}.\nLet it take these."
            ) from error
    if train is None:
        return
    usual = asdict(Training())
    changed = [name for name, value in asdict(settings).items() if value != usual[name]]
    lost = [name for name in (*changed, *tune) if name not in SEEN]
    if lost:
        raise ConfigError(
            f"{lost[0]} has no effect: a loop of your own, train=, doesn't see it.\n"
            f"Set it in the loop, and leave it out here. Those that hold are {', '.join(SEEN)}."
        )


def check_outside(*places: Any, out: Path) -> None:
    """Raise `ConfigError` where the folder of the runs would lie among the images."""
    for place in places:
        if place is None:
            continue
        folder = path_at(place)
        if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(
                f"The runs would be kept in {str(out)!r}, inside of the images' folder {str(folder)!r}, and would be "
                "taken for images the next time.\nPass an out= (--out) somewhere else."
            )


def check_numerics() -> None:
    """Raise `ConfigError` for a default dtype of torch in which other processes would not compute."""
    if torch.get_default_dtype() is not torch.float32:
        raise ConfigError(
            f"torch's default dtype is {torch.get_default_dtype()}, and runs compute in float32.\n"
            "Call torch.set_default_dtype(torch.float32) before the comparison."
        )


def check_model(setup: Setup) -> nn.Module:
    """Return a bare model, after the two things that runs rely on: it is a new one each time, and it classifies.

    Raises:
        ConfigError: the function gives the same weights twice, the model fails on a batch, or its output isn't
            one row of logits for each image.
    """
    model = setup.build(Variant(BARE), 0)
    if is_own(setup.model):
        again = setup.build(Variant(BARE), 0)
        tensors = {id(tensor) for tensor in (*again.parameters(), *again.buffers())}
        if any(id(tensor) in tensors for tensor in (*model.parameters(), *model.buffers())):
            raise ConfigError(
                "The function of the model returns the same weights each time it is called, or a part of them.\n"
                "Every run would go on from the one before. Let it build a new model in each call, of a "
                "copy.deepcopy of what is shared."
            )
    # A loop of one's own need not train on batches as they are here.
    count = 2 if setup.train is not None else min(8, setup.training.batch_size)
    with own_randomness(0), torch.no_grad():
        x = torch.randn(count, 3, setup.size, setup.size)
        try:
            out = model.train(setup.train is None)(x)
        except Exception as error:  # the model may raise anything
            raise ConfigError(
                f"The model fails on a batch of {count} images (3, {setup.size}, {setup.size}): "
                f"{str(error).partition(chr(10))[0]}\n"
                "Take a model of RGB images in float32, or another size= or batch_size."
            ) from error
    logits = take_logits(out)
    if not isinstance(logits, Tensor) or logits.shape != (count, setup.classes):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(
            f"The model returns {got} for {count} images of {setup.classes} classes.\n"
            "A comparison is of classifiers, with one row of logits for each image. Let it take num_classes=."
        )
    return model
