"""``fxgraft compare``: does a method help on these images?"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from fxgraft.cli.completion import complete_model, complete_spec
from fxgraft.cli.early_checks import check_method, check_there
from fxgraft.errors import ConfigError
from fxgraft.spec import parse_grafts


def compare(
    data: Annotated[str, typer.Argument(help="Folder, tars or a timm data set; see below.")],
    model: Annotated[
        str,
        typer.Option(
            help="Backbone: a name of timm or torchvision, or package.module:function.",
            autocompletion=complete_model,
        ),
    ] = "resnet50",
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Start from the library's weights.")
    ] = False,
    weights: Annotated[Path | None, typer.Option(help="Start from this checkpoint.")] = None,
    model_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Of the model's constructor; again for more."),
    ] = None,
    graft: Annotated[
        list[str] | None,
        typer.Option(
            "--graft",
            metavar="SPEC",
            help="METHOD:key=value,…, or several as A + B (adapt_batchnorm or gam last); again for another variant.",
            autocompletion=complete_spec,
        ),
    ] = None,
    graft_file: Annotated[
        Path | None,
        typer.Option(
            "--graft-file", metavar="FILE", help="A YAML list of variants, before those of --graft."
        ),
    ] = None,
    baseline: Annotated[str, typer.Option(help="What the variants are compared with.")] = "bare",
    hold_out: Annotated[
        list[str] | None, typer.Option(help="Domain to test on and not to train on; again for more, or all.")
    ] = None,
    test: Annotated[str | None, typer.Option(help="Other images to test on.")] = None,
    target: Annotated[str | None, typer.Option(help="Images to adapt to, without labels.")] = None,
    corrupt: Annotated[
        bool, typer.Option("--corrupt", help="Test on the corruptions of ImageNet-C.")
    ] = False,
    per_class: Annotated[
        int | None, typer.Option(help="At most so many training images of each class and domain.")
    ] = None,
    test_per_class: Annotated[
        int | None, typer.Option(help="At most so many test images of each class.")
    ] = None,
    seeds: Annotated[str, typer.Option(metavar="N|N,N,…", help="How many, or which.")] = "5",
    size: Annotated[int | None, typer.Option(help="Side of the images; the model's own without it.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step.")] = None,
    opt: Annotated[str | None, typer.Option(help="Optimizer, by timm's name.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay.")] = None,
    sched: Annotated[str | None, typer.Option(help="Schedule, by timm's name.")] = None,
    warmup_epochs: Annotated[int | None, typer.Option(help="Epochs of a linear rise.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any setting of training; again for more."),
    ] = None,
    tune: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V,V,…", help="Values the baseline is tuned over, as lr=0.003,0.01."),
    ] = None,
    tune_each: Annotated[
        bool, typer.Option("--tune-each", help="Tune every variant on the same values.")
    ] = False,
    metric: Annotated[str, typer.Option(help="accuracy, macro_accuracy, top5, nll or ece.")] = "accuracy",
    interest: Annotated[
        float, typer.Option(help="The smallest difference that matters: 0.02 is two points.")
    ] = 0.02,
    adapt_steps: Annotated[int, typer.Option(help="Steps of gam.")] = 1000,
    workers: Annotated[
        int | None, typer.Option(help="Runs side by side; one a core or GPU without it.")
    ] = None,
    backend: Annotated[str, typer.Option(help="joblib's: loky, ray or dask.")] = "loky",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of runs and report.")] = Path("fxgraft-compare"),
) -> None:
    """Train a backbone bare and patched on your images, in pairs, and say whether a method helps.

    DATA is domain/class/image, or train|val|test/class/image, or class/image, or tars of these. The same command goes
    on where it was interrupted; more --graft or --seeds add only what is missing.
    """
    variants = _variants(graft, graft_file)
    if weights is not None:
        check_there(weights, "The checkpoint")
    from fxgraft.comparison.experiment import compare as run

    settings = {
        "epochs": epochs, "batch_size": batch_size, "opt": opt, "lr": lr, "weight_decay": weight_decay, "sched": sched,
        "warmup_epochs": warmup_epochs,
    }  # fmt: skip
    training = {name: value for name, value in settings.items() if value is not None}
    for name, value in _pairs(set_, "--set").items():
        if name in training:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{name} is given twice, by {option} and by --set.\nLeave one of the two out.")
        training[name] = _one(_tried(name, value, "--set"), name, "--set")
    held = None if not hold_out else "all" if hold_out == ["all"] else hold_out
    console = _console()
    with _Running(console) as running:
        result = run(
            data,
            model=model,
            grafts=variants,
            hold_out=held,
            test=test,
            target=target,
            corrupt=corrupt,
            per_class=per_class,
            test_per_class=test_per_class,
            seeds=_seeds(seeds),
            pretrained=pretrained,
            weights=weights,
            model_options={
                k: _one(_values(v), k, "--model-option")
                for k, v in _pairs(model_option, "--model-option").items()
            },
            size=size,
            training=training,
            tune={k: _tried(k, v, "--tune") for k, v in _pairs(tune, "--tune").items()} or None,
            tune_each=tune_each,
            baseline=baseline,
            metric=metric,
            interest=interest,
            adapt_steps=adapt_steps,
            workers=workers,
            backend=backend,
            device=device,
            out=out,
            progress=running,
        )
    result.command = shlex.join(["fxgraft", *sys.argv[1:]])
    present(result, out, console)


def demo(
    out: Annotated[Path, typer.Option(help="Folder of images, runs and report.")] = Path("fxgraft-demo"),
    seeds: Annotated[int, typer.Option(min=2, help="Pairs of each variant.")] = 5,
    workers: Annotated[int | None, typer.Option(help="Runs side by side; one a core without it.")] = None,
) -> None:
    """Patch, train, fold and undo a model; then compare bare and patched on a style they never saw."""
    from fxgraft.comparison.demo import MEANING, NEXT, run_demo

    console = _console()
    with _Running(console) as running:
        result = run_demo(out, seeds=seeds, workers=workers, console=console, progress=running)
    present(result, out, console)
    console.print(Text(MEANING), soft_wrap=True)
    console.print(Text(f"  {NEXT}"), soft_wrap=True)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=120)  # a pipe is not cut to 80 columns


def present(result: Any, out: Path, console: Console) -> None:
    """Print the table, and write report.html, table.md and result.json into the folder."""
    from fxgraft.io.atomic_write import write_text

    console.print(result)
    write_text(out / "table.md", result.to_markdown())
    write_text(out / "result.json", result.to_json())
    report = result.to_html(out / "report.html")
    console.print(Text(f"Report: {report}"), soft_wrap=True)


class _Running:
    """Shows the table while it grows; an interruption says what is kept."""

    def __init__(self, console: Console) -> None:
        self.console, self.done, self.shown = console, 0, 0
        self.live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> _Running:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if self.console.is_terminal:
            self.live.stop()
        if kind is KeyboardInterrupt:
            self.console.print(f"Stopped. {self.done} runs of this call are kept; the same command goes on.")

    def __call__(self, result: Any, left: float) -> None:
        self.done += 1
        if self.console.is_terminal:
            self.live.update(result, refresh=True)
            self.live.console.print(f"about {_duration(left)} left")
            return
        new = result.records[max(self.shown, result.kept) :]
        self.shown = len(result.records)
        for record in new:
            tried = [f"{name} {value}" for name, value in record.get("tuning", {}).items()]
            what = (
                ["tuning on images set apart", *tried] if "tuning" in record else [f"seed {record['seed']}"]
            )
            said = ", ".join(part for part in (record["variant"], record["task"], *what) if part)
            text = f"{said}: {result.show(result.score(record))}; about {_duration(left)} left"
            self.console.print(Text(text), soft_wrap=True)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _variants(grafts: list[str] | None, file: Path | None) -> list[str]:
    """List the variants that the options say, and refuse methods that nobody has before torch is imported."""
    texts: list[str] = []
    if file is not None:
        from fxgraft.io.graft_file import read_entries

        texts += [" + ".join(spec.text for spec in entry) for entry in read_entries(file)]
    texts += grafts or ()
    for text in texts:
        for spec in parse_grafts(text):
            if spec.method not in ("bare", "adapt_batchnorm"):
                check_method(spec.method)
    return texts


def _seeds(text: str) -> int | list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--seeds takes a number of seeds, or seeds with commas between, such as 0,1,2; got {text!r}."
        ) from None
    return numbers if "," in text else numbers[0]


def _pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    pairs = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals or not value or not key.isidentifier():
            raise ConfigError(f"{option} takes KEY=VALUE, got {text!r}.")
        if key in pairs:
            several = (
                " Values to try have commas between them: --tune lr=0.003,0.01." if option == "--tune" else ""
            )
            raise ConfigError(
                f"{option} gives {key} twice, {pairs[key]} and {value}.\nGive it once.{several}"
            )
        pairs[key] = value
    return pairs


def _tried(name: str, text: str, option: str) -> list[Any]:
    """Read values of a setting of the training; one that is a name stays text, also where it is "none"."""
    from fxgraft.comparison.training import Training

    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ConfigError(f"{option} {name} takes a value, or values with commas between; got {text!r}.")
    named = isinstance(getattr(Training(), name, None), str)
    return parts if named else _values(text)


def _one(values: list[Any], name: str, option: str) -> Any:
    if len(values) > 1:
        raise ConfigError(
            f"{option} {name} takes one value, got {len(values)}.\n"
            "Several values of a setting are tried with --tune; one that has parts is written as (96,96)."
        )
    return values[0]


def _values(text: str) -> list[Any]:
    from fxgraft.spec import parse_patch_spec

    # As a list, in which commas inside of brackets and quotes belong to a value.
    values = parse_patch_spec(f"x:value=[{text}]").options["value"]
    if not isinstance(values, list):
        raise ConfigError(f"{text!r} mixes words with brackets, which cannot be read.\nQuote the words.")
    return values
