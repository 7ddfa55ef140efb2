"""One logit, several labels per image, and numbers to predict."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgraft
from models.small import batch, exactly, net, patched, recorded

LAYERS = ["act2", "act1"]
"""One with the closed form, one without."""


def with_head(weight: Tensor, bias: Tensor) -> nn.Module:
    model = net()
    model.fc = nn.Linear(12, len(weight))
    with torch.no_grad():
        model.fc.weight.copy_(weight)
        model.fc.bias.copy_(bias)
    return model


def head(classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(classes, 12, generator=generator), torch.randn(classes, generator=generator)


FORMS: dict[str, Any] = {
    "indices": lambda y: y,
    "bool": lambda y: y.bool(),
    "a column": lambda y: y.unsqueeze(1),
    "floats": lambda y: y.float(),
    "a column of floats": lambda y: y.float().unsqueeze(1),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("scope", ["spatial", "channel"])
def test_one_logit_is_two_classes(scope: str, layer: str, form: str) -> None:
    (weight, bias), (x, y) = head(1), batch()
    y = y % 2
    one = patched(with_head(weight, bias), layer, scope=scope, batch_share=0.5)
    two = patched(
        with_head(*(torch.cat((-v / 2, v / 2)) for v in (weight, bias))), layer, scope=scope, batch_share=0.5
    )
    _, (ours,) = recorded(one, x, FORMS[form](y))
    _, (theirs,) = recorded(two, x, y)
    exactly(ours.mask, theirs.mask)
    exactly(ours.selected, theirs.selected)
    assert (ours.mask == 0).any()
    assert ours.selected.any()


@pytest.mark.parametrize("layer", LAYERS)
def test_several_labels_are_a_question_each(layer: str) -> None:
    (weight, bias), (x, _) = head(3), batch()
    y = torch.randint(2, (len(x), 3), generator=torch.Generator().manual_seed(1)).float()
    model = patched(with_head(weight, bias), layer, scope="channel", batch_share=0.5, probability="sigmoid")
    values: list[Tensor] = []
    dict(model.named_modules())[layer].register_forward_hook(lambda m, a, out: values.append(out.detach()))
    _, (entry,) = recorded(model, x, y)
    if layer == "act2":
        scores = (y - 0.5) @ weight
        top = scores.topk(int(entry.mask[0].numel() - entry.mask[0].sum()), dim=1).indices
        exactly(entry.mask.flatten(1), torch.ones(len(x), 12).scatter(1, top, 0.0))
    by_int = recorded(
        patched(with_head(weight, bias), layer, scope="channel", batch_share=0.5, probability="sigmoid"),
        x,
        y.long(),
    )
    exactly(by_int[1][0].mask, entry.mask)


def test_the_share_of_the_batch_goes_by_the_mean_probability_of_the_answers() -> None:
    (weight, bias), (x, _) = head(3), batch()
    y = torch.randint(2, (len(x), 3), generator=torch.Generator().manual_seed(1)).float()
    twin = with_head(weight, bias).train()
    model = patched(with_head(weight, bias), "act2", scope="channel", batch_share=0.5, probability="sigmoid")
    seen: list[Tensor] = []
    twin.act2.register_forward_hook(lambda m, a, out: seen.append(out.detach().clone()))
    twin(x)
    _, (entry,) = recorded(model, x, y)

    def probability(z: Tensor) -> Tensor:
        p = twin.fc(z.mean((2, 3))).sigmoid()
        return (y * p + (1 - y) * (1 - p)).mean(1)

    fall = (probability(seen[0]) - probability(seen[0] * entry.mask) - 1e-4).clamp(min=0)
    count = round(len(x) * 0.5)
    exactly(entry.selected, fall > fall.sort(descending=True).values[count])


class Dense(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.body = nn.Conv2d(3, 8, 3, 2, 1)
        self.head = nn.Conv2d(8, classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())


@pytest.mark.parametrize("form", ["indices", "floats"])
def test_segmentation_of_one_class(form: str) -> None:
    x, _ = batch(4)
    y = torch.randint(2, (4, 12, 12))
    y[:, :3] = 255
    one, two = Dense(1), Dense(2)
    two.body.load_state_dict(one.body.state_dict())
    with torch.no_grad():
        for name in ("weight", "bias"):
            value = getattr(one.head, name)
            getattr(two.head, name).copy_(torch.cat((-value / 2, value / 2)))
    options = {"scope": "spatial", "ignore_index": 255, "batch_share": 0.5}
    _, (ours,) = recorded(
        patched(one, "body", **options), x, y.float().unsqueeze(1) if form == "floats" else y
    )
    _, (theirs,) = recorded(patched(two, "body", **options), x, y)
    exactly(ours.mask, theirs.mask)
    exactly(ours.selected, theirs.selected)
    assert (ours.mask == 0).any()


ONE = {
    "regression": (
        torch.linspace(-3, 40, 6),
        r"numbers from -3 to 40 as labels(?s:.*)leave the method out of a regression",
    ),
    "regression in a column": (torch.linspace(-3, 40, 6)[:, None], r"numbers from -3 to 40"),
    "ordered levels": (
        torch.arange(6),
        r"class indices or levels from 0 to 5(?s:.*)one logit for each class or level",
    ),
    "one-hot": (torch.eye(2)[torch.arange(6) % 2], r"labels of shape \(6, 2\) for logits \(6, 1\)"),
}
SEVERAL = {
    "several labels": (torch.ones(6, 3), r"rows sum to 3 to 3(?s:.*)probability=\"sigmoid\""),
    "regression": (
        torch.randn(6, 3, generator=torch.Generator().manual_seed(0)),
        r"aren.t a distribution over the classes",
    ),
    "a number each": (torch.linspace(0, 9, 6), r"one floating-point number per sample(?s:.*)regression"),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("classes", "case"), [*((1, c) for c in ONE), *((3, c) for c in SEVERAL)])
def test_what_has_no_probability_is_refused(classes: int, case: str, layer: str) -> None:
    labels, message = (ONE if classes == 1 else SEVERAL)[case]
    model = patched(with_head(*head(classes)), layer)
    x, _ = batch()
    with pytest.raises(fxgraft.TargetError, match=message):
        model(x, target=labels)


def test_the_softmax_of_one_logit_is_refused() -> None:
    model = patched(with_head(*head(1)), "act2", probability="softmax")
    x, y = batch()
    with pytest.raises(fxgraft.ConfigError, match="softmax of a single logit is 1"):
        model(x, target=y % 2)


def test_an_image_with_one_of_two_answers_is_muted_for_either() -> None:
    """A label of 0 has a score as well: what speaks for no."""
    x, y = batch()
    masks = []
    for answer in (0, 1):
        model = patched(with_head(*head(1)), "act2", scope="channel", batch_share=1.0)
        masks.append(recorded(model, x, torch.full_like(y, answer))[1][0].mask)
    assert not torch.equal(*masks)
    out = model(x, target=torch.ones_like(y))
    F.binary_cross_entropy_with_logits(out.squeeze(1), torch.ones(len(x))).backward()
    assert model.fc.weight.grad.isfinite().all()
