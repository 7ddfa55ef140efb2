"""The loss of a model with grafts: of the model, of its parts, beside another loss; and who forgets to ask for it."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgraft
from fxgraft.errors import (
    ConfigError,
    FxgraftWarning,
    RecipeError,
    StructureError,
    TargetError,
    UnknownGraftError,
)
from fxgraft.patches.rsc import record
from models.toys import CLASSES, LABELS, Net, images, net

pytestmark = pytest.mark.usefixtures("toy_methods")

SIZE = (3, 8, 8)
CONSISTENCY: dict[str, Any] = {"consistency": True, "p": 1.0, "active": None}


def crossnorm(model: nn.Module, **options: Any) -> nn.Module:
    return fxgraft.patch(model, "crossnorm", input_size=SIZE, **{**CONSISTENCY, **options})


class Mine(nn.Module):
    """A user's own model around a backbone, whose output it returns, or puts a head on, or scales."""

    def __init__(self, backbone: nn.Module, does: str = "returns") -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(CLASSES, 3) if does == "head" else None
        self.does = does

    def forward(self, x: Tensor) -> Any:
        out = self.backbone(x)
        if self.head is not None:
            return self.head(out)
        return {"logits": out.float(), "hidden": x} if self.does == "dictionary" else out


class Two(nn.Module):
    """An ensemble of two backbones."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return (self.first(x) + self.second(x)) / 2


# The terms alone.


def test_the_terms_alone_are_the_loss_without_the_criterion() -> None:
    model = fxgraft.patch(crossnorm(net()), "rsc", layer="stage2", input_size=SIZE)
    out = model(images(), target=LABELS)
    torch.manual_seed(1)
    whole = fxgraft.losses(model, out, LABELS)
    torch.manual_seed(1)
    extra = fxgraft.extra_loss(model, out, LABELS)
    assert set(whole) == {"criterion", "crossnorm.consistency"}
    assert extra > 0
    assert torch.equal(extra, whole["crossnorm.consistency"])
    extra.backward()
    assert model.fc.weight.grad.abs().sum() > 0  # type: ignore[union-attr]


@pytest.mark.parametrize("patched", [False, True])
def test_nothing_to_add_is_zero_of_the_outputs_kind(patched: bool) -> None:
    model = net().double()
    if patched:
        fxgraft.patch(model, "rsc", layer="stage2", input_size=SIZE)
    out = model(images().double(), **({"target": LABELS} if patched else {}))
    extra = fxgraft.extra_loss(model, out, LABELS)
    assert extra.shape == ()
    assert extra.dtype is torch.float64
    assert not extra.requires_grad
    assert extra == 0
    assert fxgraft.extra_loss(model, {"boxes": LABELS}, LABELS) == 0


@pytest.mark.parametrize(
    ("method", "options"),
    [("mixmo", {}), ("diversification", {"loss": "gradient_boosting", "loss_start": 0.5})],
)
def test_a_graft_in_the_criterions_place_cannot_do_without_it(method: str, options: dict[str, Any]) -> None:
    model = fxgraft.patch(net(), method, input_size=SIZE, **options)
    out = model(images(), target=LABELS)
    with pytest.raises(ConfigError, match=rf"'{method}'.*stands in for the criterion(?s:.*)fxgraft\.loss"):
        fxgraft.extra_loss(model, out, LABELS)


def test_a_segmentation_model_with_an_auxiliary_head() -> None:
    segmentation = pytest.importorskip("torchvision.models.segmentation")
    model = segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=True)
    fxgraft.patch(model, "crossnorm", layers="backbone.layer2.*", input_size=(3, 32, 32), **CONSISTENCY)
    x = images(2, 32)
    y = torch.randint(CLASSES, (2, 32, 32))
    out = model.train()(x)
    assert set(out) == {"out", "aux"}
    torch.manual_seed(1)
    parts = fxgraft.losses(model, out, y)
    assert torch.equal(parts["criterion"], F.cross_entropy(out["out"], y))
    torch.manual_seed(1)
    own = F.cross_entropy(out["out"], y) + 0.5 * F.cross_entropy(out["aux"], y)
    extra = fxgraft.extra_loss(model, out, y)
    assert torch.equal(extra, parts["crossnorm.consistency"])
    (own + extra).backward()
    assert model.aux_classifier[0].weight.grad.abs().sum() > 0


def test_the_entry_that_was_named_is_compared() -> None:
    class Pair(Net):
        def forward(self, x: Tensor) -> Any:
            return x.mean(), super().forward(x)

    model = crossnorm(Pair(), output=1)
    out = model(images())
    assert fxgraft.losses(model, out, LABELS)["crossnorm.consistency"] > 0


def test_terms_cannot_be_added_to_values_that_nothing_reduces() -> None:
    model, values = crossnorm(net()), torch.nn.CrossEntropyLoss(reduction="none")
    match = r"shape \(4,\), and the grafts add 'crossnorm.consistency'(?s:.*)fxgraft\.losses"
    with pytest.raises(ConfigError, match=match):
        fxgraft.loss(model, model(images()), LABELS, values)
    assert fxgraft.losses(model, model(images()), LABELS, values)["criterion"].shape == (4,)
    assert fxgraft.loss(net(), torch.zeros(4, CLASSES), LABELS, values).shape == (4,)


# Parts of a bigger model.


@pytest.mark.parametrize("does", ["returns", "dictionary"])
@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel], ids=["bare", "wrapped"])
def test_a_part_has_its_terms_in_the_loss_of_the_whole(
    does: str, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    whole = wrap(Mine(crossnorm(net()), does))
    out = whole(images())
    parts = fxgraft.losses(whole, out, LABELS)
    assert set(parts) == {"criterion", "backbone.crossnorm.consistency"}
    assert parts["backbone.crossnorm.consistency"] > 0
    assert [graft.name for graft in fxgraft.grafts(whole)] == ["crossnorm"]
    assert "  backbone.crossnorm = crossnorm: " in str(fxgraft.summary(whole))


def test_terms_of_several_parts_are_added() -> None:
    whole = Two(crossnorm(net()), crossnorm(net(), consistency_weight=1))
    out = whole(images())
    torch.manual_seed(1)
    parts = fxgraft.losses(whole, out, LABELS)
    assert list(parts) == [
        "criterion",
        "first.crossnorm.consistency",
        "second.crossnorm.consistency",
    ]
    torch.manual_seed(1)
    extra = fxgraft.extra_loss(whole, out, LABELS)
    assert torch.allclose(extra, parts["first.crossnorm.consistency"] + parts["second.crossnorm.consistency"])


def test_a_patched_part_of_a_patched_model_is_reached() -> None:
    whole = Mine(fxgraft.patch(net(), "rsc", layer="stage2", input_size=SIZE), "head")
    fxgraft.patch(whole, "taps", layer="head", input_size=SIZE)
    assert [graft.name for graft in fxgraft.grafts(whole)] == ["taps", "rsc"]


def test_the_progress_reaches_all_parts() -> None:
    whole = Two(
        *(
            fxgraft.patch(net(), "diversification", loss="gradient_boosting", loss_start=0.5, input_size=SIZE)
            for _ in range(2)
        )
    )
    fxgraft.set_progress(whole, 0.6)
    for graft in fxgraft.grafts(whole):
        assert graft.units["head"].boosts  # type: ignore[union-attr]


@pytest.mark.parametrize("does", ["returns", "dictionary"])
def test_a_part_whose_output_is_the_models_may_stand_in_for_the_criterion(does: str) -> None:
    part = fxgraft.patch(net(), "mixmo", input_size=SIZE)
    whole = Mine(part, does)
    with fxgraft.targets(LABELS):
        out = whole(images())
    logits = out["logits"] if does == "dictionary" else out
    assert torch.equal(fxgraft.loss(whole, out, LABELS), fxgraft.loss(part, logits, LABELS))


@pytest.mark.parametrize(
    ("method", "options"), [("mixmo", {}), ("diversification", {"loss": "gradient_boosting"})]
)
def test_a_part_behind_which_there_is_more_may_not(method: str, options: dict[str, Any]) -> None:
    whole = Mine(fxgraft.patch(net(), method, input_size=SIZE, **options), "head")
    with fxgraft.targets(LABELS):
        out = whole(images())
    with pytest.raises(
        StructureError, match=rf"'{method}' on the part 'backbone'(?s:.*)Patch the whole model"
    ):
        fxgraft.loss(whole, out, LABELS)


def test_two_parts_may_not_both_stand_in_for_the_criterion() -> None:
    whole = Two(*(fxgraft.patch(net(), "mixmo", input_size=SIZE) for _ in range(2)))
    with fxgraft.targets(LABELS):
        out = whole(images())
    with pytest.raises(ConfigError, match=r"'mixmo' on 'first' and 'mixmo' on 'second'"):
        fxgraft.loss(whole, out, LABELS)


def test_consistency_of_a_part_that_gives_no_predictions() -> None:
    whole = Mine(crossnorm(net()), "head")
    out = whole(images())
    with pytest.raises(
        ConfigError, match=r"\(4, 4\) where the loss is for \(4, 3\)(?s:.*)Patch the whole model"
    ):
        fxgraft.loss(whole, out, LABELS % 3)


def test_other_calls_find_the_part() -> None:
    whole = Mine(fxgraft.patch(net(), "rsc", layer="stage2", batch_share=1, input_size=SIZE))
    fxgraft.patch(whole.backbone, "taps", layer="stage1", input_size=SIZE)
    with record(whole) as records, fxgraft.targets(LABELS):
        _, acts = fxgraft.tapped(whole, images())
    assert len(records) == 1
    assert list(acts) == ["stage1"]
    merged = fxgraft.merge(whole)
    assert type(merged.backbone) is Net
    assert fxgraft.grafts(merged) == []
    assert len(fxgraft.grafts(whole)) == 2
    assert torch.equal(merged.eval()(images()), whole.eval()(images()))
    with pytest.raises(UnknownGraftError, match="Its part 'backbone' is patched"):
        fxgraft.unpatch(whole)


def test_a_wrapped_model_says_what_to_unpatch_and_save(tmp_path: Path) -> None:
    wrapped: Any = nn.DataParallel(fxgraft.patch(net(), "rsc", layer="stage2", input_size=SIZE))
    for names in ((), ("rsc",)):
        with pytest.raises(UnknownGraftError, match="The Net that it wraps is patched: unpatch that"):
            fxgraft.unpatch(wrapped, *names)
    with pytest.raises(RecipeError, match="The Net that it wraps is patched: save that"):
        fxgraft.save(wrapped, tmp_path / "run.safetensors")
    assert [graft.name for graft in fxgraft.grafts(wrapped)] == ["rsc"]


@dataclass
class Logits:
    logits: Tensor


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Logits:
        return Logits(self.net(x))


def test_labels_are_compared_where_the_output_is_a_dataclass() -> None:
    model = fxgraft.patch(Structured(), "rsc", layer="net.stage2", batch_share=1, input_size=SIZE)
    out = model(images(), target=LABELS)
    with pytest.raises(TargetError):
        fxgraft.loss(model, out, (LABELS + 1) % CLASSES)
    fxgraft.loss(model, out, LABELS).backward()


class Pair(nn.Module):
    """A student and a teacher, both patched and both in training mode."""

    def __init__(self, method: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.student, self.teacher = net(), net()
        for each in (self.teacher, self.student):
            fxgraft.patch(each, method, input_size=SIZE, **options)


@pytest.mark.parametrize("how", ["no_grad", "frozen", "learns as well"])
@pytest.mark.parametrize(("method", "options"), [("crossnorm", CONSISTENCY), ("mixmo", {})])
def test_a_teacher_in_training_mode_has_no_share_in_the_loss(
    method: str, options: dict[str, Any], how: str
) -> None:
    pair, alone = Pair(method, options).train(), fxgraft.patch(net(), method, input_size=SIZE, **options)
    pair.student.load_state_dict(alone.state_dict())
    if how == "frozen":
        pair.teacher.requires_grad_(False)
    found = []
    for student, whole in ((alone, alone), (pair.student, pair)):
        for order in ("first", "last"):
            if whole is pair and order == "first":
                with torch.set_grad_enabled(how != "no_grad"):
                    pair.teacher(images(), target=LABELS)
            torch.manual_seed(0)
            out = student(images(), target=LABELS)
            if whole is pair and order == "last":
                state = torch.get_rng_state()
                with torch.set_grad_enabled(how != "no_grad"):
                    pair.teacher(images(), target=LABELS)
                torch.set_rng_state(state)
            found.append(fxgraft.losses(whole, out, LABELS))
    names = {name.removeprefix("student.") for each in found for name in each}
    assert names == set(found[0])
    for parts in found[1:]:
        for name, value in parts.items():
            torch.testing.assert_close(value, found[0][name.removeprefix("student.")])


# Training without the loss.


def steps(
    model: nn.Module, count: int = 4, ask: Callable[..., Tensor] | None = None, accumulate: int = 1
) -> list[str]:
    """Train; return the warnings."""
    optimiser = torch.optim.SGD(model.parameters(), 0.01)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(count):
            for _ in range(accumulate):
                with fxgraft.targets(LABELS):
                    out = model(images())
                logits = out if out.ndim == 2 else out.mean(0)
                (F.cross_entropy(logits, LABELS) if ask is None else ask(model, out, LABELS)).backward()
            optimiser.step()
            optimiser.zero_grad()
    assert all(issubclass(each.category, FxgraftWarning) for each in caught)
    return [str(each.message) for each in caught]


SHARES: list[tuple[str, dict[str, Any]]] = [
    ("crossnorm", CONSISTENCY),
    ("diversification", {"loss": "gradient_boosting"}),
    ("mixmo", {}),
    ("train_toy", {}),
]


@pytest.mark.parametrize(("method", "options"), SHARES)
def test_training_without_the_loss_is_warned_of_once(method: str, options: dict[str, Any]) -> None:
    model = fxgraft.patch(net(), method, input_size=SIZE, **options)
    assert steps(model, 2) == []
    (message,) = steps(model, 5)
    assert f"'{method}' on this Net has a share in the loss" in message
    assert "fxgraft.loss(model, out, y)" in message
    assert steps(model) == []


@pytest.mark.parametrize(("method", "options"), SHARES)
@pytest.mark.parametrize("inside", [False, True])
def test_asking_for_the_loss_is_enough(method: str, options: dict[str, Any], inside: bool) -> None:
    model = fxgraft.patch(net(), method, input_size=SIZE, **options)
    whole = Mine(model) if inside else model
    assert steps(whole, ask=fxgraft.loss) == []
    assert steps(whole) == []  # it was asked for before: the user knows of it


def test_asking_for_the_terms_or_the_parts_is_enough() -> None:
    for ask in (fxgraft.extra_loss, lambda *args: fxgraft.losses(*args)["criterion"]):
        assert steps(crossnorm(net()), ask=ask) == []


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rsc", {"layer": "stage2"}),
        ("crossnorm", {}),
        ("crossnorm", {"consistency": True, "p": 0}),
        ("diversification", {}),
        ("selfnorm", {}),
        ("toy", {}),
    ],
)
def test_methods_without_a_share_in_the_loss_need_none(method: str, options: dict[str, Any]) -> None:
    assert steps(fxgraft.patch(net(), method, input_size=SIZE, **options)) == []


def test_several_passes_for_one_loss_are_no_training_without_it() -> None:
    model = crossnorm(net())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outs = [model(images()) for _ in range(4)]
        with torch.no_grad():
            model(images())
        torch.stack([out.sum() for out in outs[:1]]).sum().backward()
        model(images())


def test_evaluation_is_no_training() -> None:
    model = crossnorm(net()).eval()
    assert steps(model, 5) == []


@pytest.mark.parametrize("how", [{"foreach": True}, {"fused": True}, {"foreach": False}])
def test_all_kinds_of_optimisers_are_seen(how: dict[str, bool]) -> None:
    model = crossnorm(net())
    stepping = torch.optim.AdamW(model.parameters(), lr=0.01, **how)
    for _ in range(2):
        model(images()).sum().backward()
        stepping.step()
    with pytest.warns(FxgraftWarning, match="share in the loss"):
        model(images())


def test_asking_in_one_thread_is_enough() -> None:
    model = crossnorm(net())
    fxgraft.loss(model, model(images()), LABELS)
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.extend(steps(model)))
    thread.start()
    thread.join()
    assert found == []


def test_gradients_as_functions_are_let_alone() -> None:
    model = crossnorm(net())
    for each in model.modules():
        if isinstance(each, nn.BatchNorm2d):
            each.eval()  # its counters cannot be written to there
    weights = dict(model.named_parameters())

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, weights, (images(),)).sum()

    for _ in range(2):
        assert torch.func.grad(loss)(weights)["fc.weight"].abs().sum() > 0


def test_a_copy_counts_for_itself() -> None:
    model = crossnorm(net())
    fxgraft.loss(model, model(images()), LABELS)
    assert len(steps(copy.deepcopy(model))) == 1


def test_compiled_training_stays_one_graph_and_is_not_compiled_again() -> None:
    model = crossnorm(net())
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    optimiser = torch.optim.SGD(model.parameters(), 0.01)
    torch._dynamo.reset()
    for _ in range(2):
        compiled(images()).sum().backward()
        optimiser.step()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(4):
            compiled(images()).sum().backward()
            optimiser.step()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of dynamo's own looking
@pytest.mark.sweep
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rsc", {}),
        ("crossnorm", {}),
        ("crossnorm", {"consistency": True, "p": 1.0, "active": None}),
        ("selfnorm", {}),
        ("diversification", {}),
        ("mixmo", {}),
    ],
    ids=str,
)
def test_a_step_with_its_loss_is_one_graph(method: str, options: dict[str, Any]) -> None:
    """It computes what a compiled pass and a compiled loss of its output do."""
    torch.compiler.reset()
    model = fxgraft.patch(net(), method, input_size=SIZE, **options)
    state = copy.deepcopy(model.state_dict())

    def whole(x: Tensor, y: Tensor) -> Tensor:
        return fxgraft.loss(model, model(x, target=y), y)

    step, call = (torch.compile(each, fullgraph=True, backend="eager") for each in (whole, model))
    judge: Any = torch.compile(lambda out, y: fxgraft.loss(model, out, y), fullgraph=True, backend="eager")
    found = []
    for way in (step, lambda x, y: judge(call(x, target=y), y)):
        model.load_state_dict(state)
        model.zero_grad()
        torch.manual_seed(3)
        loss = way(images(), LABELS)
        loss.backward()
        found.append((loss.detach(), [p.grad for p in model.parameters()]))
    torch.testing.assert_close(*found)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of dynamo's own looking
@pytest.mark.sweep
def test_a_step_with_its_loss_compiles() -> None:
    model = fxgraft.patch(Mine(net()), "rsc", layer="backbone.stage2", input_size=SIZE)

    def stepping(x: Tensor, y: Tensor) -> Tensor:
        return fxgraft.loss(model, model(x, target=y), y)

    compiled: Any = torch.compile(stepping, backend="eager")
    assert torch.isfinite(compiled(images(), LABELS))


# What isn't a criterion, and what isn't logits.


@pytest.mark.parametrize("method", [None, "selfnorm"])
def test_arguments_in_another_order_and_classes(method: str | None) -> None:
    model = net() if method is None else fxgraft.patch(net(), method, input_size=SIZE)
    out = model(images())
    with pytest.raises(
        ConfigError, match=r"tensor of torch\.int64, which are labels(?s:.*)loss\(model, out, y\)"
    ):
        fxgraft.loss(model, LABELS, out)
    with pytest.raises(ConfigError, match=r"CrossEntropyLoss is a class(?s:.*)CrossEntropyLoss\(\)"):
        fxgraft.loss(model, out, LABELS, nn.CrossEntropyLoss)


@pytest.mark.parametrize("returned", [0.5, (torch.tensor(0.5), 1)])
def test_a_criterion_that_returns_no_tensor(returned: Any) -> None:
    model = crossnorm(net())
    out = model(images(), target=LABELS)
    with pytest.raises(
        ConfigError, match=r"criterion returned a (float|tuple), to which the grafts add tensors"
    ):
        fxgraft.loss(model, out, LABELS, lambda logits, y: returned)


def test_evaluation_mode_between_a_pass_and_a_loss_that_runs_the_batch_again() -> None:
    model = crossnorm(net()).train()
    out = model(images(), target=LABELS)
    with pytest.raises(ConfigError, match=r"put into evaluation mode since(?s:.*)fxgraft\.loss first"):
        fxgraft.loss(model.eval(), out, LABELS)
    assert "crossnorm.consistency" in fxgraft.losses(model.train(), out, LABELS)


def test_one_number_in_the_place_of_predictions() -> None:
    model = crossnorm(net()).train()
    out = model(images(), target=LABELS)
    with pytest.raises(StructureError, match="compares predictions, and was given one number"):
        fxgraft.extra_loss(model, F.cross_entropy(out, LABELS), LABELS)


def test_consistency_needs_predictions_in_the_output() -> None:
    maps = timm.create_model("test_resnet", features_only=True)
    with pytest.raises(StructureError, match="not clear what in it are the logits"):
        fxgraft.patch(maps, "crossnorm", consistency=True)
    fxgraft.patch(maps, "crossnorm")


def test_the_gradient_boosting_loss_is_one_of_training() -> None:
    model = fxgraft.patch(net(), "diversification", loss="gradient_boosting", loss_k=1, input_size=SIZE)
    out = model(images())
    assert not torch.equal(fxgraft.loss(model, out, LABELS), F.cross_entropy(out, LABELS))
    out = model.eval()(images())
    assert torch.equal(fxgraft.loss(model, out, LABELS), F.cross_entropy(out, LABELS))
    soft = F.one_hot(LABELS, CLASSES).float()
    binary = F.binary_cross_entropy_with_logits
    assert torch.equal(fxgraft.loss(model, out, soft, binary), binary(out, soft))


@pytest.mark.parametrize("made", [lambda out: out.mean(0), lambda out: out[1], lambda out: 2 * out[0]])
def test_members_have_other_labels_than_the_batch(made: Callable[[Tensor], Tensor]) -> None:
    model = fxgraft.patch(net(), "mixmo", input_size=SIZE)
    out = model(images(), target=LABELS)
    with pytest.raises(TargetError, match="computed from the logits of several members in a training pass"):
        fxgraft.loss(model, made(out), LABELS)
    out = model.eval()(images())
    assert torch.equal(fxgraft.loss(model, out, LABELS), F.cross_entropy(out, LABELS))
