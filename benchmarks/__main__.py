"""Benchmarks: does a method help, on which data, what does it cost, and on which networks does it go?

    python -m benchmarks quick --data DIR
    python -m benchmarks full --data DIR --device cuda --minutes 9
    python -m benchmarks table
    python -m benchmarks zoo --minutes 60
    python -m benchmarks overhead
    python -m benchmarks readme --write

Everything that is missing is run; what is there is kept. A run that is cut off goes on from its last finished
epoch when the same command is given again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.evidence import help_table, scores_table
from benchmarks.matrix import matrix_table
from benchmarks.overhead import (
    MODELS,
    Overhead,
    file_of,
    fixed_cost_table,
    overhead_table,
    quiet_profiler,
    subjects,
)
from benchmarks.pictures import plot
from benchmarks.results import FOLDER, Results
from benchmarks.runner import Settings, carry_out
from benchmarks.studies import STUDIES
from benchmarks.study import SIZES
from benchmarks.zoo import Zoo
from benchmarks.zoo import run as run_zoo
from benchmarks.zoo_tables import coverage, summary
from benchmarks.zoo_tables import plot as plot_zoo
from fxgraft.errors import ConfigError, candidates
from fxgraft.io.atomic_write import write_text

README = Path(__file__).parents[1] / "README.md"

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)

Names = Annotated[list[str] | None, typer.Argument(help=f"Only these: {', '.join(STUDIES)}.")]
Data = Annotated[Path, typer.Option(help="Directory with the data.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
Seeds = Annotated[str | None, typer.Option(metavar="N,N,…", help="Instead of those of the protocol.")]
Workers = Annotated[int, typer.Option(min=1, help="Runs side by side, one thread each.")]
Minutes = Annotated[float | None, typer.Option(help="Stop after this long; the next call goes on.")]
Out = Annotated[Path, typer.Option(help="Folder of the result files.")]


@app.command()
def quick(
    data: Data,
    names: Names = None,
    device: Device = "cpu",
    seeds: Seeds = None,
    workers: Workers = 2,
    minutes: Minutes = None,
    out: Out = FOLDER,
) -> None:
    """Run what is missing of the protocols for two CPU cores."""
    _run(
        "quick",
        names,
        Settings(data=data, device=device, workers=workers, minutes=minutes, seeds=_seeds(seeds)),
        out,
    )


@app.command()
def full(
    data: Data,
    names: Names = None,
    device: Device = "cuda",
    seeds: Seeds = None,
    workers: Workers = 1,
    minutes: Minutes = None,
    out: Out = FOLDER,
) -> None:
    """Run what is missing of the protocols to quote, for a GPU."""
    _run(
        "full",
        names,
        Settings(data=data, device=device, workers=workers, minutes=minutes, seeds=_seeds(seeds)),
        out,
    )


@app.command()
def table(names: Names = None, out: Out = FOLDER) -> None:
    """Print what the result files hold, and draw the pictures."""
    console = Console()
    for results in read_all(names, out):
        _present(results, console)


@app.command()
def readme(write: Annotated[bool, typer.Option("--write", help="Put them into README.md.")] = False) -> None:
    """Write the README's tables from the committed results."""
    document = README.read_text(encoding="utf-8")
    for part, text in readme_parts().items():
        document = with_part(document, part, text)
        if not write:
            typer.echo(text + "\n")
    if write:
        write_text(README, document)


@app.command()
def zoo(
    pattern: Annotated[str, typer.Option("--filter", help="Only these, as timm/resnet*.")] = "*",
    workers: Workers = 2,
    minutes: Minutes = None,
    out: Out = FOLDER,
) -> None:
    """Try every method on every architecture of timm and torchvision, on the meta device."""
    console = Console()
    found = Zoo(out / "zoo.json")
    run_zoo(found, console, pattern, workers, minutes)
    write_text(out / "zoo.md", summary(found))
    plot_zoo(found, out / "zoo.png")
    console.print(coverage(found), markup=False)


