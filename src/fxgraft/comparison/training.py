"""Training for a comparison: timm's optimisers, schedules and transforms in a loop of one page."""

from __future__ import annotations

import contextlib
import functools
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, get_worker_info

import fxgraft
from fxgraft.comparison.data import Items
from fxgraft.errors import ConfigError, candidates
from fxgraft.graph.structure.heads.outputs import take_logits
from fxgraft.io.images import Item, open_image, version_of
from fxgraft.patches.options import (
    check_choices,
    check_count,
    check_not_negative,
    check_positive,
    check_share,
    is_number,
    plain_numbers,
)

SCORES = ("accuracy", "macro_accuracy", "top5", "nll", "ece")
"""What is measured of every run; a verdict is about one of them."""
LOWER_IS_BETTER = frozenset({"nll", "ece"})
_CACHE_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Training:
    """How every variant is trained; names and meanings are those of timm's train.py.

    Images are decoded once and kept with a shorter side of 8/7 of the size, or larger where ``train_crop`` is: the
    smallest crop has as many pixels as the network sees. Transforms start from there.

    Attributes:
        epochs: passes over the training images, one or more.
        batch_size: images per step; the last, smaller batch of an epoch is left out.
        opt: optimizer, by timm's name.
        lr: learning rate.
        momentum: the momentum of optimizers that have one.
        weight_decay: not on biases and norms, as timm does it.
        sched: schedule, by timm's name, stepped after every update.
        warmup_epochs: number of epochs of a linear rise from zero.
        smoothing: label smoothing.
        clip_grad: largest norm of the gradients; None does not clip.
        amp: bfloat16 autocast.
        channels_last: memory format.
        model_ema: score the moving average of the weights.
        model_ema_decay: decay of that average.
        train_crop: smallest area of a random crop; 1 takes the whole image.
        hflip: probability of a horizontal flip.
        color_jitter: strength; 0 is off.
        grayscale: probability of losing the colours.
        select: "last", the weights of the last epoch; or "best", those with the best accuracy on the images of the
            source that are set apart. Test images never select.
    """

    epochs: int = 10
    batch_size: int = 32
    opt: str = "adamw"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.05
    # Not "step": timm's steps come after 90 epochs, most often after the end.
    sched: Literal["cosine", "tanh", "poly", "constant", "none"] = "cosine"
    warmup_epochs: int = 0
    smoothing: float = 0.0
    clip_grad: float | None = None
    amp: bool = False
    channels_last: bool = False
    model_ema: bool = False
    model_ema_decay: float = 0.999
    train_crop: float = 0.8
    hflip: float = 0.5
    color_jitter: float = 0.4
    grayscale: float = 0.1
    select: Literal["last", "best"] = "last"

    def __post_init__(self) -> None:
        from timm.optim import list_optimizers  # pyright: ignore[reportPrivateImportUsage]

        plain_numbers(self)
        check_choices(self)
        check_count(self, "epochs", "batch_size")
        check_share(self, "hflip", "grayscale", "smoothing", "momentum", "model_ema_decay")
        check_positive(self, "lr")
        if self.clip_grad is not None:
            check_positive(self, "clip_grad")
        check_not_negative(self, "weight_decay", "color_jitter")
        if not is_number(self.train_crop) or not 0 < self.train_crop <= 1:
            raise ConfigError(
                f"train_crop is a share of the image's area, in (0, 1]; got {self.train_crop!r}."
            )
        if self.warmup_epochs not in range(self.epochs + 1):
            raise ConfigError(
                f"warmup_epochs must be a whole number of at most epochs ({self.epochs}), got "
                f"{self.warmup_epochs!r}."
            )
        known = [str(name) for name in list_optimizers()]
        if self.opt not in known:
            raise ConfigError(f"timm has no optimizer {self.opt!r}. {candidates(str(self.opt), known)}")


@dataclass(kw_only=True)
class Fit:
    """The results of a training apart from the weights.

    Attributes:
        loss: mean training loss of each epoch.
        validation: accuracy on the images set apart, after each epoch.
        diagnostics: what the grafts did in the last step of each epoch; see `fxgraft.diagnostics`.
        step_seconds: median over the training steps.
        steps: number of training steps.
        diverged: whether a loss stopped being finite; training ends there.
    """

    loss: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    diagnostics: list[dict[str, float]] = field(default_factory=list)
    step_seconds: float = math.nan
    steps: int = 0
    diverged: bool = False


