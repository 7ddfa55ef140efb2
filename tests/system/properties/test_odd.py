"""Methods on odd networks against an untouched twin, or a reference by hand: equal numbers, or a typed refusal."""

from __future__ import annotations

import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

import fxgraft
from models.odd_models import Net, Odd, odds
from system.properties.profiles import profiles

# With these options training is the untouched network's, and so is evaluation.
NEUTRAL: dict[str, tuple[dict[str, Any], ...]] = {
    "taps": ({"layers": ["stem"]}, {"layers": ["blocks.0"]}, {"layers": ["blocks.0.conv2"]}),
    "rsc": ({"start": 1.0}, {"start": 1.0, "layer": "blocks.0"}),
    "crossnorm": ({"p": 0.0}, {"p": 0.0, "position": "pre"}, {"p": 0.0, "layers": ["stem"]}),
    "selfnorm": ({}, {"position": "residual"}, {"layers": ["stem"]}, {"gates": 1}),
    "diversification": ({"p_peak": 0.0, "p_patch": 0.0},),
    "mixmo": ({"members": 1},),
}
ACTIVE: dict[str, tuple[dict[str, Any], ...]] = {
    "rsc": ({"batch_share": 1.0}, {"scope": "channel"}),
    "crossnorm": ({"p": 1.0, "active": None},),
    "diversification": ({"p_peak": 1.0, "patch": 1},),
    "mixmo": ({}, {"mixing": "linear"}),
}
counts: Counter[str] = Counter()


@st.composite
def cases(draw: st.DrawFn, table: dict[str, tuple[dict[str, Any], ...]]) -> tuple[Odd, str, dict[str, Any]]:
    """A network and a method with options."""
    method = draw(st.sampled_from(sorted(table)))
    return draw(odds()), method, draw(st.sampled_from(table[method]))


class RefusedError(Exception):
    """A typed refusal, which is never wrong here."""


@contextmanager
def refusals() -> Any:
    """Turn errors that say what to do into a refusal; anything else is a failure."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except fxgraft.FxgraftError as error:
        raise RefusedError(str(error)) from error


def loss_of(model: nn.Module, out: Tensor, y: Tensor, odd: Odd, patched: bool) -> Tensor:
    """The criterion that fits the number of logits."""

    def binary(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        return F.binary_cross_entropy_with_logits(
            logits, labels.reshape(logits.shape).float(), reduction=reduction
        )

    criterion = binary if odd.classes == 1 else F.cross_entropy
    if not patched:
        return criterion(out, y)
    return fxgraft.loss(model, out, y, criterion)


def call(model: Net, x: Any, y: Tensor, odd: Odd, patched: bool) -> Tensor:
    """Call a network as its user would: with the labels where its forward takes them."""
    if odd.argument == "labels":
        return model(x, labels=y)
    if odd.argument:
        return model(x, target=y)
    return model(x, target=y) if patched else model(x)


def step(model: Net, odd: Odd, patched: bool, training: bool) -> dict[str, Any]:
    """One seeded pass with its gradients and what it left in the buffers."""
    x, y = odd.batch()
    model.train(training)
    model.zero_grad()
    torch.manual_seed(1)
    out = call(model, x, y, odd, patched)
    if odd.images and out.requires_grad:
        loss_of(model, out, y, odd, patched).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {
        "out": out.detach().clone(),
        "gradients": {name: value for name, value in gradients.items() if "graft_" not in name},
        "buffers": {name: value.clone() for name, value in model.named_buffers() if "graft_" not in name},
        "calls": [block.calls for block in model.blocks],
    }


def bare_step(model: Net, odd: Odd, training: bool) -> dict[str, Any] | None:
    """The untouched network's; None where it cannot run such a batch itself."""
    try:
        return step(model, odd, False, training)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):  # of batch norm
            raise
        return None


def differences(found: Any, expected: Any, tolerance: float, name: str = "") -> list[str]:
    """Name what is not equal, in shape, type or value."""
    if isinstance(expected, dict):
        missing = [f"{name} lacks {key}" for key in expected if key not in found]
        return missing + [
            each
            for key in expected
            if key in found
            for each in differences(found[key], expected[key], tolerance, f"{name} {key}")
        ]
    if not isinstance(expected, Tensor):
        return [] if found == expected else [f"{name}: {found} for {expected}"]
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return [f"{name}: {tuple(found.shape)} {found.dtype} for {tuple(expected.shape)} {expected.dtype}"]
    apart = torch.where(found.isnan() & expected.isnan(), 0.0, (found - expected).abs()).flatten()
    scale = 1.0 + expected.nan_to_num().abs().flatten().max() if expected.numel() else 1.0
    return [] if (apart <= tolerance * scale).all() else [f"{name}: {apart.max():.3g}"]


