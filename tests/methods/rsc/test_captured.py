"""What RSC's look ahead needs besides the value at its site, where other grafts act on that too."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import timm
import torch
import torch.utils.checkpoint
from torch import Tensor

import fxgraft
from fxgraft.graph.structure.rest_of_network import Rest


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The logits of every look ahead."""
    found: list[Tensor] = []
    evaluate = Rest.evaluate

    def spied(self: Rest, *args: Any) -> Tensor:
        found.append(evaluate(self, *args))
        return found[-1]

    monkeypatch.setattr(Rest, "evaluate", spied)
    return found


@pytest.mark.parametrize("layer", ["blocks.3.mlp", "blocks.3.add", "blocks.3.mlp.fc1"])
@pytest.mark.parametrize("order", [("rsc", "selfnorm"), ("selfnorm", "rsc")], ids="+".join)
def test_it_predicts_what_the_model_does(order: tuple[str, str], layer: str, looks: list[Tensor]) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=5)
    for method in order:
        fxgraft.patch(model, method, **({"layer": layer} if method == "rsc" else {}))
    selfnorm = next(graft for graft in fxgraft.grafts(model) if graft.name == "selfnorm")
    with torch.no_grad():
        for unit in selfnorm.units.values():
            for each in unit.parameters():
                each.normal_()
    x, y = torch.randn(6, 3, 160, 160), torch.arange(6) % 5
    expected = model.eval()(x)
    model.train()
    for unit in selfnorm.units.values():
        unit.eval()  # so that the pass and the look ahead normalise alike
    model(x, target=y)
    torch.testing.assert_close(looks[0], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(looks[-1], expected, rtol=1e-4, atol=1e-5)


def test_a_site_inside_of_a_block_beside_taps() -> None:
    model = timm.create_model("test_vit", num_classes=5)
    fxgraft.patch(model, "rsc", layer="blocks.3.add")
    fxgraft.patch(model, "taps", layers=["blocks.3.add", "blocks.3"])
    x, y = torch.randn(4, 3, 160, 160), torch.arange(4)
    fxgraft.loss(model, model.train()(x, target=y), y).backward()
    assert list(fxgraft.activations(model)) == ["blocks.3.add", "blocks.3"]


def test_a_pass_that_checkpointing_runs_again_is_refused_where_statistics_have_moved() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, 64, 64), torch.arange(4)
    moving = fxgraft.patch(timm.create_model("test_resnet", num_classes=4), "rsc", layer="layer1").train()
    loss = torch.utils.checkpoint.checkpoint(lambda x: moving(x, target=y), x, use_reentrant=False).sum()
    with pytest.raises(fxgraft.BypassError, match="looks ahead through BatchNorm"):
        loss.backward()


@pytest.mark.parametrize("layer", [None, "stages.2"])
def test_a_pass_that_checkpointing_runs_again_mutes_the_same(layer: str | None) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, 64, 64), torch.arange(4)
    name = "test_resnet" if layer is None else "test_convnext"
    model = fxgraft.patch(timm.create_model(name, num_classes=4), "rsc", layer=layer).train()
    twin = copy.deepcopy(model)
    for each, again in ((model, False), (twin, True)):
        torch.manual_seed(1)
        call = functools.partial(each, target=y)
        out = torch.utils.checkpoint.checkpoint(call, x, use_reentrant=False) if again else call(x)
        out.square().sum().backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_the_closed_form_gives_way_to_a_weight_that_is_made_in_the_call(looks: list[Tensor]) -> None:
    torch.manual_seed(0)
    model = fxgraft.patch(timm.create_model("test_resnet", num_classes=4), "rsc").train()
    x, y = torch.randn(4, 3, 64, 64), torch.arange(4)
    model(x, target=y)
    assert not looks
    torch.nn.utils.spectral_norm(model.fc)
    model(x, target=y)
    assert looks
