"""CrossNorm on models: placement as in the authors' code, choice of units, options, losses and errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch.utils.checkpoint
import torchvision
from torch import Tensor, nn

import fxgraft
from fxgraft import ConfigError, CrossNorm, SiteError, StructureError
from fxgraft.functional.modulation import instance_moments
from fxgraft.patches.crossnorm import tensors as core
from fxgraft.patches.crossnorm.patch import CrossNormUnit
from golden_data import GoldenCase, load_golden
from sweeping import some

POSITIONS = ("pre", "residual", "identity", "post")
SMALL: dict[str, Any] = {"input_size": (3, 64, 64)}


class Bottleneck(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        out = 4 * planes
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inplanes != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


class Net(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.block = Bottleneck(inplanes, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", [c for p in POSITIONS for c in load_golden(f"cnsn_pos_{p}")], ids=str)
@pytest.mark.parametrize("reverse", some([False, True], 1))
@pytest.mark.filterwarnings("ignore:SelfNorm. init=.authors. opens each gate:fxgraft.FxgraftWarning")
def test_authors_numbers_in_a_bottleneck(
    case: GoldenCase, dtype: torch.dtype, reverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = case.settings
    model: Any = Net(setting["inplanes"], setting["planes"], setting["stride"]).to(dtype)
    inputs = case.inputs_as(dtype)
    x = inputs["x"].requires_grad_()
    wanted = {"sn": ["selfnorm"], "cn": ["crossnorm"], "cnsn": ["crossnorm", "selfnorm"]}[setting["type"]]
    for method in reversed(wanted) if reverse else wanted:
        options: Any = {"p": 1.0} if method == "crossnorm" else {"init": "authors"}
        size = tuple(x.shape[1:])
        fxgraft.patch(model, method, position=setting["pos"], input_size=size, **options)
    state = {k.removeprefix("sd_").replace("/", "."): v for k, v in inputs.items() if k.startswith("sd_")}
    own = "block.graft_selfnorm.g"
    loaded = {}
    for key, value in state.items():
        if key == "cnsn.selfnorm.g_fc.weight":
            loaded[f"{own}.mean_weight"], loaded[f"{own}.std_weight"] = value[:, 0, 0], value[:, 0, 1]
        elif key.startswith("cnsn."):
            loaded[f"{own}.norm.{key.removeprefix('cnsn.selfnorm.g_bn.')}"] = value
        else:
            loaded[f"block.{key}"] = value
    missing = model.load_state_dict(loaded, strict=False)
    assert not missing.unexpected_keys
    assert all("num_batches_tracked" in key for key in missing.missing_keys)
    model.train(setting["train"])
    draws = [torch.tensor([0]), case.draws["ins_idxs"]]  # the unit that is on, then its permutation
    if setting["train"] and "crossnorm" in wanted:
        monkeypatch.setattr(torch, "randperm", lambda *_, **__: draws.pop(0))
    y = model(x)
    (y * inputs["cot"]).sum().backward()
    close = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(y, case.outputs["y"].to(dtype), **close)
    torch.testing.assert_close(x.grad, case.outputs["grad_x"].to(dtype), **close)


def resnet(**options: Any) -> nn.Module:
    return timm.create_model("resnet18", num_classes=4, channels=(8, 12, 16, 20), **options)


def watch(model: nn.Module) -> list[list[str]]:
    """Record, for every pass, which sites were restyled."""
    on: list[list[str]] = [[]]
    graft = next(g for g in fxgraft.grafts(model) if g.patch.method == "crossnorm")
    for name, unit in graft.units.items():
        original = unit._restyled  # type: ignore[operator]

        def restyled(x: Tensor, name: str = name, original: Any = original) -> Tensor:
            on[-1].append(name)
            return original(x)

        unit._restyled = restyled  # type: ignore[assignment]
    return on


def test_exactly_the_active_number_is_on_with_probability_p() -> None:
    model = fxgraft.patch(resnet(), "crossnorm", p=0.5, active=3, **SMALL).train()
    on, x = watch(model), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for _ in range(60):
            on.append([])
            model(x)
    counts = [len(each) for each in on[1:]]
    assert set(counts) == {0, 3}
    assert 15 <= counts.count(3) <= 45
    assert len({name for each in on for name in each}) == 8
    assert all(len(set(each)) == len(each) for each in on)


def test_the_choice_follows_the_seed() -> None:
    model = fxgraft.patch(resnet(), "crossnorm", p=1.0, **SMALL).train()
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        outs = []
        for seed in (5, 5, 6):
            torch.manual_seed(seed)
            outs.append(copy.deepcopy(model)(x))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("options", [{"p": 0.0}, {"lam": 1.0, "p": 1.0}, {"consistency": True}])
def test_neutral_settings_draw_nothing_and_change_no_bit(options: dict[str, Any]) -> None:
    bare = resnet().train()
    model = fxgraft.patch(copy.deepcopy(bare), "crossnorm", **options, **SMALL)
    x = torch.randn(3, 3, 64, 64)
    before = torch.get_rng_state()
    out = model(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(out, bare(x))
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_evaluation_and_a_batch_of_one_are_the_bare_models() -> None:
    bare = resnet(norm_layer=nn.Identity)
    model = fxgraft.patch(copy.deepcopy(bare), "crossnorm", p=1.0, active=None, **SMALL)
    x = torch.randn(3, 3, 64, 64)
    before = torch.get_rng_state()
    assert torch.equal(model.eval()(x), bare.eval()(x))
    with pytest.warns(fxgraft.FxgraftWarning, match="exchanges nothing in a batch of one"):
        out = model.train()(x[:1])
    assert torch.equal(out, bare.train()(x[:1]))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(model(x), bare(x))


@pytest.mark.parametrize("mode", ["two-instance", "one-instance", "both"])
def test_modes_exchange_what_they_say(mode: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    fxgraft.patch(model, "crossnorm", layers="input", mode=mode, p=1.0, **SMALL)
    (unit,) = fxgraft.grafts(model)[0].units.values()
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64) * torch.rand(4, 3, 1, 1) + torch.randn(4, 3, 1, 1)
    torch.manual_seed(0)
    found = instance_moments(unit._restyled(x))[0]  # type: ignore[operator]
    torch.manual_seed(0)
    mean = instance_moments(x)[0]
    if mode != "one-instance":
        mean = mean[torch.randperm(4)]
    if mode != "two-instance":
        mean = mean[:, torch.randperm(3)]
    torch.testing.assert_close(found, mean)


@pytest.mark.parametrize("crop", ["neither", "content", "style", "both"])
def test_every_crop_trains(crop: Any) -> None:
    model = fxgraft.patch(resnet(), "crossnorm", crop=crop, p=1.0, active=None, **SMALL).train()
    fxgraft.loss(model, model(torch.randn(3, 3, 64, 64)), torch.tensor([0, 1, 2])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_tokens_keep_their_prefix() -> None:
    model = timm.create_model("test_vit", num_classes=4, img_size=64)
    fxgraft.patch(model, "crossnorm", p=1.0, active=None, input_size=(3, 64, 64))
    units = fxgraft.grafts(model)[0].units
    unit = units["blocks.2.add"]
    assert (unit.layout.name, unit.layout.prefix) == ("NLC", 1)  # type: ignore[union-attr]
    seen: dict[str, Tensor] = {}
    model.blocks[2].norm2.register_forward_pre_hook(lambda _, args: seen.update(after=args[0]))
    before = unit.forward
    unit.forward = lambda x: before(seen.setdefault("before", x))  # type: ignore[assignment]
    model.train()(torch.randn(3, 3, 64, 64))
    assert torch.equal(seen["after"][:, :1], seen["before"][:, :1])
    assert not torch.equal(seen["after"][:, 1:], seen["before"][:, 1:])


def test_layers_narrow_and_override() -> None:
    def units(layers: Any, model: nn.Module | None = None, **options: Any) -> list[str]:
        patched = fxgraft.patch(model or resnet(), "crossnorm", layers=layers, **options, **SMALL)
        return list(fxgraft.grafts(patched)[0].units)

    assert units("layer2") == ["layer2.0.add", "layer2.1.add"]
    assert units(["layer1.0", "layer3.*"]) == ["layer1.0.add", "layer3.0.add", "layer3.1.add"]
    assert units(1) == ["layer1.0.add", "layer1.1.add"]
    assert units("input") == ["input"]
    assert units(["input", "layer4.1.add:pre", "maxpool"]) == ["input", "layer4.1.add:pre", "maxpool"]


def test_the_image_itself_is_restyled() -> None:
    model = fxgraft.patch(nn.Sequential(nn.Conv2d(3, 4, 3)), "crossnorm", layers="input", p=1.0, **SMALL)
    seen: list[Tensor] = []
    model[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.rand(5, 3, 64, 64)
    model.train()(x)
    means = instance_moments(x)[0]
    torch.testing.assert_close(instance_moments(seen[0])[0].sum(0), means.sum(0))
    assert not torch.equal(seen[0], x)


def test_dense_and_plain_positions() -> None:
    dense = timm.create_model("densenet121", num_classes=3, growth_rate=4, block_config=(2, 2))
    for position, node in (("conv1_pre", "cat"), ("conv1_post", "conv1"), ("conv2_post", "conv2")):
        fxgraft.patch(dense, "crossnorm", position=position, name=position, p=1.0, **SMALL)
        units = fxgraft.grafts(dense)[-1].units
        names = [name for name, unit in units.items() if isinstance(unit, CrossNormUnit)]
        assert len(names) == 4
        assert all(name.endswith(node) for name in names)
    with pytest.raises(StructureError, match=r"no residual join in DenseNet.*\n.*4 dense layers"):
        fxgraft.patch(dense, "crossnorm", position="post", name="post", **SMALL)
    plain = torchvision.models.vgg11_bn(num_classes=3)
    for position, count in (("conv", 8), ("norm", 8), ("act", 8)):
        fxgraft.patch(plain, "crossnorm", position=position, name=position, input_size=(3, 64, 64))
        assert len(fxgraft.grafts(plain)[-1].units) == count


def test_segmentation_models() -> None:
    options: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": 3}
    model = torchvision.models.segmentation.fcn_resnet50(**options)
    fxgraft.patch(model, "crossnorm", p=1.0, consistency=True, active=2, input_size=(3, 32, 32))
    assert len(fxgraft.grafts(model)[0].units) == 16
    x, y = torch.randn(2, 3, 64, 64), torch.randint(3, (2, 64, 64))
    parts = fxgraft.losses(model.train(), model(x), y)
    assert parts["crossnorm.consistency"].isfinite()
    assert parts["crossnorm.consistency"] > 0


def test_channels_last_stays_channels_last() -> None:
    model = fxgraft.patch(resnet(), "crossnorm", p=1.0, active=None, **SMALL).to(
        memory_format=torch.channels_last
    )
    shapes: list[bool] = []
    for block in model.layer1:
        block.act2.register_forward_pre_hook(
            lambda _, args: shapes.append(args[0].is_contiguous(memory_format=torch.channels_last))
        )
    model.train()(torch.randn(3, 3, 64, 64).contiguous(memory_format=torch.channels_last))
    assert shapes == [True, True]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"p": 1.5}, ConfigError, r"p must be a share in \[0, 1\], got 1.5"),
        ({"lam": -0.1}, ConfigError, r"lam must be a share in \[0, 1\]"),
        ({"threshold": 2}, ConfigError, "threshold must be a share"),
        ({"beta": 0}, ConfigError, "beta must be a positive number"),
        ({"consistency_weight": -1}, ConfigError, "consistency_weight must be a positive number"),
        ({"active": 0}, ConfigError, "active must be a number of units"),
        (
            {"skip_last": True, "layers": "layer4.1"},
            ConfigError,
            "leaves out 'layer4.1.add', and there is no",
        ),
        ({"active": 9}, ConfigError, r"active=9 units cannot be on, since there are 8: layer1.0.add"),
        (
            {"position": "middle"},
            ConfigError,
            "position must be one of 'pre', 'pre_with_projection', 'residual'",
        ),
        ({"mode": "three"}, ConfigError, "mode must be one of"),
        ({"layers": "layer9"}, SiteError, "no site 'layer9'"),
        ({"layers": []}, SiteError, "No layer was named"),
        ({"layers": "fc"}, SiteError, "'fc' has no positions"),
        ({"layers": "layer1.0.add:middle"}, SiteError, "names no position of a residual join"),
        ({"layers": "layer1.7.add:pre"}, SiteError, "There is no residual join 'layer1.7.add'"),
        ({"layout": "NLC"}, SiteError, "said to be NLC, but its shape is"),
        ({"position": "conv1_pre"}, StructureError, "no dense layer in ResNet.*\n.*8 residual joins"),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], match: str) -> None:
    model = timm.create_model("resnet18", num_classes=4, channels=(8, 12, 16, 20))
    keys = list(model.state_dict())
    with pytest.raises(error, match=match):
        fxgraft.patch(model, "crossnorm", **options, input_size=(3, 64, 64))
    assert type(model) is timm.models.resnet.ResNet
    assert list(model.state_dict()) == keys


def test_maps_of_one_pixel() -> None:
    bottleneck = Net(4, 1, 1)
    with pytest.raises(SiteError, match=r"No 'post' of Net has a map of more than one position: block"):
        fxgraft.patch(bottleneck, "crossnorm", input_size=(4, 1, 1))
    with pytest.raises(SiteError, match="has no positions"):
        fxgraft.patch(bottleneck, "selfnorm", layers="block", input_size=(4, 1, 1))
    fxgraft.patch(bottleneck, "crossnorm", p=1.0, input_size=(4, 8, 8))
    out = bottleneck.train()(torch.randn(3, 4, 1, 1))
    assert out.isfinite().all()


def test_a_crop_of_tokens() -> None:
    model = timm.create_model("test_vit", num_classes=4, img_size=64)
    with pytest.raises(SiteError, match=r"crop='style' needs maps, and 'blocks.0.add' holds NLC"):
        fxgraft.patch(model, CrossNorm(crop="style"), input_size=(3, 64, 64))


@pytest.mark.sweep
def test_the_same_compiled_whichever_units_are_drawn() -> None:
    torch._dynamo.reset()
    model = resnet()
    model = fxgraft.patch(model, "crossnorm", p=0.5, active=2, crop="both", **SMALL).train()
    compiles = 0

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal compiles
        compiles += 1
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(3, 3, 64, 64)
    outs = [compiled(x) for _ in range(2)]
    warm = compiles
    outs += [compiled(x) for _ in range(8)]
    assert compiles == warm
    assert all(out.isfinite().all() for out in outs)
    assert len({round(out.sum().item(), 3) for out in outs}) > 2


def test_copies_act_alike_and_apart() -> None:
    model = fxgraft.patch(resnet(), "crossnorm", p=1.0, active=None, **SMALL).train()
    twin = copy.deepcopy(model)
    assert isinstance(next(iter(fxgraft.grafts(twin)[0].units.values())), CrossNormUnit)
    x = torch.randn(3, 3, 64, 64)
    outs = []
    for each in (model, twin):
        torch.manual_seed(3)
        outs.append(each(x))
    assert torch.equal(*outs)
    assert core.EPS == 1e-5


def test_a_part_that_checkpointing_runs_again_is_refused() -> None:
    model = fxgraft.patch(
        timm.create_model("test_resnet", num_classes=4), "crossnorm", p=1.0, active=None
    ).train()
    inner = model.layer3.forward
    model.layer3.forward = lambda x: torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=True)
    out = model(torch.randn(4, 3, 64, 64))
    with pytest.raises(fxgraft.BypassError, match="activation checkpointing runs a part of it again"):
        out.sum().backward()
