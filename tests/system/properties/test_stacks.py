"""Random stacks of all methods on random networks: the contract, in any company, order, dtype and layout."""

from __future__ import annotations

import pickle
from typing import Any

from hypothesis import strategies as st
from torch import nn

import fxgraft
from models.random_models import Recipe, recipes
from system.contract.cases import METHODS, same, seeded, trace, untouched
from system.contract.expectations import expectation
from system.properties.profiles import profiles

Stack = list[tuple[str, dict[str, Any]]]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Recipe, Stack]:
    """A network, and two to four methods for it, some at sites of their own."""
    recipe = draw(recipes(timm_share=0))
    chosen = draw(st.lists(st.sampled_from(METHODS), min_size=2, max_size=4, unique=True))
    stack = []
    for method in chosen:
        options = dict(expectation(method).options)
        where = next(
            (o for o in ("layers", "layer") if o in fxgraft.methods()[method].__dataclass_fields__), None
        )
        if where is not None and (where in options or draw(st.booleans())):
            options[where] = draw(st.sampled_from(recipe.sites))
        stack.append((method, options))
    return recipe, stack


def put_on(model: nn.Module, recipe: Recipe, stack: Stack) -> Stack:
    """Patch with all that the network takes; what refuses, alone or in this company, changes nothing."""
    there: Stack = []
    for method, options in stack:
        try:
            with untouched(model, draws=True):
                fxgraft.patch(model, method, dry_run=True, input_size=(3, *recipe.size), **options)
        except fxgraft.FxgraftError:
            continue
        fxgraft.patch(model, method, input_size=(3, *recipe.size), **options)
        there.append((method, options))
    return there


@profiles(3, 20, cases())
def test_evaluation_and_training(case: tuple[Recipe, Stack]) -> None:
    """Evaluation is the bare model's, everything that trained trains, and the same seed gives the same step."""
    recipe, stack = case
    bare, model = recipe.build(), recipe.build()
    there = put_on(model, recipe, stack)
    patches = [fxgraft.methods()[method] for method, _ in there]
    expected, actual = (seeded(each, *recipe.batch(4), False) for each in (bare, model))
    assert [name for name in model.state_dict() if "graft_" not in name] == list(bare.state_dict())
    if all(patch.train_only for patch in patches):
        assert actual.differences(expected) == []
    elif all(patch.train_only or expectation(patch.method).starts_as_bare for patch in patches):
        assert same(actual.out, expected.out)
    expected, actual = (seeded(each, *recipe.batch(4), True) for each in (bare, model))
    assert [name for name in expected.gradients if name not in actual.gradients] == []
    assert [name for name, gradient in actual.gradients.items() if not gradient.isfinite().all()] == []
    assert actual.out.dtype == expected.out.dtype
    assert seeded(model, *recipe.batch(4), True).differences(actual) == []


@profiles(2, 12, cases(), st.randoms(use_true_random=False))
def test_taken_off_in_any_order(case: tuple[Recipe, Stack], chance: Any) -> None:
    """What is left acts as if it had come alone; in the end the model is what it was. Copies come off alike."""
    recipe, stack = case
    bare, model = recipe.build(), recipe.build()
    model.register_forward_hook(_observe)
    before = trace(model)
    there = put_on(model, recipe, stack)
    twin = pickle.loads(pickle.dumps(model))
    assert seeded(twin, *recipe.batch(4), True).differences(seeded(model, *recipe.batch(4), True)) == []
    leaving = chance.sample(there, len(there))
    while leaving:
        gone = leaving.pop()
        there = [each for each in there if each is not gone]
        for each in (model, twin):
            fxgraft.unpatch(each, gone[0])
        rest = recipe.build()
        put_on(rest, recipe, there)
        assert [graft.name for graft in fxgraft.grafts(model)] == [method for method, _ in there]
        rest.load_state_dict(model.state_dict())
        expected = seeded(rest, *recipe.batch(4), True)
        assert seeded(model, *recipe.batch(4), True).differences(expected) == []
    after = trace(model)
    assert [part for part in before if before[part] != after[part]] == []
    for training in (True, False):
        expected = seeded(bare, *recipe.batch(4), training)
        for each in (model, twin):
            assert seeded(each, *recipe.batch(4), training).differences(expected) == []


def _observe(*_: Any) -> None:
    """A hook of the user's."""
