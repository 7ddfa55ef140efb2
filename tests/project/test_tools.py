"""The tasks of development run what they say, and hand on how it ended."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tools.__main__ import LISTING, ROOT, app
from typer.testing import CliRunner


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The commands, which are not run: each ends with code 3 if it is a sweep."""
    commands: list[tuple[str, ...]] = []

    def run(command, **_):
        commands.append(tuple(command))
        return SimpleNamespace(returncode=3 if "sweep" in command else 0)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_a_task_hands_on_arguments_and_the_exit_code(ran) -> None:
    assert CliRunner().invoke(app, ["test", "-x", "tests/unit"]).exit_code == 0
    assert CliRunner().invoke(app, ["sweep"]).exit_code == 3
    assert ran == [
        (sys.executable, "-m", "pytest", "-x", "tests/unit"),
        (sys.executable, "-m", "pytest", "-m", "sweep"),
    ]


def test_the_documentation_is_built_without_warnings(ran) -> None:
    assert CliRunner().invoke(app, ["docs"]).exit_code == 0
    assert {"sphinx", "-W", "-n"} <= set(ran[0])


def test_the_check_is_the_one_of_continuous_integration(ran) -> None:
    assert CliRunner().invoke(app, ["check"]).exit_code == 0
    assert ran == [("bash", ".ci/run")]
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert "run: bash .ci/run" in workflow


def test_a_release_needs_a_date_and_then_checks_builds_and_tags(
    ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pyproject.toml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setattr("tools.__main__.ROOT", tmp_path)
    undated = CliRunner().invoke(app, ["release"])
    assert undated.exit_code == 1
    assert "write the date of the release" in undated.output
    assert ran == []
    log = tmp_path / "CHANGELOG.md"
    log.write_text(log.read_text().replace("## 0.1.0 - unreleased", "## 0.1.0 - 2030-01-31"))
    assert CliRunner().invoke(app, ["release"]).exit_code == 0
    assert [command[:2] for command in ran] == [
        ("git", "diff"),
        ("bash", ".ci/run"),
        (sys.executable, "-m"),
        ("git", "tag"),
    ]


def test_the_generated_listing_is_where_it_is_compared() -> None:
    assert LISTING.is_file()
