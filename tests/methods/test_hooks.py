"""Hooks and replaced forwards that change values act where a method does a module's arithmetic, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import fxgraft
from fxgraft.errors import BypassError, ConfigError, MergeError, WrappedModelError
from fxgraft.mixmo import MixMoInput
from fxgraft.patches.diversification.patch import maps
from fxgraft.patches.selfnorm import Gate
from methods.rsc.rsc_tools import close
from models.small import CLASSES, batch, final_mask, recorded

SCALE = torch.linspace(-2.0, 3.0, 12)


class Step(nn.Module):
    """What a hook does, written out as a layer of the twin."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 12, 3, 2, 1)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x)) + F.avg_pool2d(x, 2)[:, :1]


class Tailed(nn.Module):
    """Stem, a block with a site in it, pooling, dropout, classifier; steps wherever a hook could act."""

    PLACES = (
        "block in",
        "block out",
        "conv out",
        "act out",
        "pool in",
        "pool out",
        "drop out",
        "fc in",
        "fc out",
        "out",
    )

    def __init__(self, steps: dict[str, Callable[[Tensor], Tensor]] | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.block = Inner()
        self.pool, self.drop, self.fc = nn.AdaptiveAvgPool2d(1), nn.Dropout(0.0), nn.Linear(12, CLASSES)
        self.steps = steps or {}

    def at(self, place: str, x: Tensor) -> Tensor:
        return self.steps[place](x) if place in self.steps else x

    def until(self, x: Tensor, site: str) -> tuple[Tensor, Tensor]:
        """Return the value at a site, and the block's input."""
        x = self.at("block in", self.stem(x))
        z = self.block.conv(x)
        if site == "block.conv":
            return z, x
        z = self.block.act(self.at("conv out", z))
        return (z, x) if site == "block.act" else (self.at("act out", z) + F.avg_pool2d(x, 2)[:, :1], x)

    def after(self, z: Tensor, x: Tensor, site: str) -> Tensor:
        """Return the logits for a value at a site."""
        if site == "block.conv":
            z = self.block.act(self.at("conv out", z))
        if site != "block":
            z = self.at("act out", z) + F.avg_pool2d(x, 2)[:, :1]
        z = self.at("pool in", self.at("block out", z))
        z = self.at("drop out", self.drop(self.at("pool out", self.pool(z)).flatten(1)))
        return self.at("out", self.at("fc out", self.fc(self.at("fc in", z))))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        return self.fc(self.drop(self.pool(x).flatten(1)))


def built(kind: type[nn.Module] = Tailed, *args: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(*args)


def uneven(x: Tensor) -> Tensor:
    """Change a value so that another class of features leads, at every place alike."""
    if x.ndim == 2 and x.shape[1] == CLASSES:
        return x * torch.linspace(0.2, 3.0, CLASSES) + x.square() / 4
    scale = SCALE if x.shape[1] == 12 else torch.linspace(0.5, 2.0, x.shape[1])
    return x * scale.view(1, -1, *[1] * (x.ndim - 2)) + x.square() / 4


def hooked(model: Any, place: str) -> None:
    """Register a hook that does what the twin's step does there."""
    name, _, side = place.rpartition(" ")
    module = {"": model, "conv": model.block.conv, "act": model.block.act}.get(name)
    module = getattr(model, name) if module is None else module
    if side == "in":
        module.register_forward_pre_hook(lambda _, args: (uneven(args[0]),))
    else:
        module.register_forward_hook(lambda _, args, out: uneven(out))


def check_rsc(model: nn.Module, twin: Tailed, site: str, scope: str) -> None:
    x, y = batch(8)
    out, (entry,) = recorded(model, x, y)
    with torch.no_grad():
        z, inner = twin.until(x, site)
    z.requires_grad_()
    before = twin.after(z, inner, site)
    (g,) = torch.autograd.grad(before.gather(1, y[:, None]).sum(), z)
    pooled = g.mean((2, 3), keepdim=True)
    scores = (pooled if scope == "channel" else (z * pooled).sum(1)).detach().flatten(1)
    count = int((entry.mask[0] == 0).sum())
    assert torch.equal(
        entry.mask.flatten(1), torch.ones_like(scores).scatter(1, scores.topk(count).indices, 0.0)
    )
    after = twin.after(z * entry.mask, inner, site)
    fall = torch.stack([F.softmax(v, 1).gather(1, y[:, None])[:, 0] for v in (before, after)])
    fall = (fall[0] - fall[1] - 1e-4).clamp(min=0)
    assert torch.equal(entry.selected, fall > fall.sort(descending=True).values[4])
    close(out, twin.after(z * final_mask(entry), inner, site))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("site", ["block", "block.conv", "block.act"])
@pytest.mark.parametrize("place", Tailed.PLACES)
def test_rsc_looks_ahead_through_hooks(place: str, site: str, when: str) -> None:
    scope = "channel" if when == "before" else "spatial"
    model = built()
    if when == "before":
        hooked(model, place)
    fxgraft.patch(model, "rsc", layer=site, scope=scope, batch_share=0.5, input_size=(3, 24, 24))
    if when == "after":
        recorded(model, *batch(8))
        hooked(model, place)
    check_rsc(model, built(Tailed, {place: uneven}), site, scope)


def test_the_closed_form_comes_back_where_nothing_acts() -> None:
    model = fxgraft.patch(built(), "rsc", layer="block", input_size=(3, 24, 24))
    assert "closed form" in str(fxgraft.summary(model))
    model.fc.register_forward_hook(lambda *_: None)
    again = fxgraft.patch(fxgraft.unpatch(model), "rsc", layer="block", input_size=(3, 24, 24))
    assert "modules run again" in str(fxgraft.summary(again))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["pool", "drop", "fc"])
def test_rsc_runs_forwards_that_were_replaced(name: str, when: str) -> None:
    def replace(model: Any) -> None:
        module = getattr(model, name)
        module.forward = lambda x, own=module.forward: uneven(own(x))

    model = built()
    if when == "before":
        replace(model)
    fxgraft.patch(model, "rsc", layer="block", scope="channel", batch_share=0.5, input_size=(3, 24, 24))
    if when == "after":
        replace(model)
    check_rsc(model, built(Tailed, {f"{name} out": uneven}), "block", "channel")


def test_rsc_runs_the_hooks_of_all_modules() -> None:
    model = built()
    fxgraft.patch(model, "rsc", layer="block", scope="channel", batch_share=0.5, input_size=(3, 24, 24))
    handle = register_module_forward_hook(
        lambda module, args, out: uneven(out) if module is model.pool else None
    )
    try:
        check_rsc(model, built(Tailed, {"pool out": uneven}), "block", "channel")
    finally:
        handle.remove()


def test_a_site_whose_forward_was_replaced_is_refused() -> None:
    model = fxgraft.patch(built(), "rsc", layer="block", input_size=(3, 24, 24))
    own = model.block.forward
    model.block.forward = lambda x: uneven(own(x))
    x, y = batch(8)
    with pytest.raises(WrappedModelError, match=r"'block' was given a forward of its own"):
        model(x, target=y)


class Returns(Tailed):
    def forward(self, x: Tensor) -> Any:
        return {"features": self.block(self.stem(x)), "logits": super().forward(x)}


def test_rsc_runs_the_hooks_of_a_model_that_returns_several_values() -> None:
    model = fxgraft.patch(
        built(Returns), "rsc", layer="pool", scope="channel", input_size=(3, 24, 24), layout="NCHW"
    )
    x, y = batch(8)
    _, (plain,) = recorded(model, x, y)
    model.register_forward_hook(lambda _, args, out: {**out, "logits": uneven(out["logits"])})
    _, (entry,) = recorded(model, x, y)
    twin = built(Tailed, {"out": uneven})
    z = twin.pool(twin.until(x, "block")[0]).detach().requires_grad_()
    logits = uneven(twin.fc(z.flatten(1)))
    (g,) = torch.autograd.grad(logits.gather(1, y[:, None]).sum(), z)
    assert torch.equal(entry.mask.flatten(1), torch.ones(8, 12).scatter(1, g.flatten(1).topk(4).indices, 0.0))
    assert not torch.equal(entry.selected, plain.selected)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["pool", "drop", "fc"])
