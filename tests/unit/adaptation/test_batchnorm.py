"""Adaptive batch normalisation: the statistics are those of the images, and nothing else changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxgraft
from fxgraft.errors import ConfigError
from models.small import exactly, net

SIZE = (3, 24, 24)


def batches(count: int = 3, size: int = 4, seed: int = 5) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(size, 3, 24, 24, generator=g) + 1 for _ in range(count)]


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 1000))
def test_the_first_layer_gets_the_average_moments_of_the_batches(count: int, size: int, seed: int) -> None:
    model, loader = net(dropout=0.5), batches(count, size, seed)
    fxgraft.adapt_batchnorm(model, loader)
    with torch.no_grad():
        values = [model.layer1[0](x) for x in loader]
    norm = norms(model)[0]
    torch.testing.assert_close(norm.running_mean, torch.stack([v.mean((0, 2, 3)) for v in values]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([v.var((0, 2, 3)) for v in values]).mean(0))
    assert norm.num_batches_tracked == count


def test_it_is_what_torch_does_for_averaged_weights():
    model = net()
    twin = copy.deepcopy(model)
    assert fxgraft.adapt_batchnorm(model, batches()) is model
    torch.optim.swa_utils.update_bn(batches(), twin)
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_else_changes(training: bool):
    model = net(dropout=0.5).train(training)
    model.layer1[1].eval()
    model.fc.weight.requires_grad_(False)
    before, modes = state(model), {n: m.training for n, m in model.named_modules()}
    random = torch.get_rng_state()
    fxgraft.adapt_batchnorm(model, batches(), momentum=0.3)
    exactly(torch.get_rng_state(), random)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert all(p.grad is None for p in model.parameters())
    assert [norm.momentum for norm in norms(model)] == [0.1, 0.1]
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if "running" in key or "num_batches" in key}


def uneven(*sizes: int) -> list[Tensor]:
    """Batches of these sizes whose images differ from each other as a whole."""
    g = torch.Generator().manual_seed(6)
    images = torch.randn(sum(sizes), 3, 24, 24, generator=g) + torch.randn(sum(sizes), 3, 1, 1, generator=g)
    return list(images.split(sizes))


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5}, {"reset": False}], ids=str)
def test_batches_count_by_their_images(options: Any) -> None:
    """A last batch of one image weighs as one image, and not as a batch."""
    model, loader = net(), uneven(32, 32, 1)
    before = norms(model)[0].running_var.clone()
    fxgraft.adapt_batchnorm(model, loader, **options)
    with torch.no_grad():
        found = [model.layer1[0](x).var((0, 2, 3)) for x in loader]
    if options:
        share = options.get("momentum", 0.1)
        expected = (
            found[0] * share + before * (1 - share) if "reset" in options else found[0] * share + 1 - share
        )
        for var, size in zip(found[1:], (32, 1), strict=True):
            expected = torch.lerp(expected, var, share * size / 32)
    else:
        expected = sum(var * len(x) for var, x in zip(found, loader, strict=True)) / 65
    torch.testing.assert_close(norms(model)[0].running_var, expected)


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("sizes", [(5, 5, 1), (1,) * 4, (11,)], ids=str)
def test_exact_statistics_are_those_of_all_images_layer_by_layer(
    sizes: tuple[int, ...], patched: bool
) -> None:
    model, loader = net(dropout=0.5), uneven(*sizes)
    if patched:
        fxgraft.patch(model, "crossnorm", position="norm", p=1.0, active=None, input_size=SIZE)
        fxgraft.patch(model, "selfnorm", position="norm", input_size=SIZE)
    assert fxgraft.adapt_batchnorm(model, loader, exact=True) is model
    model.eval()
    for norm in [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]:
        seen: list[Tensor] = []
        handle = norm.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            for x in loader:
                model(x)
        handle.remove()
        values = torch.cat(seen).transpose(0, 1).flatten(1).double()
        torch.testing.assert_close(norm.running_mean.double(), values.mean(1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.running_var.double(), values.var(1), rtol=1e-5, atol=1e-6)
        assert norm.num_batches_tracked == len(sizes)
        assert not norm._forward_pre_hooks


class Twice(nn.Module):
    """Calls its norm twice, and has one that forgets to count."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.uncounted = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.uncounted.num_batches_tracked = None

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.norm(3 * x) + self.uncounted(x)


def test_layers_that_run_twice_or_do_not_count() -> None:
    model, loader = Twice(), uneven(6, 2)
    fxgraft.adapt_batchnorm(model, loader)
    found = [sum((k * x).mean((0, 2, 3)) for k in (1, 3)) / 2 for x in loader]
    torch.testing.assert_close(model.norm.running_mean, (6 * found[0] + 2 * found[1]) / 8)
    torch.testing.assert_close(model.uncounted.running_mean, torch.cat(loader).mean((0, 2, 3)))
    assert model.norm.num_batches_tracked == 4
    fxgraft.adapt_batchnorm(model, loader, exact=True)
    whole = torch.cat(loader)
    values = torch.cat([whole, 3 * whole])
    torch.testing.assert_close(model.norm.running_var, values.var((0, 2, 3)))


def test_without_a_reset_the_old_statistics_count():
    model, (x,) = net(), batches(1)
    norm = norms(model)[0]
    before = norm.running_mean.clone()
    moved = model.layer1[0](x).mean((0, 2, 3)).detach()
    for momentum, share in ((None, 0.1), (0.4, 0.4)):
        twin = copy.deepcopy(model)
        fxgraft.adapt_batchnorm(twin, [x], reset=False, momentum=momentum)
        torch.testing.assert_close(norms(twin)[0].running_mean, (1 - share) * before + share * moved)