def patched(odd: Odd, method: str, options: dict[str, Any]) -> Net:
    """The network with a method on it, and with all that is done to it afterwards."""
    model = odd.build()
    fxgraft.patch(model, method, input_size=odd.input_size, **options)
    odd.finish(model)
    return model


def untouched(odd: Odd) -> Net:
    model = odd.build()
    odd.finish(model)
    return model


def check_neutral(odd: Odd, method: str, options: dict[str, Any]) -> None:
    """A method that does nothing leaves outputs, gradients and buffers as they are, in both modes."""
    # Sums in another order, in a head that runs at every position and in gates that are 1 up to rounding.
    tolerance = 2e-5 if method in ("diversification", "selfnorm", "mixmo") else 1e-6
    for training in (True, False):
        expected = bare_step(untouched(odd), odd, training)
        if expected is None:
            continue
        try:
            with refusals():
                found = step(patched(odd, method, options), odd, True, training)
        except RefusedError:
            counts["refused"] += 1
            continue
        counts["compared"] += 1
        if method == "mixmo" and training:  # a row of logits for each of its members: one
            found["out"] = found["out"].squeeze(0)
        wrong = differences(found, expected, tolerance)
        assert wrong == [], f"{'training' if training else 'evaluation'}: {wrong}"


def check_active(odd: Odd, method: str, options: dict[str, Any]) -> None:
    """Evaluation of a method that acts in training alone is the untouched network's; a training step is finite."""
    expected = bare_step(untouched(odd), odd, False)
    assert expected is not None
    try:
        with refusals():
            model = patched(odd, method, options)
            found = step(model, odd, True, False)
            if method == "mixmo":  # the gradients are those of its members
                found["gradients"] = expected["gradients"]
            wrong = differences(found, expected, 2e-6 if method == "mixmo" else 0.0)
            assert wrong == [], f"evaluation: {wrong}"
            if bare_step(untouched(odd), odd, True) is not None:
                trained = step(model, odd, True, True)
                assert trained["out"].isfinite().all()
                assert all(each.isfinite().all() for each in trained["gradients"].values())
        counts["compared"] += 1
    except RefusedError:
        counts["refused"] += 1


