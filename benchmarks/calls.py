"""What a loop pays in every step for asking: the same in a network of ten modules and in one of five thousand.

    pytest benchmarks/calls.py -n 0 --benchmark-columns=median,iqr,rounds

The backbone and its grafts are the same; the other modules lie beside it and are never called. A copy of the backbone
is alive as well, as a moving average of the weights is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

import fxgraft

CALLS: dict[str, Callable[[nn.Module, Any, Any], Any]] = {
    "loss": fxgraft.loss,
    "extra_loss": fxgraft.extra_loss,
    "set_progress": lambda model, *_: fxgraft.set_progress(model, 0.5),
    "diagnostics": lambda model, *_: fxgraft.diagnostics(model),
}


@pytest.mark.parametrize("modules", [10, 1000, 5000])
@pytest.mark.parametrize("call", CALLS)
def test_call(benchmark: BenchmarkFixture, call: str, modules: int) -> None:
    backbone = timm.create_model("test_resnet", num_classes=4)
    fxgraft.patch(fxgraft.patch(backbone, "rsc"), "selfnorm")
    average = copy.deepcopy(backbone)
    around = nn.ModuleDict({"backbone": backbone, "rest": nn.ModuleList()})
    around["rest"].extend(nn.Sequential(*(nn.Identity() for _ in range(9))) for _ in range(modules // 10))
    x, y = torch.randn(4, 3, 64, 64), torch.arange(4)
    out = backbone(x, target=y)
    benchmark(CALLS[call], around, out, y)
    assert fxgraft.grafts(average)  # alive until here
