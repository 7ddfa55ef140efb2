"""Training twice: a patched stock network, and a network with the method typed into its forward, as a release is.

Both start from the same weights and see the same batches and the same draws. What is drawn is repeated by seeding
torch before every step of either; nothing is computed by the library on the side of the reference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS = 5
WIDTHS = (8, 12, 16, 20)
TOLERANCE = 1e-9
SEED = 20  # of the first step: what is drawn in five of them has every case that the tests ask for

Step = Callable[[int], Tensor]
"""Makes one step of training, of the number given, and returns its loss."""
State = Callable[[], Mapping[str, Tensor]]


def stock(classes: int) -> nn.Module:
    """A residual network of timm in float64, of four basic blocks, whose BatchNorm has seen nothing."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": WIDTHS, "zero_init_last": False}
    return timm.create_model("resnet18", num_classes=classes, **options).double().train()


def batch(step: int, size: int, pixels: int, classes: int) -> tuple[Tensor, Tensor]:
    """Images and labels of one step."""
    g = torch.Generator().manual_seed(100 + step)
    images = torch.randn(size, 3, pixels, pixels, generator=g, dtype=torch.float64)
    return images, torch.randint(classes, (size,), generator=g)


class Block(nn.Module):
    """A basic residual block up to the sum, without its last activation."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        if stride > 1:
            down = (nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))
            self.downsample = nn.Sequential(*down)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return branch + (self.downsample(x) if hasattr(self, "downsample") else x)


class Typed(nn.Module):
    """The same network written out, with the weights of the stock one; methods change what it is made of."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        for index, (inner, outer) in enumerate(zip((64, *WIDTHS), WIDTHS, strict=False), 1):
            block = Block(inner, outer, 1 if index == 1 else 2)
            if index == 1:
                block.downsample = nn.Sequential(
                    nn.Conv2d(inner, outer, 1, bias=False), nn.BatchNorm2d(outer)
                )
            setattr(self, f"layer{index}", nn.Sequential(block))
        self.fc = nn.Linear(WIDTHS[-1], getattr(network, "fc").out_features)  # noqa: B009
        self.double().load_state_dict(copy.deepcopy(network.state_dict()))

    def stem(self, x: Tensor) -> Tensor:
        """The first convolution."""
        return self.conv1(x)

    def post(self, index: int, x: Tensor) -> Tensor:
        """What happens to the sum of a block, before its last activation."""
        return x

    def features(self, x: Tensor) -> Tensor:
        """The map before global pooling."""
        x = F.max_pool2d(F.relu(self.bn1(self.stem(x))), 3, 2, 1)
        for index in range(4):
            x = F.relu(self.post(index, getattr(self, f"layer{index + 1}")[0](x)))
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


def deviation(patched: Step, reference: Step, states: tuple[State, State]) -> float:
    """Train both for some steps; the largest difference of losses, parameters and buffers after any step.

    Args:
        patched: a step of the patched network.
        reference: the same of the other.
        states: of both, under the same names.
    """
    worst = 0.0
    start = {key: value.clone() for key, value in states[0]().items()}
    for step in range(STEPS):
        losses = []
        for each in (patched, reference):
            torch.manual_seed(SEED + step)
            losses.append(each(step).detach())
        worst = max(worst, (losses[0] - losses[1]).abs().item(), _difference(states[0](), states[1]()))
    still = [key for key, value in states[0]().items() if torch.equal(value, start[key])]
    assert not still, f"these were not trained, and comparing them says nothing: {still}"
    return worst


def _difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    assert sorted(ours) == sorted(theirs)
    return max((value - theirs[key]).abs().max().item() for key, value in ours.items())


def stepping(loss: Callable[[int], Tensor], optimiser: torch.optim.Optimizer) -> Step:
    """A step of training from its loss."""

    def step(number: int) -> Tensor:
        optimiser.zero_grad()
        value = loss(number)
        value.backward()
        optimiser.step()
        return value

    return step
