"""The arithmetic of CrossNorm: parity with the authors' code, gradients, boxes, and what must hold of any map."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from fxgraft.functional.modulation import instance_moments, modulated
from fxgraft.patches.crossnorm.tensors import EPS, crossnorm, draw_box
from golden_data import GoldenCase, load_golden
from sweeping import some

CROPS = ("neither", "style", "content", "both")
CASES = [case for crop in CROPS for case in load_golden(f"crossnorm_op_{crop}")]
LAYOUTS = ("rows", "channels_last", "tokens", "slice")


def arguments(case: GoldenCase) -> dict:
    boxes = {
        f"{which}_box": case.draws[f"{which}_box"].tolist()
        for which in ("content", "style")
        if f"{which}_box" in case.draws
    }
    return {
        "permutation": case.draws["ins_idxs"],
        "channels": case.draws.get("chan_idxs"),
        "lam": case.settings["lam"] or 0.0,
        **boxes,
    }


def make(layout: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = {"tokens": (3, 7, 4), "slice": (3, 4, 8, 9)}.get(layout, (3, 4, 5, 6))
    x = torch.randn(shape, dtype=dtype, generator=generator)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "tokens":
        return x.movedim(-1, 1)
    return x[..., 1:5, 2:7] if layout == "slice" else x


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_authors_numbers(case: GoldenCase, dtype: torch.dtype, channels_last: bool):
    inputs = case.inputs_as(dtype)
    x = inputs["x"]
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    y = crossnorm(x, **arguments(case))
    (y * inputs["cot"]).sum().backward()
    close = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(y, case.outputs["y"].to(dtype), **close)
    torch.testing.assert_close(x.grad, case.outputs["grad_x"].to(dtype), **close)


@pytest.mark.parametrize("case", [c for c in CASES if len(c.draws) > 1], ids=str)
def test_boxes_as_tensors_give_the_same(case: GoldenCase):
    x = case.inputs_as(torch.float64)["x"]
    given_ints = arguments(case)
    given_tensors = {k: torch.tensor(v) if k.endswith("_box") else v for k, v in given_ints.items()}
    torch.testing.assert_close(
        crossnorm(x, **given_tensors), crossnorm(x, **given_ints), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("case", ["inm0", "inm1"])
def test_authors_statistics(case: str):
    golden = load_golden("crossnorm_stats")[case]
    for which in ("content", "style"):
        mean, var = instance_moments(golden.inputs_as(torch.float64)[which])
        torch.testing.assert_close(mean, golden.outputs[f"{which}_mean"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close((var + EPS).sqrt(), golden.outputs[f"{which}_std"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", some(LAYOUTS, 2))
@pytest.mark.parametrize("shift", some([True, False], 1))
def test_gradient_of_modulation(layout: str, shift: bool):
    x = make(layout).detach().requires_grad_()
    w = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        order = torch.tensor([1, 2, 0])
        return modulated(
            x, lambda m, v: ((w * m + (v + 1e-5).sqrt()).sigmoid(), m[order] * v if shift else None)
        )

    assert gradcheck(run, (x, w))
    assert gradgradcheck(run, (x, w))


def test_a_graph_serves_gradients_with_and_without_a_graph_of_their_own():
    x = make("rows").detach().requires_grad_()
    w = torch.randn(4, dtype=torch.float64, requires_grad=True)
    y = modulated(x, lambda m, v: ((w * m + v).sigmoid(), m * w)).sin().sum()
    plain = torch.autograd.grad(y, (x, w), retain_graph=True)
    for create_graph in (True, False, True):
        found = torch.autograd.grad(y, (x, w), retain_graph=True, create_graph=create_graph)
        torch.testing.assert_close(found, plain)
        assert all(each.requires_grad == create_graph for each in found)


def test_constant_coefficients_can_be_differentiated_twice():
    x = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(lambda x, w: modulated(x, lambda m, v: (w.expand(3, 2), None)), (x, w))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_reaches_what_is_asked_for_and_nothing_else(layout: str):
    frozen = make(layout)
    w = torch.randn(4, dtype=torch.float64, requires_grad=True)
    modulated(frozen, lambda m, v: (w + v, m)).sum().backward()
    assert frozen.grad is None
    torch.testing.assert_close(w.grad, frozen.sum(dim=(0, *range(2, frozen.ndim))))
    x = make(layout).detach().requires_grad_()
    modulated(x, lambda m, v: (m.detach() * 2, None)).sum().backward()
    expected = (2 * x.mean(tuple(range(2, x.ndim)), keepdim=True)).expand_as(x)
    torch.testing.assert_close(x.grad, expected.detach())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_order_and_dtype_are_kept(layout: str):
    x = make(layout, torch.float32)
    y = crossnorm(x, torch.tensor([2, 0, 1]))
    assert y.dtype == x.dtype
    assert layout == "slice" or y.stride() == x.stride()
    half = crossnorm(x.bfloat16(), torch.tensor([2, 0, 1]))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), y, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("box", [None, torch.tensor([0, 0, 8, 8])], ids=["whole", "box on the device"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_where_a_channel_hardly_varies(dtype: torch.dtype, box: torch.Tensor | None) -> None:
    """Scale and shift are then large and cancel; rounded to half precision they gave values of 12 in place of 0."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 8, 8, generator=g)
    x[0, 0], x[1, 1] = 5, 5 + x[1, 1] / 100
    x = x.to(dtype)
    results = []
    for leaf in (x.clone().requires_grad_(), x.double().requires_grad_()):
        y = crossnorm(leaf, torch.tensor([1, 2, 3, 0]), content_box=box)
        y.double().square().sum().backward()
        results.append((y.detach().double(), leaf.grad.double()))  # type: ignore[union-attr]
    (y, grad), (wanted, wanted_grad) = results
    digits = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(y, wanted, rtol=digits, atol=digits)
    scale = wanted_grad.abs().amax((2, 3), keepdim=True).clamp(min=1)
    torch.testing.assert_close(grad / scale, wanted_grad / scale, rtol=0, atol=0.1)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("mean", [0.0, 3.0, 50.0, 3000.0])
