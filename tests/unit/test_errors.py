"""Every mistake a user can make: its error, what the message says, and that nothing was touched."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxgraft
from fxgraft.errors import (
    ConfigError,
    SiteError,
    StructureError,
    TargetError,
    TraceError,
    UnknownGraftError,
    WrappedModelError,
    candidates,
)
from models.toys import (
    LABELS,
    Net,
    Toy,
    assert_equal_steps,
    assert_same,
    images,
    net,
    state_of_everything,
    step,
)
from sweeping import some

pytestmark = pytest.mark.usefixtures("toy_methods")

SIZE = (3, 16, 16)
Act = Callable[[nn.Module], Any]


class Odd(Net):
    """A network with a layer for every mistake."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Conv2d(3, 4, 1)
        self.pair = Pair()
        self.index = Index()
        self.untraceable = Untraceable()
        self.never = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        self.side(x)
        x = self.stem(self.untraceable(self.pair(x)[0]))
        self.index(x)
        return self.forward_head(self.stage2(self.down(self.stage1(x))))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Index(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(1)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if isinstance(x, fx.Proxy) and bool(x.sum() > 0) else self.inner(x) + 0


def rsc(**options: Any) -> Act:
    return lambda model: fxgraft.patch(model, "rsc", **{"layer": "stage2", "input_size": SIZE, **options})


MISTAKES: dict[str, tuple[Act, type[Exception], str]] = {
    # Words.
    "method": (
        lambda m: fxgraft.patch(m, "rcs"),
        UnknownGraftError,
        r"no method 'rcs'(?s:.*)Close matches: 'rsc'",
    ),
    "method far off": (lambda m: fxgraft.patch(m, "zzz"), UnknownGraftError, r"There are: 'crossnorm'"),
    "method class": (lambda m: fxgraft.patch(m, fxgraft.RSC), ConfigError, r"fxgraft\.RSC\(\.\.\.\)"),  # type: ignore[arg-type]
    "method of no kind": (lambda m: fxgraft.patch(m, 3), ConfigError, r"a method's name or a patch, got 3"),  # type: ignore[arg-type]
    "option": (rsc(layrs="stage2"), ConfigError, r"'rsc' has no option 'layrs'(?s:.*)'layers'"),
    "option beside a patch": (
        lambda m: fxgraft.patch(m, fxgraft.RSC(), layer="stage1"),
        ConfigError,
        r"RSC is given with its options; layer cannot be added(?s:.*)RSC\(layer=\.\.\.\)",
    ),
    # Types of arguments.
    "unpatch of a list": (
        lambda m: fxgraft.unpatch(m, ["rsc"]),  # type: ignore[arg-type]
        ConfigError,
        r"unpatch takes names or grafts, one after the other; got \['rsc'\]",
    ),
    "preset of no kind": (
        lambda m: fxgraft.patch(m, "rsc", preset=["pacs"]),  # type: ignore[arg-type]
        ConfigError,
        r"patch: preset is declared as str \| None, and got \['pacs'\] \(list\)",
    ),
    "name of no kind": (
        lambda m: fxgraft.patch(m, "rsc", name=3),  # type: ignore[arg-type]
        ConfigError,
        r"patch: name is declared as str \| None, and got 3 \(int\)",
    ),
    **{
        f"size {size}": (
            lambda m, size=size: fxgraft.patch(m, "rsc", input_size=size),
            ConfigError,
            r"patch: input_size is declared as tuple\[int, \.\.\.\] \| None, and got",
        )
        for size in (64, {3, 64}, (3, 64.0, 64.0), "3x64x64")
    },
    "pattern of no kind": (
        lambda m: fxgraft.sites(m, 3),  # type: ignore[arg-type]
        ConfigError,
        r"sites: pattern is declared as str \| None, and got 3",
    ),
    "head of no kind": (
        lambda m: fxgraft.patch(m, "diversification", head=-1),
        ConfigError,
        r"head must be a name or None, got -1",
    ),
    "output of no kind": (
        lambda m: fxgraft.patch(m, "diversification", output=True),
        ConfigError,
        r"output must be a name or a position or None, got True",
    ),
    "criterion of no kind": (
        lambda m: fxgraft.loss(m, torch.zeros(2, 4), torch.zeros(2).long(), "ce"),  # type: ignore[arg-type]
        ConfigError,
        r"criterion is a function, called as criterion\(logits, y\), and 'ce' cannot be called",
    ),
    # Sites.
    "layer of bytes": (
        rsc(layer=b"layer1"),
        ConfigError,
        r"layers must be names or stage numbers, in order, got b'layer1'",
    ),
    "layer": (
        rsc(layer="stage3"),
        SiteError,
        r"no site 'stage3' in Odd(?s:.*)Close matches(?s:.*)fxgraft\.sites",
    ),
    "layer ambiguous": (rsc(layer="conv1"), SiteError, r"'conv1' is ambiguous in Odd: 4 modules"),
    "layer never called": (
        rsc(layer="never"),
        SiteError,
        r"'never' is a module of Odd, but its forward is never called",
    ),
    "layer of two values": (
        rsc(layer="pair"),
        SiteError,
        r"needs a feature map at 'pair', and Pair returns tuple",
    ),
    "layer of whole numbers": (rsc(layer="index"), SiteError, r"Index returns a tensor of torch\.int64"),
    "layer without effect": (rsc(layer="side"), SiteError, r"output of Odd does not depend on 'side'"),
    "layer of no kind": (
        rsc(layer=1.5),
        SiteError,
        r"A site is a name or a stage number, not 1\.5 \(float\)",
    ),
    "no layer": (rsc(layer=[]), SiteError, r"No site was named"),
    "glob": (rsc(layer="zz*"), SiteError, r"No site matches 'zz\*'"),
    "stage": (rsc(layer=7), SiteError, r"There is no stage 7 in Odd, which has \d"),
    "sites": (lambda m: fxgraft.sites(m, "stage9", input_size=SIZE), SiteError, r"No site matches 'stage9'"),
    "untraceable": (
        rsc(layer="untraceable.inner"),
        TraceError,
        r"cannot trace(?s:.*)test_errors\.py:\d+(?s:.*)whole module",
    ),
    # Numbers and choices.
    **{
        f"{share} {value}": (
            rsc(**{share: value}),
            ConfigError,
            rf"RSC: {share} must be a share in \[0, 1\], got",
        )
        for share in ("spatial_drop", "channel_drop", "vector_drop", "batch_share", "start")
        for value in (-0.1, 1.5, float("nan"), "0.5", True, None)
    },
    **{
        option: (rsc(**{option: "best"}), ConfigError, rf"RSC: {option} must be one of '.*', got 'best'")
        for option in ("scope", "strategy", "saliency", "batch_schedule", "layout")
    },
    "epochs": (rsc(batch_schedule="authors"), ConfigError, r"epochs must be their number, got None"),
    "no epochs": (rsc(epochs=0), ConfigError, r"epochs must be a whole number of at least 1, got 0"),
    "layout that does not fit": (
        rsc(layout="NLC"),
        SiteError,
        r"'stage2' was said to be NLC, but its shape is \(2, 16",
    ),
    "output": (rsc(output="logits"), StructureError, r"returns a single value, which has no entry 'logits'"),
    "input size": (
        rsc(input_size=(1, 16, 16)),
        StructureError,
        r"does not run on a batch of shape \(2, 1, 16, 16\)",
    ),
    "empty input size": (
        rsc(input_size=(3, 0, 16)),
        ConfigError,
        r"^input_size must be positive.*\nPass for example input_size=\(3, 224, 224\)",
    ),
    "name": (rsc(name="not a name"), ConfigError, r"must be an identifier, got 'not a name'"),
    "progress": (lambda m: fxgraft.set_progress(m, 2), ConfigError, r"in \[0, 1\]; got 2"),
    # What is there.
    "unpatch a bare model": (lambda m: fxgraft.unpatch(m), UnknownGraftError, r"no graft on this Odd"),
    "unpatch a name": (lambda m: fxgraft.unpatch(m, "rsc"), UnknownGraftError, r"no graft 'rsc' on this Odd"),
    "no model": (
        lambda m: fxgraft.patch(m.state_dict(), "rsc"),
        WrappedModelError,
        r"is of type OrderedDict",
    ),  # type: ignore[arg-type]
    "traced for good": (
        lambda m: fxgraft.patch(torch.export.export(net().eval(), (images(),)), "rsc"),
        WrappedModelError,
        r"exported program",
    ),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_explained_and_touches_nothing(mistake: str) -> None:
    act, kind, message = MISTAKES[mistake]
    model = Odd()
    model.stage1[0].bn.eval()
    before = state_of_everything(model)
    with pytest.raises(kind, match=message) as caught:
        act(model)
    assert type(caught.value) is kind
    assert_same(before, state_of_everything(model))
    assert fxgraft.grafts(model) == []


@pytest.mark.parametrize("mistake", some([m for m in MISTAKES if "unpatch" not in m], 20))
def test_a_mistake_leaves_earlier_patches_alone(mistake: str) -> None:
    act, kind, message = MISTAKES[mistake]
    model = Odd()
    fxgraft.patch(model, "rsc", layer="stage1", name="earlier", scope="spatial", input_size=SIZE)
    before = state_of_everything(model)
    expected = step(model, images(), target=LABELS)
    with pytest.raises(kind, match=message):
        act(model)
    assert_same(before, state_of_everything(model))
    assert [graft.name for graft in fxgraft.grafts(model)] == ["earlier"]
    assert_equal_steps(step(model, images(), target=LABELS), expected)


@pytest.mark.parametrize("again", [rsc(), rsc(name="other")])
def test_patching_twice_alike(again: Act) -> None:
    model = rsc()(net())
    before = state_of_everything(model)
    with pytest.raises(ConfigError, match=r"'rsc' is on the model already(?s:.*)Change a setting"):
        again(model)
    assert_same(before, state_of_everything(model))


def test_unpatching_one_that_is_gone() -> None:
    model = rsc(name="one")(net())
    rsc(name="two", layer="stage1")(model)
    (gone, _) = fxgraft.grafts(model)
    fxgraft.unpatch(model, gone)
    before = state_of_everything(model)
    with pytest.raises(UnknownGraftError, match=r"no graft 'one' on this Net(?s:.*)'two'"):
        fxgraft.unpatch(model, gone)
    assert_same(before, state_of_everything(model))


# Labels.

SOFT = torch.full((4, 4), 0.25)
LABEL_MISTAKES: dict[str, tuple[Any, str]] = {
    "missing": (
        None,
        r"'rsc' needs the labels of the batch(?s:.*)target=y(?s:.*)fxgraft\.targets(?s:.*)with_targets",
    ),
    "too few": (LABELS[:3], r"labels for 3 samples with a batch of 4"),
    "a scalar": (torch.tensor(1), r"labels for no samples with a batch of 4"),
    "too high": (LABELS + 1, r"class indices from 1 to 4 for 4 classes(?s:.*)\[0, 3\]"),
    "negative": (LABELS - 1, r"class indices from -1 to 2 for 4 classes"),
    "soft of wrong width": (torch.full((4, 5), 0.2), r"soft targets for 5 classes; the model has 4"),
    "soft of another batch": (SOFT[:2], r"labels for 2 samples with a batch of 4"),
    "one number each": (
        LABELS.float(),
        r"one floating-point number per sample(?s:.*)y\.long\(\)(?s:.*)regression",
    ),
    "a list": ([0, 1, 2, 3], r"labels of type list(?s:.*)\(B,\)"),
    "indices of two dimensions": (
        LABELS.reshape(4, 1),
        r"integer labels of shape \(4, 1\)(?s:.*)y\.squeeze\(1\)",
    ),
    "one-hot of whole numbers": (
        torch.eye(4, dtype=torch.long),
        r"integer labels of shape \(4, 4\)(?s:.*)y\.float\(\)",
    ),
    "soft of too many dimensions": (SOFT.reshape(4, 4, 1), r"soft labels of shape \(4, 4, 1\)"),
}


@pytest.mark.parametrize("ambient", [False, True])
@pytest.mark.parametrize("layer", ["stage1", "stage2", "drop"])
@pytest.mark.parametrize("mistake", LABEL_MISTAKES)
def test_a_mistake_in_the_labels(mistake: str, layer: str, ambient: bool) -> None:
    labels, message = LABEL_MISTAKES[mistake]
    model = rsc(layer=layer)(net())
    model.stage1[0].bn.eval()
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    flags = [(name, module.training, list(module.__dict__)) for name, module in model.named_modules()]
    given = fxgraft.targets(labels) if ambient and labels is not None else contextlib.nullcontext()
    with given, pytest.raises(TargetError, match=message):
        model(images(), **({} if ambient else {"target": labels}))
    assert [(name, module.training, list(module.__dict__)) for name, module in model.named_modules()] == flags
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters())
    out = model(images(), target=LABELS)  # and the next pass is a good one
    assert out.isfinite().all()
    model(images(), target=SOFT)
    model.eval()
    model(images())


def test_labels_left_over_from_the_last_batch() -> None:
    model = rsc()(net())
    for x, _ in fxgraft.with_targets([(images(), LABELS), (images(3), LABELS[:3])]):
        model(x)
        with pytest.raises(TargetError, match=r"left over from an earlier pass(?s:.*)one training pass"):
            model(x)


# The messages themselves.


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("layr4", ["layer3", "layer4", "fc"], "Close matches: 'layer4', 'layer3'."),
        ("zz", ["a", "b"], "There are: 'a', 'b'."),
        ("zz", [], "There are none."),
        ("zz", ["a", "a", "b"], "There are: 'a', 'b'."),
        (
            "zz",
            [f"a{i}" for i in range(10)],
            "There are: " + ", ".join(f"'a{i}'" for i in range(8)) + ", … (10 in all).",
        ),
    ],
)
def test_candidates(word: str, known: list[str], expected: str) -> None:
    assert candidates(word, known) == expected


def test_options_that_a_method_needs_are_asked_for() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Needy(Toy):
        """Needs something."""

        width: int
        height: int

    fxgraft.register("needy")(Needy)
    with pytest.raises(ConfigError, match=r"'needy' needs width, height"):
        fxgraft.patch(net(), "needy")
    with pytest.raises(ConfigError, match=r"'needy' needs height"):
        fxgraft.patch(net(), "needy", width=3)
