"""What is released says one thing everywhere: version, license."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def stated(file: str, pattern: str) -> str:
    found = re.search(pattern, (ROOT / file).read_text(), re.MULTILINE)
    assert found is not None, f"{file} has no {pattern}"
    return found.group(1)


@pytest.mark.parametrize(
    ("file", "pattern"), [("CITATION.cff", r"^version: (\S+)$"), ("CHANGELOG.md", r"^## (\d\S*) ")]
)
def test_the_version_is_that_of_the_package(file: str, pattern: str) -> None:
    assert stated(file, pattern) == stated("pyproject.toml", r'^version = "(.+)"$')


def test_the_license_is_named_alike() -> None:
    name = stated("pyproject.toml", r'^license = "(.+)"$')
    assert name == stated("CITATION.cff", r"^license: (.+)$") == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.mark.parametrize("file", ["README.md", "CHANGELOG.md", "CITATION.cff"])
def test_the_source_archive_has_it(file: str) -> None:
    assert f'"{file}"' in stated("pyproject.toml", r"^include = (\[.*\])$")
    assert (ROOT / file).is_file()
