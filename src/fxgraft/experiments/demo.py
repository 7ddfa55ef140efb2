"""The demo: what a patch does to a model, and then whether it helps on a domain never seen.

First the surgery, each line checked: `fxgraft.experiments.surgery`. Then training on all domains but one and testing on
the one left out, bare against patched. Every variant starts from the same weights and sees the same batches, so
that a pair of runs differs in the patch alone. Short training from scratch on small data is noisy: the table is an
example of the protocol, not a result to quote.

Without data of your own, the images are scikit-learn's digits in four styles, no image in two of them:
see `fxgraft.experiments.digits`.
"""

from __future__ import annotations

import importlib
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from torch import nn

import fxgraft
from fxgraft.errors import ConfigError
from fxgraft.experiments.augment import Augment
from fxgraft.experiments.backbones import RepeatedBackbone
from fxgraft.experiments.digits import digits_domains
from fxgraft.experiments.domains import Domain, leave_one_out
from fxgraft.experiments.environment import checked_device, environment
from fxgraft.experiments.evaluation import evaluate
from fxgraft.experiments.loading import load_domains
from fxgraft.experiments.muting import draw_muted
from fxgraft.experiments.report import DemoReport, Run
from fxgraft.experiments.spec import PatchSpec, parse_patch_spec
from fxgraft.experiments.surgery import surgery
from fxgraft.experiments.training import train
from fxgraft.files import write_text

BARE = "bare"