@pytest.mark.parametrize("kind", ["hook", "pre-hook", "forward"])
def test_the_diversification_head_refuses_what_acts_on_layers_it_does_not_call(
    name: str, kind: str, when: str
) -> None:
    def act(model: Any) -> None:
        module = getattr(model, name)
        if kind == "hook":
            module.register_forward_hook(lambda _, args, out: uneven(out))
        elif kind == "pre-hook":
            module.register_forward_pre_hook(lambda _, args: (uneven(args[0]),))
        else:
            module.forward = lambda x, own=module.forward: uneven(own(x))

    model, x = built(), batch(8)[0]
    if when == "before":
        act(model)
    fxgraft.patch(model, "diversification", alpha=1.0, input_size=(3, 24, 24))
    if when == "after":
        act(model)
    twin = built()
    act(twin)
    with pytest.raises(BypassError, match=rf"'{name}' of this Tailed has hooks or a forward of its own"):
        model(x)
    with pytest.raises(BypassError, match=name):
        maps(model.eval(), x)
    assert torch.equal(model(x), twin.eval()(x))  # evaluation calls all of them


@pytest.mark.parametrize("place", ["block in", "block out", "out"])
def test_hooks_around_the_diversification_head_act(place: str) -> None:
    model, x = built(), batch(8)[0]
    fxgraft.patch(model, "diversification", alpha=1.0, input_size=(3, 24, 24))
    hooked(model, place)
    twin = built()
    hooked(twin, place)
    torch.testing.assert_close(model(x), twin(x))


