"""`fxgraft.compare`: lists the runs, carries them out side by side, and keeps their records."""

from __future__ import annotations

import functools
import itertools
import math
import os
import pickle
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import closing
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch

from fxgraft.arguments import check_arguments, checked_device, path_at
from fxgraft.comparison.checks import (
    TUNING_SEED,
    check_adaptation,
    check_images,
    check_metric,
    check_model,
    check_model_options,
    check_numbers,
    check_numerics,
    check_outside,
    check_own_loop,
    check_packages,
    check_targets,
    values_to_try,
)
from fxgraft.comparison.corruptions import check_corruptions
from fxgraft.comparison.data import Data, Task, read_data
from fxgraft.comparison.protocol import protocol_of
from fxgraft.comparison.records import Folder, Record
from fxgraft.comparison.result import Comparison
from fxgraft.comparison.runs import BARE, Job, Setup, Variant, carry_out, parse_variant, settings_of
from fxgraft.comparison.statistics import LEVEL
from fxgraft.comparison.training import LOWER_IS_BETTER, Training, reading_processes
from fxgraft.environment import environment
from fxgraft.errors import ConfigError
from fxgraft.io.images import open_image
from fxgraft.models import Model
from fxgraft.patches.options import plain_number
from fxgraft.patches.registry import methods

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
            Each reading of an image is another crop; set ``images.epoch = 0``, 1, … before each epoch for crops
            that depend on seed, epoch and image alone, so that the runs of a pair share them.
        measure: further numbers of each run, called as ``measure(model, validation, test)`` with the scored model and
            two map-style data sets of (image, label), as evaluation transforms them. They stand in the run's
            "measured"; no verdict is about them.
        tune: values to try, by setting: ``{"lr": [0.003, 0.01]}``. For each domain that is tested the baseline is tuned
            on the images of its source that are set apart, with a seed of its own, and every variant gets the setting
            that was best for it. An adaptation is left out meanwhile.
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
    check_packages(backend)
    check_numerics()
    out = path_at(out)
    check_outside(data, test, target, out=out)
    chosen = _variants(grafts, baseline)
    numbers = [int(seed) for seed in (range(seeds) if isinstance(seeds, (int, Integral)) else seeds)]
    check_numbers(numbers, seeds, metric, interest, level, workers, size)
    check_adaptation(adapt_steps, adapt_lr)
    model_options = {name: plain_number(value) for name, value in (model_options or {}).items()}
    check_model_options(model_options)
    if tune_each and not tune:
        raise ConfigError(
            "tune_each=True has no effect without values to try.\n"
            'Pass them, as tune={"lr": [0.003, 0.01]}, or leave tune_each= out.'
        )
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
    check_metric(metric, len(images.classes))
    check_targets(images, chosen)
    side = _own_size(model) if size is None else int(size)
    if corrupt:
        check_corruptions(side)
    setup = Setup(
        model=model,
        model_options=model_options,
        pretrained=pretrained,
        weights=None if weights is None else str(path_at(weights).absolute()),
        classes=len(images.classes),
        size=side,
        training=settings,
        train=train,
        measure=measure,
        methods=_own_methods(chosen),
        corrupt=corrupt,
        adapt_steps=int(adapt_steps),
        adapt_lr=adapt_lr,
    )
    tune = values_to_try(tune or {})
    grid = [dict(zip(tune, row, strict=True)) for row in itertools.product(*tune.values())] if tune else []
    check_own_loop(train, measure, settings, tune)
    for values in ({}, *grid):
        check_images(images, settings_of(settings, values), train, bool(tune))
    limits = {"per_class": plain_number(per_class), "test_per_class": plain_number(test_per_class)}
    # Outside of a block without gradients, which the caller may be in.
    with torch.inference_mode(False), torch.enable_grad():
        bare = check_model(setup)
        for variant in chosen:
            setup.check(variant)
        folder = Folder(out, protocol_of(setup, images, bare, tune, tune_each, limits))
        del bare
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


def _own_methods(chosen: Sequence[Variant]) -> dict[str, type[Any]]:
    """Return the methods that aren't fxgraft's own: other processes may not have registered them."""
    known = methods()
    used = {method for variant in chosen for method, _ in variant.grafts} & known.keys()
    return {method: known[method] for method in used if not known[method].__module__.startswith("fxgraft.")}


