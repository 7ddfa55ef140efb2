"""MixStyle and EFDMix against their releases: their numbers, and five steps of training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fxgraft
from fxgraft.patches.mixstyle import mix_histograms, mix_moments
from methods.neighbours import CASES, Release, arrays, check, check_training
from methods.releases import batch, stock

CLASSES, SIZE, PIXELS = 5, 6, 64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("mix", ["random", "crossdomain"])
@pytest.mark.parametrize("file", ["mixstyle", "efdmix"])
def test_the_numbers_of_the_release(file: str, mix: str, dtype: torch.dtype) -> None:
    case = arrays(file, f"{file}_{mix}_0", dtype)
    partner = case["perm_0"]
    if mix == "crossdomain":  # it reverses the batch and permutes each half of that
        backwards = torch.arange(7, -1, -1).chunk(2)
        partner = torch.cat([backwards[0][case["perm_0"]], backwards[1][case["perm_1"]]])
    ratio = case["lam_0"].flatten()
    function = mix_moments if file == "mixstyle" else mix_histograms
    check(case, lambda x: function(x, partner, ratio), 1e-12 if dtype == torch.float64 else CASES[file])


def moments(x: Tensor, partner: Tensor, ratio: Tensor) -> Tensor:
    """By hand, as the paper writes it."""
    mean, std = (
        each.detach() for each in (x.mean((2, 3), True), (x.var((2, 3), keepdim=True) + 1e-6).sqrt())
    )
    own = ratio.view(-1, 1, 1, 1)
    return (x - mean) / std * (own * std + (1 - own) * std[partner]) + own * mean + (1 - own) * mean[partner]


def histograms(x: Tensor, partner: Tensor, ratio: Tensor) -> Tensor:
    """By hand, value by value."""
    flat, given = x.flatten(2), x[partner].flatten(2).sort(stable=True, dim=-1).values
    rank = (flat.unsqueeze(-1) > flat.unsqueeze(-2)).sum(-1)
    twins = (flat.unsqueeze(-1) == flat.unsqueeze(-2)).tril(-1).sum(-1)  # equal values rank by their place
    matched = given.gather(-1, rank + twins).view(x.shape)
    return x + (matched - x.detach()) * (1 - ratio.view(-1, 1, 1, 1))


@pytest.mark.parametrize("match", ["moments", "histogram"])
@pytest.mark.parametrize("mix", ["random", "crossdomain"])
def test_five_steps_of_training(match: str, mix: str) -> None:
    options: dict[str, Any] = {"match": match, "mix": mix, "preset": "pacs"}
    model = fxgraft.patch(stock(CLASSES), "mixstyle", **options, input_size=(3, PIXELS, PIXELS))
    domains = torch.tensor([0, 0, 1, 2, 1, 0])
    by_hand = moments if match == "moments" else histograms

    def change(x: Tensor) -> Tensor:
        if mix == "random":
            partner = torch.randperm(SIZE)
        else:
            chance = torch.rand(SIZE, SIZE)
            for row in range(SIZE):
                chance[row, domains == domains[row]] = -1
            partner = chance.argmax(1)
        ratio = torch._sample_dirichlet(torch.full((SIZE, 2), 0.1))[:, 0]
        return by_hand(x, partner, ratio.double())

    reference = Release(stock(CLASSES), change, (2, 3, 4), 0.5)

    def ours(step: int) -> Tensor:
        x, y = batch(step, SIZE, PIXELS, CLASSES)
        out = model(x, domains=domains) if mix == "crossdomain" else model(x)
        return fxgraft.loss(model, out, y)

    check_training(model, ours, reference, (SIZE, PIXELS, CLASSES))
