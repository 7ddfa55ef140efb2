"""The tasks of development, one command each: ``python -m tools TASK``.

Each runs what its name says in this repository and ends with its exit code; further arguments go to the program.
"""

from __future__ import annotations

import re
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
    """Run all of the long sweeps: an hour on two cores. Continuous integration leaves out what is exhaustive."""
    _python("-m", "pytest", "-m", "sweep", *(further or ()))


@app.command()
def style() -> None:
    """Check style and types."""
    _python("-m", "ruff", "check")
    _python("-m", "ruff", "format", "--check")
    _python("-m", "pyright", "--pythonpath", sys.executable, "src")


@app.command()
def generate() -> None:
    """Write every generated file: the stub, the public names, parts of the README, what the command line knows."""
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
    _python("-m", "tools.facts", "--write")
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


@app.command()
def release() -> None:
    """Check everything, build the packages into dist/, and tag the version of pyproject.toml; nothing is published."""
    (version,) = re.findall(
        r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
    )
    heading = rf"^## {re.escape(version)} - \d{{4}}-\d{{2}}-\d{{2}}$"
    if not re.search(heading, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE):
        typer.echo(
            f"CHANGELOG.md has no line '## {version} - YYYY-MM-DD': write the date of the release.", err=True
        )
        raise typer.Exit(1)
    _run("git", "diff", "--exit-code", "HEAD")  # what is released is what is committed
    _run("bash", ".ci/run")
    _python("-m", "build")
    _run("git", "tag", "--annotate", f"v{version}", "--message", f"fxgraft {version}")
    typer.echo(f"Tagged v{version}. Then: git push origin v{version}, and upload dist/.")


if __name__ == "__main__":
    app(prog_name="python -m tools")
