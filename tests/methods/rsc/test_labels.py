"""Labels and outputs of other forms: structured outputs, dense labels, soft targets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgraft
from models.small import CLASSES, SITES, batch, exactly, muted_counts, net, patched, recorded


class TwoHeads(nn.Module):
    """Returns logits and auxiliary logits in a dictionary, a tuple, or under other names."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.body = net()
        self.body.fc = nn.Identity()
        self.main = nn.Linear(12, CLASSES)
        self.aux = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Any:
        x = self.body(x)
        logits, aux = self.main(x), self.aux(x)
        if self.form == "tuple":
            return logits, aux
        first = "logits" if self.form == "named" else "first"
        return {first: logits, "aux": aux}


@pytest.mark.parametrize(
    ("form", "output", "head"),
    [
        ("named", None, "main"),
        ("named", "aux", "aux"),
        ("other", "first", "main"),
        ("other", "aux", "aux"),
        ("tuple", 0, "main"),
        ("tuple", 1, "aux"),
    ],
)
def test_output_says_which_logits(form: str, output: str | int | None, head: str) -> None:
    x, y = batch()
    model = TwoHeads(form)
    options = {} if output is None else {"output": output}
    patched(model, "body.act2", scope="channel", channel_drop=0.5, **options)
    out, (entry,) = recorded(model, x, y)
    expected = getattr(model, head).weight[y].topk(6, dim=1).indices
    exactly(entry.mask.flatten(1), torch.ones(6, 12).scatter(1, expected, 0.0))
    key = output if output is not None else "logits"
    exactly(fxgraft.loss(model, out, y), F.cross_entropy(out[key], y))


@pytest.mark.parametrize(
    ("form", "output"), [("named", "nowhere"), ("tuple", 2), ("tuple", None), ("other", None)]
)
def test_an_unknown_output_lists_those_there_are(form: str, output: str | int | None) -> None:
    model = TwoHeads(form)
    names = "0, 1" if form == "tuple" else "'aux'"
    with pytest.raises(fxgraft.StructureError, match=names):
        patched(model, "body.act2", output=output)
    assert type(model) is TwoHeads


def test_output_of_a_single_value_is_an_error() -> None:
    with pytest.raises(fxgraft.StructureError, match="Leave output= out"):
        patched(net(), "act2", output="out")


class Dense(nn.Module):
    """A segmentation network: logits (B, K, H, W) at half the resolution of the image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.body = nn.Conv2d(3, 8, 3, 2, 1)
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(8, CLASSES, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@pytest.mark.parametrize("ignore", [-100, 255])
@pytest.mark.parametrize("scope", ["spatial", "channel"])
def test_dense_labels_leave_ignored_pixels_out(scope: str, ignore: int) -> None:
    x, _ = batch(4)
    y = torch.randint(CLASSES, (4, 12, 12))
    y[:, :5] = ignore
    model = patched(Dense(), "body", scope=scope, ignore_index=ignore, batch_share=0.5)
    _, (entry,) = recorded(model, x, y)

    twin = Dense()
    z = twin.body(x).detach().requires_grad_()
    valid = y != ignore
    labels = y.where(valid, 0).unsqueeze(1)
    logits = twin.head(z)
    (logits.gather(1, labels).squeeze(1) * valid).sum().backward()
    pooled = z.grad.mean((2, 3), keepdim=True)
    scores = (pooled if scope == "channel" else (z * pooled).sum(1)).flatten(1).detach()
    exactly(
        entry.mask.flatten(1),
        torch.ones_like(scores).scatter(1, scores.topk(muted_counts(entry.mask)[0]).indices, 0.0),
    )

    def probability(value: Tensor) -> Tensor:
        p = twin.head(value).softmax(1).gather(1, labels).squeeze(1) * valid
        return p.flatten(1).sum(1) / valid.flatten(1).sum(1)

    fall = (probability(z) - probability(z * entry.mask) - 1e-4).clamp(min=0)
    exactly(entry.selected, fall > fall.sort(descending=True).values[2])


def test_all_pixels_ignored_is_no_division_by_zero() -> None:
    x, _ = batch(2)
    model = patched(Dense(), "body", scope="channel")
    out, (entry,) = recorded(model, x, torch.full((2, 12, 12), -100))
    assert out.isfinite().all()
    assert not entry.selected.any()


def test_a_dense_label_out_of_range_is_an_error() -> None:
    x, _ = batch(2)
    model = patched(Dense(), "body")
    with pytest.raises(fxgraft.TargetError, match=f"from 0 to 255 for {CLASSES} classes"):
        model(x, target=torch.zeros(2, 12, 12, dtype=torch.long).index_fill(1, torch.tensor(3), 255))


@SITES
@pytest.mark.parametrize("scope", ["spatial", "channel"])
def test_soft_targets_that_are_one_hot_are_indices(scope: str, layer: str) -> None:
    x, y = batch()
    by_index, by_weight = (
        recorded(patched(net(), layer, scope=scope), x, target)
        for target in (y, F.one_hot(y, CLASSES).float())
    )
    exactly(by_weight[1][0].mask, by_index[1][0].mask)
    exactly(by_weight[1][0].selected, by_index[1][0].selected)
    exactly(by_weight[0], by_index[0])


def test_soft_targets_mix() -> None:
    x, y = batch()
    mixed = 0.7 * F.one_hot(y, CLASSES).float() + 0.3 * F.one_hot(y.roll(1), CLASSES).float()
    model = patched(net(), "act2", scope="channel", channel_drop=0.5)
    _, (entry,) = recorded(model, x, mixed)
    top = (mixed @ model.fc.weight).topk(6, dim=1).indices
    exactly(entry.mask.flatten(1), torch.ones(6, 12).scatter(1, top, 0.0))
