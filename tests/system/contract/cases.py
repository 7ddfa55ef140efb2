"""The cells of the sweep, one method on one backbone, and the bare models that they are compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgraft
from models.backbones import BACKBONES, NUM_CLASSES, Backbone
from models.random_models import Recipe
from models.toys import parts_of
from system.contract.expectations import APART, EXPECTED, Expectation, Refusal, expectation

METHODS = tuple(fxgraft.methods())

# One backbone of each kind of structure runs in every test run; the sweep runs all of them.
REPRESENTATIVE = (
    "small",
    "timm/densenet121",  # densely connected
    "timm/mobilenetv3_small_050",  # a head with a layer between pooling and classifier
    "timm/resnet18",
    "timm/swin_tiny_patch4_window7_224",  # maps with channels last
    "timm/test_vit",  # a class token
)

# On the other backbones the two of `third_party_package` go through the same door as RSC, and taps have a sweep of
# their own (test_taps.py).
ELSEWHERE = ("manifold_mixup", "padain", "taps")


class Small(Backbone):
    """A network so small that every method can run with every tool."""

    recipe = Recipe(width=6, residual=(True, False), size=(16, 16))
    missing = None

    def build(self, *, warm: bool = False) -> nn.Module:
        return self.recipe.build()

    def inputs(self, batch: int = 4) -> Tensor:
        return self.recipe.batch(batch)[0]


SMALL = Small("small", "", (3, 16, 16))


@dataclass(frozen=True)
class Cell:
    """One method on one backbone."""

    method: str
    backbone: Backbone

    @property
    def expected(self) -> Expectation:
        return expectation(self.method)

    @property
    def refusal(self) -> Refusal | None:
        return self.expected.refusals.get(self.backbone.name)

    @property
    def works(self) -> bool:
        return self.refusal is None or self.refusal.instead is not None

    def options(self, **more: Any) -> dict[str, Any]:
        """The options of the sweep on this backbone."""
        instead = self.refusal.instead if self.refusal is not None else None
        return {**self.expected.options, **(instead or {}), **more}

    def patch(self, model: nn.Module, options: Mapping[str, Any] | None = None, **keywords: Any) -> nn.Module:
        """Put the method on a model of this backbone; one that nothing is known of may refuse it."""
        chosen = self.options() if options is None else options
        try:
            return fxgraft.patch(
                model, self.method, input_size=self.backbone.input_size, **chosen, **keywords
            )
        except fxgraft.FxgraftError as error:
            if self.method in EXPECTED or self.backbone.name in ("small", "timm/resnet18"):
                raise
            pytest.skip(f"{self.method} does not take {self.backbone.name}: {error}")


def cells(
    kept: Callable[[Cell], bool] = lambda cell: cell.works,
    representative: Collection[str] = REPRESENTATIVE,
    backbones: Collection[str] | None = None,
) -> list[Any]:
    """Cells as pytest parameters, backbone by backbone, those of the sweep marked as such."""
    return [
        pytest.param(
            Cell(method, backbone),
            id=f"{backbone.name}-{method}",
            marks=[
                *([pytest.mark.skip(reason=backbone.missing)] if backbone.missing else []),
                *(
                    []
                    if backbone.name in representative and method not in rare(backbone)
                    else [pytest.mark.sweep]
                ),
            ],
        )
        for backbone in (SMALL, *BACKBONES)
        if backbones is None or backbone.name in backbones
        for method in METHODS
        if (backbone.name in ("small", *REPRESENTATIVE) or method not in ELSEWHERE)
        and kept(Cell(method, backbone))
    ]


def rare(backbone: Backbone) -> tuple[str, ...]:
    """Name the methods that are tried on two of the representative backbones in every run, on the rest in the sweep.

    GAM copies the whole network, DSU is placed as MixStyle is, and the two of `tests/third_party` go through the same
    door as RSC.
    """
    return () if backbone.name in ("small", "timm/resnet18") else ("gam", "dsu", "padain", "manifold_mixup")


def named(name: str) -> Backbone:
    (found,) = (backbone for backbone in BACKBONES if backbone.name == name)
    return found


def observe(*_: Any) -> None:
    """A hook of the user's, on the model and on one of its parts; it can be pickled."""


@lru_cache(maxsize=2)
def bare(backbone: Backbone) -> nn.Module:
    """A backbone in use: warm, with hooks and a frozen part. Only ever copied."""
    model = backbone.build(warm=True)
    parameters = list(model.parameters())
    parameters[len(parameters) // 2].requires_grad_(False)
    model.register_forward_hook(observe)
    next(m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))).register_forward_hook(observe)
    return model.train()


