"""MixMo on random networks: who is reached from where, what folding keeps, what undoing restores."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxgraft
from fxgraft.patches.mixmo.patch import Encoders
from patches.mixing import last_pairing
from properties.random_models import Recipe, gradients, recipes, same

QUIET: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "derandomize": True,
    "phases": [Phase.generate, Phase.shrink],
}
BINARY = ("cut", "cow", "patchup_hard", "horizontal", "vertical", "channel", "stack_channel")


def options(*mixings: str, members: int = 3) -> Any:
    return st.fixed_dictionaries(
        {
            "members": st.integers(1, members),
            "mixing": st.sampled_from(mixings or ("linear", "sum", "noise", *BINARY)),
            "init": st.sampled_from(["pretrained", "random"]),
            "repetitions": st.integers(1, 2),
            "p": st.just(1.0),
        }
    )


def patched(recipe: Recipe, given_options: dict[str, Any]) -> nn.Module:
    return fxgraft.patch(recipe.build(), "mixmo", input_size=(3, *recipe.size), **given_options)


def unit(model: nn.Module, kind: Any) -> Any:
    (found,) = (each for each in fxgraft.grafts(model)[0].units.values() if isinstance(each, kind))
    return found


def profiles(few: int, many: int) -> Any:
    sweep = pytest.param(many, marks=pytest.mark.sweep, id="many")
    return pytest.mark.parametrize("examples", [pytest.param(few, id="few"), sweep])


@profiles(15, 150)
def test_an_encoder_is_reached_from_its_own_region_only(examples: int) -> None:
    """The image that a member encodes has a gradient only under the cells that the masks give to it."""

    @settings(max_examples=examples, **QUIET)
    @given(recipes(timm_share=4), options(*BINARY, members=2), st.integers(0, 1000))
    def check(recipe: Recipe, chosen: dict[str, Any], seed: int) -> None:
        chosen = {**chosen, "members": 2, "repetitions": 1}
        model = patched(recipe, chosen)
        stem = model.get_submodule(unit(model, Encoders).path)
        out: list[Tensor] = []
        stem.register_forward_hook(lambda module, args, value: out.append(value))
        x, y = recipe.batch(2, seed)
        images = [x.clone().requires_grad_(), x.flip(0).requires_grad_()]
        torch.manual_seed(seed)
        logits = model(fxgraft.MixMoInput(images), target=[y, y])
        masks = last_pairing(model).masks
        (through,) = torch.autograd.grad(fxgraft.loss(model, logits, [y, y]), out[0], retain_graph=True)
        found = torch.autograd.grad((out[0] * through.detach()).sum(), images)
        for mask, gradient in zip(masks, found, strict=True):
            cells = (mask.to(through.dtype) * through) != 0
            assert not gradient[_windows(stem, x, cells) == 0].any()
            assert gradient.any() == cells.any()

    check()


def _windows(stem: Any, x: Tensor, cells: Tensor) -> Tensor:
    """Count for every pixel how many windows of these cells it lies in."""
    shape = (stem.kernel_size, stem.stride, stem.padding, stem.dilation)
    counting = nn.Conv2d(stem.in_channels, stem.out_channels, *shape, bias=False).to(x.dtype)
    nn.init.ones_(counting.weight)
    pixels = x.detach().requires_grad_()
    return torch.autograd.grad(counting(pixels), pixels, cells.to(x.dtype))[0]


@profiles(15, 150)
def test_starts_as_the_bare_network_folds_and_comes_off(examples: int) -> None:
    @settings(max_examples=examples, **QUIET)
    @given(recipes(), options(), st.integers(0, 1000))
    def check(recipe: Recipe, chosen: dict[str, Any], seed: int) -> None:
        bare, model = recipe.build(), patched(recipe, chosen)
        x, y = recipe.batch(3, seed)
        buffers = copy.deepcopy(bare.state_dict())
        starts = chosen["init"] == "pretrained" or chosen["members"] == 1
        with torch.no_grad():
            expected = bare.eval()(x)
            if starts:
                assert same(model.eval()(x), expected)
        out = model.train()(x, target=y)
        rows = 3 * chosen["repetitions"]
        assert out.shape == (chosen["members"], rows, expected.shape[1])
        assert out.dtype == expected.dtype
        fxgraft.loss(model, out, y).backward()
        assert all(g is not None and g.isfinite().all() for g in gradients(model))
        with torch.no_grad():
            for parameter in fxgraft.grafts(model)[0].parameters():
                parameter += 0.1 * torch.randn_like(parameter)
            wanted = model.eval()(x)
            merged = fxgraft.merge(model)
            plain = recipe.build()
            plain.load_state_dict(merged.state_dict(), strict=True)
            torch.testing.assert_close(plain.eval()(x), wanted, rtol=1e-5, atol=1e-5)
            fxgraft.unpatch(model)
            assert list(model.state_dict()) == list(buffers)
            model.load_state_dict(buffers)
            assert same(model.eval()(x), expected)

    check()
