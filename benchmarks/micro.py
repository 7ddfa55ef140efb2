"""The arithmetic of each method alone, on one map: forward and backward, beside what it is to be compared with.

    pytest benchmarks/micro.py -n 0 --benchmark-columns=median,iqr,rounds

A map (32, 256, 14, 14) and logits of 200 classes; names in parentheses are what a method cannot do without: one
multiplication of the map, one cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import fxgraft
from fxgraft.functional.divergence import jensen_shannon
from fxgraft.functional.modulation import modulated
from fxgraft.patches.crossnorm.tensors import crossnorm
from fxgraft.patches.diversification.tensors import damp, draw, suppression_mask
from fxgraft.patches.gam.tensors import discriminator_loss, gaussian_match
from fxgraft.patches.mixmo.tensors import mix
from fxgraft.patches.rsc.tensors import feature_mask, saliency

B, C, SIDE, K = 32, 256, 14, 200


def a_map() -> Tensor:
    return torch.randn(B, C, SIDE, SIDE)


def muted(z: Tensor) -> Tensor:
    """RSC's spatial mask, with the gradient as the closed form has it: equal at every position."""
    scores = saliency(z, z[..., :1, :1].expand_as(z), "spatial")
    return z * feature_mask(scores, z.detach(), "spatial", 1 / 3)


def gated(z: Tensor) -> Tensor:
    return modulated(z, lambda mean, var: (torch.sigmoid(mean + var), None))


def damped(maps: Tensor) -> Tensor:
    return damp(maps, suppression_mask(maps.detach(), draw(maps.detach())))


def mixed(z: Tensor) -> Tensor:
    mask = torch.zeros(B, 1, SIDE, SIDE)
    mask[..., 3:10, 3:10] = 1
    return mix([z, z.flip(0)], [mask, 1 - mask], gain=1.0)


def matched(z: Tensor) -> Tensor:
    return gaussian_match(z, torch.zeros(C), torch.ones(C))


MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "(one multiplication)": lambda z: z * 1.5,
    "crossnorm": lambda z: crossnorm(z, torch.arange(B).roll(1)),
    "selfnorm": gated,
    "rsc: mask": muted,
    "mixmo: cut": mixed,
    "gam: gaussian matching": matched,
}
LABELS = torch.arange(B) % K
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "(cross-entropy)": lambda logits: F.cross_entropy(logits, LABELS),
    "gradient boosting, k = 15": lambda logits: fxgraft.gradient_boosting_cross_entropy(logits, LABELS, k=15),
    "crossnorm: consistency": lambda logits: jensen_shannon(logits, logits.flip(0), logits.roll(1, 0)),
    "gam: discriminators": lambda logits: discriminator_loss(logits[:, :2], logits[:, 2:4]),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def there_and_back(function: Callable[[Tensor], Tensor], value: Tensor) -> Callable[[], None]:
    value.requires_grad_()

    def run() -> None:
        value.grad = None
        function(value).sum().backward()

    return run


@pytest.mark.parametrize("name", MAPS)
def test_map(benchmark: BenchmarkFixture, name: str) -> None:
    benchmark.group = f"a map ({B}, {C}, {SIDE}, {SIDE})"
    benchmark(there_and_back(MAPS[name], a_map()))


def test_class_maps(benchmark: BenchmarkFixture) -> None:
    benchmark.group = f"class maps ({B}, {K}, 7, 7)"
    benchmark(there_and_back(damped, torch.randn(B, K, 7, 7)))


@pytest.mark.parametrize("name", LOSSES)
def test_loss(benchmark: BenchmarkFixture, name: str) -> None:
    benchmark.group = f"logits ({B}, {K})"
    benchmark(there_and_back(LOSSES[name], torch.randn(B, K)))
