"""Files are whole or as they were, whatever stops the one who writes them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fxgraft.io.atomic_write import clear_drafts, write_file, write_text
from system.faults.lines import Lines


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


def text(value: str):
    return lambda path: path.write_text(value)


def test_a_folder_is_made_and_a_file_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    write_file(folder / "one", text("1"))
    write_file(folder / "two", text("2"))
    write_file(folder / "two", text("3"))
    assert content(folder) == {"one": "1", "two": "3"}


def test_a_failure_leaves_the_old_one(tmp_path: Path) -> None:
    write_file(tmp_path / "one", text("1"))

    def full(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    for name in ("one", "two"):
        with pytest.raises(OSError, match="No space left"):
            write_file(tmp_path / name, full)
    assert content(tmp_path) == {"one": "1"}


def test_a_failed_move_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_file(tmp_path / "one", text("1"))
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


@pytest.mark.parametrize("cleared", [True, False])
def test_what_a_killed_process_left_is_gone_after_the_next_save(tmp_path: Path, cleared: bool) -> None:
    code = (
        "import os, sys; from pathlib import Path; from fxgraft.io.atomic_write import write_file\n"
        "def write(path):\n"
        "    path.write_text('half'); path.with_name('.tmp12').write_text('of the writer'); os.kill(os.getpid(), 9)\n"
        "write_file(Path(sys.argv[1]) / 'one', write)\n"
    )
    source = str(Path(sys.modules["fxgraft"].__file__).parents[1])
    killed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=False, env={**os.environ, "PYTHONPATH": source}
    )
    assert killed.returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    if cleared:
        clear_drafts(tmp_path / "one")
        assert content(tmp_path) == {}
    write_file(tmp_path / "one", text("whole"))
    assert content(tmp_path) == {"one": "whole"}


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "one", "1")
        write_file(tmp_path / "two", lambda path: save_file({"a": torch.ones(2)}, path))
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("one", "two")] == [0o640, 0o640]


def test_savers_of_one_folder_take_turns(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from fxgraft.io.atomic_write import write_file\n"
        "def write(path):\n"
        "    for _ in range(20):\n"
        "        with path.open('a') as file: file.write(sys.argv[2])\n"
        "        time.sleep(0.005)\n"
        "for _ in range(3): write_file(Path(sys.argv[1]) / 'one', write)\n"
    )
    source = str(Path(sys.modules["fxgraft"].__file__).parents[1])
    savers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), mark], env={**os.environ, "PYTHONPATH": source}
        )
        for mark in "ab"
    ]
    assert [saver.wait() for saver in savers] == [0, 0]
    assert content(tmp_path) in ({"one": 20 * m} for m in "ab")


def test_an_interrupted_save_locks_nobody_out(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl", reason="no locks of this kind here")

    def save() -> None:
        write_file(tmp_path / "a", lambda draft: draft.write_text("whole"))

    with Lines() as lines:
        save()
    held = []  # as an interactive session keeps the last error, with its frames and what they hold
    for at in range(len(lines.places)):
        try:
            with Lines(at, KeyboardInterrupt()):
                save()
        except KeyboardInterrupt as error:
            held.append(error)
        folder = os.open(tmp_path, os.O_RDONLY)
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(folder)
    assert len(held) == len(lines.places)


def test_links_and_pipes_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "file")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "new"
    write_text(Path(os.devnull), "nothing")
    assert not Path(os.devnull).is_file()
