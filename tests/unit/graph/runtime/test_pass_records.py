"""Records of passes in compiled code, as the code does it: run here by Python, as if it were being compiled."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

import fxgraft
from fxgraft.errors import TargetError
from fxgraft.graph.runtime.pass_records import OTHER_LABELS, OTHER_OUTPUT, SOME, Outputs, PassRecord, some_of
from models.toys import CLASSES, LABELS, images, net

SIZE = (3, 8, 8)


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    with monkeypatch.context() as patched:
        patched.setattr(torch.compiler, "is_compiling", lambda: True)
        yield patched


def test_some_numbers_are_a_copy_of_the_first() -> None:
    values = torch.arange(2 * SOME, dtype=torch.float64).view(2, -1)
    some = some_of({"empty": torch.empty(0), "logits": values})
    assert some is not None
    assert some.dtype == torch.float32
    assert torch.equal(some, values[0].float())
    values.zero_()
    assert some[1] == 1
    assert some_of(torch.empty(0)) is None
    assert some_of(None) is None


def test_outputs_and_labels_of_another_pass_are_found() -> None:
    out, labels = torch.tensor([[1.0, float("nan")]]), torch.tensor([3])
    record = PassRecord({}, labels, out)
    record.check(some_of(out * (1 + 1e-3)), some_of(labels))  # rounded apart
    record.check(None, None)
    record.check(torch.zeros(5), None)  # of another shape: nothing is known
    with pytest.raises(RuntimeError, match=OTHER_OUTPUT):
        record.check(some_of(2 * out), None)
    with pytest.raises(RuntimeError, match=OTHER_LABELS):
        record.check(None, some_of(labels + 1))


def test_the_last_four_outputs_are_known(compiling: pytest.MonkeyPatch) -> None:
    outputs = Outputs()
    made = [torch.ones(1, requires_grad=True) * index for index in range(5)]
    for index, out in enumerate(made):
        outputs.note(out, {"rsc": index}, LABELS if index == 4 else None)
        outputs.note(out, {}, None)  # a pass that left nothing behind
    assert [bool(outputs.records(out)) for out in made] == [False, True, True, True, True]
    assert [outputs.compiled(out) is not None for out in made] == [False, False, False, True, True]
    assert outputs.compiled_labels()
    assert outputs.trained()
    assert outputs.remembers("rsc")
    assert not outputs.remembers("mixmo")
    compiling.undo()
    assert [record.notes["rsc"] for record in outputs.records(2 * made[4])] == [4]  # tied now
    assert outputs.compiled(made[4]) is None
    assert not outputs.compiled_labels()


def test_a_loss_of_other_labels(compiling: pytest.MonkeyPatch) -> None:
    model = fxgraft.patch(net(), "rsc", layer="stage2", input_size=SIZE)
    out = model(images(), target=LABELS)
    assert torch.equal(fxgraft.loss(model, out, LABELS), F.cross_entropy(out, LABELS))
    assert torch.equal(fxgraft.loss(model, out, LABELS.clone()), F.cross_entropy(out, LABELS))
    other = (LABELS + 1) % CLASSES
    with pytest.raises((RuntimeError, TargetError), match="other labels than the pass of this output took"):
        fxgraft.loss(model, out, other)
    copied = out.clone()  # from which compiled code finds no way back
    assert torch.equal(fxgraft.loss(model, copied, other), F.cross_entropy(out, other))


def test_a_loss_of_an_output_whose_values_changed(compiling: pytest.MonkeyPatch) -> None:
    model = fxgraft.patch(net(), "rsc", layer="stage2", input_size=SIZE)
    out = model(images(), target=LABELS)
    with torch.no_grad():
        out.mul_(2)
    with pytest.raises(RuntimeError, match=OTHER_OUTPUT):
        fxgraft.loss(model, out, LABELS)
