"""One method alone on a backbone: what it leaves alone, what it computes and trains, and that it comes off.

Every test takes the same patched model of its cell and leaves it as it was.
"""

from __future__ import annotations

import pytest
from torch import nn

import fxgraft
from system.contract.cases import (
    REPRESENTATIVE,
    Cell,
    ForwardContext,
    batch,
    cells,
    fresh,
    reference,
    same,
    seeded,
    trace,
)


class Grafted:
    """A patched model of a cell, and the passes that several tests look at."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self._passes: dict[bool, ForwardContext] = {}
        self._model: nn.Module | None = None

    @property
    def model(self) -> nn.Module:
        if self._model is None:
            model = fresh(self.cell.backbone)
            self.before = trace(model)
            self._model = self.cell.patch(model)
        return self._model

    def taken_off(self) -> nn.Module:
        """The model without its graft; whoever asks next gets a new one."""
        model = fxgraft.unpatch(self.model)
        self._model = None
        return model

    def run(self, training: bool) -> ForwardContext:
        """The seeded pass of the patched model."""
        if training not in self._passes:
            self._passes[training] = seeded(self.model, *batch(self.cell.backbone), training)
        return self._passes[training]

    @property
    def own(self) -> dict[str, nn.Parameter]:
        """The parameters of the method."""
        return {name: p for name, p in self.model.named_parameters() if "graft_" in name}


@pytest.fixture(scope="module", params=cells())
def grafted(request: pytest.FixtureRequest) -> Grafted:
    return Grafted(request.param)


def test_what_it_leaves_alone(grafted: Grafted) -> None:
    """The class, the keys, the tensors, the hooks and the modes are the backbone's; new names say whose they are."""
    model, method = grafted.model, fxgraft.methods()[grafted.cell.method]
    before, after = grafted.before, trace(model)
    (_, identity, cls), *_ = before["modules"]
    assert id(model) == identity
    assert isinstance(model, cls)
    for part in ("parameters", "buffers", "keys", "training"):
        names = [entry if isinstance(entry, str) else entry[0] for entry in after[part]]
        mine = [each for each, name in zip(after[part], names, strict=True) if "graft_" not in name]
        assert mine == before[part], part
    hooks = [entry for entry in after["hooks"] if "graft_" not in entry[0]]
    assert hooks == before["hooks"]
    (graft,) = fxgraft.grafts(model)
    assert (graft.name, graft.patch.method) == (grafted.cell.method,) * 2
    assert bool(graft.parameters()) >= bool(grafted.own)
    assert method.adds_parameters >= bool(grafted.own)
    assert grafted.cell.method in str(fxgraft.summary(model))


def test_evaluation(grafted: Grafted) -> None:
    """Bit by bit the bare model's where the method acts in training only; always in shape, dtype and format."""
    cell = grafted.cell
    expected, actual = reference(cell.backbone, False), grafted.run(False)
    if fxgraft.methods()[cell.method].train_only:
        assert actual.differences(expected) == []
        return
    assert (actual.out.shape, actual.out.dtype) == (expected.out.shape, expected.out.dtype)
    assert actual.out.stride() == expected.out.stride()
    assert same(actual.random_state, expected.random_state)
    assert same({key: actual.buffers[key] for key in expected.buffers}, expected.buffers)
    assert not cell.expected.starts_as_bare or same(actual.out, expected.out)


def test_training(grafted: Grafted) -> None:
    """What trained before trains after, the method's own parameters too, and the same seed gives the same step."""
    cell = grafted.cell
    expected, actual = reference(cell.backbone, True), grafted.run(True)
    assert [name for name in expected.gradients if name not in actual.gradients] == []
    gained = {name for name in actual.gradients if "graft_" not in name} - expected.gradients.keys()
    assert [name for name in gained if not grafted.model.get_parameter(name).requires_grad] == []
    assert [name for name, gradient in actual.gradients.items() if not gradient.isfinite().all()] == []
    if not cell.expected.judged_apart:
        assert [name for name in grafted.own if name not in actual.gradients] == []
    assert actual.out.dtype == expected.out.dtype
    if cell.expected.acts is not None:
        assert same(actual.out, expected.out) == (not cell.expected.acts)
    if cell.backbone.name in REPRESENTATIVE:  # of every kind of structure
        again = seeded(grafted.model, *batch(cell.backbone), True)
        assert again.differences(actual) == []


def test_taking_it_off(grafted: Grafted) -> None:
    """Everything is what it was before, object by object, and computes what it computed, to the bit."""
    backbone = grafted.cell.backbone
    plain = grafted.taken_off()
    after = trace(plain)
    assert [part for part in after if after[part] != grafted.before[part]] == []
    for training in (True, False) if backbone.name in REPRESENTATIVE else (True,):
        assert seeded(plain, *batch(backbone), training).differences(reference(backbone, training)) == []


@pytest.mark.parametrize(
    "cell",
    cells(
        lambda cell: cell.works and cell.expected.neutral is not None,
        ("small", "timm/resnet18"),
        ("small", *REPRESENTATIVE),
    ),
)
def test_neutral_settings(cell: Cell) -> None:
    """They train as the bare model does, bit by bit, and draw nothing."""
    model = cell.patch(fresh(cell.backbone), cell.options(**(cell.expected.neutral or {})))
    actual, expected = seeded(model, *batch(cell.backbone), True), reference(cell.backbone, True)
    actual.out = actual.out.reshape(expected.out.shape)  # of several inputs and outputs, one
    assert actual.differences(expected) == []
