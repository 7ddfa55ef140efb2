"""Looking at a model and patching it leave nothing behind, in modules that keep things or in Python's own books."""

from __future__ import annotations

import gc
import linecache
import weakref

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.fx import _symbolic_trace

import fxgraft


class Keeps(nn.Module):
    """Computes a bias once in evaluation, in every way in which modules keep things."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))
        self.register_buffer("grid", None)
        self.cache: dict[str, Tensor] = {}
        self.seen: list[int] = []
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.cache:
            self.cache["bias"] = self.weight * 2
        if self.grid is None:
            self.grid = torch.ones(6) * self.weight.detach()
        self.seen.append(len(x))
        self.last = x
        return x + self.cache["bias"].view(-1, 1, 1) + self.grid.view(-1, 1, 1)


def test_nothing_fake_is_kept():
    keeps = Keeps()
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1), keeps, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    )
    cache, seen = keeps.cache, keeps.seen
    fxgraft.patch(model.eval(), "diversification", input_size=(3, 16, 16))
    fxgraft.sites(model)
    assert keeps.cache is cache
    assert keeps.seen is seen
    assert (cache, seen, keeps.last, keeps.grid) == ({}, [], None, None)
    assert type(model(torch.randn(2, 3, 16, 16))) is Tensor
    assert seen == [2]


class Places(nn.Module):
    """Makes a tensor from nothing in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x) + torch.linspace(0, 1, 6).view(1, -1, 1, 1)
        return self.fc(torch.relu(x).mean((2, 3)))


def test_tensors_that_a_forward_makes_are_the_same_and_follow_the_device() -> None:
    model = Places()
    x = torch.randn(2, 3, 16, 16)
    wanted = model(x)
    fxgraft.patch(model, "diversification", input_size=(3, 16, 16), p_peak=0.0, p_patch=0.0)
    torch.testing.assert_close(model.train()(x), wanted)
    with torch.device("meta"):
        assert model.to("meta")(x.to("meta")).device.type == "meta"


def test_attention_biases_of_timm_are_computed_anew():
    torch.manual_seed(0)
    model = timm.create_model("efficientvit_m0", num_classes=3).eval()
    x = torch.randn(1, 3, 224, 224)
    fxgraft.patch(model, "rsc")
    with torch.no_grad():
        out = model(x)
        assert type(out) is Tensor
        assert torch.equal(out, fxgraft.unpatch(model)(x))


@pytest.mark.sweep
def test_generated_code_goes_with_its_patch():
    """Both books are global: what stays there makes every later trace slower and is never freed."""

    def books() -> tuple[int, int]:
        gc.collect()  # graphs have finalizers: what they hold goes in a second collection
        gc.collect()
        generated = [name for name in linecache.cache if name.startswith("<fxgraft")]
        return len(_symbolic_trace._wrapped_fns_to_patch), len(generated)

    # Its blocks call functions that timm keeps out of traces, which generated code registers.
    model, size = timm.create_model("gcvit_xxtiny", img_size=64, embed_dim=16), (3, 64, 64)
    before = books()
    fxgraft.patch(model, "crossnorm", input_size=size)
    during = books()
    assert during > before
    assert during[1] > before[1]
    fxgraft.patch(model, "selfnorm", input_size=size)
    fxgraft.unpatch(model)
    assert books() == before
    gone = weakref.ref(fxgraft.patch(model, "crossnorm", input_size=size))
    del model
    assert books() == before
    assert gone() is None
