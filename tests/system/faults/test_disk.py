"""A disk that is full, and a process that is killed, in the middle of writing: the old file or the new one, whole."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import fxgraft
from models.toys import net
from sweeping import some
from system.contract.cases import same
from system.faults.lines import SIZE, bare
from unit.adaptation.adapting import adapted

resource = pytest.importorskip("resource")


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """Let the system refuse to write files beyond a size, as a full disk does in the middle of one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def no_space(monkeypatch: pytest.MonkeyPatch, size: int) -> Iterator[None]:
    """Let the writers of whole files stop after some bytes, as they see a full disk."""

    def part(write: Callable[..., Any]) -> Callable[..., Any]:
        def stops(*args: Any, **kwargs: Any) -> None:
            out = write(*args, **kwargs)
            (file,) = (each for each in args if isinstance(each, Path))
            if file.stat().st_size > size:
                with file.open("r+b") as opened:
                    opened.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return out

        return stops

    with monkeypatch.context() as patched:
        patched.setattr("fxgraft.io.save_load.save_file", part(fxgraft.io.save_load.save_file))
        patched.setattr(torch, "save", part(torch.save))
        yield


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("full", ["system", "writer"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_save_to_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, full: str
) -> None:
    model = fxgraft.patch(bare(), "selfnorm", input_size=SIZE)
    fxgraft.save(model, tmp_path)
    before = contents(tmp_path)
    with torch.no_grad():
        model.fc.weight.add_(1)
    for name in before:
        size = int(share * len(before[name]))
        stops = files_end_at(size) if full == "system" else no_space(monkeypatch, size)
        with stops, pytest.raises(OSError, match=r"large|space"):
            fxgraft.save(model, tmp_path)
        assert contents(tmp_path) == before
    fxgraft.save(model, tmp_path)
    assert same(dict(fxgraft.load(net(), tmp_path).state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("full", ["system", "writer"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_checkpoint_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, full: str
) -> None:
    adapted(tmp_path, 1)
    before = contents(tmp_path)
    size = int(share * len(before["adaptation.pt"]))
    stops = files_end_at(size) if full == "system" else no_space(monkeypatch, size)
    with stops, pytest.raises(OSError, match=r"cannot be written|space"):
        adapted(tmp_path, 3)
    assert contents(tmp_path) == before
    assert same(adapted(tmp_path, 3), adapted(tmp_path / "straight", 3))


@pytest.mark.parametrize("count", [2, pytest.param(12, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("what", some(["save", "adapt"], 1))
def test_a_killed_process(tmp_path: Path, what: str, count: int) -> None:
    tests, source = Path(__file__).parents[2], Path(fxgraft.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "system.faults.killed", what, str(count), str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",  # set inside, it would make a pool of threads that children inherit without threads
            "PYTHONPATH": os.pathsep.join((str(tests), str(source))),
        },
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= count
