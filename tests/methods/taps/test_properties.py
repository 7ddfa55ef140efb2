"""Taps on random backbones, sites, dtypes and layouts: exact values, exact copies, and an unchanged network."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

import fxgraft
from models.random_models import Recipe, recipes, same
from system.contract.cases import seeded
from system.properties.profiles import profiles


@profiles(4, 30, recipes(), st.data())
def test_taps(recipe: Recipe, data: st.DataObject) -> None:
    layers = data.draw(st.lists(st.sampled_from(recipe.sites), min_size=1, unique=True))
    detach = data.draw(st.booleans())
    bare, model = recipe.build(), recipe.build()
    seen: dict[str, Any] = {}
    passed: dict[str, torch.Tensor] = {}
    for name in layers:
        bare.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: (out.detach().clone(), out, out._version)})
        )
        model.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: passed.update({name: out})
        )
    fxgraft.patch(model, "taps", layers=layers, detach=detach, input_size=(3, *recipe.size))
    for training in data.draw(st.permutations([True, False])):
        expected = seeded(bare, *recipe.batch(), training)
        assert seeded(model, *recipe.batch(), training).differences(expected) == []
        acts = fxgraft.activations(model)
        assert list(acts) == layers
        assert [name for name in layers if not same(acts[name].detach(), seen[name][0])] == []
        assert [acts[name].requires_grad for name in layers] == [not detach] * len(layers)
        # Copies where a later layer writes over the value, and nowhere else.
        written = [name for name in layers if seen[name][1]._version != seen[name][2]]
        assert [n for n in layers if acts[n].data_ptr() != passed[n].data_ptr()] == written
