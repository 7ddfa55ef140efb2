"""Where units go by position: shared activations, maps whose shape does not tell channels from places."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.layers import BatchNormAct2d, freeze_batch_norm_2d
from torch import Tensor, nn

import fxgraft
from fxgraft.graph.structure.positions import positions
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.patches.crossnorm.patch import CrossNormUnit
from fxgraft.patches.crossnorm.tensors import crossnorm
from unit.graph.structure.test_joins import ByArgument

SIZE = (3, 16, 16)


class Shared(nn.Module):
    """One activation for two convolutions, as torchvision's ResNets have."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 2, 1)
        self.second = nn.Conv2d(8, 8, 3, 1, 1)
        self.act = nn.ReLU()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.second(self.act(self.first(x))))
        return self.fc(x.mean((2, 3)))


class Block(nn.Module):
    """A residual block in either memory layout."""

    def __init__(self, channels_last: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8) if channels_last else nn.BatchNorm2d(8)
        self.mix = nn.Linear(8, 8) if channels_last else nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.mix(self.norm(x)))


class Cube(nn.Module):
    """A residual block on a map that is as deep as it is high and wide."""

    def __init__(self, channels_last: bool, flexible: bool) -> None:
        super().__init__()
        self.channels_last = channels_last
        self.flexible = flexible
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.block = Block(channels_last)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not self.flexible and x.shape[2] != SIZE[1]:
            raise ValueError("images of 16 pixels")
        x = self.stem(x)
        x = self.block(x.permute(0, 2, 3, 1) if self.channels_last else x)
        return self.head(x.mean((1, 2) if self.channels_last else (2, 3)))


def test_every_call_of_a_shared_activation_has_a_unit() -> None:
    model = Shared().double().train()
    fxgraft.patch(model, "crossnorm", position="act", input_size=SIZE, p=1.0, active=None)
    units = fxgraft.grafts(model)[0].units_of(CrossNormUnit)
    orders = [torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1])]
    for unit, order in zip(units, orders, strict=True):
        unit._restyled = lambda x, order=order: crossnorm(x, order)  # type: ignore[assignment]
    x = torch.randn(3, *SIZE, dtype=torch.float64)
    wanted = crossnorm(model.act(model.first(x)), orders[0])
    wanted = crossnorm(model.act(model.second(wanted)), orders[1])
    torch.testing.assert_close(model(x), model.fc(wanted.mean((2, 3))))


@pytest.mark.parametrize("flexible", [True, False], ids=["any size", "one size"])
@pytest.mark.parametrize(("channels_last", "layout"), [(False, "NCHW"), (True, "NHWC")])
@pytest.mark.parametrize("position", ["pre", "residual", "post"])
def test_the_layout_of_a_map_that_is_as_deep_as_wide(
    position: str, channels_last: bool, layout: str, flexible: bool
) -> None:
    model = Cube(channels_last, flexible)
    fxgraft.patch(model, "crossnorm", position=position, input_size=SIZE)
    assert [str(unit.layout) for unit in fxgraft.grafts(model)[0].units_of(CrossNormUnit)] == [layout]


def test_norms_stay_norms_when_they_are_frozen() -> None:
    model = timm.create_model("test_efficientnet", num_classes=4)
    fxgraft.patch(model, "selfnorm", position="norm", input_size=(3, 64, 64))
    before = len(fxgraft.grafts(model)[0].units)
    model = freeze_batch_norm_2d(model)
    model.train()(torch.randn(2, 3, 64, 64))
    assert len(fxgraft.grafts(model)[0].units) == before


@pytest.mark.parametrize(
    ("name", "position", "last"),
    [
        ("resnet18", "post", "layer4.1.add"),
        ("densenet121", "conv1_pre", "features.denseblock2.denselayer2.cat"),
        ("vgg11", "conv", "features.18"),
    ],
)
def test_the_usual_position_is_that_of_the_networks_blocks(name: str, position: str, last: str) -> None:
    small = {"growth_rate": 4, "block_config": (2, 2)} if name == "densenet121" else {}
    options: dict[str, Any] = {"p": 1.0, "input_size": (3, 64, 64)}
    by_default, by_name = (timm.create_model(name, num_classes=4, **small) for _ in range(2))
    fxgraft.patch(by_default, "crossnorm", **options)
    fxgraft.patch(by_name, "crossnorm", position=position, **options)
    (graft,), (named,) = map(fxgraft.grafts, (by_default, by_name))
    assert list(graft.units) == list(named.units)
    assert [name for name, unit in graft.units.items() if isinstance(unit, CrossNormUnit)][-1] == last
    assert f"units ({position})" in graft.patch.describe(graft)