@pytest.mark.parametrize(
    "wrap", [lambda x: (x, torch.zeros(4)), lambda x: {"image": x, "label": 1}, lambda x: {"x": x}]
)
def test_batches_of_other_forms(wrap: Any):
    model, twin = net(), net()
    fxgraft.adapt_batchnorm(model, [wrap(x) for x in batches()], device="cpu")
    fxgraft.adapt_batchnorm(twin, batches())
    exactly(norms(model)[1].running_var, norms(twin)[1].running_var)


def test_patched_models():
    model, twin = net(), net()
    fxgraft.patch(model, "crossnorm", position="norm", p=1.0, active=None, input_size=SIZE)
    fxgraft.patch(model, "rsc", layer="layer1", input_size=SIZE)
    fxgraft.patch(model, "gam", layers=["act2", "fc"], input_size=SIZE)
    source = state(fxgraft.patches.gam.source(model))
    for each in (model, twin):
        fxgraft.adapt_batchnorm(each.train(), batches())
    for key, value in twin.state_dict().items():
        exactly(model.state_dict()[key], value)
    for key, value in fxgraft.patches.gam.source(model).state_dict().items():
        exactly(value, source[key])


def test_gates_of_selfnorm_adapt_too():
    model = net()
    fxgraft.patch(model, "selfnorm", position="norm", input_size=SIZE)
    before = state(model)
    fxgraft.adapt_batchnorm(model, batches())
    gates = [key for key in before if "graft_" in key and "running_mean" in key]
    assert gates
    assert not any(torch.equal(model.state_dict()[key], before[key]) for key in gates)


def test_timm_norms_with_activation():
    model = timm.create_model("efficientnet_b0", num_classes=3)
    norm = model.bn1
    fxgraft.adapt_batchnorm(model.eval(), batches(1, 2))
    value = model.conv_stem(batches(1, 2)[0])
    torch.testing.assert_close(norm.running_mean, value.mean((0, 2, 3)).detach())


class Unreached(nn.Module):
    """Has a branch that evaluation never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.training_only = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.training_only(self.norm(x)) if self.training else self.norm(x)


def test_layers_that_no_image_reaches_keep_their_statistics():
    model = Unreached()
    model.training_only.running_mean.fill_(7)
    fxgraft.adapt_batchnorm(model, batches())
    exactly(model.training_only.running_mean, torch.full((3,), 7.0))
    assert (model.norm.running_mean - 1).abs().max() < 0.2


def one_value() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2))


def overflowing() -> nn.Module:
    model = net()
    model.layer1[0].weight.data.fill_(3e38)
    return model


@pytest.mark.parametrize(
    ("build", "loader", "options", "error", "message"),
    [
        (lambda: nn.Linear(2, 2), batches(), {}, fxgraft.StructureError, "no BatchNorm with running"),
        (
            lambda: nn.BatchNorm2d(3, track_running_stats=False),
            batches(),
            {},
            fxgraft.StructureError,
            "no Batch",
        ),
        (net, [], {}, fxgraft.ConfigError, "gave no batches"),
        (net, iter([]), {}, fxgraft.ConfigError, "can be used once"),
        (net, [*batches(), {"label": 1}], {}, fxgraft.ConfigError, "holds no images"),
        (net, batches(), {"momentum": 0}, fxgraft.ConfigError, r"in \(0, 1\]; got 0"),
        (net, [*batches(), batches()[0] / 0], {}, fxgraft.ConfigError, "NaN or infinity, in batch 3 and 0"),
        (
            net,
            [batches()[0] * torch.nan] * 2,
            {"exact": True},
            fxgraft.ConfigError,
            "NaN .* in batch 0 and 1",
        ),
        (
            overflowing,
            batches(),
            {},
            fxgraft.ConfigError,
            "statistics of 'layer1.1' and of 1 others are not finite",
        ),
        (
            net,
            batches(),
            {"exact": True, "momentum": 0.1},
            fxgraft.ConfigError,
            "over all images, and momentum=",
        ),
        (net, batches(), {"exact": True, "reset": False}, fxgraft.ConfigError, "or reset=False asks"),
        (
            net,
            iter(batches()),
            {"exact": True},
            fxgraft.ConfigError,
            "gives its batches once, and exact=True",
        ),
        (one_value, batches(1, 1), {"exact": True}, fxgraft.ConfigError, "All images together leave"),
        (
            one_value,
            [*batches(), *batches(1, 1)],
            {},
            fxgraft.ConfigError,
            "batch of 1 leaves(.|\n)*drop_last",
        ),
    ],
)
def test_what_cannot_be_estimated_changes_nothing(
    build: Any, loader: Any, options: Any, error: type[Exception], message: str
):
    model = build()
    before, modes = state(model), [m.training for m in model.modules()]
    with pytest.raises(error, match=message):
        fxgraft.adapt_batchnorm(model, loader, **options)
    for key, value in model.state_dict().items():
        exactly(value, before[key])
    assert [m.training for m in model.modules()] == modes
    assert all(norm.momentum == 0.1 for norm in norms(model))


@pytest.mark.parametrize(
    ("loader", "options", "message"),
    [
        (None, {}, "The loader gives batches of images.*NoneType does not"),
        (torch.zeros(4, 3, 8, 8), {}, "The loader gives batches of images.*Tensor does not"),
        (torch.utils.data.TensorDataset(torch.zeros(4, 3, 8, 8)), {}, "TensorDataset does not"),
        ([torch.zeros(4, 3, 8, 8)], {"momentum": "a"}, "momentum is the share of each new batch"),
        ([torch.zeros(4, 3, 8, 8)], {"device": "nowhere"}, "no device 'nowhere'"),
    ],
)
def test_what_is_no_loader_and_no_option(loader: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fxgraft.adapt_batchnorm(net(), loader, **options)
