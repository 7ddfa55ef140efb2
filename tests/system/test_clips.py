"""Networks of clips of torchvision: methods train, evaluate to the bit, compile in one graph, export and come off."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.video import resnet, swin_transformer

import fxgraft

pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("fresh_compiler")]
SIZE, LABELS = (3, 4, 32, 32), torch.tensor([0, 1, 2, 3])
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "r3d": lambda: resnet.VideoResNet(
        resnet.BasicBlock, [resnet.Conv3DSimple] * 4, [1] * 4, resnet.BasicStem, num_classes=5
    ),
    "swin3d": lambda: swin_transformer.SwinTransformer3d(
        [2, 4, 4], 12, [1, 1], [2, 2], [2, 3, 3], stochastic_depth_prob=0.0, num_classes=5
    ),
}
STACKS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "training only": [
        ("rsc", {"layer": -2, "scope": "spatial"}),
        ("diversification", {"patch": (1, 2, 2), "p_peak": 1.0, "p_patch": 1.0}),
        ("taps", {"layers": -1}),
    ],
    "drawn": [("crossnorm", {"p": 1.0}), ("mixstyle", {"p": 1.0}), ("dsu", {"p": 1.0})],
    "with parameters": [("selfnorm", {})],
    "mixmo": [("mixmo", {"p": 1.0})],
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]()


def clips() -> Tensor:
    return torch.randn(4, *SIZE, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, call: Callable[..., Any]) -> list[Tensor]:
    """Make a training step; return its logits and the gradients."""
    torch.manual_seed(2)
    model.train().zero_grad()
    out = call(clips(), target=LABELS)
    fxgraft.loss(model, out, LABELS).backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_clips(name: str, stack: str) -> None:
    model, bare = network(name), network(name).eval()
    expected = bare(clips())
    for method, options in STACKS[stack]:
        fxgraft.patch(model, method, input_size=SIZE, **options)
    assert torch.equal(model.eval()(clips()), expected)
    exported = torch.export.export(model, (clips(),)).module()
    torch.testing.assert_close(exported(clips()), expected)

    twin = copy.deepcopy(model)
    compiled: Any = torch.compile(twin, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(clips()), expected)
    ours, theirs = step(model, model), step(twin, compiled)
    assert len(ours) == len(theirs) > 10
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.isfinite().all()
        assert other.isfinite().all()
        if stack != "drawn":  # compiled code draws other numbers
            torch.testing.assert_close(other, mine, rtol=1e-3, atol=1e-4)

    fxgraft.unpatch(model)
    assert list(model.state_dict()) == list(bare.state_dict())
    model.load_state_dict(bare.state_dict())  # the running statistics of the step
    assert torch.equal(model.eval()(clips()), expected)
