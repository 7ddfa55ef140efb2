"""Shapes by fake tensors and the meaning of dimensions."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import fxgraft
from fxgraft.errors import ConfigError, SiteError, StructureError
from fxgraft.graph.structure.layout import Layout, layout_of
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.observe import default_input_size, observe, tensors
from fxgraft.graph.tracing.preserve import preserved_modes
from models.backbones import BACKBONES
from models.toys import assert_same, images, net, state_of_everything


def test_every_call_is_recorded_with_what_went_in_and_out() -> None:
    model = net()
    seen = observe(model, (3, 8, 8), batch=5)
    assert seen.output("").shape == (5, 4)
    assert seen.output("stage2.1").shape == (5, 16, 4, 4)
    assert [tuple(call.output.shape) for call in seen.calls["stem.act"]] == [(5, 8, 8, 8)] * 2
    assert [tuple(t.shape) for t in tensors(seen.calls["fc"][0].args)] == [(5, 16)]
    assert set(seen.calls) == {name for name, _ in model.named_modules()}


def test_calls_are_ordered_by_when_they_return() -> None:
    calls = observe(net(), (3, 8, 8)).calls
    order = sorted(calls, key=lambda name: calls[name][0].order)
    assert order[:3] == ["stem.first", "stem.act", "stem.second"]
    assert order[-3:] == ["drop", "fc", ""]
    assert order.index("stage1.0") < order.index("stage1.1") < order.index("stage1")


@pytest.mark.parametrize("training", [True, False])
def test_observing_changes_nothing_and_fires_no_hook(training: bool) -> None:
    model = net().train(training)
    model.stage1[0].bn.train(not training)
    fired = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: fired.append("hook"))
    before = state_of_everything(model)
    observe(model, (3, 8, 8))
    assert_same(before, state_of_everything(model))
    with pytest.raises(RuntimeError):
        observe(model, (5, 8, 8))
    assert_same(before, state_of_everything(model))
    assert fired == []
    assert nn.Module.__call__ is nn.Module.__dict__["__call__"]
    model(images())
    assert fired


def test_observing_computes_nothing() -> None:
    huge = nn.Sequential(nn.Conv2d(3, 4096, 1), nn.AdaptiveAvgPool2d(1))
    assert observe(huge, (3, 8192, 8192), batch=64).output("0").shape == (64, 4096, 8192, 8192)


def test_preserved_modes_is_flag_by_flag() -> None:
    model = net().train()
    model.stage1[0].bn.eval()
    before = [module.training for module in model.modules()]
    failing = preserved_modes(model)
    failing.__enter__()
    model.eval()
    assert failing.__exit__(ZeroDivisionError, ZeroDivisionError(), None) is not True
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: timm.create_model("test_resnet", in_chans=1), (1, 160, 160)),
        (lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1), (3, 32, 32)),
        (lambda: timm.create_model("vit_tiny_patch16_224", img_size=(32, 64), depth=1), (3, 32, 64)),
        # Its first convolution sees cosine coefficients, not the image.
        pytest.param(
            next(each for each in BACKBONES if each.name == "timm/csatv2").build,
            (3, 512, 512),
            marks=pytest.mark.skipif(not timm.is_model("csatv2"), reason="timm is older than this model"),
        ),
        # Its first convolution sees 4×4 pixels as channels.
        (lambda: timm.create_model("tresnet_m"), (3, 224, 224)),
        (lambda: timm.create_model("tresnet_m", in_chans=1), (1, 224, 224)),
        (lambda: torchvision.models.VisionTransformer(32, 16, 1, 2, 8, 8), (3, 32, 32)),
        (lambda: torchvision.models.resnet18(), (3, 224, 224)),
        (lambda: nn.Sequential(nn.Conv2d(7, 2, 1)), (7, 224, 224)),
        (lambda: nn.ReLU(), (3, 224, 224)),
        (lambda: Moved(1, nn.Conv3d(3, 8, 2, 2)), (3, 16, 224, 224)),
        (lambda: Moved(2, nn.Conv3d(3, 8, 2, 2)), (16, 3, 224, 224)),
    ],
)
def test_the_input_size_is_what_the_model_says(build: object, expected: tuple[int, int, int]) -> None:
    assert default_input_size(build()) == expected  # type: ignore[operator]


def test_the_fake_batch_has_the_dtype_of_the_model() -> None:
    assert observe(net().half(), (3, 8, 8)).output("").dtype == torch.float16
    assert observe(nn.ReLU(), (3, 8, 8)).output("").dtype == torch.float32


@pytest.mark.parametrize("size", [(), (3, 0, 8), (3, 8, -1)])
def test_an_input_size_must_be_positive(size: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"input_size must be positive, as \(C, H, W\)"):
        observe(net(), size)


def test_a_size_the_model_cannot_take_is_named() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    with pytest.raises(
        StructureError, match=r"does not run on a batch of shape \(2, 3, 48, 48\)(?s:.*)input_size="
    ):
        fxgraft.sites(model, input_size=(3, 48, 48))


def layout(model: nn.Module, path: str, size: tuple[int, ...] | None = None) -> str:
    trace = ModelTrace(model, size)
    return str(layout_of(trace, trace.observation.output(path), path))


@pytest.mark.parametrize(
    ("name", "kwargs", "path", "expected"),
    [
        ("test_resnet", {}, "layer4", "NCHW"),
        ("test_resnet", {}, "fc", "NC"),
        ("test_convnext", {}, "stages.3", "NCHW"),
        ("test_vit", {}, "blocks.5", "NLC, 1 prefix"),
        (
            "vit_tiny_patch16_224",
            {"img_size": 32, "depth": 1, "class_token": False, "global_pool": "avg"},
            "norm",
            "NLC",
        ),
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1, "reg_tokens": 4}, "blocks.0", "NLC, 5 prefix"),
        ("test_mambaout", {}, "stages.3", "NHWC"),
        ("mixer_s32_224", {}, "blocks.0", "NLC"),
    ],
)
def test_layouts_of_backbones(name: str, kwargs: dict[str, object], path: str, expected: str) -> None:
    assert layout(timm.create_model(name, num_classes=5, **kwargs), path) == expected


def test_a_map_as_wide_as_it_has_channels_is_told_by_a_larger_image() -> None:
    assert layout(nn.Sequential(nn.Conv2d(3, 8, 1)), "0", (3, 8, 8)) == "NCHW"
    assert layout(timm.create_model("test_mambaout", num_classes=5), "stages.0", (3, 128, 128)) == "NHWC"


class Moved(nn.Module):
    """Takes its channels in another dimension of the input."""

    def __init__(self, channels: int, convolution: nn.Module) -> None:
        super().__init__()
        self.channels, self.conv = channels, convolution
        self.tokens, self.head = nn.Identity(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.movedim(self.channels, 1))
        return self.head(self.tokens(x.flatten(2).transpose(1, 2)).mean(1))


@pytest.mark.parametrize(
    ("channels", "convolution", "size", "expected"),
    [
        (1, nn.Conv3d(3, 8, 2, 2), (3, 4, 8, 8), "NCDHW"),
        (2, nn.Conv3d(3, 8, 2, 2), (4, 3, 8, 8), "NCDHW"),  # clips (B, T, C, H, W)
        (4, nn.Conv3d(3, 8, 2, 2), (4, 8, 8, 3), "NCDHW"),
        (3, nn.Conv2d(3, 8, 2, 2), (8, 8, 3), "NCHW"),
    ],
)
def test_the_first_convolution_tells_where_an_input_has_its_channels(
    channels: int, convolution: nn.Module, size: tuple[int, ...], expected: str
) -> None:
    model = Moved(channels, convolution)
    assert layout(model, "conv", size) == expected
    assert layout(model, "tokens", size) == "NLC"


def test_a_reshape_that_merges_frames_with_images_keeps_their_channels() -> None:
    class Frames(Moved):
        def forward(self, x: Tensor) -> Tensor:
            maps = self.conv(x.reshape(-1, *x.shape[2:]))
            tokens = maps.flatten(2).transpose(1, 2).reshape(x.shape[0], -1, 8)
            return self.head(self.tokens(tokens).mean(1))

    assert layout(Frames(2, nn.Conv2d(3, 8, 2, 2)), "tokens", (4, 3, 8, 8)) == "NLC"


def test_frames_before_channels_are_no_layout_of_an_input() -> None:
    model = Moved(2, nn.Conv3d(3, 8, 2, 2))
    with pytest.raises(SiteError, match=r"its dimensions are images, places, features, places, places"):
        fxgraft.patch(model, "crossnorm", layers="input", input_size=(4, 3, 8, 8))


class Odd(nn.Module):
    """Takes the first pixels of an image for a map, so that nothing tells its dimensions apart."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :27].unflatten(1, (3, 3, 3))


