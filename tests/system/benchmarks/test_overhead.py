"""What methods cost: what is measured, what is kept, what the tables say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from benchmarks.by_hand import BY_HAND
from benchmarks.coverage import STACK
from benchmarks.overhead import Overhead, file_of, overhead_table, subjects
from rich.console import Console
from tools.readme import own_methods

from fxgraft.errors import ConfigError

SETTINGS: dict[str, Any] = {"batch": 2, "size": 64, "rounds": 1, "min_run_time": 0.0, "threads": 1}
QUIET = Console(quiet=True)


def test_every_method_alone_and_those_that_go_together() -> None:
    chosen = subjects(())
    assert [patches[0][0] for patches in chosen[:-1]] == list(own_methods())
    assert [method for method, _ in chosen[-1]] == list(STACK)
    assert subjects(["rsc:layer=layer4 + selfnorm"]) == [[("rsc", {"layer": "layer4"}), ("selfnorm", {})]]
    assert subjects(["taps", "rsc:layer=layer4"]) == [
        [("taps", {"layers": -1})],
        [("rsc", {"layer": "layer4"})],
    ]


def test_a_measurement_goes_on_and_is_not_repeated(tmp_path: Path) -> None:
    path = file_of(tmp_path, "cpu", compiled=False)
    assert path.name == "overhead.json"
    assert file_of(tmp_path, "cuda:1", compiled=True).name == "overhead-cuda1-compiled.json"
    assert (
        file_of(tmp_path, "cpu", compiled=True, name="crossnorm").name == "overhead_crossnorm-compiled.json"
    )
    methods = subjects(["rsc", "diversification"])
    together = [("rsc", {}), ("diversification", {})]
    Overhead(path, SETTINGS).run(["test_vit"], methods[:1], QUIET)
    first = json.loads(path.read_text())
    found = Overhead(path, SETTINGS)
    found.run(["test_vit"], [*methods, together], QUIET)
    assert json.loads(path.read_text())["reports"] == first["reports"]
    assert [(each["model"], each["method"]) for each in found.refused] == [("test_vit", "diversification")]
    assert found.reports[0].patch_seconds > 0
    assert "| test_vit | rsc |" in path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").stat().st_size > 1000
    head, _, noise, row = overhead_table(path).splitlines()
    assert head == "| training step | test_vit |"
    assert noise.startswith("| *bare again* | ")
    assert row.startswith("| `rsc` | ")


def test_beside_hooks_by_hand(tmp_path: Path) -> None:
    path = file_of(tmp_path, "cpu", compiled=False, by_hand=True)
    assert path.name == "overhead-by-hand.json"
    found = Overhead(path, {**SETTINGS, "size": 96}, by_hand=True)
    found.run(["test_resnet"], subjects(["rsc", "gam:layers=-1", "selfnorm"]), QUIET)
    found.run(["test_vit"], subjects(["crossnorm"]), QUIET)
    assert [report.patches for report in found.reports] == [("rsc",), ("selfnorm",)]
    assert [each["reason"] for each in found.refused] == ["nothing is written by hand for VisionTransformer"]
    row = overhead_table(path).splitlines()[-1]
    assert re.fullmatch(r"\| `selfnorm` \| \d+\.\d\d \(\d+\.\d\d\) \|", row)


@pytest.mark.parametrize("method", BY_HAND)
def test_what_is_written_by_hand_trains(method: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=5)
    x, y = torch.randn(4, 3, 96, 96), torch.arange(4)
    loss = BY_HAND[method](model.train())
    for _ in range(3):
        model.zero_grad()
        loss(x, y).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("content", "message"),
    [("[]", "isn't a file of this benchmark"), (None, "with other settings: batch, size")],
)
def test_other_files_are_refused(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "overhead.json"
    if content is None:
        Overhead(path, SETTINGS).run(["test_resnet"], subjects(["taps"]), QUIET)
    else:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        Overhead(path, {**SETTINGS, "batch": 4, "size": 32})
