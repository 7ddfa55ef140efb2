"""`fxgraft.compare`: lists the runs, carries them out side by side, and keeps their records."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import closing
from dataclasses import asdict, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from fxgraft.arguments import check_arguments, path_at
from fxgraft.comparison.corruptions import check_corruptions
from fxgraft.comparison.data import Data, Task, open_image, read_data
from fxgraft.comparison.records import Folder, Record
from fxgraft.comparison.result import Comparison
from fxgraft.comparison.runs import BARE, Job, Setup, Variant, carry_out, parse_variant, settings_of
from fxgraft.comparison.statistics import LEVEL
from fxgraft.comparison.training import LOWER_IS_BETTER, SCORES, Training, reading_processes
from fxgraft.environment import checked_device, environment
from fxgraft.errors import ConfigError
from fxgraft.io.atomic_write import digest_of
from fxgraft.models import Model
from fxgraft.patches.options import plain_number

TUNING_SEED = 10_000
"""Seed of the runs that choose settings; no pair has it."""
INTEREST = 0.02


def compare(
    data: str | os.PathLike[str],
    *,
    model: Model = "resnet50",
    grafts: str | Sequence[str] = (),
    hold_out: str | Sequence[str] | None = None,
    test: str | os.PathLike[str] | None = None,
    target: str | os.PathLike[str] | None = None,
    corrupt: bool = False,
    per_class: int | None = None,
    test_per_class: int | None = None,
    seeds: int | Sequence[int] = 5,
    pretrained: bool = False,
    weights: str | os.PathLike[str] | None = None,
    model_options: Mapping[str, Any] | None = None,
    size: int | None = None,
    training: Training | Mapping[str, Any] | None = None,
    train: Callable[..., Any] | None = None,
    measure: Callable[..., Mapping[str, float]] | None = None,
    tune: Mapping[str, Sequence[Any]] | None = None,
    tune_each: bool = False,
    baseline: str = BARE,
    metric: str = "accuracy",
    interest: float = INTEREST,
    level: float = LEVEL,
    adapt_steps: int = 1000,
    adapt_lr: float = 2e-4,
    workers: int | None = None,
    backend: str = "loky",
    device: str | torch.device = "cpu",
    out: str | os.PathLike[str] = "fxgraft-compare",
    progress: Callable[[Comparison, float], Any] | None = None,
) -> Comparison:
    """Train a backbone bare and patched on your images, in pairs, and say what the pairs show.

    The two runs of a pair differ in the graft alone: they start from the same weights and see the same batches under
    the same crops and colours. What is finished is kept in ``out``; the same call goes on from there, and more grafts
    or seeds add only what is missing. Needs ``pip install "fxgraft[compare]"``.

    Args:
        data: images as they lie on disk, or the name of a timm data set; see `comparison.data.read_data`.
        model: a name of timm or torchvision, ``"package.module:function"`` or a function of one's own, called with
            ``num_classes=``. A function has to be importable from other processes where ``workers`` is above 1.
        grafts: variants, each ``"METHOD:key=value,..."``, or several on one network with " + " between.
            ``adapt_batchnorm`` and ``gam`` act after training on the target's images without labels.
        hold_out: the domain or domains to test on and leave out of training; "all" takes each of them in turn.
        test: other images to test on.
        target: images to adapt to, without labels; by default those that are tested.
        corrupt: test on the fifteen corruptions of ImageNet-C at five severities; scores are means over the 75.
        per_class: the largest number of training images of each class of each domain, by a fixed draw.
        test_per_class: the largest number of test images of each class.
        seeds: number of seeds, or the seeds.
        pretrained: start from the library's weights.
        weights: start from a checkpoint; its classifier is left out where it has other classes.
        model_options: options of the model's constructor, such as ``{"output_stride": 16}``.
        size: side of the images in pixels; by default the model's own.
        training: settings, see `Training`; a mapping changes the defaults.
        train: a training loop of one's own instead, called as ``train(model, images, validation, seed)`` with two
            map-style data sets of (image, label). It trains the model in place, and may return each epoch's loss.
        measure: further numbers of each run, called as ``measure(model, validation, test)`` with the scored model and
            two map-style data sets of (image, label), as evaluation transforms them. They stand in the run's
            "measured"; no verdict is about them.
        tune: values to try, by setting: ``{"lr": [0.003, 0.01]}``. The baseline is tuned on the images of the source
            that are set apart, with a seed of its own, and every variant gets the setting that was best for it.
        tune_each: tune every variant, with the same values.
        baseline: what the variants are compared with: "bare", or a variant.
        metric: the score of the verdict: "accuracy", "macro_accuracy", "top5", "nll" or "ece".
        interest: the smallest difference that matters, on the scale of the metric: 0.02 is two points of accuracy.
        level: error level of all verdicts together; 0.05 gives intervals of 95 % with one variant.
        adapt_steps: steps of ``gam``.
        adapt_lr: learning rate of ``gam``.
        workers: runs side by side; by default one for each CPU core or GPU. On a CPU each has one thread.
        backend: backend of joblib: "loky" for processes on this machine, "ray" or "dask" for a cluster.
        device: "cpu", "cuda" (runs are dealt out to all GPUs) or one of them, "cuda:1".
        out: folder of the protocol and the runs.
        progress: a function, called after each run with the comparison so far and the seconds that are left.

    Returns:
        The runs and verdicts: ``print(result)``, ``result.verdicts``, ``result.to_html("report.html")``.

    Raises:
        ConfigError: an argument is out of range, the data or the folder do not fit, or a package is missing. All of
            this, and that every graft fits the backbone, is found before the first training step.
        RecipeError: a file of weights cannot be read, or does not fit the model.
        FxgraftError: what `fxgraft.patch` raises for a graft that does not fit.
    """
    given = locals()  # those that are not checked here have checks, and words, of their own
    own = ("tune", "per_class", "test_per_class")
    check_arguments(compare, {name: value for name, value in given.items() if name not in own})
    _check_packages(backend)
    chosen = _variants(grafts, baseline)
    numbers = [int(seed) for seed in (range(seeds) if isinstance(seeds, (int, Integral)) else seeds)]
    _check_numbers(numbers, seeds, metric, interest, level, workers, size)
    _check_adaptation(adapt_steps, adapt_lr)
    model_options = {name: plain_number(value) for name, value in (model_options or {}).items()}
    _check_model_options(model_options)
    chosen_device = checked_device(device)
    settings = training if isinstance(training, Training) else settings_of(Training(), training or {})
    interest, level, adapt_lr = float(interest), float(level), float(adapt_lr)
    images = read_data(
        data,
        hold_out=hold_out,
        test=test,
        target=target,
        per_class=per_class,
        test_per_class=test_per_class,
    )
    side = _own_size(model) if size is None else int(size)
    if corrupt:
        check_corruptions(side)
    setup = Setup(
        model=model,
        model_options=model_options,
        pretrained=pretrained,
        weights=None if weights is None else str(path_at(weights)),
        classes=len(images.classes),
        size=side,
        training=settings,
        train=train,
        measure=measure,
        corrupt=corrupt,
        adapt_steps=int(adapt_steps),
        adapt_lr=adapt_lr,
    )
    tune = _values_to_try(tune or {})
    grid = [dict(zip(tune, row, strict=True)) for row in itertools.product(*tune.values())] if tune else []
    for values in ({}, *grid):
        _check_images(images, settings_of(settings, values), train)
    for variant in chosen:
        setup.check(variant)
    protocol = _protocol(setup, images, data, tune, tune_each)
    protocol |= {"per_class": per_class, "test_per_class": test_per_class}
    folder = Folder(path_at(out), protocol)
    with folder.opened() as records:
        result = Comparison(
            protocol=folder.protocol,
            environment=environment(chosen_device),
            variants=[variant.text for variant in chosen],
            baseline=chosen[0].text,
            tasks=[task.name for task in images.tasks],
            seeds=numbers,
            metric=metric,
            interest=interest,
            level=level,
            records=records,
            classes=list(images.classes),
            pictures=functools.partial(_pictures, setup, chosen, images),
        )
        runner = _Runner(setup, folder, result, workers, backend, chosen_device, progress)
        tuned = runner.tune(chosen, images.tasks, grid, tune_each)
        runner.run(_jobs(result, chosen, images.tasks, tuned, chosen_device))
    return result


def _check_packages(backend: str) -> None:
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


def _variants(grafts: str | Sequence[str], baseline: str) -> list[Variant]:
    texts = [grafts] if isinstance(grafts, str) else list(grafts)
    chosen = [parse_variant(text) for text in (baseline, *texts)]
    names = [variant.text for variant in chosen]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(
            f"The variant {twice!r} is given twice.\nThe baseline is compared with each of the others.\n"
            "Leave one of the two out."
        )
    if len(names) < 2:
        raise ConfigError('Nothing to compare: give at least one graft, for example grafts="rsc".')
    return chosen


def _pictures(setup: Setup, chosen: Sequence[Variant], images: Data) -> Sequence[Any]:
    from fxgraft.comparison.report import method_pictures

    tested = images.tasks[0].test
    return method_pictures(
        setup, chosen, [open_image(item) for item in (tested[0], tested[len(tested) // 2])]
    )


def _check_numbers(
    numbers: list[int],
    seeds: Any,
    metric: str,
    interest: float,
    level: float,
    workers: int | None,
    size: int | None,
) -> None:
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


def _check_adaptation(steps: int, lr: float) -> None:
    if steps < 1 or not 0 < lr < math.inf:
        raise ConfigError(
            f"adapt_steps must be at least 1 and adapt_lr a positive number; got {steps!r} and {lr!r}."
        )


def _check_model_options(options: Mapping[str, Any]) -> None:
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


def _values_to_try(values: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Check the values to try, by setting, and give them as a file holds them."""
    if not isinstance(values, Mapping):
        raise ConfigError(f'tune takes values to try, as {{"lr": [0.003, 0.01]}}; got {values!r}.')
    for name, tried in values.items():
        if isinstance(tried, str) or not isinstance(tried, Sequence) or not tried:
            raise ConfigError(f'tune takes values to try, as {{"lr": [0.003, 0.01]}}; got {name}={tried!r}.')
    return {name: [plain_number(value) for value in tried] for name, tried in values.items()}


