"""Models that end in a sigmoid or softmax: their logits are what stands before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgraft
from fxgraft.patches.rsc.patch import RSCUnit, record
from models.toys import CLASSES, LABELS, images, net

SIZE = (3, 8, 8)
YES = torch.tensor([0, 1, 1, 0])


class Ending(nn.Module):
    """A network with something behind its logits."""

    def __init__(
        self, end: Callable[[Any, Tensor], Any], module: nn.Module | None = None, classes: int = CLASSES
    ):
        super().__init__()
        self.body, self.end, self.last = net(), end, module
        torch.manual_seed(1)
        self.body.fc = nn.Linear(16, classes)
        self.body.drop = nn.Identity()

    def forward(self, x: Tensor) -> Any:
        return self.end(self, self.body(x))


def plain(model: Any, z: Tensor) -> Tensor:
    return z


def only_in_evaluation(model: Any, z: Tensor) -> Tensor:
    return z if model.training else z.softmax(1)


ENDS: dict[str, tuple[Callable[[Any, Tensor], Any], nn.Module | None, int]] = {
    "softmax": (lambda model, z: model.last(z), nn.Softmax(1), CLASSES),
    "log_softmax": (lambda model, z: model.last(z), nn.LogSoftmax(-1), CLASSES),
    "function": (lambda model, z: F.log_softmax(z, dim=1), None, CLASSES),
    "method": (lambda model, z: z.softmax(-1).float(), None, CLASSES),
    "in a part": (lambda model, z: model.last(z), nn.Sequential(nn.Identity(), nn.Softmax(1)), CLASSES),
    "with a temperature": (lambda model, z: (z / 2).softmax(1), None, CLASSES),
    "in evaluation": (only_in_evaluation, None, CLASSES),
    "sigmoid": (lambda model, z: model.last(z), nn.Sigmoid(), 1),
    "squeezed": (lambda model, z: torch.sigmoid(z).squeeze(1), None, 1),
    "squeezed before": (lambda model, z: torch.sigmoid(z.flatten()), None, 1),
    "in a dictionary": (lambda model, z: {"logits": z.softmax(1)}, None, CLASSES),
}


@pytest.mark.parametrize("layer", ["body.stage1", "body.stage2"])
@pytest.mark.parametrize("scope", ["spatial", "channel"])
@pytest.mark.parametrize("name", ENDS)
def test_rsc_looks_at_what_stands_before(name: str, scope: str, layer: str) -> None:
    end, module, classes = ENDS[name]
    before = (lambda model, z: z / 2) if name == "with a temperature" else plain
    labels = LABELS if classes > 1 else YES
    found = []
    for model in (Ending(end, module, classes), Ending(before, None, classes)):
        fxgraft.patch(model, "rsc", layer=layer, scope=scope, batch_share=0.5, input_size=SIZE)
        with record(model) as records:
            model(images(), target=labels)
        found.append(records[0])
    assert torch.equal(found[0].mask, found[1].mask)
    assert torch.equal(found[0].selected, found[1].selected)


def test_the_closed_form_holds_before_a_softmax() -> None:
    model = fxgraft.patch(Ending(lambda m, z: z.softmax(1)), "rsc", layer="body.stage2", input_size=SIZE)
    (unit,) = fxgraft.grafts(model)[0].units_of(RSCUnit)
    assert unit.rest.tail is not None


COMPUTED = {
    "clamped": lambda model, z: z.sigmoid().clamp(1e-6, 1 - 1e-6),
    "log": lambda model, z: z.softmax(1).log(),
    "both answers": lambda model, z: torch.cat((1 - z.sigmoid(), z.sigmoid()), 1),
    "mean of two": lambda model, z: (z.softmax(1) + (2 * z).softmax(1)) / 2,
}


@pytest.mark.parametrize("name", COMPUTED)
def test_what_is_computed_from_probabilities_is_refused(name: str) -> None:
    with pytest.raises(
        fxgraft.StructureError, match=r"returns probabilities, and not logits(?s:.*)Return the logits"
    ):
        fxgraft.patch(Ending(COMPUTED[name]), "rsc", layer="body.stage2", input_size=SIZE)


def test_hooks_that_act_on_probabilities_are_in_the_way() -> None:
    model = Ending(lambda m, z: z.softmax(1))
    model.register_forward_hook(lambda module, args, out: out * 0.9)
    with pytest.raises(fxgraft.StructureError, match=r"returns probabilities, and hooks act on them"):
        fxgraft.patch(model, "rsc", layer="body.stage2", input_size=SIZE)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("crossnorm", {"p": 1.0, "consistency": True}),
        ("diversification", {"loss": "gradient_boosting", "head": "body.fc"}),
    ],
)
def test_terms_of_logits_take_no_probabilities(method: str, options: dict[str, Any]) -> None:
    with pytest.raises(fxgraft.StructureError, match=r"Ending returns probabilities, and not logits"):
        fxgraft.patch(Ending(lambda m, z: z.softmax(1)), method, input_size=SIZE, **options)
    model = fxgraft.patch(Ending(only_in_evaluation), method, input_size=SIZE, **options)
    assert fxgraft.loss(model, model(images(), target=LABELS), LABELS).isfinite()


def test_a_gate_of_logits_is_no_end() -> None:
    def gated(model: Any, z: Tensor) -> Tensor:
        return z * model.last(z).sigmoid()

    torch.manual_seed(0)
    model = Ending(gated, nn.Linear(CLASSES, 1))
    fxgraft.patch(model, "rsc", layer="body.stage1", input_size=SIZE)
    model(images(), target=LABELS)


@pytest.mark.parametrize("head", [None, "body.fc"])
def test_class_maps_are_averaged_before_a_softmax(head: str | None) -> None:
    bare = Ending(lambda m, z: z.softmax(1))
    model = Ending(lambda m, z: z.softmax(1))
    fxgraft.patch(model, "diversification", p_peak=0.0, p_patch=0.0, head=head, input_size=SIZE)
    torch.testing.assert_close(model(images()), bare(images()))


def test_the_default_site_is_the_map_that_is_pooled() -> None:
    sites = [
        fxgraft.grafts(fxgraft.patch(Ending(end), "rsc", input_size=SIZE))[0].units_of(RSCUnit)[0].site.name
        for end in (plain, lambda model, z: z.softmax(1))
    ]
    assert sites[0] == sites[1]


def test_members_are_no_mean_of_probabilities() -> None:
    with pytest.raises(
        fxgraft.StructureError, match=r"softmax\(\) has a part in them(?s:.*)Return the logits"
    ):
        fxgraft.patch(Ending(only_in_evaluation), "mixmo", input_size=SIZE)
