"""Random sequences of patching, unpatching, copying, switching modes and training, beside a bare twin."""

from __future__ import annotations

import copy
import pickle
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
from torch import nn

import fxgraft
from models.random_models import Recipe, gradients, options, recipes, same
from system.contract.expectations import expectation
from system.properties.profiles import QUIET

# What leaves evaluation and the parameters alone, beside RSC at random sites.
OTHERS = [
    name for name, method in fxgraft.methods().items() if method.train_only and not method.adds_parameters
]
FRACTIONS = st.sampled_from([0.0, 0.25, 0.5, 1.0])


class Sequences(RuleBasedStateMachine):
    """A model with grafts that come and go, and a twin without, kept at the same weights."""

    @initialize(recipe=recipes(timm_share=6))
    def build(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.model = recipe.build()
        self.bare = recipe.build()
        self.base = type(self.bare)
        self.expected: dict[str, fxgraft.Patch] = {}
        self.count = 0
        self.progress = 0.0

    @rule(data=st.data(), start=FRACTIONS)
    def patch(self, data: st.DataObject, start: float) -> None:
        if data.draw(st.integers(1, 3)) == 3:
            method = data.draw(st.sampled_from(OTHERS))
            wanted: fxgraft.Patch = fxgraft.methods()[method](**expectation(method).options)
        else:
            wanted = fxgraft.RSC(**data.draw(options(st.sampled_from(self.recipe.sites))), start=start)
        name = f"g{self.count}"
        size = (3, *self.recipe.size)
        if wanted in self.expected.values():
            with pytest.raises(fxgraft.ConfigError, match="with these settings"):
                fxgraft.patch(self.model, wanted, name=name, input_size=size)
            return
        try:
            plan = fxgraft.patch(self.model, wanted, name=name, input_size=size, dry_run=True)
        except (fxgraft.StructureError, fxgraft.SiteError, fxgraft.ConfigError):
            # A network without what it takes, or with a graft that leaves its site out.
            return
        assert plan.name == name
        assert len(fxgraft.grafts(self.model)) == len(self.expected)
        assert fxgraft.patch(self.model, wanted, name=name, input_size=size) is self.model
        self.expected[name] = wanted
        self.count += 1

    @rule(wrong=st.sampled_from([{"layer": "nowhere"}, {"layer": 99}, {"layer": "fc.weight"}, {"output": 3}]))
    def fail_to_patch(self, wrong: dict[str, Any]) -> None:
        before = [(name, type(m), m.training) for name, m in self.model.named_modules()]
        given = {"layer": self.recipe.sites[0], **wrong}
        with pytest.raises(fxgraft.FxgraftError):
            fxgraft.patch(self.model, "rsc", name="wrong", input_size=(3, *self.recipe.size), **given)
        assert [(name, type(m), m.training) for name, m in self.model.named_modules()] == before

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def unpatch(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.expected)), min_size=1, unique=True))
        fxgraft.unpatch(self.model, *names)
        for name in names:
            del self.expected[name]

    @precondition(lambda self: self.expected)
    @rule()
    def unpatch_all(self) -> None:
        fxgraft.unpatch(self.model)
        self.expected = {}

    @rule(way=st.sampled_from(["deepcopy", "pickle"]))
    def go_on_with_a_copy(self, way: str) -> None:
        old = self.model
        self.model = copy.deepcopy(old) if way == "deepcopy" else pickle.loads(pickle.dumps(old))
        if fxgraft.grafts(old):
            fxgraft.unpatch(old)  # which must not reach the copy

    @rule(training=st.booleans())
    def switch_mode(self, training: bool) -> None:
        self.model.train(training)
        self.bare.train(training)

    @rule()
    def freeze_a_norm(self) -> None:
        for model in (self.model, self.bare):
            norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
            if norms:
                norms[0].eval()

    @rule(fraction=FRACTIONS)
    def set_progress(self, fraction: float) -> None:
        fxgraft.set_progress(self.model, fraction)
        if self.expected:
            self.progress = fraction

    @rule(seed=st.integers(0, 99))
    def step(self, seed: int) -> None:
        x, y = self.recipe.batch(seed=seed)
        outs = []
        for model in (self.model, self.bare):
            model.zero_grad()
            torch.manual_seed(seed)
            out = model(x, target=y) if model is self.model and self.expected else model(x)
            fxgraft.loss(model, out, y).backward()
            outs.append(out)
        assert outs[0].shape == outs[1].shape
        assert outs[0].dtype == outs[1].dtype
        assert all(p.grad is None or p.grad.isfinite().all() for p in self.model.parameters())
        if not self.expected or not self.model.training:
            assert same(outs[0], outs[1])
            assert same(gradients(self.model), gradients(self.bare))
        with torch.no_grad():
            for mine, theirs in zip(self.model.parameters(), self.bare.parameters(), strict=True):
                mine -= 0.0 if mine.grad is None else 0.01 * mine.grad
                theirs.copy_(mine)
            for mine, theirs in zip(self.model.buffers(), self.bare.buffers(), strict=True):
                theirs.copy_(mine)

    @precondition(lambda self: self.expected and self.model.training)
    @rule()
    def forget_the_labels(self) -> None:
        """Where something is muted that is an error; otherwise labels are not needed and change nothing."""
        x, y = self.recipe.batch()
        state = copy.deepcopy(self.model.state_dict())
        outs = []
        for labels in ({}, {"target": y}):
            torch.manual_seed(6)
            try:
                outs.append(self.model(x, **labels).detach())
            except fxgraft.TargetError:
                assert not labels
                needing = [p for p in self.expected.values() if isinstance(p, fxgraft.RSC)]
                assert [patch for patch in needing if patch.start <= self.progress]
            self.model.load_state_dict(state)
        assert same(outs[0], outs[-1])

    @invariant()
    def it_is_what_it_should_be(self) -> None:
        if not hasattr(self, "model"):
            return
        assert {g.name: g.patch for g in fxgraft.grafts(self.model)} == self.expected
        assert isinstance(self.model, self.base)
        assert (type(self.model) is self.base) == (not self.expected)
        assert list(self.model.state_dict()) == list(self.bare.state_dict())
        pairs = list(zip(self.model.named_modules(), self.bare.named_modules(), strict=True))
        assert [(a[0], a[1].training) for a, _ in pairs] == [(b[0], b[1].training) for _, b in pairs]
        for mine, theirs in zip(
            self.model.state_dict().values(), self.bare.state_dict().values(), strict=True
        ):
            assert torch.equal(mine, theirs)

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        x, _ = self.recipe.batch()
        with torch.no_grad():
            assert same(self.model.eval()(x), self.bare.eval()(x))
        if self.expected:
            fxgraft.unpatch(self.model)
        assert [type(m) for m in self.model.modules()] == [type(m) for m in self.bare.modules()]


@pytest.mark.parametrize(
    ("examples", "steps"),
    [pytest.param(4, 10, id="few"), pytest.param(25, 20, id="many", marks=pytest.mark.sweep)],
)
def test_sequences(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        Sequences,
        settings=settings(max_examples=examples, stateful_step_count=steps, **QUIET),
    )