def test_statistics_survive_a_mean_far_from_zero(mean: float, channels_last: bool):
    x = torch.randn(4, 8, 32, 32) + mean
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    expected = x.double().var((2, 3))
    found = {}

    def look(m: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, None]:
        found["var"] = v
        return torch.ones_like(m), None

    with torch.no_grad():
        modulated(x, look)
    torch.testing.assert_close(found["var"].double(), expected, rtol=2e-4, atol=0)


def test_a_constant_map_stays_finite():
    x = torch.full((3, 2, 4, 4), 7.0, requires_grad=True)
    y = crossnorm(x, torch.tensor([1, 2, 0]))
    y.sum().backward()
    torch.testing.assert_close(y, x)
    assert torch.isfinite(x.grad).all()


def test_one_position_takes_the_value_of_the_partner():
    x = torch.randn(3, 2, 1, 1)
    torch.testing.assert_close(crossnorm(x, torch.tensor([1, 2, 0])), x[[1, 2, 0]])


def test_detached_style_gets_no_gradient():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    cotangent = torch.zeros(2, 3, 4, 4)
    cotangent[0] = torch.randn(3, 4, 4)
    swap = torch.tensor([1, 0])
    (through,) = torch.autograd.grad(crossnorm(x, swap), x, cotangent)
    (cut,) = torch.autograd.grad(crossnorm(x, swap, detach=True), x, cotangent)
    assert through[1].abs().max() > 1e-3
    assert cut[1].abs().max() == 0
    torch.testing.assert_close(through[0], cut[0])


maps = st.tuples(
    st.integers(2, 5), st.integers(1, 6), st.integers(2, 7), st.integers(2, 7), st.integers(0, 99)
)


@given(maps)
@settings(max_examples=40, deadline=None)
def test_statistics_are_exchanged(sizes: tuple[int, ...]):
    *shape, seed = sizes
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, dtype=torch.float64, generator=generator) * 2 + 1
    order = torch.randperm(shape[0], generator=generator)
    mean, var = instance_moments(crossnorm(x, order, eps=0.0))
    torch.testing.assert_close(mean, instance_moments(x)[0][order], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(var, instance_moments(x)[1][order], rtol=1e-7, atol=1e-9)


@given(maps)
@settings(max_examples=25, deadline=None)
def test_reordering_the_batch_reorders_the_output(sizes: tuple[int, ...]):
    *shape, seed = sizes
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    partner, order = (torch.randperm(shape[0], generator=generator) for _ in range(2))
    # Instance order[i] comes to place i; its partner is now where that one went.
    inverse = order.argsort()
    torch.testing.assert_close(
        crossnorm(x[order], inverse[partner[order]]), crossnorm(x, partner)[order], rtol=1e-9, atol=1e-9
    )


@given(maps)
@settings(max_examples=25, deadline=None)
def test_a_lam_of_one_changes_nothing(sizes: tuple[int, ...]):
    *shape, seed = sizes
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(crossnorm(x, torch.arange(shape[0]).flip(0), lam=1.0), x)


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.1, 5), st.floats(0, 0.9), st.integers(0, 999))
@settings(max_examples=80, deadline=None)
def test_a_box_lies_in_the_map_and_is_large_enough(height, width, beta, threshold, seed):
    torch.manual_seed(seed)
    top, left, bottom, right = draw_box(height, width, beta=beta, threshold=threshold).tolist()
    assert 0 <= top < bottom <= height
    assert 0 <= left < right <= width
    area = (bottom - top) * (right - left)
    whole = area == height * width
    assert whole or (area > threshold * height * width and area >= 2)


def test_boxes_follow_the_share():
    # 8×8 and Beta(1, 1): the authors' code has a mean area share of .31 among accepted boxes.
    boxes = torch.stack([draw_box(8, 8) for _ in range(3000)])
    share = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 64).mean()
    assert share.item() == pytest.approx(0.31, abs=0.02)
