"""The demo, cut down to a few steps."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fxgraft.cli.commands import app
from fxgraft.comparison import demo, surgery


@pytest.fixture
def short(monkeypatch):
    """One epoch, and no graft that needs statistics of a network that has learned."""
    monkeypatch.setattr(demo, "TRAINING", replace(demo.TRAINING, epochs=1))


def test_the_surgery_holds_and_the_pairs_are_compared(short, tmp_path, monkeypatch):
    result = CliRunner().invoke(
        app,
        ["demo", "--out", str(tmp_path / "out"), "--seeds", "2", "--workers", "1"],
        env={"COLUMNS": "150"},
    )
    assert result.exit_code == 0, result.output
    text = re.sub(r"\s+", " ", result.output)
    assert result.output.count("✓") == 7
    assert "✗" not in result.output
    for words in (
        "✓ undone by fxgraft.unpatch",
        "80 % power",
        "adapt_batchnorm",
        "What it cannot show",
        "report.html",
    ):
        assert words in text
    assert "fxgraft compare DATA --model resnet50 --pretrained" in text
    assert {each.name for each in (tmp_path / "out").iterdir()} >= {
        "digits",
        "report.html",
        "runs.jsonl",
        "table.md",
    }
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<pre>fxgraft demo" in page


def test_a_line_that_does_not_hold_is_marked(short, tmp_path, monkeypatch):
    monkeypatch.setattr(surgery, "_exported", lambda *_: object())
    monkeypatch.setattr(demo, "compare", lambda *_, **__: type("Nothing", (), {})())
    console = Console(file=io.StringIO(), width=150)
    demo.run_demo(tmp_path / "out", console=console)
    assert console.file.getvalue().count("✓") == 6
    assert "✗ and the graph" in console.file.getvalue()
