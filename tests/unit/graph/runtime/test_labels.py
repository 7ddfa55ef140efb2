"""Which labels a pass takes, which pass an output is of, and whether a loss gets the labels that its pass took."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections import UserDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgraft
from fxgraft.errors import TargetError
from models.toys import CLASSES, LABELS, images, net
from system.test_threads import batches, spy

SIZE = (3, 8, 8)
DERIVED: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda out: out,
    "converted": lambda out: out.bfloat16().float(),
    "double": lambda out: out.double(),
    "scaled": lambda out: out / 2.0,
    "a copy": lambda out: out.clone(),
    "a view": lambda out: out.view(-1).view(out.shape),
    "a part": lambda out: out[..., :],
    "in place": lambda out: out.clone().mul_(2.0),
    "far behind": lambda out: sum([out] * 30, out).log_softmax(-1),
}


# Which pass an output is of.


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_every_output_is_tied_to_its_pass(compiled: bool) -> None:
    torch.compiler.reset()
    model = fxgraft.patch(net(), "mixmo", decay=0.0, input_size=SIZE)
    (graft,) = fxgraft.grafts(model)
    call: Any = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
    for derive in DERIVED.values():
        first, second = call(images(), target=LABELS), call(images(seed=1), target=LABELS.flip(0))
        with torch.no_grad():
            model.eval()(images(seed=2))
        model.train()
        found = [graft.recall(derive(out)) for out in (second, first)]
        assert [pairing.labels.tolist() for pairing in found] == [LABELS.flip(0).tolist(), LABELS.tolist()]
        assert [graft.recall(out) for out in (second, first)] == found
        for out, y, pairing in ((second, LABELS.flip(0), found[0]), (first, LABELS, found[1])):
            out = derive(out)
            expected = sum(
                (w * F.cross_entropy(row, y[order], reduction="none")).mean()
                for w, row, order in zip(pairing.weights.T, out, pairing.permutations, strict=True)
            )
            torch.testing.assert_close(fxgraft.loss(model, out, y), expected, check_dtype=False)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_consistency_compares_with_the_batch_of_its_own_pass(compiled: bool) -> None:
    torch.compiler.reset()
    model = fxgraft.patch(net(), "crossnorm", consistency=True, p=1.0, active=None, input_size=SIZE)
    (graft,) = fxgraft.grafts(model)
    call: Any = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
    x = images()
    out = call(x).double()
    call(images(seed=1))
    model.eval()(images(seed=2))
    model.train()
    (found,) = graft.arguments(out).args
    assert torch.equal(found, x)
    assert "crossnorm.consistency" in fxgraft.losses(model, out, LABELS)


def test_views_are_known_without_a_gradient() -> None:
    model = fxgraft.patch(net(), "mixmo", input_size=SIZE)
    (graft,) = fxgraft.grafts(model)
    with torch.no_grad():
        first, second = model(images(), target=LABELS), model(images(), target=LABELS.flip(0))
        assert graft.recall(first[:, :2]) is graft.recall(first) is not graft.recall(second)
        with pytest.raises(
            TargetError, match=r"'mixmo' cannot tell which pass this output is of(?s:.*)criterion="
        ):
            graft.recall(first * 2)
        assert graft.recall(model.eval()(images()) * 2) is None


def test_an_output_of_several_passes_is_refused() -> None:
    model = fxgraft.patch(net(), "mixmo", input_size=SIZE)
    first, second = model(images(), target=LABELS), model(images(), target=LABELS)
    with pytest.raises(TargetError, match=r"computed from 2 passes(?s:.*)add the losses"):
        fxgraft.loss(model, (first + second) / 2, LABELS)


def test_what_ties_an_output_goes_with_its_graph() -> None:
    model = fxgraft.patch(net(), "mixmo", input_size=SIZE)
    (graft,) = fxgraft.grafts(model)
    out = model(images(), target=LABELS)
    known = weakref.ref(graft.recall(out))
    del out
    model(images(), target=LABELS)  # what the last pass left stays until the next
    gc.collect()
    assert known() is None


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_outputs_of_a_checkpointed_call_are_known(reentrant: bool) -> None:
    model = fxgraft.patch(net(), "mixmo", input_size=SIZE)
    x = images().requires_grad_()
    out = torch.utils.checkpoint.checkpoint(
        lambda x: model(x, target=LABELS), x, use_reentrant=reentrant, preserve_rng_state=True
    )
    model(images(seed=1), target=LABELS.flip(0))
    assert torch.equal(fxgraft.grafts(model)[0].recall(out).labels, LABELS)


# The labels of a loss.


SMOOTH = 0.9 * F.one_hot(LABELS, CLASSES) + 0.1 / CLASSES
MIXED = 0.6 * F.one_hot(LABELS, CLASSES) + 0.4 * F.one_hot(LABELS.flip(0), CLASSES)
SAME: list[tuple[Tensor, Any]] = [
    (LABELS, LABELS.clone()),
    (LABELS, LABELS.int()),
    (LABELS, SMOOTH),
    (SMOOTH, LABELS),
    (LABELS, F.one_hot(LABELS, CLASSES).half()),
    (MIXED, MIXED.clone()),
    (MIXED, 0.9 * MIXED + 0.1 / CLASSES),
    (LABELS, LABELS[:2]),
    (LABELS, {"labels": LABELS, "boxes": MIXED}),
    (LABELS, None),
]
OTHER: list[tuple[Tensor, Any]] = [
    (LABELS, LABELS.flip(0)),
    (LABELS, (LABELS + 1) % CLASSES),
    (LABELS, MIXED),
    (MIXED, LABELS),
    (MIXED, MIXED.flip(0)),
    (LABELS, SMOOTH.flip(0)),
    (LABELS, MIXED[:, :3]),
    (LABELS, (LABELS.flip(0), 0.5)),
]


def first(out: Tensor, y: Any) -> Tensor:
    return out.sum() * 0


@pytest.mark.parametrize(
    ("same", "taken", "given"), [*((True, *each) for each in SAME), *((False, *each) for each in OTHER)]
)
def test_the_labels_of_a_loss_are_those_of_its_pass(same: bool, taken: Tensor, given: Any) -> None:
    model = fxgraft.patch(net(), "rsc", layer="stage2", input_size=SIZE)
    out = model(images(), target=taken)
    model(images(seed=1), target=taken.roll(1, 0))
    if same:
        fxgraft.loss(model, out.float(), given, criterion=first)
        assert fxgraft.extra_loss(model, out, given) == 0
        return
    for ask in (lambda *args: fxgraft.loss(*args, criterion=first), fxgraft.extra_loss):
        with pytest.raises(
            TargetError, match=r"other labels than the pass of this output took(?s:.*)Give both"
        ):
            ask(model, out.float(), given)


def test_compiled_passes_remember_their_labels() -> None:
    torch.compiler.reset()
    model = fxgraft.patch(net(), "rsc", layer="stage2", input_size=SIZE)
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    early, late = compiled(images(), target=LABELS), compiled(images(), target=LABELS.flip(0))
    fxgraft.loss(model, early, LABELS.clone())
    with pytest.raises(TargetError, match="other labels than the pass"):
        fxgraft.loss(model, late, LABELS)


def test_labels_that_are_written_to_behind_the_pass() -> None:
    model, y = fxgraft.patch(net(), "rsc", layer="stage2", input_size=SIZE), LABELS.clone()
    out = model(images(), target=y)
    y[0] = -100
    with pytest.raises(TargetError, match=r"written to between the pass and its loss(?s:.*)y\.clone\(\)"):
        fxgraft.loss(model, out, y)


def test_labels_of_joined_outputs_are_not_compared_and_of_averaged_ones_are() -> None:
    model = fxgraft.patch(net(), "rsc", layer="stage2", input_size=SIZE)
    outs = [model(images(), target=LABELS), model(images(), target=LABELS)]
    fxgraft.loss(model, torch.cat(outs), torch.cat([LABELS, LABELS]))
    fxgraft.loss(model, sum(outs), LABELS)
    with pytest.raises(TargetError, match="other labels than the pass"):
        fxgraft.loss(model, sum(outs), LABELS.flip(0))


def test_a_task_behind_a_part_may_have_labels_of_its_own() -> None:
    part = fxgraft.patch(net(), "rsc", layer="stage2", input_size=SIZE)
    whole = nn.Sequential(part, nn.Linear(CLASSES, 3))
    with fxgraft.targets(LABELS):
        out = whole(images())
    fxgraft.loss(whole, out, LABELS.flip(0) % 3)


# Which labels a pass takes.


Pair = namedtuple("Pair", ["x", "label"])


@dataclasses.dataclass
class Record:
    x: Tensor
    label: Tensor


@dataclasses.dataclass(slots=True)
class Slots:
    x: Tensor
    label: Tensor


KINDS: dict[str, tuple[Any, Any, Callable[[Any], Tensor]]] = {
    "tuple": (lambda x, y: (x, y), 1, lambda b: b[0]),
    "dict": (lambda x, y: {"x": x, "label": y}, "label", lambda b: b["x"]),
    "user dict": (lambda x, y: UserDict(x=x, label=y), "label", lambda b: b["x"]),
    "named tuple": (Pair, "label", lambda b: b.x),
    "dataclass": (Record, "label", lambda b: b.x),
    "slots": (Slots, "label", lambda b: b.x),
    "nested": (lambda x, y: ({"l": (x, y), "u": x + 1}, 0, 0), (0, "l", 1), lambda b: b[0]["l"][0]),
}


@pytest.mark.parametrize("ahead", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_may_be_ahead_of_its_passes(kind: str, ahead: int) -> None:
    make, index, inputs = KINDS[kind]
    every = images(20)
    data = [make(every[4 * i : 4 * i + 4], LABELS * 0 + i) for i in range(5)]  # slices of one tensor
    model, waiting = net(), []
    seen = spy(model)
    for batch in fxgraft.with_targets(data, index):
        waiting.append(batch)
        if len(waiting) > ahead:
            model(inputs(waiting.pop(0)).view(4, 3, 8, 8))
    assert seen == list(range(5 - ahead))


def test_copies_of_batches_are_those_of_the_last_one_or_refused() -> None:
    model = net()
    seen = spy(model)
    for x, _ in fxgraft.with_targets(batches(0)):
        model(x + 0)
    assert seen == [0, 1, 2]
    run = iter(fxgraft.with_targets(batches(0)))
    copies = [next(run)[0].clone(), next(run)[0].clone()]
    with pytest.raises(TargetError, match=r"the loop is ahead of its passes(?s:.*)model\(x, target=y\)"):
        model(copies[0])
    model(copies[0], target=LABELS)


def test_zipped_loaders_over_slices_of_one_tensor() -> None:
    model = net()
    seen = spy(model)
    every = images(24)
    parts = [(every[4 * i : 4 * i + 4], LABELS * 0 + i) for i in range(6)]
    for (x, _), (other, _) in zip(
        fxgraft.with_targets(parts[::2]), fxgraft.with_targets(parts[1::2]), strict=True
    ):
        model(x)
        model(other)
    assert seen == [0, 1, 2, 3, 4, 5]
    same = [(parts[0][0], LABELS * 0 + 9)]
    for (x, _), _ in zip(fxgraft.with_targets(parts[:1]), fxgraft.with_targets(same), strict=True):
        with pytest.raises(TargetError, match="two loaders of fxgraft"):
            model(x)


def test_a_model_called_by_keywords_is_known_by_its_input() -> None:
    model = net()
    seen = spy(model)
    run = iter(fxgraft.with_targets(batches(0)))
    current, _ = next(run), next(run)
    model(x=current[0])
    assert seen == [0]


def test_labels_given_with_the_call_have_served() -> None:
    model = fxgraft.patch(net(), "rsc", layer="stage2", input_size=SIZE)
    for x, y in fxgraft.with_targets(batches(0)):
        model(x, target=y)
        with pytest.raises(TargetError, match="left over from an earlier pass"):
            model(images(seed=9))  # unlabelled, and of the same size


def test_models_that_need_no_labels_use_none_up() -> None:
    teacher = fxgraft.patch(net(), "crossnorm", input_size=SIZE)
    model = fxgraft.patch(net(), "rsc", layer="stage2", input_size=SIZE)
    for x, y in fxgraft.with_targets(batches(0)):
        teacher(x + 0)
        fxgraft.loss(model, model(x + 0), y)


def test_unlabelled_parts_of_a_batch() -> None:
    """Of several loaders in one batch; one that has come to its end gives None."""
    model = net()
    seen = spy(model)
    x, u = images(), images(seed=1)
    data = [{"l": (x, LABELS), "u": u}, {"l": None, "u": u}]
    for step, batch in enumerate(fxgraft.with_targets(data, ("l", 1))):
        with pytest.raises(TargetError, match=["labels are not of", "none were given"][step]):
            model(batch["u"])
        if batch["l"] is not None:
            model(batch["l"][0])
    assert seen == [0]


def test_batches_of_other_libraries() -> None:
    transformers = pytest.importorskip("transformers")
    model = net()
    seen = spy(model)
    data = [transformers.BatchFeature({"pixel_values": x, "labels": y}) for x, y in batches(0)]
    run = iter(fxgraft.with_targets(data, "labels"))
    current = next(run)
    for following in run:  # one batch ahead
        model(current.pixel_values)
        current = following
    assert seen == [0, 1]


@pytest.mark.parametrize(
    ("batch", "index", "match"),
    [
        ({"x": 1, "y": 2}, 1, r"a dict, has no entry 1 for the labels; it has 'x', 'y'"),
        (Pair(1, 2), "y", r"a Pair, has no entry 'y' for the labels; it has 'x', 'label'"),
        (Record(LABELS, LABELS), 1, r"a Record, has no entry 1 for the labels; it has 'x', 'label'"),
        ((1,), 1, r"a tuple, has no entry 1 for the labels; it has 0\.\n"),
        (LABELS, 1, r"a Tensor, has no entry 1 for the labels; it has no entries"),
        ({"l": (1, 2)}, ("l", 5), r"On the way to \('l', 5\) a part of the batch, a tuple, has no entry 5"),
    ],
)
def test_batches_without_the_entry(batch: Any, index: Any, match: str) -> None:
    with pytest.raises(TargetError, match=rf"{match}(?s:.*)fxgraft\.with_targets\(loader, index=\.\.\.\)"):
        next(iter(fxgraft.with_targets([batch], index)))


def test_compiled_passes_refuse_where_the_loop_is_ahead() -> None:
    torch.compiler.reset()
    model = fxgraft.patch(net(), "rsc", layer="stage2", input_size=SIZE)
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    for x, y in fxgraft.with_targets(batches(0)):
        fxgraft.loss(model, compiled(x), y)
    run = iter(fxgraft.with_targets(batches(0)))
    current, _ = next(run), next(run)
    with pytest.raises(Exception, match="the loop is ahead of its passes"):
        compiled(current[0])


def test_answers_of_a_device_come_in_a_later_step() -> None:
    class Done:
        ready = False

        def query(self) -> bool:
            return self.ready

    model = fxgraft.patch(net(), "rsc", layer="stage2", input_size=SIZE)
    doubts, done = fxgraft.grafts(model)[0].context.checks, Done()  # type: ignore[union-attr]
    doubts._waiting.append((torch.tensor(True), done, TargetError("other labels")))
    model(images(), target=LABELS)
    done.ready = True
    with pytest.raises(TargetError, match="other labels"):
        model(images(), target=LABELS)
    model(images(), target=LABELS)


# Labels that aren't classes, and batches that are too small.


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of dynamo's own looking
@pytest.mark.parametrize("wrong", [-1, -100, CLASSES])
@pytest.mark.parametrize(
    ("method", "options"),
    [("rsc", {"layer": "stage2", "batch_share": 1.0}), ("rsc", {"layer": "stage1"}), ("mixmo", {})],
)
def test_compiled_code_refuses_what_is_no_class(method: str, options: dict[str, Any], wrong: int) -> None:
    torch.compiler.reset()
    model = fxgraft.patch(net(), method, input_size=SIZE, **options)
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    compiled(images(), target=LABELS)
    y = LABELS.clone()
    y[1] = wrong
    with pytest.raises(TargetError, match="class indices from"):
        model(images(), target=y)
    with pytest.raises(RuntimeError, match=rf"'{method}' was given class indices outside of \[0, 3\]"):
        compiled(images(), target=y)


@pytest.mark.parametrize(
    ("method", "options", "match"),
    [
        ("rsc", {"layer": "stage2"}, "'rsc' mutes nothing in a batch of 1(?s:.*)batch_share=1"),
        ("mixmo", {}, "'mixmo' pairs the image of a batch of one with itself(?s:.*)MixMoInput"),
        ("crossnorm", {"p": 1.0}, "'crossnorm' exchanges nothing in a batch of one(?s:.*)one-instance"),
    ],
)
def test_batches_that_are_too_small_are_told_of_once(
    method: str, options: dict[str, Any], match: str
) -> None:
    model = fxgraft.patch(net(), method, input_size=SIZE, **options)
    x, y = images(), LABELS
    with pytest.warns(fxgraft.FxgraftWarning, match=match):
        model(x[:1], target=y[:1])
    for rows in (1, 4):
        fxgraft.loss(model, model(x[:rows], target=y[:rows]), y[:rows]).backward()


def test_a_small_batch_that_is_compared_is_told_of_by_its_loss() -> None:
    """In one-instance mode, or switched off, there is nothing to tell."""
    for options in ({"mode": "one-instance", "p": 1.0}, {"p": 0.0}):
        fxgraft.patch(net(), "crossnorm", input_size=SIZE, **options)(images()[:1])
    model = fxgraft.patch(net(), "crossnorm", consistency=True, p=1.0, input_size=SIZE)
    out = model(images()[:1])
    with pytest.warns(fxgraft.FxgraftWarning, match="exchanges nothing in a batch of one"):
        fxgraft.loss(model, out, LABELS[:1])


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_narrow_labels_of_mixtures(dtype: torch.dtype) -> None:
    model = fxgraft.patch(net(), "mixmo", input_size=SIZE)
    fxgraft.patch(model, "rsc", layer="stage2", input_size=SIZE)
    model(images(), target=LABELS.to(dtype)).sum().backward()
    mixed = fxgraft.mixmo.MixedLabels(LABELS, LABELS.flip(0), torch.full((4, 1, 8, 8), 0.25))
    narrow = fxgraft.mixmo.MixedLabels(mixed.first.to(dtype), mixed.second.to(dtype), mixed.mask)
    torch.testing.assert_close(narrow.soft(CLASSES), mixed.soft(CLASSES))
    model(images(), target=narrow).sum().backward()


@pytest.mark.parametrize("layer", ["stage1", "stage2"])
def test_gradients_as_functions_of_the_weights(layer: str) -> None:
    model = fxgraft.patch(net(), "rsc", layer=layer, scope="spatial", input_size=SIZE)
    for each in model.modules():
        each.train(not isinstance(each, nn.BatchNorm2d))
    weights = {name: each.detach().clone() for name, each in model.named_parameters()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        out = torch.func.functional_call(model, weights, (images(),), {"target": LABELS})
        return fxgraft.loss(model, out, LABELS)

    torch.manual_seed(0)
    found = torch.func.grad(loss)(weights)
    torch.manual_seed(0)
    fxgraft.loss(model, model(images(), target=LABELS), LABELS).backward()
    for name, each in model.named_parameters():
        torch.testing.assert_close(found[name], each.grad)


def compiled_step(model: nn.Module) -> Any:
    def step(x: Tensor, y: Tensor, given: Tensor) -> Tensor:
        return fxgraft.loss(model, model(x, target=y), given)

    return torch.compile(step, fullgraph=True, backend="eager")


@pytest.mark.parametrize(
    "method", [pytest.param("rsc", marks=()), pytest.param("mixmo", marks=pytest.mark.sweep)]
)
def test_a_compiled_step_compares_labels_as_it_runs(method: str) -> None:
    """In one graph: equal labels in other memory or as one-hot vectors are the same, permuted ones are not."""
    torch.compiler.reset()
    model = fxgraft.patch(net(), method, input_size=(3, 16, 16))
    step = compiled_step(model)
    x, y = images(size=16), LABELS
    step(x, y, y).backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        step(x.flip(0), y, y).backward()
    for same in (y.clone(), F.one_hot(y, CLASSES).float()):
        assert step(x, y, same).isfinite()
    with pytest.raises(RuntimeError, match="other labels than the pass of this output took"):
        step(x, y, y.roll(1))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of dynamo's own looking
@pytest.mark.parametrize("how", ["converted", "three passes"])
def test_compiled_code_leaves_the_comparison_to_python_where_it_cannot_tell_the_pass(how: str) -> None:
    torch.compiler.reset()
    model = fxgraft.patch(net(), "rsc", layer="stage2", input_size=SIZE)

    def step(x: Tensor, y: Tensor, given: Tensor) -> Tensor:
        if how == "converted":
            return fxgraft.loss(model, model(x, target=y).double(), given)
        outs = [model(x, target=y), model(x, target=y.flip(0)), model(x, target=y.flip(0))]
        return fxgraft.loss(model, outs[0], given)

    compiled: Any = torch.compile(step, backend="eager")
    compiled(images(), LABELS, LABELS)
    with pytest.raises(TargetError, match="other labels than the pass of this output took"):
        compiled(images(), LABELS, LABELS.roll(1))
    torch.compiler.reset()
    whole: Any = torch.compile(step, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="Give it that, and convert outputs in the criterion"):
        whole(images(), LABELS, LABELS)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_labels_that_a_compiled_step_writes_to_are_compared() -> None:
    torch.compiler.reset()
    model = fxgraft.patch(net(), "rsc", layer="stage2", input_size=SIZE)

    @torch.compile(fullgraph=True, backend="eager")
    def step(x: Tensor, y: Tensor) -> Tensor:
        out = model(x, target=y)
        y[1] = (y[1] + 1) % CLASSES
        return fxgraft.loss(model, out, y.clone())

    with pytest.raises(RuntimeError, match="other labels than the pass of this output took"):
        step(images(), LABELS.clone())


def test_a_compiled_training_without_the_loss_is_told_when_the_mode_changes() -> None:
    torch.compiler.reset()
    model = fxgraft.patch(net(), "mixmo", input_size=(3, 16, 16))
    compiled: Any = torch.compile(model, backend="eager")
    for _ in range(4):
        compiled(images(size=16), target=LABELS).sum().backward()
    with pytest.warns(fxgraft.FxgraftWarning, match="model is trained without it"):
        model.eval()
    model.train()


MODEL: Any = None
"""Found through a global name, as in scripts: compiled code does not compare it with its arguments again."""


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of dynamo's own looking
@pytest.mark.parametrize("pass_of", ["eager", "long ago", "other labels"])
def test_a_compiled_loss_of_an_output_that_it_was_not_compiled_for(pass_of: str) -> None:
    torch.compiler.reset()
    global MODEL
    MODEL = fxgraft.patch(net(), "mixmo", input_size=(3, 16, 16))

    @torch.compile(fullgraph=True, backend="eager")
    def loss(out: Tensor, y: Tensor) -> Tensor:
        return fxgraft.loss(MODEL, out, y)

    call: Any = torch.compile(MODEL, fullgraph=True, backend="eager")
    x, y = images(size=16), LABELS
    outs = [call(x.roll(step, 0), target=y) for step in range(6)]
    torch.testing.assert_close(loss(outs[-1], y), fxgraft.loss(MODEL, outs[-1], y))
    outs = [call(x.roll(step, 0), target=y) for step in range(6)]
    loss(outs[-1], y)
    if pass_of == "eager":
        outs[0] = MODEL(x, target=y)
    with pytest.raises(Exception, match=r"an output of another pass|other labels|cannot tell which pass"):
        loss(
            outs[-1] if pass_of == "other labels" else outs[0], y.roll(1) if pass_of == "other labels" else y
        )
