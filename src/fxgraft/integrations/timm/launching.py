"""Running a script with grafts on the model that it builds: ``python -m fxgraft.timm``."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import fxgraft
from fxgraft.errors import ConfigError, FxgraftError, RecipeError
from fxgraft.io.graft_file import read_graft_file

USAGE = """usage: python -m fxgraft.timm SCRIPT --graft SPEC [--graft SPEC ...] [arguments of the script]

Runs a training or validation script of timm, unchanged, with grafts on the model that it builds.

  SCRIPT        timm's train.py or validate.py, or one that builds its model, loader, loss and schedule as they do
  --graft SPEC  METHOD:key=value,key=value, as in rsc:layer=layer4 or selfnorm; before or after the script's name,
                several times for several grafts; with input_size=(3,64,64) among the options where the images are
                not of the model's own size
  --graft-file FILE
                a YAML list of such SPECs, or of entries as {method: rsc, layer: layer4}
  -h, --help    before the script's name, this text; after it, the script's own

With several processes: torchrun --nproc-per-node 8 -m fxgraft.timm SCRIPT ...
Without this command:   FXGRAFT_GRAFTS="SPEC; SPEC" python train.py --device-modules fxgraft.timm.auto ...
"""
_HELP = {"-h", "--help"}
_EXAMPLE = (
    "For example: python -m fxgraft.timm train.py --model resnet50 --graft rsc:layer=layer4 --graft selfnorm"
)


def main() -> None:
    """Run the command line; what goes wrong for a reason that fxgraft knows is a message and exit code 2."""
    words = sys.argv[1:]
    if words[:1] in (["-h"], ["--help"]):
        sys.stdout.write(USAGE)
        return
    try:
        grafts, script, arguments = split_arguments(words)
        launch(script, arguments, grafts)
    except FxgraftError as error:
        sys.stderr.write(f"Error: {error}\n")
        sys.exit(2)


def split_arguments(words: Sequence[str]) -> tuple[list[str], Path, list[str]]:
    """Tell fxgraft's arguments from the script's.

    Args:
        words: the words of the command line.

    Returns:
        What the ``--graft`` say, wherever they stand; the script; its arguments, in order.

    Raises:
        ConfigError: there is no script, no graft, a ``--graft`` without a value, or another option before the script.
    """
    grafts: list[str] = []
    others: list[str] = []
    rest = iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if option not in ("--graft", "--graft-file"):
            others.append(word)
            continue
        text = value if equals else next(rest, None)
        if text is None:
            raise ConfigError(f"{option} is the last word, and what to graft is missing.\n{_EXAMPLE}")
        if option == "--graft":
            grafts.append(text)
        else:
            grafts += [spec.text for spec in read_graft_file(Path(text))]
    if not others:
        raise ConfigError(f"There is no script to run.\n{_EXAMPLE}")
    if others[0].startswith("-"):
        raise ConfigError(
            f"{others[0]!r} stands before the script, and only --graft and --graft-file are fxgraft's.\n"
            f"Put the script first, and its arguments after it.\n{_EXAMPLE}"
        )
    if not grafts and not _HELP & set(others):
        raise ConfigError(
            f"There is nothing to graft: no --graft is given.\n{_EXAMPLE}\n`fxgraft info` lists the methods."
        )
    return grafts, Path(others[0]), others[1:]


def launch(script: Path, arguments: Sequence[str], grafts: Sequence[str]) -> None:
    """Run a script as ``python SCRIPT`` does, with grafts on the model that it builds through timm.

    Args:
        script: the file.
        arguments: the arguments of the script.
        grafts: grafts as text, as `parse_grafts` reads them.

    Raises:
        ConfigError: there is no such file, a graft cannot be read, or the script ended and had built no model.
        RecipeError: a checkpoint is of another model, or of one with other grafts.
        FxgraftError: of `fxgraft.patch` and of training with the grafts.
    """
    if not script.is_file():
        raise ConfigError(
            f"There is no script {str(script)!r}.\n"
            "timm's train.py and validate.py are not in its package: take them from timm's repository, of the version "
            "that is installed."
        )
    # Not before: this loads torch, which a mistyped command line does not need.
    from fxgraft.integrations.timm.grafting import Grafting

    with Grafting(grafts) as grafting, _as_program(script, arguments):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as left:
            if left.code not in (None, 0) or _HELP & set(arguments):
                raise
        except RuntimeError as error:
            if isinstance(error, FxgraftError) or "loading state_dict" not in str(error):
                raise
            raise RecipeError(_mismatch(str(error), grafts)) from error
    grafting.check_used()


@contextmanager
def _as_program(script: Path, arguments: Sequence[str]) -> Iterator[None]:
    """Set ``sys.argv`` and ``sys.path`` as for a program of its own."""
    words, places = sys.argv, list(sys.path)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = words, places


def _mismatch(message: str, grafts: Sequence[str]) -> str:
    """Explain torch's message about a checkpoint that does not fit."""
    lines = [line.strip() for line in message.splitlines()[1:]]
    shown = "\n".join(line if len(line) < 300 else f"{line[:300]} …" for line in lines[:4])
    unexpected = " ".join(line for line in lines if line.startswith("Unexpected"))
    there = [method for method in fxgraft.methods() if f"graft_{method}" in unexpected]
    hint = (
        f"It has tensors of {', '.join(map(repr, there))}: give the grafts that it was trained with, "
        f"--graft {there[0]}:key=value."
        if there
        else "Give the model and the grafts that it was trained with; a merged one has none: run the script without."
    )
    return f"The checkpoint does not fit the model with {', '.join(grafts)}.\n{shown}\n{hint}"
