"""All that is done to models, in any order, beside a twin that gets the same but for fxgraft.

After every step the model is what its twin is, but for the grafts: class, keys, tensors, flags, hooks, and its
evaluation bit by bit as long as no graft acts there.
"""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

import fxgraft
from fxgraft.extend import Unit
from models.random_models import KINDS, Recipe, recipes
from system.contract.cases import METHODS, observe, same, untouched
from system.contract.expectations import expectation
from system.properties.profiles import QUIET


def units(model: nn.Module) -> tuple[str, ...]:
    """Beginnings of the names of what grafts added."""
    return tuple(
        name for name, m in model.named_modules(remove_duplicate=False) if name and isinstance(m, Unit)
    )


def bare_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model without what grafts added, told by what it belongs to."""
    own = tuple(f"{name}." for name in units(model))
    return {key: value for key, value in model.state_dict().items() if not own or not key.startswith(own)}


def parts(model: nn.Module) -> list[Any]:
    """What a model and its twin have in common, module by module."""
    inside = units(model)
    return [
        (
            name,
            m._get_name(),
            m.training,
            [key for key, child in m._modules.items() if not isinstance(child, Unit)],
            [list(value.values()) for key, value in m.__dict__.items() if key.endswith("_hooks")],
            [(key, p is not None and p.requires_grad) for key, p in m._parameters.items()],
            sorted(set(m.__dict__) - {"_fxgraft"}),
        )
        for name, m in model.named_modules(remove_duplicate=False)
        if not inside or not (name in inside or name.startswith(tuple(f"{each}." for each in inside)))
    ]


class Machine(RuleBasedStateMachine):
    """A model on which grafts come and go, and its twin."""

    @initialize(recipe=recipes(timm_share=8, kinds=KINDS))
    def build(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.dtype = recipe.dtype
        self.model, self.twin = recipe.build(), recipe.build()
        self.grafts: dict[str, fxgraft.Patch] = {}
        self.trained: set[str] = set()  # grafts whose own parameters have moved
        self.count = 0

    @property
    def both(self) -> tuple[nn.Module, nn.Module]:
        return self.model, self.twin

    @property
    def exact(self) -> bool:
        """Whether evaluation has to be the twin's, bit by bit."""
        return all(
            patch.train_only or (expectation(patch.method).starts_as_bare and name not in self.trained)
            for name, patch in self.grafts.items()
        )

    def batch(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        x, y = self.recipe.batch(4, seed)
        return x.to(self.dtype), y

    def evaluated(self, model: nn.Module) -> Tensor:
        with evaluation(model), torch.no_grad():
            return model(self.batch()[0])

    # What fxgraft does.

    @rule(data=st.data(), method=st.sampled_from(METHODS))
    def patch(self, data: st.DataObject, method: str) -> None:
        options = dict(expectation(method).options)
        fields = fxgraft.methods()[method].__dataclass_fields__
        where = next((each for each in ("layers", "layer") if each in fields), None)
        if where is not None and (where in options or data.draw(st.booleans())):
            options[where] = data.draw(st.sampled_from(self.recipe.sites))
        name, size = f"g{self.count}", (3, *self.recipe.size)
        wanted = fxgraft.methods()[method](**options)
        if len(self.grafts) == 3:
            return
        try:
            with untouched(self.model, draws=True):
                fxgraft.patch(self.model, wanted, name=name, input_size=size, dry_run=True)
        except fxgraft.FxgraftError:  # not for this network, or not in this company
            with untouched(self.model, draws=True), pytest.raises(fxgraft.FxgraftError):
                fxgraft.patch(self.model, wanted, name=name, input_size=size)
            return
        assert fxgraft.patch(self.model, wanted, name=name, input_size=size) is self.model
        self.grafts[name] = wanted
        self.count += 1

    @precondition(lambda self: self.grafts)
    @rule(data=st.data())
    def unpatch(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.grafts)), min_size=1, unique=True))
        fxgraft.unpatch(self.model, *names)
        self.forget(names)

    def forget(self, names: list[str]) -> None:
        for name in names:
            del self.grafts[name]
            self.trained.discard(name)

    @rule(way=st.sampled_from(["deepcopy", "pickle"]))
    def copy(self, way: str) -> None:
        """Go on with a copy; what happens to the other one does not reach it."""
        old = self.model
        self.model = copy.deepcopy(old) if way == "deepcopy" else pickle.loads(pickle.dumps(old))
        assert same(self.evaluated(self.model), self.evaluated(old))
        self.check_taken_off(old)
        with torch.no_grad():
            for parameter in old.parameters():
                parameter.fill_(torch.nan)

    @rule()
    def save_and_load(self) -> None:
        """Into a fresh model, which is then gone on with."""
        with tempfile.TemporaryDirectory() as folder:
            if not self.grafts or not all(patch.saves for patch in self.grafts.values()):
                with untouched(self.model), pytest.raises(fxgraft.RecipeError):
                    fxgraft.save(self.model, folder)
                return
            with untouched(self.model):
                fxgraft.save(self.model, folder)
            fresh = copy.deepcopy(self.twin)
            with torch.no_grad():
                for parameter in fresh.parameters():
                    parameter.zero_()
            fxgraft.load(fresh, folder)
        assert same(dict(fresh.state_dict()), dict(self.model.state_dict()))
        assert same(self.evaluated(fresh), self.evaluated(self.model))
        self.model = fresh

    @precondition(lambda self: self.grafts)
    @rule()
    def merge(self) -> None:
        try:
            with untouched(self.model):
                merged = fxgraft.merge(self.model)
        except fxgraft.MergeError:
            assert any(expectation(patch.method).folds is not True for patch in self.grafts.values())
            return
        stock = copy.deepcopy(self.twin)
        stock.load_state_dict(merged.state_dict(), strict=True)
        wanted = self.evaluated(self.model)
        close = 1e-4 if self.dtype == torch.float32 else 1e-8
        torch.testing.assert_close(self.evaluated(stock), wanted, rtol=close, atol=close)

    @rule(fraction=st.sampled_from([0.0, 0.5, 1.0]))
    def progress(self, fraction: float) -> None:
        fxgraft.set_progress(self.model, fraction)

    # What anybody does.

    @rule(seed=st.integers(0, 99))
    def train(self, seed: int) -> None:
        """A step; the twin gets the weights that come of it."""
        x, y = self.batch(seed)
        outs = []
        for model in self.both:
            model.zero_grad()
            torch.manual_seed(seed)
            out = model(x, target=y) if model is self.model and self.grafts else model(x)
            fxgraft.loss(model, out, y).backward()
            outs.append(out.detach())
        mine, theirs = (dict(model.named_parameters()) for model in self.both)
        trains = {name for name, p in theirs.items() if p.grad is not None}
        assert {name for name in trains if mine[name].grad is None} == set()
        assert [name for name, p in mine.items() if p.grad is not None and not p.grad.isfinite().all()] == []
        assert [name for name, p in mine.items() if p.grad is not None and not p.requires_grad] == []
        assert outs[0].dtype == outs[1].dtype
        if not self.grafts or (not self.model.training and self.exact):
            assert same(outs[0], outs[1])
            # What acts in evaluation has a share in the gradients, also where its output is the bare one.
            if all(patch.train_only for patch in self.grafts.values()):
                assert same([mine[name].grad for name in trains], [theirs[name].grad for name in trains])
        with torch.no_grad():
            for p in mine.values():
                if p.grad is not None:
                    p -= 0.01 * p.grad
            now = bare_state(self.model)
            for key, value in self.twin.state_dict().items():
                value.copy_(now[key])
        # What has no gradient has not moved; an ensemble's members follow the loss like everything else.
        self.trained |= {
            graft.name
            for graft in fxgraft.grafts(self.model)
            if any(p.grad is not None for p in graft.parameters())
        }
        for model in self.both:
            model.zero_grad()

    @rule(training=st.booleans())
    def mode(self, training: bool) -> None:
        for model in self.both:
            model.train(training)

    @rule(index=st.integers(0, 30), training=st.booleans())
    def freeze(self, index: int, training: bool) -> None:
        """Freeze a part, parameters and mode, or thaw it; one is never left with nothing to train."""
        for part in self.leaf(index):
            part.requires_grad_(training)
            part.train(training)

    def leaf(self, index: int) -> tuple[nn.Module, nn.Module]:
        """A part of the model and of its twin; what is a leaf in the twin may hold a graft's unit in the model."""
        names = [
            name
            for name, module in self.twin.named_modules()
            if not [*module.children()] and "fc" not in name and "head" not in name
        ]
        mine, theirs = (model.get_submodule(names[index % len(names)]) for model in self.both)
        return mine, theirs

    @rule(index=st.integers(0, 30), pre=st.booleans())
    def hook(self, index: int, pre: bool) -> None:
        for part in self.leaf(index) if index else self.both:
            if pre:
                part.register_forward_pre_hook(observe)
            else:
                part.register_forward_hook(observe)

    @rule(dtype=st.sampled_from([torch.float32, torch.float64]))
    def cast(self, dtype: torch.dtype) -> None:
        for model in self.both:
            model.to(dtype)
        self.dtype = dtype

    @rule(classes=st.integers(4, 6))
    def head(self, classes: int) -> None:
        """Another classifier; what cannot work with it says so, and is taken off."""
        new = None
        for model in (self.twin, self.model):
            holder, name = classifier(model)
            old = getattr(holder, name)
            if new is None:
                new = nn.Linear(old.in_features, classes, dtype=self.dtype).train(old.training)
            setattr(holder, name, copy.deepcopy(new))
        try:
            self.evaluated(self.model)
        except fxgraft.FxgraftError:
            names = list(self.grafts)
            fxgraft.unpatch(self.model)
            self.forget(names)
        # An ensemble has a classifier of its own for each member, made from the one that was there.
        self.trained |= {name for name, patch in self.grafts.items() if not patch.train_only}

    @precondition(lambda self: self.grafts)
    @rule(rarely=st.integers(1, 8))
    def compile(self, rarely: int) -> None:
        if rarely == 1:
            for model in self.both:  # the compiler leaves notes of its own on a model
                wanted = self.evaluated(model)
                compiled = torch.compile(model, backend="eager")
                with evaluation(model), torch.no_grad():
                    assert same(compiled(self.batch()[0]), wanted)
                torch._dynamo.reset()

    # What holds all the time.

    @invariant()
    def it_is_its_twin_but_for_the_grafts(self) -> None:
        if not hasattr(self, "model"):
            return
        assert {graft.name: graft.patch for graft in fxgraft.grafts(self.model)} == self.grafts
        assert isinstance(self.model, type(self.twin))
        assert (type(self.model) is type(self.twin)) == (not self.grafts)
        assert parts(self.model) == parts(self.twin)
        assert same(bare_state(self.model), dict(self.twin.state_dict()))
        modes, chance = [m.training for m in self.model.modules()], torch.get_rng_state()
        out, expected = self.evaluated(self.model), self.evaluated(self.twin)
        assert torch.equal(torch.get_rng_state(), chance)
        assert [m.training for m in self.model.modules()] == modes
        assert out.shape == expected.shape
        if self.exact:
            assert same(out, expected)

    def check_taken_off(self, model: nn.Module) -> None:
        """Without its grafts a model is its twin."""
        if self.grafts:
            fxgraft.unpatch(model)
        assert [type(m) for m in model.modules()] == [type(m) for m in self.twin.modules()]
        assert parts(model) == parts(self.twin)
        assert same(dict(model.state_dict()), dict(self.twin.state_dict()))
        assert same(self.evaluated(model), self.evaluated(self.twin))

    def teardown(self) -> None:
        if hasattr(self, "model"):
            self.check_taken_off(copy.deepcopy(self.model))
            self.check_taken_off(self.model)


def classifier(model: nn.Module) -> tuple[nn.Module, str]:
    """Find the last linear layer of the network's own: its parent, and its name there."""
    inside = units(model)
    path = [
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and name.rpartition(".")[0] not in inside and name not in inside
    ][-1]
    holder, _, name = path.rpartition(".")
    return model.get_submodule(holder), name


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@pytest.mark.parametrize(
    ("examples", "steps"),
    [pytest.param(3, 10, id="few"), pytest.param(12, 20, id="many", marks=pytest.mark.sweep)],
)
def test_machine(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=examples, stateful_step_count=steps, **QUIET)
    )