def test_a_layout_that_cannot_be_told_asks_for_it() -> None:
    model = nn.Sequential(Odd(), nn.Flatten(), nn.Linear(27, 4))
    with pytest.raises(
        SiteError, match=r"layout of '0', of shape \(2, 3, 3, 3\), cannot be told(?s:.*)NCHW, NHWC"
    ):
        layout(model, "0")
    with pytest.raises(SiteError, match="pass layout="):
        fxgraft.patch(model, "rsc", layer="0")
    fxgraft.patch(model, "rsc", layer="0", layout="NCHW")


def test_a_declared_layout_must_fit_the_value() -> None:
    with pytest.raises(SiteError, match=r"'stage2' was said to be NLC, but its shape is \(2, 16, 4, 4\)"):
        fxgraft.patch(net(), "rsc", layer="stage2", layout="NLC", input_size=(3, 8, 8))


X = {
    "NCHW": torch.randn(2, 3, 4, 5),
    "NHWC": torch.randn(2, 4, 5, 3),
    "NLC": torch.randn(2, 20, 3),
    "NCL": torch.randn(2, 3, 20),
    "NC": torch.randn(2, 3),
}


@pytest.mark.parametrize("name", X)
def test_canonical_puts_channels_second_without_a_copy(name: str) -> None:
    view = Layout(name).canonical(X[name])
    assert view.shape[:2] == (2, 3)
    assert view.data_ptr() == X[name].data_ptr()


@pytest.mark.parametrize(("name", "prefix"), [*((name, 0) for name in X), ("NLC", 2)])
def test_multiply_is_canonical_and_back_and_spares_the_prefix(name: str, prefix: int) -> None:
    x, kind = X[name], Layout(name, prefix)
    z = kind.canonical(x)
    for shape in {tuple(z.shape), (2, 1, *z.shape[2:]), (2, 3, *[1] * (z.ndim - 2))}:
        mask = torch.rand(shape)
        out = kind.multiply(x, mask)
        assert out.shape == x.shape
        assert torch.equal(kind.canonical(out), z * mask)
        if prefix:
            assert torch.equal(out[:, :prefix], x[:, :prefix])


@pytest.mark.parametrize(("kind", "text"), [(Layout("NLC", 5), "NLC, 5 prefix"), (Layout("NCHW"), "NCHW")])
def test_layouts_print(kind: Layout, text: str) -> None:
    assert str(kind) == text
