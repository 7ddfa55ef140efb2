"""Properties of the arithmetic of activation matching."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck

from fxgraft import ConfigError
from fxgraft.patches.gam.discriminator import ByTap, Discriminator, check_discriminator
from fxgraft.patches.gam.tensors import (
    channel_moments,
    discriminator_accuracy,
    discriminator_loss,
    gaussian_match,
    mapping_loss,
    update_moments,
    weight_drift,
)

GANS = pytest.mark.parametrize("gan", ["jsd", "lsgan"])
OUTPUTS = {"jsd": 2, "lsgan": 1}


@st.composite
def activations(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Source and target activations with channels of different scales, and where the channels are."""
    dim = draw(st.sampled_from([1, -1]))
    channels, spatial = draw(st.integers(1, 5)), draw(st.sampled_from([(), (3,), (2, 3), (1, 1)]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def one() -> Tensor:
        batch = draw(st.integers(2, 6))
        x = torch.randn(batch, channels, *spatial, generator=g, dtype=torch.float64)
        shape = (1, channels, *[1] * len(spatial))
        scale = torch.logspace(-2, 2, channels, dtype=torch.float64).view(shape)
        x = x * scale + 3 * torch.randn(shape, generator=g, dtype=torch.float64)
        return x.movedim(1, -1).contiguous() if dim == -1 else x

    return one(), one(), dim


@settings(max_examples=60, deadline=None)
@given(activations(), st.booleans())
def test_matched_channels_have_the_sources_mean_and_deviation(drawn: Any, unbiased: bool) -> None:
    source, target, dim = drawn
    options = {"dim": dim, "unbiased": unbiased, "eps": 0.0}
    moments = channel_moments(source, **options)
    matched = gaussian_match(target, *moments, **options)
    assert matched.shape == target.shape
    for found, wanted in zip(channel_moments(matched, **options), moments, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    again = gaussian_match(matched, *moments, **options)
    torch.testing.assert_close(again, matched, rtol=1e-7, atol=1e-8)


@settings(max_examples=40, deadline=None)
@given(activations(), st.sampled_from([1e-5, 1e-2]))
def test_eps_bounds_the_deviation(drawn: Any, eps: float) -> None:
    source, target, dim = drawn
    mean, std = channel_moments(source, dim, eps=eps)
    matched = gaussian_match(target, mean, std, dim=dim, eps=eps)
    new_mean, new_std = channel_moments(matched, dim)
    own = channel_moments(target, dim)[1]
    torch.testing.assert_close(new_mean, mean)
    torch.testing.assert_close(new_std, std * own / (own.square() + eps).sqrt())


def test_batches_with_equal_moments_pass_unchanged():
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(gaussian_match(x, *channel_moments(x, eps=1e-5)), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_a_constant_channel_becomes_the_sources_mean(eps: float):
    source = torch.randn(5, 2, 3)
    target = torch.stack((torch.full((4, 3), 7.0), torch.randn(4, 3)), 1).requires_grad_()
    mean, std = channel_moments(source, eps=eps)
    matched = gaussian_match(target, mean, std, eps=eps)
    torch.testing.assert_close(matched[:, 0], mean[0].expand(4, 3))
    (matched * torch.randn(4, 2, 3)).sum().backward()
    assert torch.isfinite(target.grad).all()


def test_gradients_of_matching_and_moments():
    t, s = torch.randn(3, 2, 4, dtype=torch.float64), torch.randn(5, 2, 4, dtype=torch.float64)
    t.requires_grad_()
    s.requires_grad_()

    def run(t: Tensor, s: Tensor) -> Tensor:
        return gaussian_match(t, *channel_moments(s, eps=1e-5))

    assert gradcheck(run, (t, s))
    constant = torch.ones(3, 2, requires_grad=True)
    channel_moments(constant)[1].sum().backward()
    assert torch.equal(constant.grad, torch.zeros(3, 2))


def test_given_target_statistics_are_used():
    t = torch.randn(4, 3)
    mean, std, mean_t, std_t = torch.randn(3), torch.rand(3) + 1, torch.randn(3), torch.rand(3) + 1
    found = gaussian_match(t, mean, std, target_mean=mean_t, target_std=std_t)
    torch.testing.assert_close(found, (t - mean_t) / std_t * std + mean)
    assert gaussian_match(t[:1], mean, std, target_mean=mean_t, target_std=std_t).shape == (1, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype):
    x = (torch.randn(64, 3, 8, 8) * 30 + 200).to(dtype)
    mean, std = channel_moments(x)
    assert mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close((mean, std), channel_moments(x.float()))
    assert gaussian_match(x, mean, std).dtype == dtype


@settings(max_examples=40, deadline=None)
@given(activations())
def test_running_moments_of_even_weights_are_those_of_all_values(drawn: Any) -> None:
    x, _, dim = drawn
    first, second = x[: len(x) // 2], x[len(x) // 2 : 2 * (len(x) // 2)]
    moments = torch.full((2, x.shape[dim]), math.pi, dtype=torch.float64)
    moments = update_moments(moments, first, 1.0, dim)
    moments = update_moments(moments, second, 0.5, dim)
    mean, std = channel_moments(torch.cat((first, second)), dim)
    torch.testing.assert_close(moments, torch.stack((mean, std.square())))


def test_running_moments_take_a_batch_of_one():
    rows = torch.randn(50, 3, dtype=torch.float64)
    moments = torch.zeros(2, 3, dtype=torch.float64)
    for count, row in enumerate(rows):
        moments = update_moments(moments, row[None], 1 / (count + 1))
    torch.testing.assert_close(moments, torch.stack((rows.mean(0), rows.var(0, correction=0))))


def decisions(gan: str, batch: int, *positions: int) -> Tensor:
    return torch.randn(batch, OUTPUTS[gan], *positions, dtype=torch.float64, requires_grad=True)


@GANS
@pytest.mark.parametrize("positions", [(), (3, 2)])
def test_losses_are_means_over_all_decisions(gan: Any, positions: tuple[int, ...]):
    s, t = decisions(gan, 3, *positions), decisions(gan, 5, *positions)
    rows = torch.cat([x.detach().movedim(1, -1).reshape(-1, OUTPUTS[gan]) for x in (s, t)])
    labels = torch.tensor([0] * (len(rows) * 3 // 8) + [1] * (len(rows) * 5 // 8))

    def expected(rows: Tensor, labels: Tensor) -> Tensor:
        if gan == "jsd":
            return nn.functional.cross_entropy(rows, labels)
        return (rows[:, 0] - labels).square().mean()

    torch.testing.assert_close(discriminator_loss(s, t, gan).detach(), expected(rows, labels))
    both = mapping_loss(t, s, gan=gan, invert="both")
    torch.testing.assert_close(both.detach(), expected(rows, 1 - labels))
    alone = mapping_loss(t, gan=gan)
    target_rows = rows[labels == 1]
    torch.testing.assert_close(alone.detach(), expected(target_rows, torch.zeros(len(target_rows)).long()))
    (halved,) = torch.autograd.grad(both, t)
    (whole,) = torch.autograd.grad(alone, t)
    torch.testing.assert_close(halved, whole * 5 / 8)
    assert gradcheck(lambda s, t: discriminator_loss(s, t, gan), (s, t))


@GANS
def test_losses_pull_in_opposite_directions(gan: Any):
    s, t = decisions(gan, 4), decisions(gan, 4)
    (discriminating,) = torch.autograd.grad(discriminator_loss(s, t, gan), t)
    (mapping,) = torch.autograd.grad(mapping_loss(t, gan=gan), t)
    between = (t.detach() > 0) & (t.detach() < 1) if gan == "lsgan" else torch.ones_like(t).bool()
    assert (discriminating * mapping)[between].max() < 0


@GANS
def test_large_decisions_stay_finite(gan: Any):
    s, t = (decisions(gan, 4).detach().float() * 1e4 for _ in range(2))
    t.requires_grad_()
    loss = discriminator_loss(s, t, gan) + mapping_loss(t, gan=gan)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(t.grad).all()


def test_accuracy():
    right, wrong, tie = (torch.tensor([[a, b]]) for a, b in ((2.0, 1.0), (1.0, 2.0), (1.0, 1.0)))
    assert discriminator_accuracy(right, wrong) == 1
    assert discriminator_accuracy(wrong, right) == 0
    assert discriminator_accuracy(tie, tie) == 0.5
    # Domains count the same, whatever their sizes.
    assert discriminator_accuracy(torch.cat((right, right, right)), right) == 0.5
    assert discriminator_accuracy(torch.tensor([[0.1]]), torch.tensor([[0.9], [0.2]]), "lsgan") == 0.75


shapes = st.lists(st.sampled_from([(3,), (2, 3), (1,), (2, 1, 3, 3), ()]), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None)
@given(
    shapes, st.sampled_from(["mean", "sum"]), st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
)
def test_no_drift_and_no_gradient_at_equal_weights(shapes: Any, convention: Any, dtype: torch.dtype) -> None:
    source = [torch.randn(shape).to(dtype) for shape in shapes]
    target = [x.clone().requires_grad_() for x in source]
    drift = weight_drift(source, target, convention)
    drift.backward()
    assert drift == 0
    for weight in target:
        assert torch.equal(weight.grad, torch.zeros_like(weight))


@settings(max_examples=40, deadline=None)
@given(shapes, st.sampled_from(["mean", "sum"]))
def test_drift_is_what_the_formula_says(shapes: Any, convention: Any) -> None:
    source = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    target = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    pairs = zip(source, target, strict=True)
    plain = torch.stack([getattr((t - s).square(), convention)() for s, t in pairs]).sum()
    drift = weight_drift(source, target, convention)
    torch.testing.assert_close(drift, plain)
    for found, wanted in zip(
        torch.autograd.grad(3 * drift, target), torch.autograd.grad(3 * plain, target), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="1 value per channel"):
        channel_moments(torch.randn(1, 4))
    assert channel_moments(torch.randn(1, 4, 2, 2))[0].shape == (4,)
    with pytest.raises(ConfigError, match="target_mean and target_std together"):
        gaussian_match(torch.randn(2, 4), torch.zeros(4), torch.ones(4), target_mean=torch.zeros(4))
    with pytest.raises(ConfigError, match="pass the source decisions"):
        mapping_loss(torch.randn(2, 2), invert="both")
    with pytest.raises(ConfigError, match="do not match in number and shape"):
        weight_drift([torch.randn(2)], [torch.randn(3)])
    with pytest.raises(ConfigError, match="got 0 and 0"):
        weight_drift([], [])


def test_discriminators_decide_every_position_by_itself():
    maps = torch.randn(2, 6, 4, 5)
    made = Discriminator(6, 2, 2, hidden=7)
    assert made(maps).shape == (2, 2, 4, 5)
    torch.testing.assert_close(made(maps)[..., 1, 2], made(maps[..., 1:2, 2:3])[..., 0, 0])
    tokens = Discriminator(6, 1, hidden=7, activation="leaky")
    assert tokens(maps.movedim(1, -1)).shape == (2, 4, 5, 1)
    assert [each.out_features for each in Discriminator(6, 2).layers] == [500, 500, 2]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (print, "must be a torch.nn.Module"),
        (nn.Linear(3, 2), "does not take a value of shape"),
        (nn.Linear(5, 3), r"returns \(2, 4, 3\) .*\n.*2 number"),
        (nn.LSTM(5, 2), "returns tuple"),
        (nn.Sequential(nn.Linear(5, 2), nn.Flatten(0)), r"returns \(16,\)"),
    ],
)
def test_discriminators_are_checked(module: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        check_discriminator(module, torch.randn(2, 4, 5), 2, -1, "stage")


def test_a_check_leaves_the_discriminator_as_it_is():
    module = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 2))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    check_discriminator(module, torch.randn(2, 5), 2, 1, "head")
    assert all(each.training for each in module.modules())
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])


def test_modules_by_tap_know_names_with_dots():
    held = ByTap()
    held["layer1.0"], held["fc"] = nn.Linear(1, 2), nn.Linear(2, 3)
    assert list(held) == list(held.keys()) == ["layer1.0", "fc"]
    assert [name for name, _ in held.items()] == ["layer1.0", "fc"]
    assert "layer1.0" in held
    assert "layer1" not in held
    assert held["layer1.0"].out_features == 2
    again = ByTap()
    again["layer1.0"], again["fc"] = nn.Linear(1, 2), nn.Linear(2, 3)
    again.load_state_dict(held.state_dict())
    assert torch.equal(again["fc"].weight, held["fc"].weight)
