"""What holds of the places on every network, without a table: one small network of every third family.

`python -m benchmarks zoo --places` looks at all architectures of timm and torchvision."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from benchmarks.places import wrong_places
from torch import Tensor, nn

from models.backbones import Backbone, available

IN_EVERY_RUN = {"timm/resnet18", "torchvision/squeezenet1_1"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "backbone",
    [
        each
        for index, each in enumerate(available(IN_EVERY_RUN))
        if index % 3 == 0 or each.id in (*IN_EVERY_RUN, "timm/legacy_seresnet18")
    ],
)
def test_methods_are_in_their_places(backbone: Backbone) -> None:
    torch.manual_seed(0)
    assert wrong_places(backbone.build(), backbone.input_size) == []


@pytest.mark.filterwarnings("ignore")
def test_what_no_logit_reads_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxgraft.graph.grafting.backbone.without_idle", lambda trace, spots: spots)
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=4, img_size=32)
    assert [text.partition(" at ")[0] for text in wrong_places(model, (3, 32, 32))] == [
        "no logit reads SelfNorm's gate",
        "no logit reads SelfNorm's gate",
        "no logit reads what DSU restyles",
    ]


class CalledDropout(nn.Module):
    """A network that drops by a function before its classifier, as timm's older ones do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.classifier = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.conv(x).relu().mean((2, 3))
        return self.classifier(F.dropout(pooled, 0.5, self.training))


@pytest.mark.filterwarnings("ignore")
def test_what_is_dropped_at_random_is_not_wrong() -> None:
    assert wrong_places(CalledDropout(), (3, 16, 16)) == []
