"""Arguments of a call that a model and its grafts both have a use for: ``target``, ``labels``, options of methods."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgraft
from fxgraft.patches.rsc.patch import record
from models.toys import CLASSES, LABELS, images

SIZE = (3, 8, 8)


class Margin(nn.Linear):
    """Lowers the score of the label, as heads for faces and for retrieval do."""

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        out = super().forward(x)
        return out if target is None else out - 3.0 * F.one_hot(target, CLASSES)


class Base(nn.Module):
    """One residual block in the model's own forward, so that methods of blocks open it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = Margin(8, CLASSES)

    def pooled(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return (self.conv(x.relu()) + x).relu().mean((2, 3))


class Named(Base):
    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        return self.head(self.pooled(x), target)


class Keyword(Base):
    def forward(self, x: Tensor, *, scale: float = 1.0, target: Tensor | None = None) -> Tensor:
        return self.head(self.pooled(x), target) * scale


class Anything(Base):
    def forward(self, x: Tensor, **more: Any) -> Tensor:
        return self.head(self.pooled(x), more.get("target"))


class Losing(Base):
    """Computes its loss, as those of transformers do."""

    def forward(self, x: Tensor, labels: Tensor | None = None, **more: Any) -> Any:
        if "target" in more:
            raise TypeError("got multiple values for argument 'target'")
        out = self.head(self.pooled(x))
        return {
            "logits": out,
            "loss": None if labels is None else F.cross_entropy(out.view(-1, CLASSES), labels),
        }


class Plain(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pooled(x))


MODELS = {kind.__name__: kind for kind in (Named, Keyword, Anything, Losing)}
METHODS: dict[str, dict[str, Any]] = {
    "rsc": {"layers": "conv", "batch_share": 0.0},
    "crossnorm": {"p": 0.0},
    "selfnorm": {},
    "taps": {"layers": "conv"},
}


def flat(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [each for each in out.values() if each is not None]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_takes_its_labels_gets_them(name: str, method: str) -> None:
    bare = MODELS[name]()
    model = fxgraft.patch(copy.deepcopy(bare), method, input_size=SIZE, **METHODS[method])
    calls = [{}, {"labels" if name == "Losing" else "target": LABELS}]
    for training in (True, False):
        for given in calls:
            ours, theirs = model.train(training)(images(), **given), bare.train(training)(images(), **given)
            for one, other in zip(flat(ours), flat(theirs), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert not torch.equal(flat(model(images()))[-1], flat(model(images(), **calls[1]))[-1])


class Body(nn.Sequential):
    """Takes any keyword, as the body of a network of transformers does, and has a use for "scale"."""

    def forward(self, x: Tensor, **more: Any) -> Tensor:
        return super().forward(x) * more.get("scale", 1.0)


class HandsOn(nn.Module):
    """Gives its body whatever it is called with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = Body(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, **more: Any) -> Any:
        return {"last": self.head(self.body(x, **more).mean((2, 3)))}


@pytest.mark.parametrize("given", [{"target": LABELS}, {"labels": LABELS}, {"target": LABELS, "scale": 2.0}])
def test_labels_that_a_model_only_hands_on_reach_its_head(given: dict[str, Any]) -> None:
    bare = HandsOn()
    model = fxgraft.patch(copy.deepcopy(bare), "diversification", alpha=1.0, input_size=SIZE)
    for training in (True, False):
        ours, theirs = model.train(training)(images(), **given), bare.train(training)(images(), **given)
        torch.testing.assert_close(ours["last"], theirs["last"])


def labels_that_rsc_saw(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    seen: list[Tensor] = []
    own = fxgraft.extend.PassView.labels

    def labels(self: Any, *args: Any) -> Tensor:
        seen.append(own(self, *args))
        return seen[-1]

    monkeypatch.setattr(fxgraft.extend.PassView, "labels", labels)
    return seen


@pytest.mark.parametrize(
    ("kind", "args", "kwargs"),
    [
        (Named, (LABELS,), {}),
        (Named, (), {"target": LABELS}),
        (Keyword, (), {"target": LABELS}),
        (Anything, (), {"target": LABELS}),
        (Losing, (LABELS,), {}),
        (Losing, (), {"labels": LABELS}),
        (Losing, (), {"labels": LABELS.flip(0), "target": LABELS}),
        (Plain, (), {"target": LABELS}),
    ],
)
def test_the_grafts_get_them_too(
    kind: type[Base], args: tuple[Any, ...], kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = labels_that_rsc_saw(monkeypatch)
    model = fxgraft.patch(kind(), "rsc", layers="conv", batch_share=1.0, input_size=SIZE)
    with record(model) as records:
        model(images(), *args, **kwargs)
        if not args:
            model(**kwargs, x=images())
    assert len(records) == 2 - bool(args)
    assert all(torch.equal(each, LABELS) for each in seen)


def test_labels_that_are_published_come_before_those_that_are_meant_for_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = labels_that_rsc_saw(monkeypatch)
    model = fxgraft.patch(Losing(), "rsc", layers="conv", input_size=SIZE)
    with fxgraft.targets(LABELS.flip(0)):
        model(images(), labels=LABELS)
        model(images(), labels=LABELS, target=LABELS)
    assert [int(each[0]) for each in seen] == [3, 0]


def test_a_model_without_the_argument_does_not_get_it() -> None:
    model = fxgraft.patch(Plain(), "rsc", layers="conv", input_size=SIZE)
    model(images(), target=LABELS)
    with pytest.raises(TypeError, match="unexpected keyword argument 'labels'"):
        model(images(), labels=LABELS)
    with pytest.raises(fxgraft.ConfigError, match=r"Plain takes 1 positional argument, and 2 were given"):
        model(images(), LABELS)


def test_a_model_that_names_a_methods_option_gets_it_as_well() -> None:
    class Members(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, CLASSES)
            self.asked: list[Any] = []

        def forward(self, x: Tensor, members: bool | None = None) -> Tensor:
            self.asked.append(members)
            return self.fc(self.conv(x).relu().mean((2, 3)))

    model = fxgraft.patch(Members(), "mixmo", input_size=SIZE).eval()
    assert model(images(), members=True).shape == (2, 4, CLASSES)
    assert model(images(), True).shape == (2, 4, CLASSES)
    assert model(images()).shape == (4, CLASSES)
    assert model.asked == [True, True, None]


def test_a_model_that_reads_labels_is_no_place_for_rows_of_other_images() -> None:
    class Scored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, CLASSES)

        def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
            logits = self.fc(self.conv(x).relu().mean((2, 3)))
            return logits if target is None else logits - 0.3 * nn.functional.one_hot(target, CLASSES)

    model = fxgraft.patch(Scored(), "mixmo", input_size=SIZE)
    with pytest.raises(
        fxgraft.TargetError, match=r"the model's own forward was given the labels(.|\n)*fxgraft.targets"
    ):
        model(images(), target=LABELS)
    with fxgraft.targets(LABELS):
        assert model(images()).shape == (2, 4, CLASSES)
    alone = fxgraft.patch(Scored(), "mixmo", members=1, input_size=SIZE)
    assert alone(images(), target=LABELS).shape == (1, 4, CLASSES)


@pytest.mark.parametrize("kind", [Named, Anything])
@pytest.mark.parametrize("given", [True, False])
def test_passes_that_a_loss_repeats_give_the_model_what_the_first_one_gave_it(
    kind: type[Base], given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads: list[Any] = []
    own = Margin.forward

    def forward(self: Margin, x: Tensor, target: Tensor | None = None) -> Tensor:
        heads.append(target)
        return own(self, x, target)

    model = fxgraft.patch(kind(), "crossnorm", p=1.0, consistency=True, input_size=SIZE)
    monkeypatch.setattr(Margin, "forward", forward)
    with fxgraft.targets(LABELS):
        out = model(images(), **({"target": LABELS} if given else {}))
    fxgraft.loss(model, out, LABELS).backward()
    assert [each is not None for each in heads] == [given] * 3


def test_a_patched_part_that_is_given_labels_is_looked_at_from_around() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = fxgraft.patch(Plain(), "selfnorm", input_size=SIZE)

        def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
            return 2 * self.part(x, target=target)

    model = fxgraft.patch(Around(), "taps", layers="part.conv", input_size=SIZE)
    assert torch.equal(model(images(), LABELS), model(images(), target=LABELS))


def test_labels_that_have_to_be_given_are_asked_to_have_a_default() -> None:
    class Needs(Base):
        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            return self.head(self.pooled(x), target)

    with pytest.raises(
        fxgraft.StructureError, match=r"Needs needs 'target' beside the images(?s:.*)target=None"
    ):
        fxgraft.patch(Needs(), "selfnorm", input_size=SIZE)


@pytest.mark.parametrize("kind", [Named, Losing])
def test_compiled_calls_do_the_same(kind: type[Base]) -> None:
    torch.compiler.reset()
    model = fxgraft.patch(kind(), "rsc", layers="conv", scope="channel", batch_share=1.0, input_size=SIZE)
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    given = {"labels" if kind is Losing else "target": LABELS}
    for ours, theirs in zip(flat(compiled(images(), **given)), flat(model(images(), **given)), strict=True):
        torch.testing.assert_close(ours, theirs)
