"""The part of the README that the registry knows: the table of methods.

    python -m tools.readme --write    # after a change to a method
    python -m tools.readme --check    # fails where README.md says something else

It stands between two comments that name it. Methods of other packages are left out, whatever is installed
where this runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

import fxgraft
from fxgraft.errors import ConfigError
from fxgraft.io.atomic_write import write_text
from tools.pictures import ALT

OVERHEAD = Path(__file__).parents[1] / "benchmarks/results/overhead.json"
BEGIN, END = "<!-- methods: written by python -m tools.readme -->", "<!-- methods: end -->"


def own_methods() -> dict[str, type[fxgraft.Patch]]:
    """Return the methods that come with fxgraft, by name."""
    return {
        name: method for name, method in fxgraft.methods().items() if method.__module__.startswith("fxgraft.")
    }


IN_SHORT: dict[str, tuple[str, str]] = {
    "crossnorm": ("exchanges styles between images", "test images come in other styles"),
    "diversification": ("damps a class's strongest evidence", "classes differ in small parts"),
    "dsu": ("varies the style of images", "test domains were never seen"),
    "gam": ("matches activations across domains", "you have unlabelled target images"),
    "mixmo": ("trains several networks in one", "the network is wide and trains for long"),
    "mixstyle": ("mixes styles of two images", "training images come from several domains"),
    "rsc": ("hides what the prediction leans on", "test domains were never seen"),
    "selfnorm": ("learns to recalibrate channel statistics", "styles vary; evaluation may cost a little"),
    "taps": ("records values inside the network", "you want to look inside, or add losses"),
}
"""What each method does in about five words, and when to think of it."""


def method_table(methods: Mapping[str, type[fxgraft.Patch]], link: str = "", pictures: str = "") -> str:
    """Return the table of methods: what each does, when to think of it, and what it costs.

    Args:
        methods: by name.
        link: where a name leads to, with ``{name}`` in it; to its paper without it.
        pictures: the folder of the thumbnails, as the page sees it; no thumbnails without it.

    Raises:
        ConfigError: a method is not described in `IN_SHORT`.
    """
    from benchmarks.overhead import FORWARD, TRAINING_STEP, noise_of, ratios_of

    steps, calls = (ratios_of(OVERHEAD, "resnet50", what) for what in (TRAINING_STEP, FORWARD))
    rows = [
        ("*none*", "a second bare network: shows the noise", "", f"× {noise_of(OVERHEAD, 'resnet50')}", "")
    ]
    for name, method in methods.items():
        if name not in IN_SHORT:
            raise ConfigError(f"The method {name!r} has no entry in IN_SHORT of tools/readme.py.")
        does, when = IN_SHORT[name]
        # In one cell with the name: a column of pictures alone is squeezed to nothing on a narrow screen.
        shown = f'<img src="{pictures}/{name}.png" width="72" alt="{ALT[name]}"><br>' if pictures else ""
        step = f"× {steps[name]:.2f}" if name in steps else "–"
        call = "same graph" if method.train_only else f"× {calls[name]:.2f}" if name in calls else "–"
        rows.append((f"{shown}[`{name}`]({link.format(name=name) or method.url})", does, when, step, call))
    return markdown_table(("method", "what it does", "when", "training step", "evaluation"), rows)


def regenerated(text: str) -> str:
    """Return a README with its table of methods written again.

    Raises:
        ConfigError: the markers of the table are missing, or not there once.
    """
    before, *rest = re.split(f"{re.escape(BEGIN)}.*?{re.escape(END)}", text, flags=re.DOTALL)
    if len(rest) != 1:
        raise ConfigError(f"The README needs one line {BEGIN!r} and, after it, one line {END!r}.")
    return (
        f"{before}{BEGIN}\n\n{method_table(own_methods(), pictures='docs/_static/small')}\n\n{END}{rest[0]}"
    )


def markdown_table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Write a table in Markdown; a bar in a cell is escaped."""
    lines = [headings, ("---",) * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def main(
    write: Annotated[bool, typer.Option("--write/--check", help="Write, or only compare.")] = False,
    path: Annotated[Path, typer.Argument(help="The README.")] = Path("README.md"),
) -> None:
    """Write the table of methods in the README again, or check that it is up to date."""
    text = path.read_text(encoding="utf-8")
    wanted = regenerated(text)
    if write:
        write_text(path, wanted)
    elif text != wanted:
        typer.echo(f"{path} is not what the registry says: python -m tools.readme --write", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
