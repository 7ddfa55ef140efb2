"""Norms between pooling and classifier: exact with statistics of the pooled vector, said to be inexact, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import norm, norm_act
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import FrozenBatchNorm2d

import fxgraft
from fxgraft.errors import StructureError
from methods.diversification.diversified import CLASSES, NEUTRAL, images

FEATURES = 12


class Normed(nn.Module):
    """Convolution, average, one layer on (B, C) or (B, C, 1, 1), classifier."""

    def __init__(self, middle: Callable[..., Tensor], flat: bool) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, FEATURES, 3, 2, 1), nn.AdaptiveAvgPool2d(1)
        self.middle, self.flat = middle, flat
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.conv(x))
        return self.fc(self.middle(x.flatten(1) if self.flat else x).flatten(1))


def layers(module: object, **options: object) -> dict[str, tuple[Callable[[], nn.Module], bool]]:
    """List the norms that a file of timm defines, and whether they take vectors."""
    found = {}
    for name, kind in vars(module).items():
        own = isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == module.__name__  # type: ignore[attr-defined]
        if own and name not in ("SyncBatchNormAct",):
            grouped = {"num_groups": 3} if name in ("GroupNorm", "GroupNormAct") else {}
            make = lambda kind=kind, grouped=grouped: kind(FEATURES, **grouped, **options)  # noqa: E731
            found[name] = (make, "2d" not in name and "Group" not in name)
    return found


WRITTEN_OUT: dict[str, Callable[[Tensor], Tensor]] = {
    "written out": lambda x: (
        (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    ),
    "written out, with sizes": lambda x: x * (x.pow(2).sum(1, keepdim=True) / x.shape[1] + 1e-6).rsqrt(),
    "normalised": lambda x: F.normalize(x) * 3,
    "as a function": lambda x: F.layer_norm(x.double(), (FEATURES,)).float(),
}
EXACT = {
    **layers(norm),
    **layers(norm_act, apply_act=False),
    "torch LayerNorm": (lambda: nn.LayerNorm(FEATURES), True),
    "torch RMSNorm": (lambda: nn.RMSNorm(FEATURES), True),
    "torch GroupNorm": (lambda: nn.GroupNorm(4, FEATURES), False),
    "torch GroupNorm of vectors": (lambda: nn.GroupNorm(4, FEATURES), True),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(FEATURES), True),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(FEATURES), False),
    "BatchNorm2d without statistics": (lambda: nn.BatchNorm2d(FEATURES, track_running_stats=False), False),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(FEATURES), False),
    "torchvision LayerNorm2d": (lambda: LayerNorm2d(FEATURES), False),
    "torchvision FrozenBatchNorm2d": (lambda: FrozenBatchNorm2d(FEATURES), False),
    **{name: (lambda function=function: function, True) for name, function in WRITTEN_OUT.items()},
}
ACTIVATED = {
    **layers(norm_act),
    "SyncBatchNormAct": (lambda: norm_act.convert_sync_batchnorm(norm_act.BatchNormAct2d(FEATURES)), False),
}


def both(make: Callable[[], nn.Module], flat: bool) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    bare = Normed(make(), flat)
    for name, parameter in bare.named_parameters():
        if name.startswith("middle"):
            nn.init.uniform_(parameter, 0.5, 1.5)
    return bare, fxgraft.patch(copy.deepcopy(bare), "diversification", input_size=(3, 16, 16), **NEUTRAL)


def check_evaluation(bare: nn.Module, model: nn.Module, x: Tensor) -> None:
    """After a training pass of each, the statistics are those of pooled vectors, and evaluation is the bare model's."""
    torch.testing.assert_close(dict(model.named_buffers()), dict(bare.named_buffers()))
    model.load_state_dict(bare.state_dict())
    assert torch.equal(model.eval()(x), bare.eval()(x))


@pytest.mark.parametrize("kind", EXACT)
def test_norms_have_the_statistics_of_the_pooled_vector(kind: str) -> None:
    bare, model = both(*EXACT[kind])
    x, y = images(6)
    expected, out = bare(x), model(x)
    close = {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(out, expected, **close)
    F.cross_entropy(out, y).backward()
    F.cross_entropy(expected, y).backward()
    for (name, ours), theirs in zip(model.named_parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda m, n=name: f"{n}: {m}", **close)
    assert "not exact" not in str(fxgraft.summary(model))
    check_evaluation(bare, model, x)


@pytest.mark.parametrize("kind", ACTIVATED)
def test_an_activation_in_a_norm_is_said_and_trains_no_statistics_of_positions(kind: str) -> None:
    bare, model = both(*ACTIVATED[kind])
    x, _ = images(6)
    assert not torch.allclose(model(x), bare(x), atol=1e-3)
    plan = fxgraft.patch(copy.deepcopy(bare), "diversification", input_size=(3, 16, 16), dry_run=True)
    for text in (str(fxgraft.summary(model)), str(plan)):
        assert "not exact: 'middle" in text
    check_evaluation(bare, model, x)


def test_positions_of_batch_norm_with_an_activation() -> None:
    bare, model = both(*ACTIVATED["BatchNormAct2d"])
    x, _ = images(6)
    features = bare.conv(x)
    pooled = features.mean((2, 3), keepdim=True)
    layer = bare.middle
    scale = layer.weight / (pooled.var((0, 2, 3), unbiased=False) + layer.eps).sqrt()
    rows = F.relu((features - pooled.mean(0)) * scale.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1))
    expected = torch.einsum("kc,bchw->bk", bare.fc.weight, rows) / rows[0, 0].numel() + bare.fc.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


class Counting(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


@pytest.mark.parametrize(
    ("middle", "message"),
    [
        (
            Counting(FEATURES),
            r"'middle' \(Counting\) stands between pooling and classifier of Normed and may keep",
        ),
        (lambda x: F.batch_norm(x, None, None, training=True), r"batch_norm\(\) stands between"),
    ],
)
def test_what_keeps_statistics_in_another_way_is_refused(middle: Callable[..., Tensor], message: str) -> None:
    with pytest.raises(StructureError, match=message):
        fxgraft.patch(Normed(middle, False), "diversification", input_size=(3, 16, 16))


def test_the_norm_of_a_convnext_is_exact() -> None:
    torch.manual_seed(0)
    bare = timm.create_model("test_convnext", num_classes=5, drop_rate=0.3)
    nn.init.normal_(bare.head.fc.weight)
    nn.init.uniform_(bare.head.norm.weight, 0.5, 1.5)
    model = fxgraft.patch(copy.deepcopy(bare), "diversification", patch=1, **NEUTRAL)
    x = torch.randn(2, 3, 64, 64)
    torch.manual_seed(1)
    expected = bare.train()(x)
    torch.manual_seed(1)
    torch.testing.assert_close(model.train()(x), expected, rtol=1e-4, atol=1e-5)
    found = fxgraft.patches.diversification.maps(model, x)
    torch.testing.assert_close(found.mean((2, 3)), bare.eval()(x), rtol=1e-4, atol=1e-5)
