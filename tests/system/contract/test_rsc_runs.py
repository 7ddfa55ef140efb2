"""RSC compiled, in half precision and with activation checkpointing: what it mutes there is what it mutes plainly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import fxgraft
from fxgraft.patches.rsc import record
from system.contract.cases import fresh, named

CLASSES, SIZE = 5, 64
# Pooling and a linear layer follow the last stage; a whole stage follows the one before.
SITES = pytest.mark.parametrize("layer", ["layer1", "act2"], ids=["general", "closed_form"])
SCOPES = pytest.mark.parametrize("scope", ["spatial", "channel"])
LARGER = [
    ("resnet18", "layer3", "spatial"),
    ("resnet18", "layer4", "channel"),
    ("test_vit", "blocks.2", "spatial"),
    ("convnext_atto", "stages.3", "channel"),
]


class Net(nn.Module):
    """Behind ``layer2`` the rest of the network is a closed form, behind ``layer1`` it is not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8))
        self.act1 = nn.ReLU()
        self.layer2 = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.BatchNorm2d(12))
        self.act2 = nn.ReLU()
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act2(self.layer2(self.act1(self.layer1(x)))).mean((2, 3)))


def backbone(name: str = "") -> nn.Module:
    torch.manual_seed(0)
    if name:
        options = {"img_size": SIZE} if name == "test_vit" else {}
        return timm.create_model(name, num_classes=CLASSES, **options)
    model = Net()
    model(torch.randn(16, 3, SIZE, SIZE))
    return model


def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, SIZE, SIZE, generator=g), torch.randint(0, CLASSES, (4,), generator=g)


def patched(layer: Any, scope: str = "channel", name: str = "", **options: Any) -> nn.Module:
    return fxgraft.patch(
        backbone(name), "rsc", layer=layer, scope=scope, input_size=(3, SIZE, SIZE), **options
    )


def compiled(model: nn.Module, backend: str = "aot_eager") -> Any:
    return torch.compile(model, fullgraph=True, backend=backend)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def check(layer: str, scope: str, name: str, batch_share: float) -> None:
    """Two compiled training steps and an evaluation are those of an eager copy."""
    model = patched(layer, scope, name, batch_share=batch_share)
    twin = copy.deepcopy(model)
    x, y = batch()
    program = compiled(model)
    for _ in range(2):
        out = program(x, target=y)
        with record(twin) as records:
            expected = twin(x, target=y)
        assert records[0].selected.any()
        close(out, expected)
        for each, result in ((model, out), (twin, expected)):
            fxgraft.loss(each, result, y).backward()
    for (key, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        scale = theirs.grad.abs().max().item()
        assert (mine.grad - theirs.grad).abs().max().item() <= 1e-3 * scale + 1e-5, key
    for mine, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        close(mine, theirs)
    close(program.eval()(x), twin.eval()(x))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("layer", "scope"), [("layer1", "spatial"), ("act2", "channel")])
@pytest.mark.sweep
def test_compiled_training_and_evaluation_are_the_eager_ones(layer: str, scope: str) -> None:
    check(layer, scope, "", 0.5)


@pytest.mark.sweep
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("name", "layer", "scope"), LARGER)
def test_larger_backbones_compile(name: str, layer: str, scope: str) -> None:
    # Fresh weights start these so even that no label loses enough to be selected: mute all samples.
    check(layer, scope, name, 1.0)


@pytest.mark.sweep
@pytest.mark.usefixtures("fresh_compiler")
@SITES
def test_inductor(layer: str) -> None:
    model = patched(layer, batch_share=0.5)
    twin = copy.deepcopy(model)
    x, y = batch()
    program = compiled(model, "inductor")
    torch.testing.assert_close(program(x, target=y), twin(x, target=y), rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("fresh_compiler")
@SITES
def test_both_scopes_are_drawn_in_one_graph(layer: str) -> None:
    """The draw is data there: over some seeds, both scopes come out."""
    x, y = batch()
    model = frozen(patched(layer, "both", batch_share=1.0))
    wanted = {}
    for scope in ("spatial", "channel"):
        fixed = frozen(patched(layer, scope, batch_share=1.0))
        fixed.load_state_dict(model.state_dict())
        wanted[scope] = fixed(x, target=y).detach()
    assert not torch.allclose(wanted["spatial"], wanted["channel"], rtol=1e-4, atol=1e-5)
    program = compiled(model)
    seen = set()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(12):
            torch.manual_seed(seed)
            out = program(x, target=y)
            matching = {s for s, each in wanted.items() if torch.allclose(out, each, rtol=1e-4, atol=1e-5)}
            assert len(matching) == 1
            seen |= matching
    assert seen == {"spatial", "channel"}


def frozen(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


@pytest.mark.usefixtures("fresh_compiler")
def test_start_recompiles_once_and_then_mutes() -> None:
    model = patched("act2", start=0.5, batch_share=1.0)
    twin = copy.deepcopy(model)
    program = compiled(model)
    x, y = batch()
    outs = []
    for fraction in (0.0, 0.5, 0.75):
        for each in (model, twin):
            fxgraft.set_progress(each, fraction)
        outs.append(program(x, target=y))
        close(outs[-1], twin(x, target=y))
    assert not torch.allclose(outs[0], outs[1], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "layer"),
    [("timm/resnet18", "layer4"), ("timm/resnet18", "layer2"), ("timm/test_vit", "blocks.2")],
)
def test_autocast_mutes_what_full_precision_does(name: str, layer: str, dtype: torch.dtype) -> None:
    """As many positions, and mostly the same ones."""
    model, size = fresh(named(name)), named(name).input_size
    fxgraft.patch(model, "rsc", layer=layer, scope="spatial", batch_share=1.0, input_size=size)
    x, y = named(name).inputs(), torch.arange(4)
    with record(model) as records, torch.no_grad():
        model.train()(x, target=y)
        with torch.autocast("cpu", dtype=dtype):
            model(x, target=y)
    full, half = records
    assert (half.mask == 0).sum() >= 0.9 * (full.mask == 0).sum() > 0
    assert (half.mask == full.mask).float().mean() > 0.7


@pytest.mark.parametrize(("name", "layer"), [("timm/resnet18", "layer2"), ("timm/test_vit", "blocks.2")])
def test_checkpointed_regions_are_muted_once(name: str, layer: str) -> None:
    """What is computed again in backward, a whole stage for instance, is not searched and muted again."""
    x, y = named(name).inputs(), torch.arange(4)
    results = []
    for checkpointing in (False, True):
        model = fresh(named(name))
        model.set_grad_checkpointing(checkpointing)
        fxgraft.patch(
            model, "rsc", layer=layer, scope="spatial", batch_share=1.0, input_size=named(name).input_size
        )
        torch.manual_seed(2)
        with record(model) as records:
            loss = fxgraft.loss(model, model.train()(x, target=y), y)
            loss.backward()
        assert len(records) == 1
        results.append((loss.detach(), records[0].mask))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
