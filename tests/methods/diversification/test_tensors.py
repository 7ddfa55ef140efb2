"""The diversification block as tensor functions: against the reference numbers, and by its properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxgraft.errors import ConfigError
from fxgraft.patches.diversification.tensors import (
    Draws,
    damp,
    draw,
    patch_grid,
    peak_mask,
    spread_patches,
    suppression_mask,
)
from golden_data import GoldenCase, load_golden

CASES = [pytest.param(case, id=str(case)) for case in load_golden("diversification")]
SIZES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(3, 9), st.integers(3, 9))
PATCHES = st.integers(1, 3)
BORDERS = st.sampled_from(["skip", "partial"])
SHARES = st.sampled_from([0.0, 0.3, 0.5, 1.0])


def random_maps(size: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def damped(maps: torch.Tensor) -> torch.Tensor:
    mask = suppression_mask(maps, draw(maps, generator=torch.Generator().manual_seed(0)))
    return damp(maps, mask).mean((2, 3))


class TestReference:
    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_masks_outputs_and_gradients_are_those_of_the_reference(self, case: GoldenCase, dtype):
        inputs = case.inputs_as(dtype)
        maps = inputs["act"].requires_grad_()
        before = maps.detach().clone()
        draws = Draws(case.draws["rc"], case.draws["p_patch"])
        mask = suppression_mask(maps, draws, patch=case.settings["patch"], ties="all")
        out = damp(maps, mask, case.settings["alpha"])
        out.backward(inputs["cot"])
        assert torch.equal(peak_mask(maps, "all").byte(), case.outputs["peak_mask"])
        assert torch.equal(mask.byte(), case.outputs["suppress"])
        close = {"atol": 1e-7, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 1e-14, "rtol": 1e-14}
        torch.testing.assert_close(out, _as(case, "y", dtype), **close)
        torch.testing.assert_close(maps.grad, _as(case, "grad_act", dtype), **close)
        torch.testing.assert_close(out.mean((2, 3)), _as(case, "logits_gap", dtype), atol=3e-7, rtol=1e-6)
        assert torch.equal(maps.detach(), before)

    @pytest.mark.parametrize("case", CASES)
    def test_peaks_and_patches_are_told_apart_as_in_the_reference(self, case: GoldenCase):
        maps = case.inputs_as(torch.float64)["act"]
        patch = case.settings["patch"]
        peaks = suppression_mask(maps, Draws(case.draws["rc"], None), patch=patch, ties="all")
        patches = suppression_mask(maps, Draws(None, case.draws["p_patch"]), patch=patch, ties="all")
        assert torch.equal(peaks.byte(), case.outputs["peak_suppress"])
        assert torch.equal(patches.byte(), case.outputs["patch_suppress"])

    def test_one_peak_is_the_reference_wherever_no_two_entries_tie(self):
        for case in load_golden("diversification"):
            maps = case.inputs_as(torch.float64)["act"]
            draws = Draws(case.draws["rc"], case.draws["p_patch"])
            mask = suppression_mask(maps, draws, patch=case.settings["patch"])
            tied = case.outputs["peak_mask"].flatten(2).sum(2) > 1
            assert torch.equal(mask.byte()[~tied], case.outputs["suppress"][~tied])
            assert case.name == "div_tie" or not tied.any()


def _as(case: GoldenCase, name: str, dtype: torch.dtype) -> torch.Tensor:
    return case.expected(name, dtype).to(dtype)


class TestMask:
    @given(SIZES, PATCHES, BORDERS, st.integers(0, 2**16))
    def test_the_peak_is_never_in_the_patch_mask(self, size, patch, border, seed):
        maps = random_maps(size, seed)
        draws = draw(maps, p_peak=0.0, p_patch=1.0, patch=patch, border=border)
        mask = suppression_mask(maps, draws, patch=patch)
        best = maps.flatten(2).argmax(2, keepdim=True)
        assert not mask.flatten(2).gather(2, best).any()
        rows, columns = patch_grid(size[2:], patch, border)
        covered = min(rows * patch, size[2]) * min(columns * patch, size[3])
        inside = spread_patches(torch.ones(*size[:2], rows, columns, dtype=torch.bool), size[2:], patch)
        assert int(inside[0, 0].sum()) == covered
        assert torch.equal(mask, inside & (maps < maps.amax((2, 3), keepdim=True)))

    @given(SIZES, st.integers(0, 2**16))
    def test_every_peak_drawn_is_one_entry(self, size, seed):
        maps = random_maps(size, seed)
        mask = suppression_mask(maps, draw(maps, p_peak=1.0, p_patch=0.0, patch=1), patch=1)
        assert torch.equal(mask.sum((2, 3)), torch.ones(size[:2], dtype=torch.long))
        assert torch.equal(maps[mask].view(size[:2]), maps.amax((2, 3)))

    def test_of_tied_entries_the_first_is_the_peak(self):
        maps = torch.zeros(1, 2, 3, 3)
        maps[0, 1, 1, 2] = maps[0, 1, 2, 0] = 1.0
        first = peak_mask(maps)
        assert first.sum().item() == 2
        assert first[0, 0, 0, 0]
        assert first[0, 1, 1, 2]
        assert peak_mask(maps, "all").sum().item() == 9 + 2

    def test_partial_patches_reach_the_border_and_skipped_ones_do_not(self):
        maps = -torch.arange(49.0).view(1, 1, 7, 7)
        damped = {
            border: suppression_mask(maps, draw(maps, p_peak=0.0, p_patch=1.0, border=border))
            for border in ("skip", "partial")
        }
        assert damped["skip"].sum().item() == 36 - 1
        assert not damped["skip"][..., 6].any()
        assert damped["partial"].sum().item() == 49 - 1

    def test_shares_are_the_expected_ones(self):
        maps = random_maps((40, 50, 7, 7), 0)
        draws = draw(maps, generator=torch.Generator().manual_seed(3))
        mask = suppression_mask(maps, draws)
        peaks = peak_mask(maps)
        assert mask[peaks].double().mean().item() == pytest.approx(0.5, abs=0.04)
        inside = torch.zeros(7, 7, dtype=torch.bool)
        inside[:6, :6] = True
        assert mask[(~peaks) & inside].double().mean().item() == pytest.approx(0.5, abs=0.02)
        assert not mask[(~peaks) & ~inside].any()

    def test_a_patch_is_damped_as_a_whole(self):
        maps = random_maps((3, 4, 6, 6), 1)
        draws = draw(maps, p_peak=0.0, patch=3, generator=torch.Generator().manual_seed(0))
        mask = suppression_mask(maps, draws, patch=3) | peak_mask(maps)
        cells = mask.unflatten(2, (2, 3)).unflatten(4, (2, 3)).sum((3, 5))
        assert set(cells.flatten().tolist()) == {0, 1, 9}
        assert torch.equal(cells == 9, draws.patch)


class TestDamping:
    @given(SIZES, st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.integers(0, 2**16))
    def test_gradient_is_alpha_where_damped_and_one_elsewhere(self, size, alpha, seed):
        maps = random_maps(size, seed).requires_grad_()
        with torch.no_grad():
            mask = suppression_mask(maps, draw(maps, patch=2), patch=2)
        (gradient,) = torch.autograd.grad(damp(maps, mask, alpha).sum(), maps)
        assert torch.equal(gradient, torch.ones_like(maps.detach()).masked_fill(mask, alpha))

    @given(SIZES, SHARES, SHARES, PATCHES, BORDERS, st.integers(0, 2**16))
    def test_the_average_of_damped_maps_lacks_a_share_of_the_masked(
        self, size, p_peak, p_patch, patch, border, seed
    ):
        maps = random_maps(size, seed)
        before = maps.clone()
        generator = torch.Generator().manual_seed(seed)
        draws = draw(maps, p_peak=p_peak, p_patch=p_patch, patch=patch, border=border, generator=generator)
        mask = suppression_mask(maps, draws, patch=patch)
        expected = maps.mean((2, 3)) - 0.7 * (maps * mask).mean((2, 3))
        torch.testing.assert_close(damp(maps, mask, 0.3).mean((2, 3)), expected)
        assert torch.equal(maps, before)

    def test_each_kind_is_drawn_in_one_call(self, monkeypatch):
        calls = []
        original = torch.rand
        monkeypatch.setattr(torch, "rand", lambda *a, **k: calls.append(a) or original(*a, **k))
        draw(torch.zeros(2, 3, 7, 7))
        assert calls == [((2, 3),), ((2, 3, 2, 2),)]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_stays(self, dtype):
        maps = random_maps((2, 3, 6, 6), 0, torch.float32).to(dtype)
        assert damped(maps).dtype == dtype

    def test_channels_last_gives_the_same(self):
        maps = random_maps((2, 3, 6, 6), 0)
        results = [damped(each) for each in (maps, maps.contiguous(memory_format=torch.channels_last))]
        torch.testing.assert_close(*results, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("height", "width", "patch", "border", "expected"),
    [
        (7, 7, 3, "skip", (2, 2)),
        (7, 7, 3, "partial", (3, 3)),
        (8, 11, 3, "skip", (2, 3)),
        (3, 3, 3, "skip", (1, 1)),
    ],
)
def test_patch_grid(height, width, patch, border, expected):
    assert patch_grid((height, width), patch, border) == expected


@pytest.mark.parametrize(("size", "patch"), [((2, 7), 3), ((7, 2), 3), ((1, 1), 2)])
def test_a_patch_larger_than_the_map_is_refused(size, patch):
    with pytest.raises(ConfigError, match=r"larger than the class maps[\s\S]*Use patch="):
        draw(torch.zeros(1, 1, *size), patch=patch)


def test_a_patch_without_cells_is_refused():
    with pytest.raises(ConfigError, match="at least one cell"):
        patch_grid((7, 7), 0)