def test_mixmo_refuses_inputs_of_their_own_behind_a_pre_hook() -> None:
    x, y = batch(8)
    model = fxgraft.patch(built(), "mixmo", mixing="linear", input_size=(3, 24, 24))
    model.stem.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    model(x, target=y)  # the members of one batch come from what the hook made of it
    with pytest.raises(BypassError, match=r"'stem' has forward pre-hooks"):
        model(MixMoInput((x, x.flip(0))), target=(y, y.flip(0)))


def test_mixmo_folds_under_hooks_as_it_evaluates() -> None:
    x, y = batch(8)
    model = built()
    for place in ("fc in", "fc out"):
        hooked(model, place)
    bare = model.eval()(x)
    model = fxgraft.patch(model.train(), "mixmo", input_size=(3, 24, 24))
    assert torch.equal(model.eval()(x), bare)
    fxgraft.loss(model.train(), model(x, target=y), y).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(parameter.grad)
    close(fxgraft.merge(model).eval()(x), model.eval()(x))


def test_mixmo_refuses_a_parametrization_that_came_later() -> None:
    x, y = batch(8)
    model = fxgraft.patch(built(), "mixmo", input_size=(3, 24, 24))
    nn.utils.parametrizations.spectral_norm(model.stem)
    with pytest.raises(WrappedModelError, match=r"'stem' was wrapped or converted after it was patched"):
        model(x, target=y)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(
    ("tap", "place"), [("block.conv", "act out"), ("pool", "fc in"), ("pool", "pool out")]
)
def test_gam_absorbs_nothing_past_a_hook(tap: str, place: str, later: bool) -> None:
    model = built()
    if not later:
        hooked(model, place)
    fxgraft.patch(model, "gam", layers=[tap, "fc"], input_size=(3, 24, 24))
    if later:
        hooked(model, place)
    for unit in fxgraft.grafts(model)[0].units.values():
        if hasattr(unit, "steps"):
            unit.steps.add_(1)
            unit.moments[0, 1] *= 4.0
    x = batch(8)[0]
    if tap == "block.conv":  # the layer itself gives the value: what it hands on is changed behind it
        close(fxgraft.merge(model).eval()(x), model.eval()(x))
        return
    with pytest.raises(MergeError, match=r"scales the channels at 'pool', and no layer can take that in"):
        fxgraft.merge(model)


def test_a_gate_for_one_image_runs_the_hooks_of_its_norm() -> None:
    gate = Gate(4)
    mean, std = torch.rand(1, 4), torch.rand(1, 4)
    plain = gate(mean, std)
    gate.norm.register_forward_hook(lambda _, args, out: out + 1)
    close(gate(mean, std), 2 * torch.sigmoid(torch.logit(plain / 2) + 1))
    assert gate.norm.training
    assert gate.norm.num_batches_tracked == 0


def test_the_gradient_boosting_loss_stands_in_for_no_criterion_with_hooks() -> None:
    x, y = batch(8)
    model = fxgraft.patch(built(), "diversification", loss="gradient_boosting", input_size=(3, 24, 24))
    criterion = nn.CrossEntropyLoss()
    criterion.register_forward_hook(lambda _, args, out: 10 * out)
    with pytest.raises(ConfigError, match=r"CrossEntropyLoss(?s:.*)together with another criterion"):
        fxgraft.loss(model, model(x), y, criterion)
