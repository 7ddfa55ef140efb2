"""The README says what is so: its code runs, its commands exist, its tables are the registry's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from tools import readme
from tools.readme import own_methods, regenerated
from torch.utils.data import DataLoader
from typer.testing import CliRunner

import fxgraft
from fxgraft.cli.commands import app
from fxgraft.patches import registry

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
# No downloads, and a smaller relative of the backbone.
SUBSTITUTIONS = {"pretrained=True": "pretrained=False", "resnet50": "resnet18"}
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(README) if kind == language]


def commands() -> list[str]:
    return [line for body in blocks("bash") for line in body.splitlines() if line.startswith("fxgraft ")]


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated")  # by Lightning
def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fxgraft.methods()
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))  # a block registers a method
    torch.manual_seed(0)
    batch = (torch.randn(4, 3, 64, 64), torch.randint(7, (4,)))
    loader = DataLoader([batch, batch], batch_size=None)  # type: ignore[arg-type]
    namespace = {"loader": loader, "source_loader": loader, "target_loader": loader}
    code = blocks("python")
    assert code
    for number, body in enumerate(code):
        for word, replacement in SUBSTITUTIONS.items():
            body = body.replace(word, replacement)
        exec(compile(body, f"README.md, python block {number + 1}", "exec"), namespace)
    # What the text around the blocks promises of their results.
    model, plain = namespace["model"], namespace["plain"]
    assert fxgraft.grafts(model) == []
    assert [graft.name for graft in fxgraft.grafts(namespace["again"])] == ["rsc"]
    assert type(plain) is type(model) is type(namespace["stock"])
    assert list(plain.state_dict()) == list(model.state_dict())


def test_two_commands_come_first_and_the_checks_run_them_word_for_word():
    first_two = blocks("bash")[:2]
    assert [body.count("\n") for body in first_two] == [1, 1]
    checks = (ROOT / ".ci" / "run").read_text()
    for body, ending in zip(first_two, ("fxgraft demo", "pytest"), strict=True):
        assert body.strip().endswith(f".venv/bin/{ending}")
        assert f"bash -c '{body.strip()}'" in checks


@pytest.mark.parametrize("line", commands())
def test_commands_and_their_options_exist(line):
    _, command, *rest = shlex.split(line)
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.stdout)
    for option in (word for word in rest if word.startswith("--")):
        assert option in text


def test_what_the_registry_knows_is_generated():
    assert regenerated(README) == README, "python -m tools.readme --write"
    citing = README.partition("## Citing")[2]
    assert all(f"({method.url})" in citing for method in own_methods().values())


def test_methods_of_other_packages_stay_out(monkeypatch):
    foreign = type("Foreign", (fxgraft.RSC,), {"__module__": "other.package", "title": "Foreign"})
    with_it = {**fxgraft.methods(), "foreign": foreign}
    monkeypatch.setattr(fxgraft, "methods", lambda: with_it)
    assert "foreign" not in own_methods()
    assert regenerated(README) == README


def test_the_generator_writes_and_checks(tmp_path):
    path = tmp_path / "README.md"
    generator = typer.Typer()
    generator.command()(readme.main)
    path.write_text(README.replace("what it costs", "what it costed", 1))
    checked = CliRunner().invoke(generator, [str(path), "--check"])
    assert checked.exit_code == 1
    assert "not what the registry says" in checked.output
    assert CliRunner().invoke(generator, [str(path), "--write"]).exit_code == 0
    assert path.read_text() == README


def test_a_readme_without_its_markers_is_refused():
    with pytest.raises(fxgraft.ConfigError, match="options: written by"):
        regenerated(README.replace("<!-- options: end -->", ""))


def test_changelog_covers_this_version():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert f"## {version[1]}" in (ROOT / "CHANGELOG.md").read_text()