# Chosen for the embedded digits on two CPU cores: the whole demo in about a minute.
DIGITS_SIZE, DIGITS_EPOCHS = 32, 5
# For data of one's own nothing bounds the time; these are a start.
DATA_SIZE, DATA_EPOCHS = 64, 10
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 0.05
MEANING = (
    "What this shows: the patches train, and what a step costs. What it cannot show: whether a method helps with your "
    'data and a pretrained network that has converged; for that see benchmarks/ and the README\'s "Does it help?".'
)
PHOTO_AUGMENT = Augment(crop_padding=6, flip=0.5, jitter=0.4, gray=0.1)


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What the demo does.

    Attributes:
        data: PACS-like data, as `load_domains` takes it; None is the embedded digits.
        model: a name for `build_model`, trained from scratch. The default is timm's smallest ResNet
            (0.4 M parameters).
        patch: variants, each compared with the bare model: patches as `parse_patch_spec` reads them, several of them
            in a stack with " + " between them; "none" adds nothing, and leaves the bare model alone.
        held_out: the domains that are left out, one after the other; None is the last one.
        all: leave out every domain in turn.
        epochs: passes over the training domains; None is 5 for the digits and 10 for other data.
        size: side of the images; None is 32 for the digits and 64 for other data.
        device: where to train.
        seeds: of initial weights, batches and patches; every one repeats all runs.
        out: directory for ``demo.json`` and ``muted.png``; made if missing.
        batch_size: images per step.
        quiet: no progress bar.
    """

    data: Path | None = None
    model: str = "test_resnet"
    patch: list[str] = field(default_factory=lambda: ["rsc", "crossnorm", "rsc + crossnorm"])
    held_out: list[str] | None = None
    all: bool = False
    epochs: int | None = None
    size: int | None = None
    device: str = "cpu"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    out: Path = Path("fxgraft-demo")
    batch_size: int = 32
    quiet: bool = False


def run_demo(settings: DemoSettings | None = None, *, console: Console | None = None) -> DemoReport:
    """Run the demo: surgery, training, the table, the JSON and the picture of what RSC muted.

    The backbone is built with the output stride at which the last feature map is 3×3 or larger, as far as
    its constructor lets one choose: a stock ResNet would shrink a 32-pixel image to a single position, on
    which muting positions means nothing.

    Args:
        settings: None is the defaults.
        console: where the table goes; None is standard output.

    Returns:
        Every run with its numbers, as written to the JSON.

    Raises:
        ConfigError: for settings out of range, data that cannot be read, or a missing extra. All of this,
            and that the patches fit the model, is found out before the first training step.
        FxgraftError: what `fxgraft.patch` raises for a patch that does not fit.
    """
    settings = settings or DemoSettings()
    variants = _variants(settings)
    device = checked_device(settings.device)
    _need_matplotlib()
    size = settings.size or (DIGITS_SIZE if settings.data is None else DATA_SIZE)
    epochs = settings.epochs or (DIGITS_EPOCHS if settings.data is None else DATA_EPOCHS)
    domains = digits_domains(size) if settings.data is None else load_domains(settings.data, size)
    left_out = _left_out(settings, domains)
    build = RepeatedBackbone(settings.model, len(domains[0].classes), size)
    for specs in variants.values():
        _patched(build(0), specs, 0)
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 110)  # rich assumes 80 columns of a pipe and would cut the table
    settings.out.mkdir(parents=True, exist_ok=True)
    augment = Augment(crop_padding=size // 10) if settings.data is None else PHOTO_AUGMENT
    options: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": settings.batch_size,
        "lr": LEARNING_RATE,
        "optimizer": "adamw",
        "weight_decay": WEIGHT_DECAY,
    }
    report = DemoReport(
        protocol=_protocol(settings, domains, variants, build, {"augment": asdict(augment), **options}),
        seeds=list(settings.seeds),
        environment=environment(device),
    )
    progress = _Bar(1 + len(left_out) * len(variants) * len(settings.seeds), settings.quiet)
    picture: list[tuple[nn.Module, Sequence[Domain], int]] = []
    with progress:
        step = progress.next_run("patched, trained, folded, undone")
        for check in surgery(
            build(0).to(device), domains[0], batch_size=settings.batch_size, device=device, progress=step
        ):
            console.print(
                Text(f"{'✓' if check.holds else '✗'} {check.text}", "green" if check.holds else "bold red")
            )
            report.surgery.append(check)
        for seed, held_out in itertools.product(settings.seeds, left_out):
            train_set, _, test = leave_one_out(domains, held_out.name)
            for name, specs in variants.items():
                step = progress.next_run(f"{name}, unseen: {held_out.name}")
                model = _patched(build(seed), specs, seed)
                began = time.perf_counter()
                history = train(
                    model, train_set, **options, seed=seed, device=device, augment=augment, progress=step
                )
                run = Run(
                    variant=name,
                    held_out=held_out.name,
                    seed=seed,
                    accuracy=evaluate(model, *test),
                    step_seconds=history.median_step,
                    steps=len(history.step_seconds),
                    train_seconds=time.perf_counter() - began,
                    epoch_loss=history.epoch_loss,
                )
                report.runs.append(run)
                if any(spec.method == "rsc" for spec in specs):
                    picture = [(model, [domain for domain in domains if domain is not held_out], seed)]
    for trained, seen, seed in picture:
        report.picture = draw_muted(trained, seen, seed, settings.out / "muted.png")
    write_text(settings.out / "demo.json", report.to_json())
    _print(report, settings.out, console)
    return report


def _left_out(settings: DemoSettings, domains: Sequence[Domain]) -> list[Domain]:
    """The domains to leave out, each checked."""
    if settings.all and settings.held_out:
        raise ConfigError("held_out names domains, and all means every one: give one of the two.")
    names = [domain.name for domain in domains]
    for name in settings.held_out or names[-1:]:
        leave_one_out(domains, name)
    chosen = names if settings.all else settings.held_out or names[-1:]
    return [domain for domain in domains if domain.name in chosen]


def _variants(settings: DemoSettings) -> dict[str, tuple[PatchSpec, ...]]:
    """The bare model and one variant per stack of patches, by the name in the table."""
    for name in ("epochs", "size", "batch_size"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}.")
    if not settings.seeds or len(set(settings.seeds)) < len(settings.seeds):
        raise ConfigError(f"seeds must be one or more different numbers, got {settings.seeds}.")
    variants: dict[str, tuple[PatchSpec, ...]] = {BARE: ()}
    for text in settings.patch:
        if text.strip() == "none":
            continue
        specs = tuple(parse_patch_spec(part.strip()) for part in text.split(" + "))
        name = " + ".join(spec.text for spec in specs)
        if name in variants:
            raise ConfigError(f"The patch {name!r} is given twice.")
        variants[name] = specs
    return variants


def _protocol(
    settings: DemoSettings,
    domains: Sequence[Domain],
    variants: dict[str, tuple[PatchSpec, ...]],
    build: RepeatedBackbone,
    training: dict[str, Any],
) -> dict[str, Any]:
    data = "scikit-learn digits in four styles" if settings.data is None else settings.data.name
    return {
        "task": "leave one domain out, trained from scratch, weights of the last epoch",
        "data": data,
        "domains": {domain.name: len(domain) for domain in domains},
        "classes": list(domains[0].classes),
        "model": settings.model,
        "model_options": build.options,
        "size": build.size,
        "variants": {name: [spec.text for spec in specs] for name, specs in variants.items()},
        **training,
    }


def _need_matplotlib() -> None:
    # Asked for before the training, so that it does not end minutes later without its picture.
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ConfigError(
            "The demo draws with matplotlib, which is not installed.\n"
            'Install it with: pip install "fxgraft[demo]".'
        ) from error


def _patched(model: nn.Module, specs: Sequence[PatchSpec], seed: int) -> nn.Module:
    # A method may have weights of its own to draw.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for spec in specs:
            fxgraft.patch(model, spec.method, **spec.options)
    return model


def _print(report: DemoReport, out: Path, console: Console) -> None:
    console.print(report)
    console.print(Text(MEANING), soft_wrap=True)
    written = ["demo.json", *([report.picture] if report.picture else [])]
    console.print(Text("Written: " + ", ".join(str(out / name) for name in written)), soft_wrap=True)


class _Bar:
    """One bar over all runs."""

    def __init__(self, runs: int, quiet: bool) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, *times, console=Console(stderr=True), transient=True, disable=quiet)
        self.task = self.bar.add_task("", total=runs)
        self.begun = 0

    def __enter__(self) -> None:
        self.bar.start()

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def next_run(self, title: str) -> Callable[[int, int], None]:
        done, self.begun = self.begun, self.begun + 1
        self.bar.update(self.task, description=title, completed=done)
        return lambda step, total: self.bar.update(self.task, completed=done + step / total)
