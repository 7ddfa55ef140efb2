"""The command line: ``fxgraft demo | compare | sites | suggest | info | bench | merge | show``.

What goes wrong for a reason that fxgraft knows is one plain message on stderr and exit code 2. Commands import what
they need when they run: torch and the model libraries take seconds, which help and a mistyped option do not need.
"""

from __future__ import annotations

import logging
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fxgraft.cli.compare import compare, demo
from fxgraft.cli.completion import complete_method
from fxgraft.cli.early_checks import check_method, check_there
from fxgraft.cli.graft_options import GraftFileOption, GraftOption, chosen_grafts
from fxgraft.cli.show import show
from fxgraft.cli.site_commands import ModelArgument, sites, suggest
from fxgraft.cli.site_commands import show as show_table
from fxgraft.errors import ConfigError, FxgraftError


class _PlainErrors(TyperGroup):
    """Turns fxgraft's errors into a message and an exit code, for every command at once."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FxgraftError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_PlainErrors,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Graft published training methods onto timm and torchvision backbones.",
)

app.add_typer(show, name="show")
app.command()(compare)
app.command()(demo)
app.command()(sites)
app.command()(suggest)

DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …")]


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    versions = ", ".join(f"{name} {_version(name)}" for name in ("torch", "timm"))
    typer.echo(f"fxgraft {_version('fxgraft')} ({versions}, Python {platform.python_version()})")
    raise typer.Exit


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def merge(
    source: Annotated[
        Path,
        typer.Argument(help="File of fxgraft.save, output folder of timm's train.py, or a checkpoint."),
    ],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("model.safetensors"),
    model: Annotated[str | None, typer.Option(help="Backbone, where the checkpoint does not say.")] = None,
    graft: GraftOption = None,
    graft_file: GraftFileOption = None,
    num_classes: Annotated[
        int | None, typer.Option(help="Classes; read from the weights without it.")
    ] = None,
    input_size: Annotated[int | None, typer.Option(help="Side of the images it was patched for.")] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Take the averaged weights of the checkpoint.")] = False,
) -> None:
    """Fold a trained model's grafts into stock weights, for timm.create_model(..., checkpoint_path=...)."""
    specs = [spec.text for spec in chosen_grafts(graft, graft_file)]
    check_there(source, "The checkpoint")
    from fxgraft.cli.merging import merge_file

    said = merge_file(
        source, out, model=model, grafts=specs, classes=num_classes, input_size=input_size, ema=ema
    )
    typer.echo(said)


@app.command()
def info(
    method: Annotated[
        str | None,
        typer.Argument(help="A method; without it, the table of all.", autocompletion=complete_method),
    ] = None,
) -> None:
    """Show what a method does, where it goes, what it costs and its options."""
    if method is not None:
        check_method(method)
    from fxgraft.cli.method_card import card, overview

    show_table(overview() if method is None else card(method))


@app.command()
def bench(
    model: ModelArgument,
    graft: GraftOption = None,
    graft_file: GraftFileOption = None,
    batch: Annotated[int, typer.Option(help="Images per call.")] = 16,
    size: Annotated[str, typer.Option(help="Side of the images; of clips 16x112x112.")] = "224",
    device: DeviceOption = None,
    rounds: Annotated[
        int | None, typer.Option(help="Timings of each network.", show_default="12, quick 3")
    ] = None,
    min_run_time: Annotated[
        float | None,
        typer.Option(help="Seconds for which one timing repeats its call.", show_default="0.2, quick 0"),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer and shorter timings: a first impression.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads of torch.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Through torch.compile, all of them.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the numbers to this file, .json.")] = None,
) -> None:
    """Measure what patches cost: time and memory against the bare model, in turns."""
    specs = chosen_grafts(graft, graft_file)
    if not specs:
        raise ConfigError(
            "Nothing to measure: give at least one --graft, for example --graft rsc:layer=layer4."
        )
    from fxgraft.bench.overhead_report import read_size

    sides = read_size(size)
    if out is not None:
        # Before the measurement: a file that cannot be written should not cost minutes first.
        if out.suffix != ".json":
            raise ConfigError(
                f"The numbers are written as JSON, and {str(out)!r} does not end in .json.\n"
                f"Pass --out {out.with_suffix('.json')}."
            )
        _open_for_writing(out)
    # torch's profiler, which reads the memory, logs its start and stop to stderr unless told otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # warns where there is no GPU
    from fxgraft.bench.overhead import measure
    from fxgraft.cli.progress import progress_of
    from fxgraft.io.atomic_write import write_text

    with progress_of("measuring") as progress:
        report = measure(
            model,
            [(spec.method, spec.options) for spec in specs],
            batch=batch,
            size=sides,
            device=device or "cpu",
            rounds=(3 if quick else 12) if rounds is None else rounds,
            min_run_time=(0.0 if quick else 0.2) if min_run_time is None else min_run_time,
            threads=threads,
            compiled=compiled,
            progress=progress,
        )
    show_table(report, str(report))
    if out is not None:
        write_text(out, report.to_json())


def _open_for_writing(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        raise ConfigError(
            f"Cannot write {str(path)!r}: {error.strerror}.\nPass another file as --out."
        ) from None
