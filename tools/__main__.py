"""The tasks of development, one command each: ``python -m tools TASK``.

Each runs what its name says in this repository and ends with its exit code; further arguments go to the program.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).parents[1]
LISTING = ROOT / "tests/project/public_api.txt"

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
Further = Annotated[list[str] | None, typer.Argument(help="Further arguments of the program.")]
PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True}


def _run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, check=False)  # noqa: S603 - the tasks below, and the caller's arguments
    if done.returncode:
        raise typer.Exit(done.returncode)


def _python(*arguments: str) -> None:
    _run(sys.executable, *arguments)


@app.command("test", context_settings=PASSED_ON)
def run_tests(further: Further = None) -> None:
    """Run the tests of every day: minutes on two cores."""
    _python("-m", "pytest", *(further or ()))


@app.command(context_settings=PASSED_ON)
def sweep(further: Further = None) -> None:
    """Run the long sweeps: most of an hour on two cores."""
    _python("-m", "pytest", "-m", "sweep", *(further or ()))


@app.command()
def style() -> None:
    """Check style and types."""
    _python("-m", "ruff", "check")
    _python("-m", "ruff", "format", "--check")
    _python("-m", "pyright", "--pythonpath", sys.executable, "src")


@app.command()
def generate() -> None:
    """Write every generated file: the stub, the listing of public names, the parts of the README."""
    _python("-m", "tools.stubs", "--write")
    listing = subprocess.run(
        [sys.executable, "tests/project/test_public_api.py"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    LISTING.write_text(listing.stdout, encoding="utf-8")
    _python("-m", "tools.readme", "--write")
    _python("-m", "benchmarks", "readme", "--write")


@app.command(context_settings=PASSED_ON)
def docs(further: Further = None) -> None:
    """Build the documentation into docs/_build/html, without network; a warning is an error."""
    options = ("-E", "-W", "-n", "--keep-going", "-q")  # -E: a page that is kept would keep its warnings back
    _python("-m", "sphinx", *options, *(further or ()), "docs", "docs/_build/html")


@app.command(context_settings=PASSED_ON)
def bench(further: Further = None) -> None:
    """Run a benchmark: python -m tools bench overhead."""
    _python("-m", "benchmarks", *(further or ()))


@app.command()
def check() -> None:
    """Run everything that has to pass, as the continuous integration does."""
    _run("bash", ".ci/run")


if __name__ == "__main__":
    app(prog_name="python -m tools")