def _pictures(setup: Setup, chosen: Sequence[Variant], images: Data) -> Sequence[Any]:
    from fxgraft.comparison.report import method_pictures

    tested = images.tasks[0].test
    return method_pictures(
        setup, chosen, [open_image(item) for item in (tested[0], tested[len(tested) // 2])]
    )


def _own_size(model: Model) -> int:
    import timm

    config = None
    if isinstance(model, str):
        name = model.removeprefix("timm/").partition(".")[0]
        config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return 224 if config is None else config.input_size[-1]


def _jobs(
    result: Comparison,
    chosen: Sequence[Variant],
    tasks: Sequence[Task],
    settings: Mapping[tuple[str, str], Training],
    device: torch.device,
) -> list[Job]:
    """List the runs that are missing, pair by pair; variants that differ in their adaptation alone share one."""
    jobs = []
    for seed, task in itertools.product(result.seeds, tasks):
        done = {variant.text: result.record(variant.text, task.name, seed) for variant in chosen}
        _check_tuned(result, task.name, done)
        missing = [variant for variant in chosen if done[variant.text] is None]
        shared: dict[tuple[str, str], list[Variant]] = {}
        for variant in missing:
            trained = settings[variant.text, task.name]
            shared.setdefault((variant.trained, str(trained)), []).append(variant)
        jobs += [
            Job(
                tuple(group),
                task,
                seed,
                str(device),
                settings[group[0].text, task.name],
                tuned=_tuned(result, group[0].text, task.name),
            )
            for group in shared.values()
        ]
    return jobs


def _tuned(result: Comparison, variant: str, task: str) -> Mapping[str, Any] | None:
    """Return the settings that tuning chose for a variant on a task: its own, or those of the baseline."""
    return result.tuned.get(variant, result.tuned.get(result.baseline, {})).get(task)


def _check_tuned(result: Comparison, task: str, done: Mapping[str, Record | None]) -> None:
    """Raise where a run was trained with other settings than tuning chooses now."""
    for name, record in done.items():
        chosen = _tuned(result, name, task)
        if record is None or chosen is None or record.get("tuned", chosen) == chosen:
            continue
        before, now = (
            ", ".join(f"{k}={v}" for k, v in values.items()) for values in (record["tuned"], chosen)
        )
        raise ConfigError(
            f"The folder holds runs of {name!r} trained with {before}, and tuning chooses {now} now.\n"
            "Which it chooses depends on the metric, the baseline and what is held out. "
            "Pass those of the first call, or another out=."
        )


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
        self.began, self.done = time.monotonic(), 0

    def tune(
        self,
        chosen: Sequence[Variant],
        tasks: Sequence[Task],
        grid: Sequence[Mapping[str, Any]],
        each: bool,
    ) -> dict[tuple[str, str], Training]:
        """Return the settings of every variant on every task, after the runs that choose them.

        Each task chooses by images of its own: those of one task may be tested in another.
        """
        training = self.setup.training
        every = list(itertools.product(chosen, tasks))
        if not grid:
            return {(variant.text, task.name): training for variant, task in every}
        tried = [settings_of(training, row) for row in grid]
        candidates = chosen if each else chosen[:1]
        jobs = [
            Job((variant,), task, TUNING_SEED, self.devices[0], settings, row)
            for variant in candidates
            for row, settings in zip(grid, tried, strict=True)
            for task in tasks
            if self.result.tuning(variant.text, task.name, row) is None
        ]
        later = sum(
            len({v.trained for v in chosen if self.result.record(v.text, task.name, seed) is None})
            for seed, task in itertools.product(self.result.seeds, tasks)
        )
        self.run(jobs, later)
        best = {}
        for variant, task in itertools.product(candidates, tasks):
            records = [self.result.tuning(variant.text, task.name, row) for row in grid]
            scores = [
                -math.inf if record is None or record["diverged"] else self._score(record)
                for record in records
            ]
            if max(scores) == -math.inf:
                where = f" on {task.name!r}" if task.name else ""
                raise ConfigError(
                    f"All runs of {variant.text!r}{where} that should choose a setting diverged.\n"
                    f"None of the values can be used: tune={self.folder.protocol['tune']}.\n"
                    "Try others, such as smaller learning rates, with another out=."
                )
            best[variant.text, task.name] = tried[scores.index(max(scores))]
            self.result.tuned.setdefault(variant.text, {})[task.name] = grid[scores.index(max(scores))]
        return {
            (variant.text, task.name): best.get(
                (variant.text, task.name), best[candidates[0].text, task.name]
            )
            for variant, task in every
        }

    def _score(self, record: Record) -> float:
        value = record["scores"][self.result.metric]
        value = math.inf if value is None else value
        return -value if self.result.metric in LOWER_IS_BETTER else value

    def run(self, jobs: Sequence[Job], later: int = 0) -> None:
        """Carry out jobs, behind which so many come later; an interruption keeps what is finished."""
        left = len(jobs) + later
        with closing(self._carried_out(jobs)) as finished:
            for records in finished:
                for record in records:
                    self.result.add(self.folder.add(record))
                self.done, left = self.done + 1, left - 1
                if self.progress is not None:
                    self.progress(self.result, (time.monotonic() - self.began) / self.done * left)

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
            except pickle.PicklingError as error:
                raise ConfigError(
                    f"What runs need cannot be sent to another process: {error.__cause__ or error}\n"
                    "Most often a function holds a lock, a file or a logger. Pass workers=1, or make them inside."
                ) from error
            except BrokenExecutor as error:
                raise ConfigError(
                    "A process of a run was killed, most often for lack of memory.\n"
                    "What is finished is kept. Pass fewer workers or a smaller batch_size; the same call goes on."
                ) from error
