"""What the tests of RSC's tensor functions share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import settings
from torch import Tensor

from fxgraft.patches.rsc.tensors import label_score

# float64: rounding of a different order of sums. float32: ten times what separates the reference's two runs.
TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
}
SCOPES = ["spatial", "channel"]
SHAPES = [(1, 1, 1, 1), (1, 3, 1, 1), (1, 1, 4, 5), (5, 6, 7, 3), (4, 5, 2, 3, 4), (3, 8, 10), (6, 16, 1, 9)]
few = settings(max_examples=40, deadline=None)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, **TOLERANCE[actual.dtype])


def exactly(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, check_dtype=False)


def head(z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    pooled = F.adaptive_avg_pool2d(z, 1) if z.ndim == 4 else z.flatten(2).mean(2)
    return F.linear(pooled.flatten(1), weight, bias)


def gradient_at(z: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    z = z.detach().requires_grad_()
    return torch.autograd.grad(label_score(head(z, weight, bias), target), z)[0]


def random_case(shape: tuple[int, ...], classes: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(classes, shape[1], generator=g, dtype=torch.float64).to(dtype)
    bias = torch.randn(classes, generator=g, dtype=torch.float64).to(dtype)
    return z, weight, bias, torch.randint(classes, shape[:1], generator=g)
