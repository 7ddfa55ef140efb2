"""Benchmarks: does a method help, on which data, what does it cost, and on which networks does it go?

    python -m benchmarks study NAME --data DIR
    python -m benchmarks studies
    python -m benchmarks zoo --minutes 60
    python -m benchmarks beyond
    python -m benchmarks overhead
    python -m benchmarks engine
    python -m benchmarks readme --write

Everything that is missing is run; what is there is kept. The same command goes on where it was
cut off.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.beyond import run as run_beyond
from benchmarks.engine import measure
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
from benchmarks.studies import STUDIES
from benchmarks.studies.study import FOLDER as STUDIES_FOLDER
from benchmarks.studies.study import Study, evidence_table, progress_line
from benchmarks.zoo import Zoo
from benchmarks.zoo import run as run_zoo
from benchmarks.zoo_tables import claim, coverage, summary
from benchmarks.zoo_tables import plot as plot_zoo
from fxgraft.bench.overhead_report import read_size
from fxgraft.errors import ConfigError, candidates
from fxgraft.io.atomic_write import write_text

README = Path(__file__).parents[1] / "README.md"
FOLDER = Path(__file__).parent / "results"
DATA = Path(__file__).parents[2] / "shared" / "data"

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
Workers = Annotated[int, typer.Option(min=1, help="Runs side by side, one thread each.")]
Minutes = Annotated[float | None, typer.Option(help="Stop after this long; the next call goes on.")]
Out = Annotated[Path, typer.Option(help="Folder of the result files.")]


@app.command()
def study(
    names: Annotated[list[str], typer.Argument(help=f"One after the other: {', '.join(STUDIES)}.")],
    data: Annotated[
        Path, typer.Option(help="Folder with the data; see benchmarks/results/README.md.")
    ] = DATA,
    workers: Workers = 2,
    device: Device = "cpu",
    out: Out = STUDIES_FOLDER,
) -> None:
    """Do the runs that a study lacks, and write its table. What is there is kept; the same command goes on."""
    for chosen in [_study(name) for name in names]:
        if lacking := chosen.missing(data):
            typer.echo(f"Skipped: {lacking}")
            continue
        typer.echo(
            f"{chosen.name}: {chosen.pairs} pairs; {chosen.needed} show {100 * chosen.gain:.1f} points with 80 % power."
        )
        result = chosen.run(data, out, workers=workers, device=device, progress=progress_line(chosen))
        typer.echo(str(result))


@app.command()
def studies() -> None:
    """List the studies, with the runs that are done."""
    for each in STUDIES.values():
        pairs = ", ".join(
            f"{verdict.variant} against {against}: {verdict.pairs} of {each.pairs} pairs, "
            f"{result.show(verdict.difference, True)} ({result.show(verdict.low, True)} to "
            f"{result.show(verdict.high, True)}), {verdict.sentence(result.factor, result.unit)}"
            for against, result in each.read().items()
            for verdict in result.verdicts
        )
        typer.echo(f"{each.name}: {each.about}\n  {pairs or 'no pair yet'}")


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
    places: Annotated[
        bool, typer.Option("--places", help="Check whether methods are in their places, instead.")
    ] = False,
) -> None:
    """Try every method on every architecture of timm and torchvision, on the meta device."""
    console = Console()
    found = Zoo(out / "zoo.json")
    run_zoo(found, console, pattern, workers, minutes, places)
    write_text(out / "zoo.md", summary(found))
    plot_zoo(found, out / "zoo.png")
    console.print(coverage(found), markup=False)


@app.command()
def beyond(
    pattern: Annotated[str, typer.Option("--filter", help="Try these again, as torchvision/*.")] = "*",
    out: Out = FOLDER,
) -> None:
    """Try every method on transformers' image classifiers, and on networks of clips and volumes."""
    run_beyond(out / "beyond.json", pattern, typer.echo)


@app.command()
def overhead(
    model: Annotated[
        list[str] | None, typer.Option(help="A timm name, or torchvision/NAME; again for more.")
    ] = None,
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
    size: Annotated[str, typer.Option(help="Side of the images; of clips 16x112x112.")] = "224",
    device: Device = "cpu",
    name: Annotated[str | None, typer.Option(help="Of a file of its own: overhead_NAME.json.")] = None,
    out: Out = FOLDER,
) -> None:
    """Measure what every method costs against the bare model; what is in the file is kept."""
    quiet_profiler()
    settings = {
        "batch": batch,
        "size": read_size(size),
        "device": device,
        "rounds": rounds,
        "min_run_time": min_run_time,
        "threads": threads,
        "compiled": compiled,
    }
    found = Overhead(file_of(out, device, compiled, by_hand, name), settings, by_hand)
    found.run(model or MODELS, subjects(method or ()), Console())


@app.command()
def engine(rounds: Annotated[int, typer.Option(help="Epochs of each loop.")] = 7, out: Out = FOLDER) -> None:
    """Measure what a comparison costs beside a bare training loop: steps, reading, memory of many runs, workers."""
    found = json.dumps(measure(rounds), indent=1, ensure_ascii=False) + "\n"
    write_text(out / "engine.json", found)
    typer.echo(found)


def readme_parts() -> dict[str, str]:
    """Return what the README says of the committed results, by the name of its part."""
    return {
        "evidence": evidence_table(STUDIES.values(), headlines=True),
        "places": claim(Zoo(FOLDER / "zoo.json")),
    }


def result_tables() -> dict[str, str]:
    """Return what the committed results say, by name: the tables of the documentation."""
    return {
        "evidence": evidence_table(STUDIES.values()),
        "coverage": coverage(Zoo(FOLDER / "zoo.json")),
        "works-with": matrix_table(FOLDER / "works_with.json"),
        "loops": matrix_table(FOLDER / "works_with.json", loops=True),
        "overhead": overhead_table(FOLDER / "overhead.json"),
        "compiled": overhead_table(FOLDER / "overhead-compiled.json"),
        "cuda": overhead_table(FOLDER / "overhead-cuda.json"),
        "by-hand": overhead_table(FOLDER / "overhead-by-hand.json"),
        "fixed-cost": fixed_cost_table(FOLDER / "overhead_fixed.json"),
    }


def with_part(document: str, part: str, text: str) -> str:
    """Return a README with a part written again between its two marks."""
    begin, end = f"<!-- {part}: written by python -m benchmarks readme -->", f"<!-- {part}: end -->"
    if document.count(begin) != 1 or document.count(end) != 1:
        raise ConfigError(f"The README needs one line {begin!r} and, after it, one line {end!r}.")
    head, _, rest = document.partition(begin)
    _, _, tail = rest.partition(end)
    return f"{head}{begin}\n{text}\n{end}{tail}"


def _study(name: str) -> Study:
    if name not in STUDIES:
        raise ConfigError(f"There is no study {name!r}. {candidates(name, list(STUDIES))}")
    return STUDIES[name]


def main() -> None:
    """Run the command line; what goes wrong for a known reason is a message and exit code 2."""
    try:
        app(prog_name="python -m benchmarks")
    except ConfigError as error:
        typer.echo(f"Error: {error}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
