"""All methods that go together on one model, in changing orders, taken off in changing orders."""

from __future__ import annotations

import random

import pytest

import fxgraft
from models.backbones import Backbone, available
from system.contract.cases import (
    METHODS,
    REPRESENTATIVE,
    Cell,
    batch,
    fresh,
    reference,
    same,
    seeded,
    stack,
    trace,
)

# In the sweep; in every run random networks have random stacks: see properties/.


@pytest.mark.parametrize("backbone", [each for each in available(()) if each.id in REPRESENTATIVE])
@pytest.mark.parametrize("seed", [0, 1])
def test_all_together(backbone: Backbone, seed: int) -> None:
    chance = random.Random(seed)
    order = list(METHODS)
    chance.shuffle(order)
    model = fresh(backbone)
    before = trace(model)
    there = stack(model, backbone, order)
    assert len(there) > 1
    patches = [fxgraft.methods()[method] for method in there]

    evaluation, training = (seeded(model, *batch(backbone), mode) for mode in (False, True))
    if all(patch.train_only or Cell(patch.method, backbone).expected.starts_as_bare for patch in patches):
        assert same(evaluation.out, reference(backbone, False).out)
    if all(patch.train_only for patch in patches):
        assert evaluation.differences(reference(backbone, False)) == []
    trained = reference(backbone, True).gradients
    assert [name for name in trained if name not in training.gradients] == []
    assert [name for name, gradient in training.gradients.items() if not gradient.isfinite().all()] == []
    assert seeded(model, *batch(backbone), True).differences(training) == []

    leaving = chance.sample(there, len(there))
    while leaving:
        names = [leaving.pop() for _ in range(min(len(leaving), chance.randint(2, 3)))]
        fxgraft.unpatch(model, *names)
        there = [method for method in there if method not in names]
        assert [graft.name for graft in fxgraft.grafts(model)] == there
    after = trace(model)
    assert [part for part in before if before[part] != after[part]] == []
    for mode in (True, False):
        assert seeded(model, *batch(backbone), mode).differences(reference(backbone, mode)) == []
