"""A process that kills its children at chosen lines, and looks at the files that they leave.

Run as ``python -m faults.killed WHAT COUNT FOLDER``: tests start it, since a process of tests has threads, and a
child of such a process may inherit a lock that nobody holds.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import fxgraft
from models.toys import net
from system.contract.cases import same
from system.faults.lines import SIZE, Lines, bare, distinct
from unit.adaptation.adapting import adapted

WRITING = ("atomic_write.py", "save_load.py", "checkpoint.py")


class Killed(Lines):
    """Kills the process at a line."""

    def strike(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def in_child(act: Callable[[], Any], lines: Lines | None = None, result: Path | None = None) -> bool:
    """Do something in a child; what it returns goes to a file. Say whether it came through or was killed.

    The engine of autograd does not work in children of a process that has used it, so that this one never does.
    """
    child = os.fork()
    if not child:
        code = 1
        try:
            with lines or nullcontext():
                out = act()
            if result is not None:
                torch.save(out, result)
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code == 0


def chosen(act: Callable[[], Any], count: int, seed: str, result: Path) -> list[int]:
    """Choose times of different lines of what writes."""

    def traced() -> list[tuple[str, int]]:
        with Lines() as lines:
            act()
        return lines.places

    in_child(traced, result=result)
    found = torch.load(result)
    kept = {at for at, (file, _) in enumerate(found) if file.endswith(WRITING)}
    places = [place if at in kept else ("", 0) for at, place in enumerate(found)]
    return [at for at in distinct(places, count + 1, seed) if at in kept]


def saves(count: int, folder: Path) -> int:
    """Save over an earlier save; the file is then one of the two, and can be saved to."""
    models = [fxgraft.patch(bare(), "selfnorm", input_size=SIZE) for _ in range(2)]
    with torch.no_grad():
        models[1].fc.weight.add_(1)
    fxgraft.save(models[0], folder)
    done = 0
    for at in chosen(lambda: fxgraft.save(models[1], folder), count, "save", folder.with_suffix(".result")):
        fxgraft.save(models[0], folder)
        done += not in_child(lambda: fxgraft.save(models[1], folder), Killed(at))
        loaded = fxgraft.load(net(), folder)
        assert any(same(dict(loaded.state_dict()), dict(each.state_dict())) for each in models)
        fxgraft.save(models[1], folder)
        assert [file.name for file in folder.iterdir()] == ["fxgraft.safetensors"]
        assert same(dict(fxgraft.load(net(), folder).state_dict()), dict(models[1].state_dict()))
    return done


def adaptations(count: int, folder: Path) -> int:
    """Adapt, and go on in another process: that ends where a straight run does."""
    file = folder / "adaptation.pt"

    def go_on() -> list[Any]:
        file.unlink(missing_ok=True)
        adapted(folder, 1)
        return adapted(folder, 3)

    result = folder.with_suffix(".result")
    in_child(go_on, result=result)
    wanted = torch.load(result)
    done = 0
    for at in chosen(go_on, count, "adapt", result):
        done += not in_child(go_on, Killed(at))
        assert in_child(lambda: adapted(folder, 3), result=result)
        assert same(torch.load(result), wanted)
        assert [each.name for each in folder.iterdir()] == [file.name]
    return done


if __name__ == "__main__":
    what, number, where = sys.argv[1:]
    sys.stdout.write(str({"save": saves, "adapt": adaptations}[what](int(number), Path(where))))