def _check_images(images: Data, settings: Training, train: Any) -> None:
    for task in images.tasks:
        if train is None and len(task.train) < settings.batch_size:
            raise ConfigError(
                f"{len(task.train)} training images do not fill a batch of {settings.batch_size}.\n"
                "Pass a smaller batch_size."
            )
        if not task.validation and settings.select == "best":
            raise ConfigError(
                'select="best" needs images that are set apart, and every class has one image only.\n'
                'Pass select="last", or more images of each class.'
            )


def _own_size(model: Model) -> int:
    import timm

    config = None
    if isinstance(model, str):
        name = model.removeprefix("timm/").partition(".")[0]
        config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return 224 if config is None else config.input_size[-1]


def _protocol(
    setup: Setup, images: Data, data: Any, tune: Mapping[str, Sequence[Any]], tune_each: bool
) -> dict[str, Any]:
    name = setup.model if isinstance(setup.model, str) else _path(setup.model)
    loop = None if setup.train is None else _path(setup.train)
    return {
        "data": Path(str(data)).name,
        "kind": images.kind,
        "images": images.counts,
        "classes": list(images.classes),
        "model": name,
        "model_options": setup.model_options,
        "pretrained": setup.pretrained,
        "weights_sha256": None if setup.weights is None else digest_of(Path(setup.weights)),
        "size": setup.size,
        "training": asdict(setup.training) if loop is None else {"loop": loop, **_seen(setup.training)},
        "corrupt": setup.corrupt,
        "measure": None if setup.measure is None else _path(setup.measure),
        "adapt": {"steps": setup.adapt_steps, "lr": setup.adapt_lr},
        "tune": tune,
        "tune_each": tune_each,
    }


