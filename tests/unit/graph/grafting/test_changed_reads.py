"""What a traced forward read of Python's state is seen when it changes after the patch."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxgraft
from fxgraft.graph.tracing.editing import After
from models.toys import Toy

SCALES = {"a": 1.0}
POWER = 1

pytestmark = pytest.mark.usefixtures("toy_methods")


def helper(x: Tensor) -> Tensor:
    return x


@dataclass
class Config:
    scale: float = 1.0
    names: list[str] = field(default_factory=lambda: ["a"])


class Constants:
    SHIFT = 0.0


class Reader(nn.Module):
    """Its forward reads whatever a forward can."""

    factor = 1.0
    steps: list[float] = [1.0]  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 6, 1), nn.Linear(6, 4)
        self.drop = nn.Dropout(0.0)
        self.listed = [1.0]
        self.table = {"x": {"y": 1.0}}
        self.config = Config()
        self.options = SimpleNamespace(scale=1.0)
        self.parsed = argparse.Namespace(scale=1.0)
        self.blocks = nn.ModuleList([nn.Identity()])
        self.hidden = [nn.Dropout(0.0)]
        self.optional: Any = None
        self.scale_1 = 1.0
        self.numbers = [torch.ones(())]
        self.plain = nn.Dropout(0.0)

    @property
    def shown(self) -> float:
        return self.options.scale

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.factor

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.scaled(x) * self.steps[0] * self.listed[0] * self.table["x"]["y"] * self.config.scale
        x = x * len(self.config.names) * self.shown * self.parsed.scale * SCALES["a"] + Constants.SHIFT
        for block in self.blocks:
            x = block(x) + 1
        x = helper(x) ** POWER * (1 - self.drop.p) * (1 - self.hidden[0].p) * getattr(self, f"scale_{1}")
        x = x * self.numbers[0]
        if self.optional is not None:
            x = self.optional(x)
        if hasattr(self, "extra"):
            x = x * self.extra
        return self.fc(F.relu(self.plain(x)).mean((2, 3)))


CHANGES: dict[str, Callable[[Reader], Any]] = {
    "list": lambda m: m.listed.__setitem__(0, 2.0),
    "replaced list": lambda m: setattr(m, "listed", [3.0]),
    "nested": lambda m: m.table["x"].update(y=2.0),
    "dataclass": lambda m: setattr(m.config, "scale", 2.0),
    "list of an object": lambda m: m.config.names.append("b"),
    "namespace": lambda m: setattr(m.options, "scale", 2.0),
    "arguments": lambda m: setattr(m.parsed, "scale", 2.0),
    "module list": lambda m: m.blocks.append(nn.Identity()),
    "deleted of a module list": lambda m: m.blocks.__delitem__(0),
    "closed layer": lambda m: setattr(m.drop, "p", 0.5),
    "hidden layer": lambda m: setattr(m.hidden[0], "p", 0.5),
    "a child where none was": lambda m: setattr(m, "optional", nn.Conv2d(6, 6, 1)),
    "a name made up": lambda m: setattr(m, "scale_1", 2.0),
    "attribute that is asked for": lambda m: setattr(m, "extra", 3.0),
    "of the instance": lambda m: setattr(m, "factor", 2.0),
    "method of the instance": lambda m: setattr(m, "scaled", lambda x: x * 4),
    "tensor of a list": lambda m: m.numbers[0].mul_(2),
    "other tensor in a list": lambda m: m.numbers.__setitem__(0, torch.full((), 2.0)),
}
SHARED: dict[str, tuple[Any, str, Any]] = {
    "class attribute": (Reader, "factor", 2.0),
    "list of a class": (Reader, "steps", [2.0]),
    "method of a class": (Reader, "scaled", lambda self, x: x * 3),
    "constant of another class": (Constants, "SHIFT", 1.0),
    "function of torch": (F, "relu", lambda x: x * 2),
}


def seed() -> Reader:
    torch.manual_seed(0)
    return Reader().eval()


def images() -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def pair() -> tuple[Reader, Reader]:
    model, bare = seed(), seed()
    fxgraft.patch(model, Toy(at=(("", After("stem")),), factor=3), input_size=(3, 4, 4))
    bare.stem.register_forward_hook(lambda _m, _a, out: out * 3)
    assert torch.equal(model(images()), bare(images()))
    return model, bare


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_module_holds(name: str) -> None:
    model, bare = pair()
    for each in (model, bare):
        torch.manual_seed(2)
        CHANGES[name](each)
    assert torch.equal(model(images()), bare(images()))


@pytest.mark.parametrize("name", SHARED)
def test_what_a_class_holds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, bare = pair()
    before = bare(images())
    monkeypatch.setattr(*SHARED[name])
    assert not torch.equal(bare(images()), before)
    assert torch.equal(model(images()), bare(images()))


@pytest.mark.parametrize("change", [{"POWER": 2}, {"helper": lambda x: x * 2}])
def test_what_a_file_holds(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, bare = pair()
    for name, value in change.items():
        monkeypatch.setitem(globals(), name, value)
    assert torch.equal(model(images()), bare(images()))


def test_an_entry_of_a_dictionary_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    model, bare = pair()
    monkeypatch.setitem(SCALES, "a", 2.0)
    assert torch.equal(model(images()), bare(images()))


def test_what_is_not_read_makes_no_new_plan() -> None:
    model, _ = pair()
    registry = model._fxgraft.registry
    model.unread, model.plain.p, model.fc.note = 3, 0.1, [1]
    model(images())
    SCALES["new"] = 1.0
    model(images())
    del SCALES["new"]
    assert registry.renewals == 0


def test_a_removed_layer_is_a_typed_error() -> None:
    model, _ = pair()
    del model.drop
    with pytest.raises(fxgraft.FxgraftError, match="drop"):
        model(images())


def test_a_layer_that_is_set_to_none_is_a_typed_error() -> None:
    model, _ = pair()
    model.drop = None
    with pytest.raises(fxgraft.FxgraftError, match="'p'"):
        model(images())


def test_a_copy_sees_its_own_changes() -> None:
    model, bare = pair()
    twin, bare_twin = copy.deepcopy(model), copy.deepcopy(bare)
    for each in (twin, bare_twin):
        each.listed[0] = 2.0
    assert torch.equal(twin(images()), bare_twin(images()))
    assert torch.equal(model(images()), bare(images()))


class Functional(nn.Module):
    """Its forward reads the modes of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.drop = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Dropout()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        x = F.batch_norm(
            self.stem(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training
        )
        return self.fc(F.dropout(x, 0.5, self.drop.training).mean((2, 3)))


@pytest.mark.parametrize("planned_in_training", [True, False])
def test_frozen_layers_whose_mode_the_forward_reads(planned_in_training: bool) -> None:
    torch.manual_seed(0)
    model = Functional().train(planned_in_training)
    bare = copy.deepcopy(model)
    fxgraft.patch(model, Toy(at=(("", After("stem")),), factor=3), input_size=(3, 4, 4))
    bare.stem.register_forward_hook(lambda _m, _a, out: out * 3)
    for training, frozen in [(True, ()), (True, ("norm",)), (True, ("norm", "drop")), (False, ("drop",))]:
        out = []
        for each in (model, bare):
            each.train(training)
            for name in frozen:  # and dropout that goes on in evaluation
                getattr(each, name).train(not training)
            torch.manual_seed(3)
            out.append(each(images()))
        assert torch.equal(*out)
    assert torch.equal(model.norm.running_mean, bare.norm.running_mean)


class Checkpointing(nn.Conv2d):
    """Decides when it is called, as layers of transformers do."""

    gradient_checkpointing = False

    def __call__(self, *args: Any) -> Any:
        if self.gradient_checkpointing:
            return checkpoint(super().__call__, *args, use_reentrant=False)
        return super().__call__(*args)


def test_what_a_call_reads_is_read_again_by_the_graph() -> None:
    model = Functional().train()
    model.stem, model.norm.momentum = Checkpointing(3, 6, 1), 0.0
    fxgraft.patch(model, Toy(at=(("", After("stem")),), factor=3), input_size=(3, 4, 4))
    outs = []
    for flag in (False, True):
        model.stem.gradient_checkpointing = flag
        torch.manual_seed(0)
        outs.append(model(images()))
    assert torch.equal(*outs)
    assert model._fxgraft.registry.renewals == 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of dynamo's own looking
def test_compiled_code_sees_numbers_texts_and_lists() -> None:
    torch.compiler.reset()
    model, bare = pair()
    compiled: Any = torch.compile(model, backend="eager")
    compiled(images())
    for name in ("list", "closed layer", "a name made up"):
        for each in (model, bare):
            CHANGES[name](each)
        assert torch.equal(compiled(images()), bare(images()))
    torch.compiler.reset()
    whole: Any = torch.compile(model, backend="eager", fullgraph=True)
    whole(images())
    model.listed[0] = 5.0
    with pytest.raises(Exception, match=r"Call the model once without torch\.compile"):
        whole(images())