def fresh(backbone: Backbone) -> nn.Module:
    """A bare model of one's own, with a part in another mode than the rest."""
    model = copy.deepcopy(bare(backbone))
    first = next((m for m in model.modules() if "Norm" in type(m).__name__), None)
    if first is not None:
        first.eval()
    return model


@dataclass
class ForwardContext:
    """All that one seeded pass gives and leaves behind."""

    out: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]
    random_state: Tensor

    def differences(self, other: ForwardContext) -> list[str]:
        """Name what is not the same to the bit; of gradients and buffers what `other` has too."""
        wrong = [] if same(self.out, other.out) else ["output"]
        for kind in ("gradients", "buffers"):
            mine, theirs = getattr(self, kind), getattr(other, kind)
            wrong += [f"{kind} of {name}" for name in theirs if not same(mine.get(name), theirs[name])]
        return wrong if torch.equal(self.random_state, other.random_state) else [*wrong, "random state"]


def batch(backbone: Backbone) -> tuple[Tensor, Tensor]:
    return backbone.inputs(), torch.arange(4) % NUM_CLASSES


def seeded(model: nn.Module, x: Tensor, y: Tensor, training: bool, seed: int = 1) -> ForwardContext:
    """One pass with its gradients; modes, buffers and gradients of the model are put back."""
    modes = [(module, module.training) for module in model.modules()]
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train(training)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    out = model(x, target=y) if fxgraft.grafts(model) else model(x)
    state = torch.get_rng_state()
    fxgraft.loss(model, out, y).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in kept:
                buffer.copy_(kept[name])
    for module, mode in modes:
        module.training = mode
    return ForwardContext(out.detach(), gradients, buffers, state)


@lru_cache(maxsize=4)
def reference(backbone: Backbone, training: bool) -> ForwardContext:
    """The pass of the bare model."""
    return seeded(copy.deepcopy(bare(backbone)), *batch(backbone), training)


def evaluated(model: nn.Module, x: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(x, **options)


def same(actual: Any, expected: Any) -> bool:
    """Whether two nests of tensors are equal to the bit, in shape, dtype and memory format."""
    if isinstance(expected, Tensor):
        return (
            isinstance(actual, Tensor)
            and actual.dtype == expected.dtype
            and actual.shape == expected.shape
            and actual.stride() == expected.stride()
            and torch.equal(actual, expected)
        )
    if isinstance(expected, Mapping):
        return list(actual) == list(expected) and all(same(actual[k], expected[k]) for k in expected)
    if isinstance(expected, Sequence) and not isinstance(expected, str):
        return len(actual) == len(expected) and all(map(same, actual, expected))
    return actual == expected


def trace(model: nn.Module) -> dict[str, Any]:
    """Everything about a model but the values of its tensors, by identity where there is one."""
    return {
        **parts_of(model),
        "parameters": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        "buffers": [(name, id(b)) for name, b in model.named_buffers()],
        "keys": list(model.state_dict()),
    }


@contextmanager
def untouched(model: nn.Module, draws: bool = False) -> Iterator[None]:
    """Check that what is done in the block leaves a model as it was and, unless it may, draws nothing."""
    before, state = trace(model), torch.get_rng_state()
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    yield
    after = trace(model)
    assert [part for part in before if before[part] != after[part]] == []
    assert same(dict(model.state_dict()), tensors)
    assert draws or torch.equal(torch.get_rng_state(), state), "random state"


def stack(model: nn.Module, backbone: Backbone, order: list[str]) -> list[str]:
    """Put on what goes together, in this order; return what went on."""
    there: list[str] = []
    for method in order:
        cell = Cell(method, backbone)
        if not cell.works:
            continue
        rivals = [
            message for pair, message in APART.items() if pair - {method} <= set(there) and method in pair
        ]
        if rivals:
            with untouched(model), pytest.raises(fxgraft.FxgraftError, match="|".join(rivals)):
                cell.patch(model)
            continue
        cell.patch(model)
        there.append(method)
        assert [graft.name for graft in fxgraft.grafts(model)] == there
    return there


def replicas(model: nn.Module, count: int) -> list[nn.Module]:
    """Replicate a model as DataParallel does: modules of their own, parameters that lead back to the model's."""
    made = []
    for _ in range(count):
        copies: dict[nn.Module, Any] = {m: m._replicate_for_data_parallel() for m in model.modules()}
        for original, replica in copies.items():
            replica._modules.update(
                {name: copies[child] for name, child in original._modules.items() if child}
            )
            replica._parameters.update(original._parameters)
            replica._buffers.update({n: b if b is None else b.clone() for n, b in original._buffers.items()})
            replica._is_replica = True
        made.append(copies[model])
    return made
