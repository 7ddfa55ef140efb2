"""Small networks and a method of a third party, for tests of what works with any network and any method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import fxgraft
from fxgraft.graph.grafting.backbone import Backbone
from fxgraft.graph.grafting.graft import Graft, Make, Placer
from fxgraft.graph.grafting.graft_registry import GraftRegistry
from fxgraft.graph.grafting.placement import Placement
from fxgraft.graph.grafting.unit import Unit
from fxgraft.graph.structure.rest_of_network import Rest, rest_of_network
from fxgraft.graph.structure.site import Site
from fxgraft.graph.structure.sites import resolve
from fxgraft.graph.tracing.editing import Edit, Output
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.patches import registry

CLASSES = 4


class Block(nn.Module):
    """A residual block with all that is awkward: in-place activation and addition, an optional argument."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.act2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        if shortcut is None:
            shortcut = x
        x = self.conv2(self.act(self.bn(self.conv1(x))))
        x += shortcut
        return self.act2(x)


class Stem(nn.Module):
    """Calls its activation twice."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.second(self.act(self.first(x))))


class Net(nn.Module):
    """A nested network: stem, two stages of blocks, pooling, dropout, one linear layer."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.stem = Stem(channels)
        self.stage1 = nn.Sequential(Block(channels), Block(channels))
        self.down = nn.Conv2d(channels, 2 * channels, 2, stride=2)
        self.stage2 = nn.Sequential(Block(2 * channels), Block(2 * channels))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.25)
        self.fc = nn.Linear(2 * channels, CLASSES)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.stage2(self.down(self.stage1(self.stem(x))))

    def forward_head(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.pool(x).flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def net() -> Net:
    """The same network every time; the random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net()


def images(batch: int = 4, size: int = 8, seed: int = 0) -> Tensor:
    """A batch of images, the same one for the same seed."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


LABELS = torch.arange(4) % CLASSES


class Scale(Unit):
    """Multiplies by a constant; holds no tensors."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Gain(Unit):
    """Multiplies by a learned number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(float(factor)))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Instead(Unit):
    """Takes the place of a layer."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return args[0] * self.factor


Modes = Literal["training", "evaluation", "both"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Toy(fxgraft.Patch):
    """Multiplies values by a factor.

    Args:
        at: (owner, edit) pairs.
        factor: by what.
        modes: when.
        learned: whether the factor is a parameter.
        fail: raise at the unit of this number.
    """

    title = "Toy"
    at: tuple[tuple[str, Edit], ...] = (("", Output()),)
    factor: float = 2.0
    modes: Modes = "both"
    learned: bool = False
    replaces: bool = False
    fail: int | None = None

    def unit(self) -> Unit:
        return (
            Instead(self.factor)
            if self.replaces
            else Gain(self.factor)
            if self.learned
            else Scale(self.factor)
        )

    def place(self, backbone: Backbone, make: Make) -> Sequence[Placement]:
        placements = []
        for index, (owner, edit) in enumerate(self.at):
            if index == self.fail:
                raise fxgraft.StructureError(f"unit {index} finds nothing to hold on to")
            unit = make(str(index), self.unit)
            when = {"training": self.modes != "evaluation", "evaluation": self.modes != "training"}
            placements.append(Placement(owner, edit, str(index), unit, **when))
        return placements

    def describe(self, graft: Graft) -> str:
        return f"times {self.factor}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainToy(Toy):
    """A toy of training alone that adds to the loss and replaces the criterion."""

    train_only = True
    adds_parameters = True
    modes: Modes = "training"
    penalty: float = 0.5

    def losses(
        self, graft: Graft, out: Any, target: Tensor, criterion: Callable[..., Tensor]
    ) -> dict[str, Tensor]:
        return {"penalty": self.penalty * out.square().mean()}

    def criterion(self, graft: Graft, criterion: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda out, y: 2 * criterion(out, y)


def register_toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the toys as a third party would; after the test the registry is what it was."""
    fxgraft.methods()  # those that are imported later would be forgotten with the toys
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    fxgraft.register("toy")(Toy)
    fxgraft.register("train_toy")(TrainToy)