def _seen(training: Training) -> dict[str, Any]:
    """Return the settings that hold for a user's own loop, too: those of images and evaluation."""
    names = ("batch_size", "amp", "channels_last", "train_crop", "hflip", "color_jitter", "grayscale")
    return {name: getattr(training, name) for name in names}


def _path(function: Callable[..., Any]) -> str:
    return f"{function.__module__}:{function.__qualname__}"


def _jobs(
    result: Comparison,
    chosen: Sequence[Variant],
    tasks: Sequence[Task],
    settings: Mapping[str, Training],
    device: torch.device,
) -> list[Job]:
    """List the runs that are missing, pair by pair; variants that differ in their adaptation alone share one."""
    jobs = []
    for seed, task in itertools.product(result.seeds, tasks):
        missing = [other for other in chosen if result.record(other.text, task.name, seed) is None]
        shared: dict[tuple[str, str], list[Variant]] = {}
        for variant in missing:
            shared.setdefault((variant.trained, str(settings[variant.text])), []).append(variant)
        jobs += [
            Job(tuple(group), task, seed, str(device), settings[group[0].text]) for group in shared.values()
        ]
    return jobs


class _Runner:
    """Carries out jobs side by side, and writes each record as it comes."""

    def __init__(
        self,
        setup: Setup,
        folder: Folder,
        result: Comparison,
        workers: int | None,
        backend: str,
        device: torch.device,
        progress: Callable[[Comparison, float], Any] | None,
    ) -> None:
        from joblib import cpu_count

        self.folder, self.result, self.backend = folder, result, backend
        self.devices = [str(device)]
        if str(device) == "cuda":
            self.devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        self.workers = workers or (cpu_count() if device.type == "cpu" else len(self.devices))
        self.setup = replace(setup, readers=reading_processes(device, self.workers))
        self.progress = progress

    def tune(
        self,
        chosen: Sequence[Variant],
        tasks: Sequence[Task],
        grid: Sequence[Mapping[str, Any]],
        each: bool,
    ) -> dict[str, Training]:
        """Return the settings of every variant, after the runs that choose them."""
        training = self.setup.training
        if not grid:
            return dict.fromkeys((variant.text for variant in chosen), training)
        tried = [settings_of(training, row) for row in grid]
        candidates = chosen if each else chosen[:1]
        jobs = [
            Job((variant,), task, TUNING_SEED, self.devices[0], settings, row)
            for variant in candidates
            for row, settings in zip(grid, tried, strict=True)
            for task in tasks
            if self.result.tuning(variant.text, task.name, row) is None
        ]
        self.run(jobs)
        best = {}
        for variant in candidates:
            means = []
            for row in grid:
                records = [self.result.tuning(variant.text, task.name, row) for task in tasks]
                scores = [
                    -math.inf if record is None or record["diverged"] else self._score(record)
                    for record in records
                ]
                means.append(sum(scores) / len(scores))
            best[variant.text] = tried[means.index(max(means))]
            self.result.tuned[variant.text] = grid[means.index(max(means))]
        return {variant.text: best.get(variant.text, best[chosen[0].text]) for variant in chosen}

    def _score(self, record: Record) -> float:
        value = record["scores"][self.result.metric]
        value = math.inf if value is None else value
        return -value if self.result.metric in LOWER_IS_BETTER else value

    def run(self, jobs: Sequence[Job]) -> None:
        """Carry out jobs; an interruption keeps what is finished."""
        began, done = time.monotonic(), 0
        with closing(self._carried_out(jobs)) as finished:
            for records in finished:
                for record in records:
                    self.result.add(self.folder.add(record))
                done += 1
                if self.progress is not None:
                    self.progress(self.result, (time.monotonic() - began) / done * (len(jobs) - done))

    def _carried_out(self, jobs: Sequence[Job]) -> Generator[list[Record], None, None]:
        if not jobs:
            return
        if self.workers == 1 and self.backend == "loky":
            for job in jobs:
                yield carry_out(self.setup, job)
            return
        from joblib import Parallel, delayed, parallel_config

        options: dict[str, Any] = {}
        if self.backend == "loky":
            # Read by OpenMP when a worker starts: two threads that share a core wait for each other.
            options["inner_max_num_threads"] = 1
        elif self.backend == "ray":
            from ray.util.joblib import register_ray  # pyright: ignore[reportMissingImports]

            register_ray()
        dealt = [
            replace(job, device=self.devices[index % len(self.devices)]) for index, job in enumerate(jobs)
        ]
        with parallel_config(backend=self.backend, n_jobs=self.workers, **options):
            # A cluster's backend gives nothing before its last run is done: a round of workers at a time.
            running = self.backend == "loky"
            parallel = Parallel(return_as="generator_unordered" if running else "list")
            count = len(dealt) if running else self.workers
            try:
                for first in range(0, len(dealt), count):
                    round_ = dealt[first : first + count]
                    done: Any = parallel(delayed(carry_out)(self.setup, job) for job in round_)
                    yield from done
            except BrokenExecutor as error:
                raise ConfigError(
                    "A process of a run was killed, most often for lack of memory.\n"
                    "What is finished is kept. Pass fewer workers or a smaller batch_size; the same call goes on."
                ) from error