@app.command()
def overhead(
    model: Annotated[list[str] | None, typer.Option(help="A timm name; again for more.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="METHOD:key=value,…, or several as A + B; again for more.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timings of each network.")] = 12,
    min_run_time: Annotated[float, typer.Option(help="Seconds for each timing.")] = 0.2,
    threads: Annotated[int | None, typer.Option(help="CPU threads; torch's own by default.")] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Run all networks through torch.compile.")
    ] = False,
    by_hand: Annotated[
        bool,
        typer.Option("--by-hand", help="Beside each method as hooks by hand, on networks of convolutions."),
    ] = False,
    batch: int = 16,
    size: int = 224,
    device: Device = "cpu",
    name: Annotated[str | None, typer.Option(help="Of a file of its own: overhead_NAME.json.")] = None,
    out: Out = FOLDER,
) -> None:
    """Measure what every method costs against the bare model; what is in the file is kept."""
    quiet_profiler()
    settings = {
        "batch": batch,
        "size": size,
        "device": device,
        "rounds": rounds,
        "min_run_time": min_run_time,
        "threads": threads,
        "compiled": compiled,
    }
    found = Overhead(file_of(out, device, compiled, by_hand, name), settings, by_hand)
    found.run(model or MODELS, subjects(method or ()), Console())


def readme_parts() -> dict[str, str]:
    """Return what the committed results say, by the name of the part of the README."""
    return {
        "evidence": help_table(read_all(None, FOLDER)),
        "coverage": coverage(Zoo(FOLDER / "zoo.json")),
        "works-with": matrix_table(FOLDER / "works_with.json"),
        "loops": matrix_table(FOLDER / "works_with.json", loops=True),
        "overhead": overhead_table(FOLDER / "overhead.json"),
        "compiled": overhead_table(FOLDER / "overhead-compiled.json"),
        "by-hand": overhead_table(FOLDER / "overhead-by-hand.json"),
        "fixed-cost": fixed_cost_table(FOLDER / "overhead_fixed.json"),
    }


def with_part(document: str, part: str, text: str) -> str:
    """Return a README with a part written anew between its two marks."""
    begin, end = f"<!-- {part}: written by python -m benchmarks readme -->", f"<!-- {part}: end -->"
    head, _, rest = document.partition(begin)
    _, _, tail = rest.partition(end)
    return f"{head}{begin}\n{text}\n{end}{tail}"


def read_all(names: list[str] | None, folder: Path) -> list[Results]:
    """Return the result files there are, the larger protocol of each study last."""
    found = [Results(STUDIES[name], size, folder) for name in _chosen(names) for size in SIZES]
    return [results for results in found if results.runs]


def _chosen(names: list[str] | None) -> list[str]:
    for name in names or ():
        if name not in STUDIES:
            raise ConfigError(f"There is no study {name!r}. {candidates(name, list(STUDIES))}")
    return names or list(STUDIES)


def _run(size: str, names: list[str] | None, settings: Settings, out: Path) -> None:
    console = Console()
    chosen = [STUDIES[name] for name in _chosen(names)]
    for study in chosen:
        study.check(settings.data)
    for study in chosen:
        results = Results(study, size, out)
        complete = carry_out(results, settings, console)
        if results.runs:
            _present(results, console)
        if not complete:
            console.print("The time is over; the same command goes on.")
            return


def _present(results: Results, console: Console) -> None:
    if not console.is_terminal:
        console.width = max(console.width, 120)
    console.print(scores_table(results))
    plot(results, results.path.with_suffix(".png"))


def _seeds(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--seeds takes whole numbers with commas, such as 0,1,2; got {text!r}.") from None


def main() -> None:
    """Run the command line; what goes wrong for a known reason is a message and exit code 2."""
    try:
        app(prog_name="python -m benchmarks")
    except ConfigError as error:
        typer.echo(f"Error: {error}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
