"""README and documentation say what is so: their code runs, their commands exist, their tables are the registry's."""

from __future__ import annotations

import dataclasses
import functools
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image
from tools import readme
from tools.docs import TUTORIALS, method_pages, other_pages, reference_pages
from tools.pictures import SIDE, SMALL
from tools.readme import own_methods, regenerated
from torch.utils.data import DataLoader
from typer.testing import CliRunner

import fxgraft
from fxgraft.cli.commands import app
from fxgraft.patches import registry

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("[!_]*.md")),
        *sorted((ROOT / "docs").glob("[!_]*/*.md")),
    )
    if path.relative_to(ROOT).parts[1:2]
    not in [("generated",), ("methods",), ("reference",)]  # written by tools.docs
}
# No downloads, and a smaller relative of the backbone.
SUBSTITUTIONS = {"pretrained=True": "pretrained=False", "resnet50": "resnet10t"}
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def blocks(language: str, text: str = README) -> list[str]:
    return [body for kind, body in FENCE.findall(text) if kind == language]


def commands() -> list[str]:
    lines = [line for text in PAGES.values() for body in blocks("bash", text) for line in body.splitlines()]
    return sorted({line for line in lines if line.startswith("fxgraft ")})


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated")  # by Lightning
@pytest.mark.parametrize("name", [name for name, text in PAGES.items() if blocks("python", text)])
def test_python_blocks_run_in_order(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fxgraft.methods()
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))  # a block registers a method
    torch.manual_seed(0)
    batch = (torch.randn(4, 3, 64, 64), torch.randint(7, (4,)))
    loader = DataLoader([batch, batch], batch_size=None)  # type: ignore[arg-type]
    namespace = {"loader": loader, "source_loader": loader, "target_loader": loader}
    for number, body in enumerate(blocks("python", PAGES[name])):
        for word, replacement in SUBSTITUTIONS.items():
            body = body.replace(word, replacement)
        exec(compile(body, f"{name}, python block {number + 1}", "exec"), namespace)
    if name == "README.md":  # what the text around the blocks promises of their results
        model, plain = namespace["model"], namespace["plain"]
        assert fxgraft.grafts(model) == []
        assert [graft.name for graft in fxgraft.grafts(namespace["again"])] == ["rsc"]
        assert type(plain) is type(model) is type(namespace["stock"])
        assert list(plain.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("name", [name for name, text in PAGES.items() if blocks("py", text)])
def test_blocks_that_need_more_than_a_process_are_python(name):
    for body in blocks("py", PAGES[name]):
        compile(body, name, "exec")


def test_the_readme_is_one_page():
    assert len(README.encode()) <= 9 * 1024
    assert len(README.splitlines()) <= 160
    assert README[: README.index("```python")].count("\n") < 25
    assert len(re.findall(r"!\[", README)) == 1


@functools.cache
def generated() -> dict[str, str]:
    scripts = {f"generated/tutorials/{name}.rst": tutorial(name) for name in TUTORIALS}
    return {**method_pages(("test_resnet",)), **reference_pages(), **other_pages(), **scripts}


def tutorial(name: str) -> str:
    return (ROOT / f"docs/tutorials/{name}.py").read_text()


def test_links_lead_somewhere():
    for name, text in PAGES.items():
        for link in LINK.findall(text):
            path = ((ROOT / name).parent / link).resolve()
            assert path.exists() or str(path.relative_to(ROOT / "docs")) in generated(), (name, link)


def test_a_card_lists_every_option_and_preset():
    for name, method in own_methods().items():
        page = generated()[f"methods/{name}.md"]
        wanted = [*(field.name for field in dataclasses.fields(method)), *method.presets]
        assert [word for word in wanted if f"`{word}`" not in page] == [], name
        assert method.url in page


def test_the_generated_pages_list_what_there_is():
    pages = generated()
    listed = re.findall(r"^\.\. auto\w+:: (\w+)$", pages["reference/api.md"], re.MULTILINE)
    assert sorted(listed) == [name for name in fxgraft.__all__ if name != "__version__"]
    trouble = pages["generated/troubleshooting.md"]
    for error in (name for name in fxgraft.__all__ if name.endswith(("Error", "Warning"))):
        assert f"\n## {error}\n" in trouble
    assert "There is no method …." in trouble
    assert pages["generated/glossary.md"].count("\n: A ") == 8


def test_the_pictures_are_small():
    for path in (ROOT / "docs/_static").glob("*.png"):
        assert path.stat().st_size < 150_000
    shown = re.findall(r'<img src="docs/_static/small/(\w+)\.png" width="72" alt="[^"]+">', README)
    assert shown == list(own_methods())
    assert {path.stem for path in SMALL.iterdir()} == set(shown)
    for path in SMALL.iterdir():
        assert path.stat().st_size < 10_000
        with Image.open(path) as image:
            assert image.size == (SIDE, SIDE)


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
    words = [command, *rest[:1]] if command == "show" else [command]
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.stdout)
    for option in (word for word in rest if word.startswith("--")):
        assert option in text


def test_what_the_registry_knows_is_generated():
    assert regenerated(README) == README, "python -m tools.readme --write"
    papers = generated()["generated/papers.md"]
    for method in own_methods().values():
        assert f"[`{method.method}`]({method.url})" in README
        assert f"]({method.url})" in papers


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
    path.write_text(README.replace("training step", "training steps", 1))
    checked = CliRunner().invoke(generator, [str(path), "--check"])
    assert checked.exit_code == 1
    assert "not what the registry says" in checked.output
    assert CliRunner().invoke(generator, [str(path), "--write"]).exit_code == 0
    assert path.read_text() == README


def test_a_readme_without_its_markers_is_refused():
    with pytest.raises(fxgraft.ConfigError, match="methods: written by"):
        regenerated(README.replace("<!-- methods: end -->", ""))


def test_changelog_covers_this_version():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert f"## {version[1]}" in (ROOT / "CHANGELOG.md").read_text()
