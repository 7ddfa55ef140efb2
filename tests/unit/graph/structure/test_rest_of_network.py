"""The rest of a network after a site: the same numbers as the network itself, and what it ends in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxgraft
from fxgraft.errors import SiteError
from fxgraft.graph.names import ancestors
from models.backbones import BACKBONES
from models.toys import Net, assert_same, evaluate, images, net, rest, state_of_everything, value_at

SPLITS = [
    ("timm/resnet18", "layer4"),
    ("timm/resnet18", "layer2.0.add"),
    ("timm/resnet18", "layer3.0.conv1"),
    ("timm/densenet121", "features.denseblock2"),
    ("timm/test_convnext", "stages.1"),
    ("timm/test_vit", "blocks.2"),
    ("timm/test_vit", "blocks.2.attn"),
    ("timm/swin_tiny_patch4_window7_224", "layers.1"),
    ("timm/regnety_002", "s2"),
    ("timm/hrnet_w18_small", "layer1"),
    ("timm/efficientnet", "blocks.1"),
    ("timm/crossvit_tiny_240", "blocks.0.blocks.0"),
    ("timm/inception_v3", "Mixed_6a"),
    ("timm/deit_tiny_distilled_patch16_224", "blocks.0"),
]


@pytest.mark.parametrize(("name", "layer"), SPLITS)
def test_the_rest_computes_what_the_network_does(name: str, layer: str) -> None:
    found = [b for b in BACKBONES if b.name == name or (b.family == name.partition("/")[2])]
    if not found:
        raise LookupError(name)
    backbone = found[0]
    model, x = backbone.build(warm=True).eval(), backbone.inputs(2)
    site, after = rest(model, layer, backbone.input_size)
    with torch.no_grad():
        z, out, context = value_at(model, site, after.captured, x)
        assert torch.equal(out, model(x))
        assert torch.equal(evaluate(after, model, z, context), out)
        assert not torch.equal(evaluate(after, model, z * 0.5, context), out)


def test_a_value_inside_a_residual_block_needs_the_shortcut() -> None:
    model, x = net().eval(), images()
    site, after = rest(model, "stage1.1.conv1", (3, 8, 8))
    assert [each.path for each in after.captured] == ["stage1.0"]
    with torch.no_grad():
        z, out, context = value_at(model, site, after.captured, x)
        assert torch.equal(evaluate(after, model, z, context), out)
        (key,) = context.values
        context.values[key] = context.values[key] * 2
        assert not torch.equal(evaluate(after, model, z, context), out)


class Skips(nn.Module):
    """A U-shape: two values from before the site are used after it, one of them twice; and the input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.c, self.d = nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.Conv2d(15, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(a).relu()
        c = self.c(b)
        up = [nn.functional.interpolate(v, size=x.shape[-2:], mode="nearest") for v in (c, b)]
        return self.d(torch.cat([*up, a, x], 1)) + a.mean()


def test_skip_connections_are_captured() -> None:
    model, x = Skips().eval(), images()
    site, after = rest(model, "c", (3, 8, 8))
    assert len(after.captured) == 2
    assert after.inputs == (0,)
    assert after.tail is None
    assert {type(each.owner) for each in after.captured} == {str}
    for size in (8, 12):  # traced at one size, right at any
        x = images(size=size)
        with torch.no_grad():
            z, out, context = value_at(model, site, after.captured, x)
            assert torch.equal(evaluate(after, model, z, context), out)


class Segments(nn.Module):
    """A dense prediction in a dictionary, with an auxiliary head, resized to the image."""

    def __init__(self, key: str = "out") -> None:
        super().__init__()
        self.backbone, self.aux, self.classifier = (
            nn.Conv2d(3, 6, 3, stride=2),
            nn.Conv2d(6, 4, 1),
            nn.Conv2d(6, 4, 1),
        )
        self.key = key

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.backbone(x)
        aux = nn.functional.interpolate(self.aux(z), size=x.shape[-2:])
        out = nn.functional.interpolate(self.classifier(z.relu()), size=x.shape[-2:])
        return {"aux": aux, self.key: out}


@pytest.mark.parametrize(
    ("key", "output", "entry"), [("out", None, "out"), ("masks", "masks", "masks"), ("out", "aux", "aux")]
)
def test_a_rest_that_depends_on_the_size_of_the_image(key: str, output: Any, entry: str) -> None:
    model = Segments(key).eval()
    site, after = rest(model, "backbone", (3, 16, 16), output)
    assert after.inputs == (0,)
    for size in (16, 20):
        x = images(size=size)
        with torch.no_grad():
            z, out, context = value_at(model, site, after.captured, x)
            assert torch.equal(evaluate(after, model, z, context), out[entry])
    assert ("aux" in after.children) is (entry == "aux")


class Late(nn.Module):
    """A branch of the image that runs only after the site."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.side, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.main(x)
        return self.fc((z.relu() + self.side(x)).mean((2, 3)))


def test_a_late_branch_is_computed_with_the_rest() -> None:
    model, x = Late().eval(), images()
    site, after = rest(model, "main", (3, 8, 8))
    assert after.captured == ()
    assert set(after.children) == {"side", "fc"}
    with torch.no_grad():
        z, out, context = value_at(model, site, after.captured, x)
        assert torch.equal(evaluate(after, model, z, context), out)


def test_evaluating_the_rest_changes_nothing() -> None:
    model = net().train()
    model.stage2[1].bn.eval()
    _, after = rest(model, "stage1", (3, 8, 8))
    z = torch.randn(4, 8, 8, 8)
    kept = z.clone()
    before = state_of_everything(model)
    a = evaluate(after, model, z.clone())
    assert torch.equal(a, evaluate(after, model, z.clone()))
    assert_same(before, state_of_everything(model))
    assert torch.equal(z, kept)
    with after.evaluation_mode(model):
        assert [m.training for m in model.stage2.modules()] == [False] * len(list(model.stage2.modules()))
        assert model.stem.training
    assert_same(before, state_of_everything(model))


def test_a_layer_that_nothing_depends_on_is_refused() -> None:
    class Unused(Net):
        def __init__(self) -> None:
            super().__init__()
            self.side = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            self.side(x)
            return super().forward(x)

    with pytest.raises(SiteError, match="output of Unused does not depend on 'side'"):
        rest(Unused(), "side", (3, 8, 8))


def test_the_rest_notices_a_replaced_module_and_no_setting_that_nothing_reads() -> None:
    model = net()
    _, after = rest(model, "stage1", (3, 8, 8))
    assert not after.stale(model)
    model.drop.p = 0.5
    model.fc = nn.Linear(16, 4)
    assert after.stale(model)
    model.setting = 3
    _, after = rest(model, "stage1", (3, 8, 8))
    model.note = "not there when it was traced"
    model.setting = 4
    assert not after.stale(model)
    model.setting = 3
    assert not after.stale(model)
    del model.down
    assert after.stale(model)


def test_ancestors() -> None:
    assert ancestors("a.b.c") == ("a", "a.b")
    assert ancestors("a") == ()


def test_a_traced_module_has_a_rest_too() -> None:
    model, x = fx.symbolic_trace(net().eval()), images()
    for layer in ("stage1.1.add", "stage2.0.conv1", "flatten"):
        found = [s.name for s in fxgraft.sites(model, input_size=(3, 8, 8))]
        name = layer if layer in found else next(n for n in found if n.startswith("add_"))
        site, after = rest(model, name, (3, 8, 8))
        with torch.no_grad():
            z, out, context = value_at(model, site, after.captured, x)
            assert torch.equal(evaluate(after, model, z, context), out)