@dataclass(frozen=True)
class Transform:
    """timm's transform of an image, with the normalisation apart, which many images can share.

    Attributes:
        pixels: a function from a decoded image to its pixels, (3, S, S) of uint8.
        mean: the mean of the colours that the model's weights were trained with, in [0, 1].
        std: their deviation.
        side: the shorter side that images are to have at least, in pixels.
    """

    pixels: Callable[[Any], Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    side: int = 0

    def __call__(self, image: Any) -> Tensor:
        """Return what the network sees, (3, S, S)."""
        return self.normalised([self.pixels(image)])[0]

    def normalised(self, pixels: Sequence[Any]) -> Tensor:
        """Return the pixels of images as one tensor (N, 3, S, S)."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        # Arrays or tensors, as the version of timm has it.
        stacked = torch.stack([torch.as_tensor(image) for image in pixels])
        return stacked.float().div_(255).sub_(mean).div_(std)


class Images(Dataset[tuple[Tensor, int]]):
    """Images with their transform; every draw depends on seed, epoch and image alone.

    So all variants see the same crops and colours, whatever their methods draw. Where ``epoch`` is None nobody counts
    epochs, and every reading of an image draws again.
    """

    def __init__(
        self,
        items: Items,
        transform: Callable[[Any], Any],
        size: int,
        seed: int = 0,
        prepare: Callable[[Any], Any] | None = None,
    ) -> None:
        self.items, self.transform, self.seed = items, transform, seed
        self.epoch: int | None = 0
        self._readings: Counter[int] = Counter()
        self.side, self.prepare = max(round(size * 8 / 7), getattr(transform, "side", 0)), prepare

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Return the images of a batch: what can be done for all of them at once is."""
        transform = self.transform
        made = []
        with own_randomness(0):
            for index in indices:
                _seed_generators(hash((self.seed, self._turn(index), index)) % (1 << 32))
                image = _decoded(self.items[index], self.side, self.prepare)
                made.append(transform.pixels(image) if isinstance(transform, Transform) else transform(image))
        if isinstance(transform, Transform):
            made = transform.normalised(made)
        return [(image, self.items[index].label) for image, index in zip(made, indices, strict=True)]

    def _turn(self, index: int) -> int | tuple[int, int]:
        """Return what draws depend on beside seed and image."""
        if self.epoch is not None:
            return self.epoch
        self._readings[index] += 1
        worker = get_worker_info()
        # A loader's process has a copy of these counts, made again for each epoch; its seed is another one then.
        return self._readings[index], 0 if worker is None else worker.seed - worker.id


_cache: dict[tuple[Item, tuple[int, int], int, Any], Any] = {}
_cached_bytes = 0


def _decoded(item: Item, side: int, prepare: Callable[[Any], Any] | None = None) -> Any:
    """Decode and prepare an image, its shorter side no longer than ``side``; keep up to a gigabyte in this process."""
    global _cached_bytes
    key = (item, version_of(item), side, prepare)
    if key in _cache:
        return _cache[key]
    if prepare is not None:
        image = prepare(_decoded(item, side))
    else:
        image = open_image(item)
        short = min(image.size)
        if short > side:
            width, height = image.size
            image = image.resize((round(width * side / short), round(height * side / short)), resample=3)
    size = 3 * image.size[0] * image.size[1]
    # A process that reads for a GPU ends with its epoch, and what it kept with it: several would only fill the memory.
    if get_worker_info() is None and _cached_bytes + size <= _CACHE_BYTES:
        _cached_bytes += size
        _cache[key] = image
    return image


@contextlib.contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator, Python's and NumPy's inside the block, and put their states back after it."""
    python, arrays, own = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        _seed_generators(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        torch.set_rng_state(own)


def reading_processes(device: torch.device, runs: int) -> int:
    """Return how many processes read images for each of some runs side by side.

    None on a CPU, whose cores train; beside GPUs the cores are shared out, as if runs went on all of them. Draws
    depend on the image alone, so the numbers are the same.
    """
    if device.type == "cpu":
        return 0
    from joblib import cpu_count

    # With one core for each run, a process of its own would only be started and stopped once an epoch.
    share = cpu_count() // max(runs, torch.cuda.device_count())
    return min(8, share) if share > 1 else 0


def _seed_generators(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    # torch.manual_seed also notes the seed for every device that may start later: slow, and a list that grows.
    torch.default_generator.manual_seed(seed)


def fit(
    model: nn.Module,
    train: Items,
    validation: Items,
    settings: Training,
    *,
    size: int,
    seed: int = 0,
    device: str | torch.device = "cpu",
    readers: int = 0,
) -> Fit:
    """Train a model, bare or patched, and leave it with the weights that are scored.

    Args:
        model: on ``device``.
        train: images to train on, as many as a batch holds or more.
        validation: images of the same domains, set apart; scored after each epoch.
        settings: see `Training`.
        size: side of the images in pixels.
        seed: the seed of the batches and the transforms.
        device: where to train.
        readers: processes that read and transform images; 0 does both in this one.
    """
    from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]
    from timm.scheduler.scheduler_factory import create_scheduler_v2
    from timm.utils.model_ema import ModelEmaV3

    data = Images(train, transform_of(model, settings, size, training=True), size, seed)
    order = torch.Generator().manual_seed(seed)
    loader: Any = DataLoader(
        data,
        settings.batch_size,
        shuffle=True,
        drop_last=True,
        generator=order,
        num_workers=readers,
    )
    optimizer = create_optimizer_v2(
        model,
        opt=settings.opt,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=settings.sched,
        num_epochs=settings.epochs,
        warmup_epochs=settings.warmup_epochs,
        warmup_lr=0.0,
        step_on_epochs=False,
        updates_per_epoch=len(loader),
    )
    ema = ModelEmaV3(model, decay=settings.model_ema_decay) if settings.model_ema else None
    criterion = functools.partial(F.cross_entropy, label_smoothing=settings.smoothing)
    fitted, seconds, total = Fit(), [], settings.epochs * len(loader)
    best: tuple[float, dict[str, Tensor]] | None = None
    for epoch in range(settings.epochs):
        data.epoch = epoch
        model.train()
        losses = []
        for x, y in loader:
            began = time.perf_counter()
            x, y = _on(x, device, settings), y.to(device)
            fxgraft.set_progress(model, fitted.steps / total)
            with _precision(device, settings), fxgraft.targets(y):
                out = model(x)
                loss = fxgraft.loss(model, out, y, criterion)
            optimizer.zero_grad()
            loss.backward()
            if settings.clip_grad is not None:
                nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
            optimizer.step()
            fitted.steps += 1
            if scheduler is not None:
                scheduler.step_update(fitted.steps)
            if ema is not None:
                ema.update(model, fitted.steps)
            losses.append(loss.detach())
            seconds.append(time.perf_counter() - began)
        fitted.loss.append(float(torch.stack(losses).mean()))
        fitted.diagnostics.append(fxgraft.diagnostics(model))
        if not math.isfinite(fitted.loss[-1]):
            fitted.diverged = True
            break
        if validation:
            scored = model if ema is None else ema.module
            outcome = evaluate(scored, validation, settings, size=size, device=device, readers=readers)
            accuracy = outcome["scores"]["accuracy"]
            fitted.validation.append(accuracy)
            if settings.select == "best" and (best is None or accuracy > best[0]):
                best = accuracy, {name: value.clone() for name, value in scored.state_dict().items()}
    if best is not None:
        model.load_state_dict(best[1])
    elif ema is not None:
        model.load_state_dict(ema.module.state_dict())
    fitted.step_seconds = statistics.median(seconds)
    return fitted


def evaluate(
    model: nn.Module,
    items: Items,
    settings: Training,
    *,
    size: int,
    device: str | torch.device = "cpu",
    readers: int = 0,
    prepare: Callable[[Any], Any] | None = None,
) -> dict[str, Any]:
    """Score a model on images.

    Args:
        model: bare or patched; run in evaluation mode, and left in it.
        items: the images.
        settings: those of training, for batch size and precision.
        size: side of the images in pixels.
        device: where the model is.
        readers: processes that read images; 0 reads in this one.
        prepare: applied to each decoded image first, as a corruption is; equal ones are taken to do the same.

    Returns:
        "scores", each of `SCORES` by name; "right" and "images", counts by class; and "finite". Outputs that are not
        finite are no predictions: such an image counts as wrong, and "finite" is then False.
    """
    logits, labels = predict(
        model, items, settings, size=size, device=device, readers=readers, prepare=prepare
    )
    classes = logits.shape[1]
    finite = logits.isfinite().all(1)
    right = (logits.argmax(1) == labels) & finite
    images = torch.bincount(labels, minlength=classes)
    hits = torch.bincount(labels[right], minlength=classes)
    known = images > 0
    top = logits.topk(min(5, classes), dim=1).indices
    sound = bool(finite.all())
    scores = {
        "accuracy": float(right.double().mean()),
        "macro_accuracy": float((hits[known] / images[known]).double().mean()),
        "top5": float(((top == labels[:, None]).any(1) & finite).double().mean()),
        "nll": float(F.cross_entropy(logits, labels)) if sound else math.inf,
        "ece": calibration_error(logits, labels) if sound else math.inf,
    }
    return {
        "scores": scores,
        "right": hits.tolist(),
        "images": images.tolist(),
        "finite": sound,
    }


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Return the expected calibration error (Guo, Pleiss, Sun, Weinberger, ICML 2017).

    Args:
        logits: (N, K).
        labels: (N,).
        bins: number of bins, of equal width, by the probability of the class that is predicted.

    Returns:
        The mean over the images of how far the accuracy of their bin is from its mean probability, in [0, 1].
    """
    confidence, guess = logits.softmax(1).max(1)
    edges = torch.linspace(0, 1, bins + 1)[1:-1]
    bin_index = torch.bucketize(confidence, edges)  # a probability on an edge belongs to the bin below
    gaps = torch.zeros(bins, dtype=torch.double)
    gaps.index_add_(0, bin_index, (guess == labels).double() - confidence.double())
    return float(gaps.abs().sum() / len(labels))


def predict(
    model: nn.Module,
    items: Sequence[Item],
    settings: Training,
    *,
    size: int,
    device: str | torch.device = "cpu",
    readers: int = 0,
    prepare: Callable[[Any], Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the logits (N, K) in float32 and the labels (N,) of images, on the CPU."""
    transform = transform_of(model, settings, size, training=False)
    images = Images(tuple(items), transform, size, prepare=prepare)
    loader: Any = DataLoader(images, settings.batch_size, num_workers=readers)
    model.eval()
    rows, labels = [], []
    with torch.inference_mode(), _precision(device, settings):
        for x, y in loader:
            rows.append(take_logits(model(_on(x, device, settings))).float().cpu())
            labels.append(y)
    return torch.cat(rows), torch.cat(labels)


def unlabelled_batches(model: nn.Module, items: Items, settings: Training, *, size: int, seed: int) -> Any:
    """Return a loader of batches of images (B, 3, S, S) alone, in a drawn order, as evaluation transforms them."""
    data = Images(items, transform_of(model, settings, size, training=False), size)
    order = torch.Generator().manual_seed(seed)
    count = min(settings.batch_size, len(items))
    return DataLoader(
        data, count, shuffle=True, drop_last=len(items) > count, generator=order, collate_fn=_stack
    )


def _stack(rows: list[tuple[Tensor, int]]) -> Tensor:
    return torch.stack([image for image, _ in rows])


def transform_of(model: nn.Module, settings: Training, size: int, *, training: bool) -> Transform:
    """Make timm's transform, with the mean and deviation that the model's weights were trained with."""
    from timm.data.config import resolve_data_config
    from timm.data.transforms_factory import create_transform

    config = resolve_data_config({"input_size": (3, size, size)}, model=model)
    options: dict[str, Any] = {"crop_pct": 1.0}
    side = 0
    if training:
        side = math.ceil(size / math.sqrt(settings.train_crop))
        options = {
            "is_training": True,
            "scale": (settings.train_crop, 1.0),
            "hflip": settings.hflip,
            "color_jitter": settings.color_jitter or None,
            "grayscale_prob": settings.grayscale,
        }
    # As timm's prefetching loader asks for it: the transform ends with the pixels.
    pixels: Any = create_transform(size, interpolation="bicubic", use_prefetcher=True, **options)
    return Transform(pixels, config["mean"], config["std"], side)


def _on(x: Tensor, device: str | torch.device, settings: Training) -> Tensor:
    form = torch.channels_last if settings.channels_last else torch.contiguous_format
    return x.to(device, non_blocking=True, memory_format=form)


def _precision(device: str | torch.device, settings: Training) -> Any:
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16) if settings.amp else contextlib.nullcontext()
