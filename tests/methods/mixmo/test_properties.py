"""MixMo on random networks: who is reached from where, what folding keeps, what undoing restores."""

from __future__ import annotations

import copy
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import fxgraft
from models.random_models import Recipe, gradients, recipes, same
from system.properties.profiles import profiles

BINARY = ("cut", "cow", "patchup_hard", "horizontal", "vertical", "channel")


def options(*mixings: str, members: int = 3) -> Any:
    return st.fixed_dictionaries(
        {
            "members": st.integers(1, members),
            "mixing": st.sampled_from(mixings or ("linear", "sum", *BINARY)),
            "init": st.sampled_from(["pretrained", "random"]),
            "repetitions": st.integers(1, 2),
            "p": st.just(1.0),
        }
    )


def patched(recipe: Recipe, given_options: dict[str, Any]) -> nn.Module:
    return fxgraft.patch(recipe.build(), "mixmo", input_size=(3, *recipe.size), **given_options)


@profiles(4, 25, recipes(timm_share=6), options(*BINARY, members=2), st.integers(0, 1000))
def test_an_encoder_is_reached_from_its_own_region_only(
    recipe: Recipe, chosen: dict[str, Any], seed: int
) -> None:
    """No cell of the mixture comes from two images, and an image has a gradient only under its own cells."""
    model = patched(recipe, {**chosen, "members": 2, "repetitions": 1})
    stem = next(
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and any(f"{name}.graft_" in key for key in model.state_dict())
    )
    x, y = recipe.batch(2, seed)

    def mixture(*images: Tensor) -> tuple[Tensor, Tensor]:
        out: list[Tensor] = []
        handle = stem.register_forward_hook(lambda module, args, value: out.append(value))
        torch.manual_seed(seed)
        logits = model(fxgraft.mixmo.MixMoInput(list(images)), target=[y, y])
        handle.remove()
        return out[0], logits

    images = [x.clone().requires_grad_(), x.flip(0).requires_grad_()]
    mixed, logits = mixture(*images)
    through = torch.autograd.grad(fxgraft.loss(model, logits, [y, y]), mixed, retain_graph=True)[0].detach()
    found = torch.autograd.grad((mixed * through).sum(), images)
    with torch.no_grad():
        noise = torch.randn_like(x)
        owned = [
            (mixture(*(each + noise if i == index else each for i, each in enumerate(images)))[0] != mixed)
            for index in range(2)
        ]
    assert not (owned[0] & owned[1]).any()
    for cells, gradient in zip(owned, found, strict=True):
        cells = cells & (through != 0)
        assert not gradient[_windows(stem, x, cells) == 0].any()
        assert gradient.any() == cells.any()


def _windows(stem: Any, x: Tensor, cells: Tensor) -> Tensor:
    """Count for every pixel how many windows of these cells it lies in."""
    shape = (stem.kernel_size, stem.stride, stem.padding, stem.dilation)
    counting = nn.Conv2d(stem.in_channels, stem.out_channels, *shape, bias=False).to(x.dtype)
    nn.init.ones_(counting.weight)
    pixels = x.detach().requires_grad_()
    return torch.autograd.grad(counting(pixels), pixels, cells.to(x.dtype))[0]


@profiles(4, 25, recipes(), options(), st.integers(0, 1000))
def test_starts_as_the_bare_network_folds_and_comes_off(
    recipe: Recipe, chosen: dict[str, Any], seed: int
) -> None:
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