def test_layers_narrow_the_usual_position() -> None:
    model = timm.create_model("densenet121", num_classes=4, growth_rate=4, block_config=(2, 2))
    fxgraft.patch(model, "selfnorm", layers="features.denseblock2", input_size=(3, 64, 64))
    names = list(fxgraft.grafts(model)[0].units)
    assert names[0] == "features.denseblock2.denselayer1.cat"
    assert "features.denseblock2.denselayer2.cat" in names
    fxgraft.patch(model, "crossnorm", layers="features.pool0", input_size=(3, 64, 64))
    graft = fxgraft.grafts(model)[1]
    assert list(graft.units) == ["features.pool0"]
    assert "1 units (by name)" in graft.patch.describe(graft)


@pytest.mark.parametrize("position", [None, "conv", "act"])
def test_maps_of_the_logits_are_left_out(position: Any) -> None:
    model = torchvision.models.squeezenet1_1(num_classes=4)
    fxgraft.patch(model, "selfnorm", position=position, input_size=(3, 64, 64))
    names = list(fxgraft.grafts(model)[0].units)
    assert names[-1].startswith("features.12.")
    only = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(fxgraft.SiteError, match="in front of its classifier"):
        fxgraft.patch(only, "selfnorm", position="conv", input_size=SIZE)
    headless = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    assert list(fxgraft.grafts(fxgraft.patch(headless, "selfnorm", input_size=SIZE))[0].units) == ["0"]


class Act(nn.Module):
    """An activation of the user's own."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(1.702 * x) * x


class Ended(nn.Module):
    """A residual block with a projected or a plain shortcut, and what is called behind the sum."""

    def __init__(self, behind: list[nn.Module], projected: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1))
        self.behind = nn.ModuleList(behind)
        self.project = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) if projected else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(x) + self.conv(x)
        for each in self.behind:
            x = each(x)
        return x


class Functional(Ended):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.hardswish(self.project(x) + self.conv(x), inplace=True)


def _edits(block: nn.Module, position: str) -> Any:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), block, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    (found,) = positions(ModelTrace(model, SIZE), position)
    return found.edits


@pytest.mark.parametrize(
    ("behind", "node"),
    [
        ([nn.ReLU(inplace=True)], "behind_0"),
        ([nn.InstanceNorm2d(4, affine=True), nn.ReLU()], "behind_1"),
        ([Act(), nn.Conv2d(4, 4, 1), nn.ReLU()], "behind_0"),
        ([nn.Dropout(0.1), nn.PReLU()], "behind_1"),
        ([nn.BatchNorm2d(4)], "add"),
        ([nn.AvgPool2d(2), nn.ReLU()], "add"),
        ([BatchNormAct2d(4)], "behind_0"),
        ([], "add"),
    ],
)
def test_output_is_behind_the_activation_that_follows_the_sum(behind: list[nn.Module], node: str) -> None:
    edits = _edits(Ended(behind), "output")
    assert (edits.evaluation.node, edits.training.node) == (node, node)
    assert _edits(Functional([]), "output").evaluation.node == "hardswish"


def test_pre_with_projection_is_seen_by_a_projection_and_by_no_plain_shortcut() -> None:
    projected = _edits(Ended([], projected=True), "pre_with_projection")
    assert projected.evaluation.users == ("project", "conv")
    assert _edits(Ended([]), "pre_with_projection").evaluation.users == ("conv",)
    with pytest.raises(fxgraft.StructureError, match=r"is an argument of 'inner'.*\n.*\n.*position=\"pre\""):
        fxgraft.patch(ByArgument(), "crossnorm", position="pre_with_projection", input_size=(4, 4, 4))
    assert not any(
        "projection" in name for name in fxgraft.sites(ByArgument(), "residual", input_size=(4, 4, 4)).names
    )


@pytest.mark.parametrize("position", ["output", "pre_with_projection"])
def test_the_new_positions_by_name_and_taken_off(position: str) -> None:
    model = timm.create_model("test_resnet", num_classes=4)
    keys = list(model.state_dict())
    join = "layer2.0.add"
    fxgraft.patch(model, "selfnorm", layers=f"{join}:{position}")
    assert list(fxgraft.grafts(model)[0].units) == [f"{join}:{position}"]
    model.train()(torch.randn(2, 3, 64, 64)).sum().backward()
    assert list(fxgraft.unpatch(model).state_dict()) == keys
