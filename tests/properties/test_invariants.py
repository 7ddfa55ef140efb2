"""What holds for every backbone, site, stack, shape, dtype and layout; checked on random ones."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from typing import Any

import pytest
import timm
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import fxgraft
from fxgraft.patches.rsc.patch import record
from fxgraft.patches.rsc.tensors import apply_selection
from properties.random_models import Recipe, cases, gradients, same, stacked

Case = tuple[Recipe, list[dict[str, Any]]]
QUIET = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "derandomize": True,
    "phases": [Phase.generate, Phase.shrink],
}


def profiles(few: int, many: int) -> Any:
    """Run a property on `few` examples by default and on `many` in the sweep."""

    def parametrize(test: Any) -> Any:
        def run(examples: int) -> None:
            settings(max_examples=examples, **QUIET)(given(cases(), st.data())(test))()

        run.__name__ = test.__name__
        run.__doc__ = test.__doc__
        sweep = pytest.param(many, marks=pytest.mark.sweep, id="many")
        return pytest.mark.parametrize("examples", [pytest.param(few, id="few"), sweep])(run)

    return parametrize


def pass_through(model: nn.Module, recipe: Recipe, training: bool, seed: int = 5) -> list[Any]:
    """One seeded pass with its gradients: output, gradients, random state."""
    x, y = recipe.batch()
    x.requires_grad_()
    model.train(training)
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(x, target=y) if fxgraft.grafts(model) else model(x)
    fxgraft.loss(model, out, y).backward()
    return [out.detach(), x.grad, gradients(model), torch.get_rng_state()]


def statistics(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


@profiles(12, 200)
def test_evaluation_is_bitwise_the_bare_models(case: Case, data: st.DataObject) -> None:
    """Invariants 1 and 4."""
    recipe, stack = case
    bare, model = recipe.build(), stacked(recipe.build(), recipe, stack)
    assert list(model.state_dict()) == list(bare.state_dict())
    assert same(pass_through(model, recipe, False), pass_through(bare, recipe, False))
    assert same(statistics(model), statistics(bare))
    x, y = recipe.batch(2)
    with torch.no_grad():
        expected = bare.train()(x)
        trained = model.train()(x, target=y)
    assert (trained.shape, trained.dtype, trained.device) == (expected.shape, expected.dtype, expected.device)
    assert trained.stride() == expected.stride()


def _format(x: torch.Tensor) -> tuple[Any, ...]:
    """Shape, dtype and the strides that mean something: a dimension of one entry is never stepped along."""
    strides = [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    return x.shape, x.dtype, strides


@profiles(12, 200)
def test_sites_keep_their_memory_format(case: Case, data: st.DataObject) -> None:
    """Invariant 4, at the sites: everything behind a graft sees the strides it would see without it."""
    recipe, stack = case
    formats: list[dict[str, Any]] = []
    for model in (recipe.build(), stacked(recipe.build(), recipe, stack)):
        seen: dict[str, Any] = {}  # the probes call the hooks of later sites too; the real pass comes last
        for each in stack:
            model.get_submodule(each["layer"]).register_forward_hook(
                lambda _, args, out, to=seen, name=each["layer"]: to.update({name: _format(out)})
            )
        x, y = recipe.batch()
        model(x, **({"target": y} if fxgraft.grafts(model) else {}))
        formats.append(seen)
    assert formats[0] == formats[1]


@profiles(10, 150)
def test_unpatched_is_the_same_model_in_any_order(case: Case, data: st.DataObject) -> None:
    """Invariant 2."""
    recipe, stack = case
    bare, model = recipe.build(), recipe.build()
    model.register_forward_hook(lambda *_: None)
    before = _anatomy(model)
    stacked(model, recipe, stack)
    names = data.draw(st.permutations([f"g{i}" for i in range(len(stack))]))
    for index, name in enumerate(names):
        fxgraft.unpatch(model, name)
        assert {graft.name for graft in fxgraft.grafts(model)} == set(names[index + 1 :])
        rest = [
            (n, each)
            for n, each in zip((f"g{i}" for i in range(len(stack))), stack, strict=True)
            if n in names[index + 1 :]
        ]
        expected = stacked(recipe.build(), recipe, [each for _, each in rest])
        assert same(pass_through(copy.deepcopy(model), recipe, True), pass_through(expected, recipe, True))
    assert _anatomy(model) == before
    for training in (True, False):
        assert same(pass_through(model, recipe, training), pass_through(bare, recipe, training))
        assert same(statistics(model), statistics(bare))


def _anatomy(model: nn.Module) -> list[Any]:
    """Everything about a model but the values of its tensors, by identity where there is one."""
    modules = [
        (
            name,
            id(module),
            type(module),
            module.training,
            sorted(module.__dict__),
            list(module._forward_hooks),
        )
        for name, module in model.named_modules()
    ]
    tensors = [
        (key, id(p), p.requires_grad) for key, p in [*model.named_parameters(), *model.named_buffers()]
    ]
    return [modules, tensors, list(model.state_dict())]


@profiles(15, 250)
def test_every_parameter_trains_and_muted_entries_pass_nothing(case: Case, data: st.DataObject) -> None:
    """Invariant 3."""
    recipe, stack = case
    bare, model = recipe.build(), recipe.build()
    sites: list[tuple[Tensor, Tensor]] = []
    for each in stack:
        # The value that reaches the unit, and the gradient that comes back out of it.
        _tap(model.get_submodule(each["layer"]), sites)
    stacked(model, recipe, stack)
    _, _, expected, _ = pass_through(bare, recipe, True)
    with record(model) as records:
        _, _, actual, _ = pass_through(model, recipe, True)
    for mine, theirs in zip(actual, expected, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or bool(mine.isfinite().all())
    for entry in records:
        value, gradient = next((v, g) for name, v, g in _taps(model) if name == entry.site)
        layout = next(
            unit.layout for graft in fxgraft.grafts(model) for unit in graft.units.values()
            if getattr(unit, "site", None) is not None and unit.site.name == entry.site
        )  # fmt: skip
        final = apply_selection(entry.mask, entry.selected)
        muted = (layout.multiply(torch.ones_like(value), final) == 0).expand_as(value)
        assert bool((final == 0).any()) == bool(muted.any())
        assert gradient is None or not gradient[muted].any()


def _tap(module: nn.Module, sites: list[Any]) -> None:
    """Make a module keep the value it hands to its graft and the gradient that value gets."""
    inner = module.forward.__func__  # type: ignore[attr-defined]

    class Tapped(type(module)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = inner(self, *args, **kwargs)
            if isinstance(out, Tensor) and out.requires_grad:  # not while it is traced, nor in the probe
                self.__dict__["kept"] = [out.detach(), None]
                out.register_hook(lambda g, kept=self.__dict__["kept"]: kept.__setitem__(1, g))
            return out

    module.__class__ = Tapped


def _taps(model: nn.Module) -> list[tuple[str, Tensor, Tensor | None]]:
    return [
        (name, *module.__dict__["kept"])
        for name, module in model.named_modules()
        if "kept" in module.__dict__
    ]


@profiles(10, 150)
def test_the_same_seed_gives_the_same_step(case: Case, data: st.DataObject) -> None:
    """Invariant 6."""
    recipe, stack = case
    model = stacked(recipe.build(), recipe, stack)
    twin = stacked(recipe.build(), recipe, stack)
    assert same(pass_through(model, recipe, True), pass_through(twin, recipe, True))
    assert same(statistics(model), statistics(twin))


@profiles(10, 150)
def test_the_probe_leaves_no_trace(case: Case, data: st.DataObject) -> None:
    """Invariant 6: with fixed scopes and ranks by gradient a patched pass draws what the bare one draws."""
    recipe, stack = case
    scope = data.draw(st.sampled_from(["spatial", "channel"]))
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
    for each, labels in ((bare, {}), (model, {"target": y})):
        torch.manual_seed(3)
        each(x, **labels)
        each.state_after = torch.get_rng_state()
    assert same(model.state_after, bare.state_after)
    assert same(statistics(model), statistics(bare))
    assert [module.training for module in model.modules()] == flags
    assert all(p.grad is g and bool((g == 1).all()) for p, g in zip(model.parameters(), kept, strict=True))


@profiles(6, 100)
def test_copies_behave_alike_and_share_nothing(case: Case, data: st.DataObject) -> None:
    """Invariant 8."""
    recipe, stack = case
    model = stacked(recipe.build(), recipe, stack)
    fxgraft.set_progress(model, 0.5)
    expected = pass_through(copy.deepcopy(model), recipe, True)
    for twin in _copies(model, recipe):
        assert type(twin) is type(model)
        assert [(g.name, g.patch) for g in fxgraft.grafts(twin)] == [
            (g.name, g.patch) for g in fxgraft.grafts(model)
        ]
        assert not {id(m) for m in twin.modules()} & {id(m) for m in model.modules()}
        mine = {t.untyped_storage().data_ptr() for t in model.state_dict().values() if t.numel()}
        assert not mine & {t.untyped_storage().data_ptr() for t in twin.state_dict().values() if t.numel()}
        units = [id(u) for g in fxgraft.grafts(model) for u in g.units.values()]
        assert not set(units) & {id(u) for g in fxgraft.grafts(twin) for u in g.units.values()}
        assert same(pass_through(twin, recipe, True), expected)
        fxgraft.unpatch(twin)
    assert same(pass_through(model, recipe, True), expected)


def _copies(model: nn.Module, recipe: Recipe) -> list[nn.Module]:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    with tempfile.TemporaryDirectory() as folder:
        fxgraft.save(model, folder)
        loaded = fxgraft.load(recipe.build(), folder)
    return [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stream, weights_only=False),
        loaded,
        ModelEmaV3(model).module,
    ]


@pytest.mark.parametrize(
    ("name", "layers", "size"),
    [("resnet18", ["layer4", "layer2"], 64), ("convnext_atto", [-1], 64), ("test_vit", ["blocks.2"], 160)],
)
def test_the_exported_evaluation_graph_is_the_bare_models(name: str, layers: list[Any], size: int) -> None:
    """Invariant 1: node for node."""
    model = timm.create_model(name, num_classes=4).eval()
    x = torch.randn(2, 3, size, size)
    bare = torch.export.export(model, (x,))
    for index, layer in enumerate(layers):
        fxgraft.patch(model, "rsc", layer=layer, name=f"g{index}", input_size=(3, size, size))
    exported = torch.export.export(model, (x,))

    def nodes(program: Any) -> list[tuple[Any, ...]]:
        return [(n.op, n.name, n.target, str(n.args), str(n.kwargs)) for n in program.graph.nodes]

    assert nodes(exported) == nodes(bare)
    assert str(exported.graph_signature) == str(bare.graph_signature)
    assert torch.equal(exported.module()(x), model(x))
