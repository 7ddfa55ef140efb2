"""Mixing masks: what every one must satisfy, the laws they are drawn from, and how."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxgraft.errors import ConfigError
from fxgraft.patches.mixmo.masks import (
    MIXINGS,
    Mixing,
    box_mask,
    draw_centres,
    draw_masks,
    noise_mask,
    patch_rate,
    patch_size,
    share_out,
    shuffle_roles,
)
from fxgraft.patches.mixmo.tensors import dirichlet, mix

BINARY = ("cut", "cow", "patchup_hard", "horizontal", "vertical", "channel", "stack_channel")
SHAPES = {
    "linear": (1, 1, 1),
    "sum": (1, 1, 1),
    "channel": (5, 1, 1),
    "stack_channel": (5, 1, 1),
    "horizontal": (1, 6, 1),
    "vertical": (1, 1, 7),
}

mixings = st.sampled_from(MIXINGS)
sizes = st.tuples(st.integers(1, 6), st.integers(1, 12), st.integers(1, 12))


def two(share: float, batch: int) -> Tensor:
    return torch.tensor([share, 1 - share]).expand(batch, 2)


@given(mixings, st.integers(1, 4), st.integers(1, 5), sizes, st.floats(0.2, 20), st.integers(0, 999))
@settings(max_examples=150, deadline=None)
def test_masks_sum_to_one_and_shares_are_their_means(mixing, members, batch, size, alpha, seed):
    torch.manual_seed(seed)
    kappa = dirichlet(alpha, batch, members).double()
    masks, shares = draw_masks(mixing, kappa, *size)
    assert masks.dtype == shares.dtype == torch.float64
    whole = masks.expand(members, batch, *size)
    torch.testing.assert_close(whole.sum(0), torch.ones(batch, *size).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(shares, whole.mean((2, 3, 4)).t(), rtol=0, atol=1e-6)
    assert masks.min() >= 0
    assert masks.max() <= 1


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("members", [2, 3])
def test_shapes_are_no_larger_than_they_must_be(mixing: Mixing, members: int):
    masks, shares = draw_masks(mixing, dirichlet(2.0, 4, members), 5, 6, 7)
    assert masks.shape == (members, 4, *SHAPES.get(mixing, (1, 6, 7)))
    assert shares.shape == (4, members)


@pytest.mark.parametrize("mixing", BINARY)
def test_two_members_divide_the_map(mixing: Mixing):
    masks, _ = draw_masks(mixing, dirichlet(2.0, 64, 2), 16, 16, 16)
    assert set(masks.unique().tolist()) == {0, 1}


@pytest.mark.parametrize("mixing", [*BINARY, "patchup_soft", "noise"])
def test_more_members_share_the_rest_in_proportion(mixing: Mixing):
    kappa = dirichlet(2.0, 32, 4)
    masks, _ = draw_masks(mixing, kappa, 8, 12, 12)
    rest = (kappa[:, 1:] / kappa[:, 1:].sum(1, keepdim=True)).t()[..., None, None, None]
    torch.testing.assert_close(masks[1:], (1 - masks[0]) * rest)
    assert masks[0].std() > 0


@pytest.mark.parametrize("mixing", MIXINGS)
def test_a_single_member_has_everything(mixing: Mixing):
    masks, shares = draw_masks(mixing, torch.ones(3, 1), 4, 8, 8)
    assert masks.eq(1).all()
    assert shares.eq(1).all()


def test_linear_masks_are_kappa_and_sums_are_equal():
    kappa = dirichlet(2.0, 5, 3)
    masks, shares = draw_masks("linear", kappa, 4, 8, 8)
    assert torch.equal(masks[..., 0, 0, 0].t(), kappa)
    assert torch.equal(shares, kappa)
    masks, shares = draw_masks("sum", kappa, 4, 8, 8)
    assert masks.eq(1 / 3).all()
    assert shares.eq(1 / 3).all()


# The authors' code, many draws at these ratios: what their boxes really cover.
@pytest.mark.parametrize(
    ("size", "share", "covered"),
    [
        (32, 0.1, 0.082),
        (32, 0.25, 0.19),
        (32, 0.5, 0.32),
        (32, 0.75, 0.42),
        (32, 0.9, 0.51),
        (8, 0.5, 0.19),
        (8, 0.9, 0.37),
    ],
)
def test_boxes_cover_what_the_authors_do(size: int, share: float, covered: float):
    _, shares = draw_masks("cut", two(share, 4000), 1, size, size)
    assert shares[:, 0].mean().item() == pytest.approx(covered, abs=0.01)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_a_box_is_a_box(height: int, width: int, seed: int):
    torch.manual_seed(seed)
    share = torch.rand(8)
    masks = box_mask(share, draw_centres(8, height, width), height, width)[:, 0]
    rows, columns = masks.amax(2), masks.amax(1)
    assert torch.equal(masks, rows.unsqueeze(2) * columns.unsqueeze(1))
    for line in (*rows, *columns):
        assert (line.diff() != 0).sum() <= 2
        assert not ((line[0] == 1) & (line[-1] == 1) & (line == 0).any())
    assert (masks.mean((1, 2)) <= share + 1e-6).all()


def test_centres_are_uniform():
    rows, columns = draw_centres(4000, 4, 5).unbind(1)
    assert torch.bincount(rows, minlength=4).div(1000).tolist() == pytest.approx([1] * 4, abs=0.12)
    assert torch.bincount(columns, minlength=5).div(800).tolist() == pytest.approx([1] * 5, abs=0.12)


@pytest.mark.parametrize(("mixing", "dim"), [("horizontal", 3), ("vertical", 4), ("stack_channel", 2)])
def test_bands_keep_their_share_at_either_end(mixing: Mixing, dim: int):
    masks, shares = draw_masks(mixing, two(0.35, 400), 16, 16, 16)
    assert shares[:, 0].eq(5 / 16).all()
    bands = masks[0].movedim(dim - 1, 1).flatten(1)
    ends = {tuple(band.tolist()) for band in bands}
    first = (1.0,) * 5 + (0.0,) * 11
    assert ends == {first, first[::-1]}
    assert bands[:, 0].mean().item() == pytest.approx(0.5, abs=0.1)


def test_channels_are_drawn_one_by_one():
    masks, shares = draw_masks("channel", two(0.3, 200), 64, 8, 8)
    assert shares[:, 0].mean().item() == pytest.approx(0.3, abs=0.02)
    assert masks[0, :, :, 0, 0].mean(0).std() < 0.06
    assert 0.04 < shares[:, 0].std().item() < 0.075  # binomial: √(0.3 · 0.7 / 64) = 0.057


def covered_by_patches(rate: float, height: int, width: int, block: int) -> float:
    """A cell stays free when none of the cells about it, as far as they exist, is a centre."""

    def reach(size: int) -> Tensor:
        places, half = torch.arange(size), block // 2
        return (places + half).clamp(max=size - 1) - (places - half).clamp(min=0) + 1

    return 1 - ((1 - rate) ** (reach(height).unsqueeze(1) * reach(width))).float().mean().item()


@pytest.mark.parametrize("share", [0.35, 0.9])
def test_patches_cover_what_their_rate_says(share: float):
    _, hard = draw_masks("patchup_hard", two(share, 3000), 4, 16, 16)
    expected = covered_by_patches(patch_rate(torch.tensor(share), 16, 16, block=7).item(), 16, 16, 7)
    assert hard[:, 0].mean().item() == pytest.approx(expected, abs=0.02)
    _, soft = draw_masks("patchup_soft", two(share, 3000), 4, 16, 16)
    assert soft[:, 0].mean().item() == pytest.approx(expected + (1 - expected) * share, abs=0.02)


@pytest.mark.parametrize(("height", "width", "release"), [(16, 32, 0.47), (32, 16, 0.66)])
def test_patches_cover_as_much_of_a_turned_map(height: int, width: int, release: float):
    """The authors take the width for the height, so that what they cover depends on how the map lies."""
    half = torch.tensor(0.5)
    ours, theirs = (
        patch_rate(half, height, width, block=7).item(),
        patch_rate(half, width, width, block=7).item(),
    )
    assert ours == pytest.approx(0.5 * height * width / (49 * (height - 6) * (width - 6)))
    assert theirs == pytest.approx(0.5 * width**2 / (49 * (width - 6) ** 2))
    assert covered_by_patches(ours, height, width, 7) == pytest.approx(0.56, abs=0.005)
    assert covered_by_patches(theirs, height, width, 7) == pytest.approx(release, abs=0.005)
    _, drawn = draw_masks("patchup_hard", two(0.5, 2000), 4, height, width)
    assert drawn[:, 0].mean().item() == pytest.approx(0.56, abs=0.02)


def test_patches_cover_what_the_authors_do():
    """0.70 of a 32×32 map at a ratio of 0.9, and with soft masks 0.75 at 0.5, in their code."""
    _, hard = draw_masks("patchup_hard", two(0.9, 2000), 4, 32, 32)
    _, soft = draw_masks("patchup_soft", two(0.5, 2000), 4, 32, 32)
    assert hard[:, 0].mean().item() == pytest.approx(0.70, abs=0.02)
    assert soft[:, 0].mean().item() == pytest.approx(0.75, abs=0.02)


def test_soft_patches_mix_linearly_outside():
    masks, _ = draw_masks("patchup_soft", two(0.3, 64), 4, 16, 16)
    values = masks[0].unique()
    torch.testing.assert_close(values, torch.tensor([0.3, 1.0]))


@pytest.mark.parametrize(
    ("height", "width", "block"), [(1, 9, 1), (2, 9, 1), (4, 4, 3), (6, 8, 5), (7, 7, 7), (32, 9, 7)]
)
def test_patches_fit_small_maps(height: int, width: int, block: int):
    assert patch_size(height, width) == block
    assert 0 < patch_rate(torch.tensor(1.0), height, width, block=block) <= 1
    masks, _ = draw_masks("patchup_hard", two(0.5, 8), 4, height, width)
    assert masks.shape[-2:] == (height, width)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
def test_noise_lies_about_its_share(share: float):
    masks, shares = draw_masks("noise", two(share, 500), 4, 16, 16)
    assert shares[:, 0].mean().item() == pytest.approx(0.25 + share / 2, abs=0.005)
    assert (masks[0] < share).float().mean().item() == pytest.approx(0.5 if share else 0, abs=0.01)
    for low, high in ((0.0, share), (share, 1.0)):  # evenly on either side
        inside = masks[0][(masks[0] > low) & (masks[0] < high)]
        if len(inside):
            assert inside.mean().item() == pytest.approx((low + high) / 2, abs=0.005)
    given_noise = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).reshape(1, 1, 1, 5)
    expected = torch.tensor([0, share / 2, share, (1 + share) / 2, 1])
    torch.testing.assert_close(noise_mask(torch.tensor([share]), given_noise).flatten(), expected)


def test_blobs_ignore_kappa():
    _, few = draw_masks("cow", two(0.05, 300), 4, 32, 32)
    _, many = draw_masks("cow", two(0.95, 300), 4, 32, 32)
    for shares in (
        few,
        many,
    ):  # the authors' masks have a mean of about 0.48 and a proportion from 0.2 to 0.8
        assert shares[:, 0].mean().item() == pytest.approx(0.49, abs=0.04)
        assert 0.12 < shares[:, 0].std().item() < 0.25


def test_blobs_are_smooth():
    masks, _ = draw_masks("cow", two(0.5, 50), 4, 32, 32)
    changes = (masks[0].diff(dim=-1) != 0).float().mean()
    assert 0 < changes < 0.1  # independent cells would change at every other place


@pytest.mark.parametrize("mixing", [m for m in MIXINGS if m not in ("linear", "sum")])
def test_samples_are_drawn_apart_and_from_the_seed(mixing: Mixing):
    def draw() -> Tensor:
        torch.manual_seed(3)
        return draw_masks(mixing, two(0.5, 16), 16, 16, 16)[0]

    masks = draw()
    assert torch.equal(draw(), masks)
    assert len({tuple(mask.flatten().tolist()) for mask in masks[0]}) > 1


@pytest.mark.parametrize("mixing", ["linear", "sum"])
def test_nothing_is_drawn_that_is_not_needed(mixing: Mixing):
    before = torch.get_rng_state()
    draw_masks(mixing, two(0.5, 4), 4, 8, 8)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("members", [2, 3])
def test_nothing_is_read_on_the_host(mixing: Mixing, members: int):
    """The meta device has no values to read."""
    kappa = torch.empty(4, members, device="meta")
    masks, shares = draw_masks(mixing, kappa, 5, 6, 7)
    shuffled = shuffle_roles(masks, shares)
    assert all(each.is_meta for each in (masks, shares, *shuffled))


@pytest.mark.parametrize("kappa", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
@pytest.mark.parametrize("mixing", MIXINGS)
def test_a_member_may_have_all_or_nothing(mixing: Mixing, kappa: tuple[float, ...]):
    masks, shares = draw_masks(mixing, torch.tensor([kappa] * 8), 4, 9, 9)
    torch.testing.assert_close(masks.sum(0), torch.ones_like(masks[0]))
    torch.testing.assert_close(shares.sum(1), torch.ones(8))


def test_shares_of_given_masks():
    first = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 0]]).reshape(2, 1, 2, 2)
    kappa = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.1, 0.4]])
    masks, shares = share_out(first, kappa)
    torch.testing.assert_close(shares, torch.tensor([[0.5, 0.3, 0.2], [0.75, 0.05, 0.2]]))
    torch.testing.assert_close(masks[1, 0, 0], torch.tensor([[0, 0], [0.6, 0.6]]))


def test_roles_are_dealt_the_same_way_to_masks_and_shares():
    kappa = dirichlet(2.0, 4, 3)
    masks, shares = draw_masks("cut", kappa, 4, 8, 8)
    orders = set()
    for _ in range(60):
        dealt, dealt_shares = shuffle_roles(masks, shares)
        torch.testing.assert_close(dealt.mean((2, 3, 4)).t(), dealt_shares)
        orders.add(tuple(shares[0].tolist().index(s) for s in dealt_shares[0].tolist()))
    assert len(orders) == 6


@pytest.mark.parametrize("mixing", ["cut", "cow", "patchup_soft", "stack_channel", "noise"])
def test_drawing_and_mixing_compile_in_one_graph(mixing: Mixing):
    encodings = [torch.randn(4, 5, 8, 8) for _ in range(2)]

    def run(kappa: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        masks, shares = shuffle_roles(*draw_masks(mixing, kappa, 5, 8, 8))
        return mix(encodings, masks), masks, shares

    torch._dynamo.reset()
    mixed, masks, shares = torch.compile(run, fullgraph=True, backend="aot_eager")(dirichlet(2.0, 4, 2))
    torch.testing.assert_close(mixed, 2 * (masks[0] * encodings[0] + masks[1] * encodings[1]))
    torch.testing.assert_close(masks.mean((2, 3, 4)).t(), shares)


def test_an_unknown_mixing_says_which_there_are():
    with pytest.raises(ConfigError, match=r"no mixing 'cutmix'.*Close matches: 'cut'"):
        draw_masks("cutmix", two(0.5, 2), 4, 8, 8)  # type: ignore[arg-type]
