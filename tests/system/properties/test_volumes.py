"""Clips and volumes: a map seen as a volume of depth one gives the same numbers, and every method acts on clips."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import fxgraft
from fxgraft.extend import Layout
from fxgraft.patches.crossnorm.tensors import crossnorm, draw_box
from fxgraft.patches.diversification.tensors import draw, suppression_mask
from fxgraft.patches.gam.tensors import channel_moments
from fxgraft.patches.mixmo.masks import MIXINGS, draw_masks
from fxgraft.patches.mixmo.tensors import dirichlet
from fxgraft.patches.rsc.tensors import feature_mask, saliency
from fxgraft.patches.selfnorm import Gate, selfnorm
from models.toys import CLASSES, LABELS, images, net
from models.volumes import as_volumes, clips, video_net
from system.properties.profiles import profiles

SIZES = st.tuples(st.integers(2, 9), st.integers(2, 9))

METHODS: dict[str, dict[str, Any]] = {
    "rsc": {"layer": "stage1"},  # ahead of the closed form
    "crossnorm": {"p": 1.0, "active": None},
    "crossnorm, both": {"p": 1.0, "active": None, "crop": "both", "mode": "both"},
    "selfnorm": {"gates": 2, "init": "authors"},
    "diversification": {"patch": 2},
    "gam": {"layers": "stage1"},
    "mixstyle": {"p": 1.0, "layers": "stage1"},
    "dsu": {"p": 1.0, "layers": "stage1"},
    "taps": {"layers": "stage1"},
    **{f"mixmo, {mixing}": {"mixing": mixing, "p": 1.0} for mixing in ("cut", "tube", "cow", "linear")},
}


def seeded(function: Any, *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(3)
    return function(*args, **kwargs)


@profiles(20, 400, SIZES, st.sampled_from(MIXINGS), st.integers(2, 3))
def test_masks_of_depth_one(size: tuple[int, int], mixing: Any, members: int) -> None:
    kappa = dirichlet(2.0, 3, members)
    masks, shares = seeded(draw_masks, mixing, kappa, 4, *size)
    deep, same = seeded(draw_masks, mixing, kappa, 4, 1, *size)
    assert torch.equal(deep.squeeze(3), masks)
    assert torch.equal(same, shares)


@profiles(20, 400, SIZES, st.floats(0.5, 2.0), st.floats(0.0, 0.4))
def test_boxes_of_depth_one(size: tuple[int, int], beta: float, threshold: float) -> None:
    top, left, bottom, right = seeded(draw_box, *size, beta=beta, threshold=threshold)
    assert seeded(draw_box, 1, *size, beta=beta, threshold=threshold).tolist() == [
        0,
        top,
        left,
        1,
        bottom,
        right,
    ]


@profiles(
    20, 400, SIZES, st.integers(1, 2), st.sampled_from(["skip", "partial"]), st.sampled_from(["first", "all"])
)
def test_patches_of_depth_one(size: tuple[int, int], patch: int, border: Any, ties: Any) -> None:
    maps = torch.randn(2, 3, *size)
    masks = []
    for value, sides in ((maps, patch), (maps.unsqueeze(2), (1, patch, patch))):
        drawn = seeded(draw, value, patch=sides, border=border, ties=ties)
        masks.append(suppression_mask(value, drawn, patch=sides, ties=ties))
    assert torch.equal(masks[1].squeeze(2), masks[0])


@profiles(10, 200, SIZES, st.sampled_from([torch.float32, torch.float64]))
def test_arithmetic_of_depth_one(size: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(3, 4, *size, dtype=dtype)
    order, box = torch.tensor([1, 2, 0]), (0, 1, *size)
    for options in ({}, {"style_box": box}, {"content_box": box}, {"content_box": torch.tensor(box)}):
        deep = {
            key: type(own)([0, *own[:2], 1, *own[2:]])
            if isinstance(own, tuple)
            else torch.tensor([0, *own[:2], 1, *own[2:]])
            for key, own in options.items()
        }
        flat = crossnorm(x, order, **options)
        torch.testing.assert_close(crossnorm(x.unsqueeze(2), order, **deep).squeeze(2), flat)
    gate = Gate(4, "authors").to(dtype).eval()
    torch.testing.assert_close(selfnorm(x.unsqueeze(2), gate).squeeze(2), selfnorm(x, gate))
    assert torch.equal(torch.stack(channel_moments(x.unsqueeze(2))), torch.stack(channel_moments(x)))
    gradient = torch.randn_like(x)
    for scope in ("spatial", "channel"):
        scores = saliency(x, gradient, scope), saliency(x.unsqueeze(2), gradient.unsqueeze(2), scope)
        torch.testing.assert_close(scores[1].reshape(scores[0].shape), scores[0])
        masks = (
            feature_mask(scores[0], x, scope, 1 / 3),
            feature_mask(scores[0].reshape_as(scores[1]), x.unsqueeze(2), scope, 1 / 3),
        )
        assert torch.equal(masks[1].squeeze(2), masks[0])


@pytest.mark.parametrize("method", METHODS)
def test_a_network_of_depth_one(method: str) -> None:
    flat = net()
    flat.drop.p = 0.0
    deep, options = as_volumes(flat), METHODS[method]
    found = []
    for model, x, own in (
        (flat, images(size=12), options),
        (deep, images(size=12).unsqueeze(2), depth_one(options)),
    ):
        seeded(fxgraft.patch, model, method.partition(",")[0], input_size=tuple(x.shape[1:]), **own)
        out = seeded(model.train(), x, target=LABELS)
        loss = fxgraft.loss(model, out, LABELS)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append((out, loss, *gradients, model.eval()(x)))
    assert len(found[0]) == len(found[1])
    for mine, own in zip(*found, strict=True):
        torch.testing.assert_close(mine, own.reshape(mine.shape), rtol=1e-4, atol=1e-5)


def depth_one(options: dict[str, Any]) -> dict[str, Any]:
    return {key: (1, own, own) if key == "patch" else own for key, own in options.items()}


@pytest.mark.parametrize("method", METHODS)
def test_methods_on_clips(method: str) -> None:
    """A training step with finite gradients, evaluation and removal to the bit."""
    model = video_net().eval()
    x = clips()
    expected, before = model(x), copy.deepcopy(model.state_dict())
    options = {
        **METHODS[method],
        **({"layers": "layer1", "layer": None} if "layer" in str(METHODS[method]) else {}),
    }
    if method.startswith("crossnorm") or method == "selfnorm":
        options["layers"] = ["norm", "layer1"]
    fxgraft.patch(model, method.partition(",")[0], input_size=tuple(x.shape[1:]), **options)
    if not method.startswith("selfnorm"):
        assert torch.equal(model(x), expected)
    out = model.train()(x, target=LABELS)
    fxgraft.loss(model, out, LABELS).backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(each is not None and bool(each.isfinite().all()) for each in gradients)
    fxgraft.unpatch(model)
    model.load_state_dict(before)
    assert torch.equal(model.eval()(x), expected)


def test_the_memory_order_of_volumes_stays() -> None:
    x = clips().to(memory_format=torch.channels_last_3d)
    gate = Gate(3).eval()
    for out in (selfnorm(x, gate), crossnorm(x, torch.tensor([1, 0, 3, 2]))):
        assert out.is_contiguous(memory_format=torch.channels_last_3d)
        assert not out.is_contiguous()


@pytest.mark.parametrize(("name", "shape"), [("NCDHW", (2, 4, 3, 5, 6)), ("NDHWC", (2, 3, 5, 6, 4))])
def test_layouts_of_volumes(name: Any, shape: tuple[int, ...]) -> None:
    x, layout = torch.randn(shape), Layout(name)
    canonical = layout.canonical(x)
    assert canonical.shape == (2, 4, 3, 5, 6)
    assert torch.equal(layout.restore(x, canonical), x)
    mask = torch.rand(2, 1, 3, 5, 6)
    assert torch.equal(layout.canonical(layout.multiply(x, mask)), canonical * mask)


def test_a_tube_is_the_same_in_every_frame_and_a_cuboid_is_not() -> None:
    kappa = torch.full((64, 2), 0.5)
    tube, _ = draw_masks("tube", kappa, 1, 8, 8, 8)
    cuboid, _ = draw_masks("cut", kappa, 1, 8, 8, 8)
    assert tube.shape == (2, 64, 1, 1, 8, 8)
    frames = cuboid[0, :, 0].flatten(2).amax(2)
    assert set(frames.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (
            {"patch": 5},
            fxgraft.ConfigError,
            r"(?s)5×5×5 cells are larger than the class maps of 4×6×6.*patch=\(4, 5, 5\)",
        ),
        (
            {"input_size": (3, 2, 12, 12)},
            fxgraft.ConfigError,
            r"(?s)3×3×3 cells are larger than the class maps of 2×6×6.*patch=\(2, 3, 3\), or longer or larger clips",
        ),
        ({"patch": (2, 2)}, fxgraft.ConfigError, r"has 2 sides, and the class maps have 3 dimensions, 4×6×6"),
        ({"patch": (2, 0, 2)}, fxgraft.ConfigError, "patch must be a whole number of cells above 0"),
        (
            {"input_size": (3, 12, 12)},
            fxgraft.StructureError,
            r"takes clips or volumes.*\n.*input_size=\(C, T, H, W\)",
        ),
    ],
)
def test_what_does_not_fit_clips(options: dict[str, Any], error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        fxgraft.patch(video_net(), "diversification", **{"input_size": (3, 4, 12, 12), **options})


def test_an_image_network_is_given_a_clip() -> None:
    with pytest.raises(
        fxgraft.StructureError, match=r"takes images, and not clips.*\nPass input_size=\(C, H, W\)"
    ):
        fxgraft.patch(net(), "rsc", input_size=(3, 4, 12, 12))


def test_a_clip_shorter_than_the_patches_comes_in_training() -> None:
    model = fxgraft.patch(video_net(), "diversification", input_size=(3, 4, 12, 12))
    with pytest.raises(fxgraft.ConfigError, match="3×3×3 cells are larger than the class maps of 2×6×6"):
        model.train()(clips(frames=2))
    assert model.eval()(clips(frames=2)).shape == (4, CLASSES)


@pytest.mark.parametrize(
    ("build", "layer", "layout", "size", "shape"),
    [
        (video_net, "layer1", "NCHW", (3, 4, 12, 12), r"\(2, 16, 4, 6, 6\)"),
        (video_net, "layer1", "NLC", (3, 4, 12, 12), r"\(2, 16, 4, 6, 6\)"),
        (net, "stage1", "NDHWC", (3, 12, 12), r"\(2, 8, 12, 12\)"),
        (net, "stage1", "NCDHW", (3, 12, 12), r"\(2, 8, 12, 12\)"),
    ],
)
@pytest.mark.parametrize("method", ["rsc", "crossnorm", "selfnorm"])
def test_a_layout_of_another_number_of_dimensions(
    method: str, build: Any, layer: str, layout: str, size: tuple[int, ...], shape: str
) -> None:
    with pytest.raises(fxgraft.SiteError, match=rf"said to be {layout}, but its shape is {shape}"):
        fxgraft.patch(build(), method, layers=layer, layout=layout, input_size=size)


class FixedLength(type(video_net())):  # type: ignore[misc]
    """Takes clips of four frames alone."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.fc((x * torch.arange(1, 5).view(1, 1, 4, 1, 1)).mean((2, 3, 4)).repeat(1, 2))


def test_a_length_that_the_network_refuses() -> None:
    with pytest.raises(
        fxgraft.StructureError, match=r"(?s)does not run on a batch.*Pass input_size=\(C, T, H, W\) of"
    ):
        fxgraft.patch(FixedLength(), "rsc", layer="norm")
    fxgraft.patch(FixedLength(), "rsc", layer="norm", input_size=(3, 4, 12, 12))
