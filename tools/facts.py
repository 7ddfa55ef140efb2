"""What the command line knows of the built-in methods without importing torch: ``method_facts.json``.

python -m tools.facts --write    # after a change to a method, or to the table of overheads
python -m tools.facts --check    # fails where the file says something else
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from benchmarks.overhead import FORWARD, TRAINING_STEP, ratios_of

from fxgraft.cli.method_facts import STORED, facts_of
from fxgraft.io.atomic_write import write_text
from tools.readme import OVERHEAD, own_methods


def facts() -> dict[str, dict[str, Any]]:
    """Return the facts of the built-in methods as JSON holds them, with what they cost on a ResNet-50."""
    step, call = (ratios_of(OVERHEAD, "resnet50", what) for what in (TRAINING_STEP, FORWARD))
    found = {}
    for name, method in own_methods().items():
        found[name] = {**facts_of(method), "measured": {}}
        if name in step:
            found[name]["measured"] = {
                "training": round(step[name], 2),
                "evaluation": 1.0 if method.train_only else round(call[name], 2),
            }
    return json.loads(json.dumps(found))


def main(
    write: Annotated[bool, typer.Option("--write/--check", help="Write, or only compare.")] = False,
) -> None:
    """Write the file again, or check that it is up to date."""
    wanted = json.dumps(facts(), ensure_ascii=False, indent=1) + "\n"
    if write:
        write_text(STORED, wanted)
    elif STORED.read_text(encoding="utf-8") != wanted:
        typer.echo(f"{STORED.name} is not what the methods say: python -m tools.facts --write", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
