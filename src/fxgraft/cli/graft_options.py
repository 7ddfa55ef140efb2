"""The options that say what to graft, alike in all commands: ``--graft`` and ``--graft-file``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from fxgraft.cli.completion import complete_spec
from fxgraft.cli.early_checks import check_method
from fxgraft.spec import PatchSpec, parse_grafts

GraftOption = Annotated[
    list[str] | None,
    typer.Option(
        "--graft",
        metavar="SPEC",
        help="METHOD:key=value,…, or several as A + B; may be given several times.",
        autocompletion=complete_spec,
    ),
]
GraftFileOption = Annotated[
    Path | None,
    typer.Option("--graft-file", metavar="FILE", help="A YAML list of grafts, before those of --graft."),
]


def chosen_grafts(grafts: Sequence[str] | None, file: Path | None) -> list[PatchSpec]:
    """Read all that the options say, in order: the file first.

    Raises:
        ConfigError: one of them cannot be read.
        UnknownGraftError: one of them isn't a method.
    """
    specs: list[PatchSpec] = []
    if file is not None:
        from fxgraft.io.graft_file import read_graft_file

        specs += read_graft_file(file)
    specs += [spec for text in grafts or () for spec in parse_grafts(text)]
    for spec in specs:
        check_method(spec.method)
    return specs