def names(model: nn.Module) -> list[str]:
    """The names of a model's grafts."""
    return [graft.name for graft in fxgraft.grafts(model)]


def parts_of(model: nn.Module) -> dict[str, Any]:
    """What a model is made of, by identity where there is one: classes, flags, attributes, children, hooks."""
    modules = list(model.named_modules(remove_duplicate=False))
    return {
        "modules": [(name, id(module), type(module)) for name, module in modules],
        "training": [(name, module.training) for name, module in modules],
        "attributes": [(name, list(module.__dict__)) for name, module in modules],
        "children": [(name, list(module._modules)) for name, module in modules],
        "hooks": [
            (name, key, list(value.items()))
            for name, module in modules
            for key, value in module.__dict__.items()
            if key.endswith("_hooks")
        ],
    }


def state_of_everything(model: nn.Module) -> dict[str, Any]:
    """All that a call must leave alone: classes, identities, flags, hooks, attributes, tensors, chance."""
    return {
        **parts_of(model),
        "requires_grad": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        "tensors": [(key, value.clone()) for key, value in model.state_dict().items()],
        "random": torch.get_rng_state(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Compare two results of `state_of_everything`, tensors bit by bit."""
    for part in before:
        if part == "tensors":
            assert [key for key, _ in before[part]] == [key for key, _ in after[part]]
            for (key, old), (_, new) in zip(before[part], after[part], strict=True):
                assert torch.equal(old, new), key
        elif part == "random":
            assert torch.equal(before[part], after[part]), "random state"
        else:
            assert before[part] == after[part], part


def step(model: nn.Module, x: Tensor, seed: int = 7, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of one pass in the model's mode under one seed; buffers are put back."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        out = model(x, **kwargs)
        out.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    for name, buffer in model.named_buffers():
        buffer.data.copy_(kept[name])
    return out.detach(), grads


def assert_equal_steps(a: tuple[Tensor, dict[str, Tensor]], b: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Compare two results of `step` bit by bit."""
    assert torch.equal(a[0], b[0])
    assert a[1].keys() == b[1].keys()
    for name, grad in a[1].items():
        assert torch.equal(grad, b[1][name]), name


def rest(model: nn.Module, words: Any, size: tuple[int, int, int], output: Any = None) -> tuple[Site, Rest]:
    trace = ModelTrace(model, size)
    (site,) = resolve(trace, words)
    return site, rest_of_network(trace, site, output)


def value_at(
    model: nn.Module, site: Site, needed: tuple[Site, ...], x: Tensor
) -> tuple[Tensor, Tensor, SimpleNamespace]:
    """Run the model; return the value at the site, the output, and the values and inputs that the rest needs."""
    seen: dict[str, Tensor] = {}

    class Keep(Unit):
        def __init__(self, key: str) -> None:
            super().__init__()
            self.key = key

        def forward(self, value: Tensor) -> Tensor:
            seen[self.key] = value.clone()
            return value

    class Taps(Placer):
        def place(self, backbone: Backbone, make: Make) -> list[Placement]:
            captured = [one for each in needed for one in backbone.place(each, Keep(each.name))]
            return [*captured, *backbone.place(site, Keep("site"), key="site")]

    registry = GraftRegistry()
    registry.install(model, [Graft("taps", Taps(), input_size=tuple(x.shape[1:]))])
    out = model(x)
    registry.install(model, [])
    values = {key: value for key, value in seen.items() if key != "site"}
    return seen["site"], out, SimpleNamespace(values=values, inputs=(x,))


def evaluate(after: Rest, model: nn.Module, z: Tensor, known: Any = None) -> Tensor:
    """Evaluate the rest of a network with what `value_at` found."""
    if known is None:
        return after.evaluate(model, z, (), ())
    captured = [known.values[each.name] for each in after.captured]
    return after.evaluate(model, z, captured, [known.inputs[index] for index in after.inputs])
