"""MixStyle on models: where it goes, with whom an image is mixed, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxgraft
from fxgraft.patches.mixstyle import mix_histograms, mix_moments
from methods.releases import batch, stock

SMALL = (3, 64, 64)
DOMAINS = torch.tensor([0, 0, 1, 2, 1, 0])


def patched(**options: Any) -> nn.Module:
    return fxgraft.patch(stock(5), "mixstyle", input_size=SMALL, **options)


def units(model: nn.Module) -> list[str]:
    return list(fxgraft.grafts(model)[0].units)


@pytest.mark.parametrize(
    ("network", "options", "expected"),
    [
        ("resnet18", {}, ["layer1", "layer2"]),
        ("resnet18", {"stages": 9}, ["layer1", "layer2", "layer3"]),
        ("resnet18", {"layers": -1}, ["layer4"]),
        ("convnext_atto", {}, ["stages.0", "stages.1"]),
        ("vit_tiny_patch16_224", {"preset": "pacs"}, ["blocks.2", "blocks.5", "blocks.8"]),
    ],
)
def test_it_goes_behind_the_first_stages(network: str, options: dict[str, Any], expected: list[str]) -> None:
    with torch.device("meta"):
        model = timm.create_model(network)
    fxgraft.patch(model, "mixstyle", **options)
    assert units(model) == expected
    assert f"mixes moments (random) at {', '.join(expected)}, each" in str(fxgraft.summary(model))


def test_a_map_takes_the_style_of_its_partner() -> None:
    x, order, none = torch.randn(4, 3, 5, 5, dtype=torch.float64), torch.tensor([1, 2, 3, 0]), torch.zeros(4)
    mixed, matched = mix_moments(x, order, none), mix_histograms(x, order, none)
    torch.testing.assert_close(mixed.mean((2, 3)), x[order].mean((2, 3)))
    torch.testing.assert_close(mixed.std((2, 3)), x[order].std((2, 3)), rtol=1e-5, atol=0)
    torch.testing.assert_close(matched.flatten(2).sort().values, x[order].flatten(2).sort().values)
    assert torch.equal(matched.flatten(2).argsort(), x.flatten(2).argsort())
    for mix in (mix_moments, mix_histograms):
        torch.testing.assert_close(mix(x, order, none + 1), x)


def partners(domains: Any, count: int = 6) -> Tensor:
    """Who was mixed with whom, in many passes."""
    model = patched(mix="crossdomain", p=1.0, layers="layer1")
    found: list[Tensor] = []
    (unit,) = fxgraft.grafts(model)[0].units.values()
    patch = unit.config

    def change(x: Tensor, run: Any) -> Tensor:
        found.extend(patch._across(x, run) for _ in range(300))
        return x

    unit.config = type("Watched", (), {"p": 1.0, "change": staticmethod(change)})()
    model(torch.randn(count, *SMALL, dtype=torch.float64), domains=domains)
    return torch.stack(found)


@pytest.mark.parametrize("domains", [DOMAINS, DOMAINS.tolist()], ids=["a tensor", "a list"])
def test_partners_are_of_other_domains_each_as_often(domains: Any) -> None:
    found = partners(domains)
    for image in range(6):
        others = [other for other in range(6) if DOMAINS[other] != DOMAINS[image]]
        counts = found[:, image].bincount(minlength=6)
        assert counts.nonzero().flatten().tolist() == others
        assert (counts[others].double() / 300 - 1 / len(others)).abs().max() < 0.12


def test_an_image_without_another_domain_stays_as_it_is() -> None:
    assert torch.equal(partners(torch.zeros(6, dtype=torch.int32)), torch.arange(6).expand(300, 6))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({}, r"'mixstyle' mixes across domains; the call gave shape \(0, 0\)(?s:.*)domains=d"),
        ({"domains": DOMAINS[:5]}, r"gave shape \(5,\) for 6 images(?s:.*)mix=.random"),
        ({"domains": list("aabbcc")}, "Pass one number per image"),
        ({"domains": [0, None, 1, 1, 2, 2]}, "Pass one number per image"),
        ({"domains": [0, 0, 1, 1, 2, float("nan")]}, r"given torch.float32 for them(?s:.*)domains=d.long"),
    ],
)
def test_domains_that_are_missing_or_too_few(given: dict[str, Any], match: str) -> None:
    model, (x, _) = patched(mix="crossdomain", p=1.0), batch(0, 6, 64, 5)
    with pytest.raises(fxgraft.TargetError, match=match):
        model(x, **given)
    model.eval()(x, **given)  # which mixes nothing


class Again(nn.Module):
    """Runs a part again in the backward pass, once it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.head, self.again = (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()),
            nn.Linear(4, 2),
            False,
        )

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.part, x, use_reentrant=False) if self.again else self.part(x)
        return self.head(x.mean((2, 3)))


def test_what_checkpointing_runs_again_is_mixed_as_before() -> None:
    model, x, found = Again(), torch.randn(4, 3, 8, 8), []
    fxgraft.patch(model, "mixstyle", layers="part", p=0.5, input_size=(3, 8, 8))
    for model.again in (False, True):
        for seed in range(6):
            torch.manual_seed(seed)
            model(x).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    torch.testing.assert_close(found[1], found[0])


def test_domains_are_gone_when_checkpointing_runs_a_part_again() -> None:
    model, x = Again(), torch.randn(4, 3, 8, 8)
    fxgraft.patch(model, "mixstyle", layers="part", p=1.0, mix="crossdomain", input_size=(3, 8, 8))
    model.again = True
    with pytest.raises(fxgraft.BypassError, match="activation checkpointing"):
        model(x, domains=torch.arange(4)).sum().backward()


def test_a_loss_that_runs_the_batch_again_gives_the_domains_again() -> None:
    model, (x, y) = patched(mix="crossdomain", p=1.0), batch(0, 6, 64, 5)
    fxgraft.patch(model, "crossnorm", consistency=True, p=1.0, input_size=SMALL)
    assert fxgraft.losses(model, model(x, domains=DOMAINS), y)["crossnorm.consistency"] > 0


@pytest.mark.parametrize("rows", [0, 1])
def test_a_batch_without_another_image_draws_nothing(rows: int) -> None:
    model, x = patched(p=1.0).train(), torch.randn(rows, *SMALL, dtype=torch.float64)
    bare = stock(5)
    for each in (bare, model):
        for module in each.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    state = torch.get_rng_state()
    assert torch.equal(model(x), bare(x))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"p": 1.5}, fxgraft.ConfigError, r"p must be a share in \[0, 1\]"),
        ({"alpha": 0}, fxgraft.ConfigError, "alpha must be a positive number"),
        ({"stages": 0}, fxgraft.ConfigError, "stages must be a whole number"),
        ({"mix": "other"}, fxgraft.ConfigError, "mix must be one of 'random', 'crossdomain'"),
        ({"layers": "global_pool"}, fxgraft.SiteError, "'global_pool' has no positions(?s:.*)earlier layer"),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        patched(**options)
