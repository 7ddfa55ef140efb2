"""Residual joins are where the networks' sources have them."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import timm
import torch
import torchvision

from fxgraft.graph.structure.joins import residual_joins
from fxgraft.graph.tracing.model_trace import ModelTrace
from zoo.places_joins import FEW, REST, Joins


def build(name: str) -> Any:
    with torch.device("meta"):
        if not name.startswith("tv/"):
            return timm.create_model(name).eval()
        plain = {"init_weights": False} if name == "tv/googlenet" else {}
        return torchvision.models.get_model(name.removeprefix("tv/"), weights=None, **plain).eval()


def check(name: str, wanted: Joins) -> None:
    found = residual_joins(ModelTrace(build(name)))
    counted = Counter((re.sub(r"\d+", "#", each.owner), each.kind) for each in found)
    assert dict(counted) == wanted.counted(), wanted.why


@pytest.mark.parametrize(("name", "wanted"), FEW.items(), ids=FEW)
def test_joins_of_a_few_networks(name: str, wanted: Joins) -> None:
    check(name, wanted)


@pytest.mark.sweep
@pytest.mark.parametrize(("name", "wanted"), REST.items(), ids=REST)
def test_joins_of_networks(name: str, wanted: Joins) -> None:
    check(name, wanted)