def rsc_by_hand(odd: Odd, scope: str) -> dict[str, Any]:
    """RSC at the first block, written out with hooks on the untouched network, run as it is."""
    model, (x, y) = untouched(odd).train(), odd.batch()
    site = model.blocks[0]
    kept: list[Tensor] = []
    if odd.classes == 1:
        y_score = y.float()
    watching = site.register_forward_hook(lambda module, args, out: kept.append(out))
    call(model, x, y, odd, False)
    watching.remove()
    z = kept[0]

    def rest(value: Tensor) -> Tensor:
        # As the network predicts: in evaluation, and without the labels that it may take.
        instead = site.register_forward_hook(lambda module, args, out: value)
        try:
            return model.eval()(x)
        finally:
            instead.remove()
            model.train()

    def score(logits: Tensor) -> Tensor:
        if odd.classes == 1:
            return (2 * y_score - 1) * logits[:, 0]
        return logits.gather(1, y[:, None])[:, 0]

    def probability(logits: Tensor) -> Tensor:
        return score(logits).sigmoid() if odd.classes == 1 else logits.softmax(1).gather(1, y[:, None])[:, 0]

    leaf = z.detach().requires_grad_()
    logits = rest(leaf)
    (g,) = torch.autograd.grad(score(logits).sum(), leaf)
    where = tuple(range(2, z.ndim))
    weights = g.mean(where, keepdim=True)
    if scope == "spatial":
        saliency = (leaf.detach() * weights).sum(1).flatten(1)
        shape, share = (len(z), 1, *z.shape[2:]), 1 / 3
    else:
        saliency = weights.flatten(1)
        shape, share = (len(z), z.shape[1], *(1 for _ in where)), 1 / 3.2
    count = -(-saliency.shape[1] * share // 1)
    threshold = saliency.sort(1, descending=True).values[:, int(min(count, saliency.shape[1] - 1))][:, None]
    mask = 1.0 - (saliency > threshold).float()
    mask = mask.reshape(shape)
    with torch.no_grad():
        drop = (probability(logits) - probability(rest(z * mask)) - 1e-4).clamp(min=0)
    chosen = round(len(z) / 3)
    limit = drop.sort(descending=True).values[min(chosen, len(z) - 1)]
    keep = (drop <= limit).reshape(-1, *(1 for _ in z.shape[1:]))
    model.zero_grad()
    # One pass in which the site's own value is muted, so that gradients and buffers are those of a single step.
    muting = site.register_forward_hook(lambda module, args, out: out * torch.where(keep, 1.0, mask))
    out = call(model, x, y, odd, False)
    muting.remove()
    loss_of(model, out, y, odd, False).backward()
    return {
        "out": out.detach(),
        "gradients": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
    }


def check_rsc(odd: Odd, scope: str) -> None:
    """What RSC mutes is what the formula mutes when the network itself, hooks and all, is run by hand."""
    if any(kind in ("counter", "buffer", "cache") for kind in odd.blocks) or odd.images < 2:
        return
    if odd.hook == "block":
        return  # hooks of the site itself run behind the graft, and those of the reference beside them
    odd = replace(odd, norm=False)  # what lies behind the site is looked at as evaluation runs it
    try:
        with refusals():
            model = odd.build()
            fxgraft.patch(model, "rsc", layer="blocks.0", scope=scope, input_size=odd.input_size)
            odd.finish(model)
            found = step(model, odd, True, True)
    except RefusedError:
        counts["refused"] += 1
        return
    counts["compared"] += 1
    expected = rsc_by_hand(odd, scope)
    wrong = differences({key: found[key] for key in expected}, expected, 5e-5)
    assert wrong == [], wrong


@profiles(5, 120, cases(NEUTRAL))
def test_nothing_is_changed_by_a_method_that_does_nothing(case: tuple[Odd, str, dict[str, Any]]) -> None:
    check_neutral(*case)


@profiles(3, 60, cases(ACTIVE))
def test_evaluation_is_the_untouched_networks(case: tuple[Odd, str, dict[str, Any]]) -> None:
    check_active(*case)


@profiles(4, 90, odds(), st.sampled_from(["spatial", "channel"]))
def test_rsc_is_the_formula(odd: Odd, scope: str) -> None:
    check_rsc(odd, scope)


def test_most_cases_are_compared() -> None:
    """Networks of one oddity each: refusing them all would be no test."""
    counts.clear()
    for options in (
        {},
        {"argument": "target"},
        {"argument": "kwargs"},
        {"frozen_stem": True},
        {"hook": "pool"},
    ):
        for method in NEUTRAL:
            check_neutral(Odd(**options), method, NEUTRAL[method][0])
    assert counts["compared"] > 4 * counts["refused"]


NOTHING = NEUTRAL["diversification"][0]
# The smallest of the networks that once gave other numbers, or an error that did not say what to do.
KEPT: list[tuple[Any, ...]] = [
    (check_neutral, Odd(adapter="fc", hook="stem", hook_first=False, images=0), "selfnorm", {}),
    (check_neutral, Odd(blocks=("branch", "branch"), images=0), "selfnorm", {"position": "residual"}),
    (
        check_neutral,
        Odd(crops=True, hook="stem", hook_kind="replaced", hook_first=False),
        "diversification",
        NOTHING,
    ),
    (check_neutral, Odd(crops=True, hook="pool", hook_kind="replaced"), "mixmo", {"members": 1}),
    (check_neutral, Odd(replaced="stem", images=0), "diversification", NOTHING),
    (check_active, Odd(argument="target", replaced="conv", hook_first=False), "mixmo", {}),
    (check_active, Odd(crops=True, images=0), "rsc", {"batch_share": 1.0}),
    (check_active, Odd(frozen_stem=True, adapter="conv", images=0), "crossnorm", {"p": 1.0, "active": None}),
    (check_active, Odd(adapter="fc", images=0), "diversification", {"p_peak": 1.0, "patch": 1}),
    (check_rsc, Odd(dims=1, width=10, hook="pool", hook_first=False), "channel"),
    (check_rsc, Odd(blocks=("helper",), dims=1, width=10, argument="target"), "channel"),
    (
        check_rsc,
        Odd(blocks=("detach", "branch"), classes=1, hook="pool", hook_kind="replaced", images=3),
        "spatial",
    ),
    (check_neutral, Odd(changed="list"), "selfnorm", {"position": "residual"}),
    (check_neutral, Odd(blocks=("helper",), changed="entry"), "crossnorm", {"p": 0.0}),
    (check_neutral, Odd(changed="appended"), "rsc", {"start": 1.0, "layer": "blocks.0"}),
    (check_rsc, Odd(blocks=("plain", "branch"), changed="closed"), "channel"),
]


@pytest.mark.parametrize("case", KEPT, ids=range(len(KEPT)))
def test_once_wrong(case: tuple[Any, ...]) -> None:
    check, *arguments = case
    check(*arguments)
