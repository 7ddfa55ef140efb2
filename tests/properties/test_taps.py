"""Taps on random backbones, sites, dtypes and layouts: exact values, exact copies, and an unchanged network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fxgraft
from properties.random_models import Recipe, gradients, recipes, same
from properties.test_invariants import QUIET


def step(model: Any, recipe: Recipe, training: bool) -> list[Any]:
    """One seeded pass: output, gradients, random state, statistics of BatchNorm."""
    model.train(training)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    out = model(recipe.batch()[0])
    state = torch.get_rng_state()
    out.square().sum().backward()
    return [out.detach(), gradients(model), state, [b.clone() for b in model.buffers()]]


@pytest.mark.parametrize("examples", [15, pytest.param(300, marks=pytest.mark.sweep)])
def test_taps(examples: int) -> None:
    @settings(max_examples=examples, **QUIET)
    @given(recipes(), st.data())
    def check(recipe: Recipe, data: st.DataObject) -> None:
        layers = data.draw(st.lists(st.sampled_from(recipe.sites), min_size=1, unique=True))
        detach = data.draw(st.booleans())
        size = (3, *recipe.size)
        bare = recipe.build()
        model = fxgraft.patch(recipe.build(), "taps", layers=layers, detach=detach, input_size=size)
        seen: dict[str, Any] = {}
        for name in layers:
            bare.get_submodule(name).register_forward_hook(
                lambda _, args, out, name=name: seen.update({name: (out.detach().clone(), out, out._version)})
            )
        units = fxgraft.grafts(model)[0].units
        for training in data.draw(st.permutations([True, False])):
            assert same(step(model, recipe, training), step(bare, recipe, training))
            acts = fxgraft.activations(model)
            assert list(acts) == layers
            assert [name for name in layers if not same(acts[name].detach(), seen[name][0])] == []
            assert [acts[name].requires_grad for name in layers] == [not detach] * len(layers)
            written = [out._version != version for _, out, version in seen.values()]
            assert [units[name].copies[training] for name in seen] == written

    check()
