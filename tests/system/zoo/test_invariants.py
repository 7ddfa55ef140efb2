"""What holds of the places on every network, without a table: one small network of every family."""

from __future__ import annotations

import pytest
import timm
import torch
from benchmarks.places import wrong_places

from models.backbones import Backbone, available

IN_EVERY_RUN = {"timm/resnet18", "torchvision/squeezenet1_1"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backbone", available(IN_EVERY_RUN))
def test_methods_are_in_their_places(backbone: Backbone) -> None:
    torch.manual_seed(0)
    assert wrong_places(backbone.build(), backbone.input_size) == []


@pytest.mark.filterwarnings("ignore")
def test_what_no_logit_reads_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxgraft.graph.grafting.backbone.without_idle", lambda trace, spots: spots)
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=4, img_size=32)
    assert [text.partition(" at ")[0] for text in wrong_places(model, (3, 32, 32))] == [
        "no logit reads SelfNorm's gate"
    ] * 2
