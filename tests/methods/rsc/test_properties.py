"""Random stacks of RSC: what is muted passes nothing, and looking for it leaves no trace."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import fxgraft
from fxgraft.patches.rsc import record
from models.random_models import Recipe, cases, same, stacked
from system.contract.cases import seeded
from system.properties.profiles import profiles

Case = tuple[Recipe, list[dict[str, Any]]]


def _format(x: Tensor) -> tuple[Any, ...]:
    """Shape, dtype and the strides that mean something: a dimension of one entry is never stepped along."""
    strides = [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    return x.shape, x.dtype, strides


@profiles(3, 25, cases())
def test_evaluation_is_the_bare_models_and_sites_keep_their_format(case: Case) -> None:
    """Everything behind a graft sees the strides that it would see without it."""
    recipe, stack = case
    bare, model = recipe.build(), stacked(recipe.build(), recipe, stack)
    x, y = recipe.batch()
    assert seeded(model, x, y, False).differences(seeded(bare, x, y, False)) == []
    formats: list[dict[str, Any]] = []
    for each in (bare, model):
        seen: dict[str, Any] = {}  # the probes call the hooks of later sites too; the real pass comes last
        for options in stack:
            each.get_submodule(options["layer"]).register_forward_hook(
                lambda _, args, out, to=seen, name=options["layer"]: to.update({name: _format(out)})
            )
        out = each.train()(x, **({"target": y} if each is model else {}))
        formats.append({**seen, "": _format(out)})
    assert formats[0] == formats[1]


@profiles(3, 25, cases())
def test_every_parameter_trains_and_muted_entries_pass_nothing(case: Case) -> None:
    recipe, stack = case
    model = recipe.build()
    for each in stack:
        # The value that reaches the unit, and the gradient that comes back out of it.
        _keep(model.get_submodule(each["layer"]))
    stacked(model, recipe, stack)
    x, y = recipe.batch()
    with record(model) as records:
        out = model.train()(x, target=y)
    fxgraft.loss(model, out, y).backward()
    expected = seeded(recipe.build(), x, y, True).gradients
    mine = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert mine.keys() == expected.keys()
    assert [name for name, gradient in mine.items() if not gradient.isfinite().all()] == []
    sites = {site.name: site for site in fxgraft.sites(model, input_size=(3, *recipe.size))}
    for entry in records:
        _, gradient = model.get_submodule(entry.site).__dict__["kept"]
        if gradient is None:
            continue
        # Every entry of a sample that stayed muted, in the dimensions (B, C, *positions) of the mask.
        layout, _, prefix = sites[entry.site].layout.partition(", ")
        if layout in ("NHWC", "NLC"):
            gradient = gradient[:, int(prefix.split()[0]) if prefix else 0 :].movedim(-1, 1)
        chosen = entry.selected.reshape(-1, *[1] * (entry.mask.ndim - 1))
        muted = ((entry.mask == 0) & chosen).expand_as(gradient)
        assert muted.any() == ((entry.mask == 0) & chosen).any()
        assert not gradient[muted].any()


def _keep(module: nn.Module) -> None:
    """Make a module keep the value it hands to its graft and the gradient that value gets."""
    inner = module.forward.__func__  # type: ignore[attr-defined]

    class Keeping(type(module)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = inner(self, *args, **kwargs)
            if isinstance(out, Tensor) and out.requires_grad:  # not while it is traced, nor in the probe
                self.__dict__["kept"] = [out.detach(), None]
                out.register_hook(lambda g, kept=self.__dict__["kept"]: kept.__setitem__(1, g))
            return out

    module.__class__ = Keeping


@profiles(3, 20, cases(), st.sampled_from(["spatial", "channel"]))
def test_the_probe_leaves_no_trace(case: Case, scope: str) -> None:
    """With fixed scopes and ranks by gradient a patched pass draws what the bare one draws, and stores nothing."""
    recipe, stack = case
    stack = [{**each, "scope": scope, "strategy": "top_gradient"} for each in stack]
    bare, model = recipe.build(), stacked(recipe.build(), recipe, stack)
    x, y = recipe.batch()
    for each in (bare, model):
        for p in each.parameters():
            p.grad = torch.ones_like(p)
        for module in each.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()  # frozen, so that muted values do not count either
    kept = [p.grad for p in model.parameters()]
    flags = [module.training for module in model.modules()]
    states = []
    for each, labels in ((bare, {}), (model, {"target": y})):
        torch.manual_seed(3)
        each(x, **labels)
        states.append(torch.get_rng_state())
    assert same(*states)
    assert same(*([buffer.clone() for buffer in each.buffers()] for each in (model, bare)))
    assert [module.training for module in model.modules()] == flags
    assert all(p.grad is g and bool((g == 1).all()) for p, g in zip(model.parameters(), kept, strict=True))
