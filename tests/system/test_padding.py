"""Calls that give a model more than images: a mask of positions that are padding, coordinates, conditions."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

import fxgraft
from models.toys import CLASSES, LABELS, images

SIZE = (3, 8, 8)
ALONE = r"beside the images, and it knows the model as it runs on images alone(?s:.*)"


class Masked(nn.Module):
    """Averages the positions that are there, and takes a condition and a factor besides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.act, self.fc = nn.ReLU(), nn.Linear(8, CLASSES)

    def forward(
        self,
        x: Any,
        mask: Tensor | None = None,
        group: Tensor | None = None,
        scale: float = 1.0,
        y: Tensor | None = None,
    ) -> Tensor:
        if isinstance(x, dict):
            x, mask = x["image"], x.get("mask", mask)
        if isinstance(x, list):
            x = torch.cat(x)
        z = self.act(self.conv(self.act(self.stem(x))))
        kept = torch.ones_like(z[:, :1]) if mask is None else mask.unsqueeze(1)
        z = (z * kept).sum((2, 3)) / kept.sum((2, 3))
        return self.fc(z) * scale + (0.0 if group is None else group.unsqueeze(1))


def mask() -> Tensor:
    """Half of each image is padding."""
    found = torch.ones(4, 8, 8, dtype=torch.bool)
    found[:, :, 4:] = False
    return found


CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((images(), mask()), {}),
    ((images(),), {"mask": mask().long()}),
    ((), {"x": images(), "mask": mask().float()}),
    (({"image": images(), "mask": mask()},), {}),
]
WITH_POSITIONS: dict[str, dict[str, Any]] = {
    "rsc": {"layer": "conv"},
    "crossnorm": {"p": 1.0, "layers": "conv"},
    "selfnorm": {"layers": "conv"},
    "mixmo": {},
}


@pytest.mark.parametrize("method", WITH_POSITIONS)
@pytest.mark.parametrize("call", CALLS, ids=range(len(CALLS)))
def test_padding_is_no_position(method: str, call: tuple[Any, ...]) -> None:
    model = fxgraft.patch(Masked(), method, input_size=SIZE, **WITH_POSITIONS[method])
    args, kwargs = call
    error, message = fxgraft.BypassError, rf"was given 'mask' {ALONE}"
    if method == "mixmo" and args and isinstance(args[0], dict):
        error, message = fxgraft.ConfigError, "was given a dict of images"
    with pytest.raises(error, match=message), fxgraft.targets(LABELS):
        model(*args, **kwargs)
    with fxgraft.targets(LABELS):
        model(images())


def test_padding_is_no_position_in_evaluation_where_a_method_acts_there() -> None:
    model = fxgraft.patch(Masked(), "selfnorm", layers="conv", input_size=SIZE).eval()
    with pytest.raises(fxgraft.BypassError, match=rf"'selfnorm' was given 'mask' {ALONE}"):
        model(images(), mask())
    for method in ("rsc", "crossnorm"):
        model = fxgraft.patch(Masked(), method, input_size=SIZE, **WITH_POSITIONS[method]).eval()
        assert torch.equal(model(images(), mask()), Masked()(images(), mask()))


def test_discriminators_are_shown_no_padding() -> None:
    model = fxgraft.patch(Masked(), "gam", layers=["stem", "conv"], matching=None, input_size=SIZE)
    batch = {"image": images(), "mask": mask()}
    with pytest.raises(fxgraft.FxgraftError, match="mask"):
        fxgraft.gam.gam_losses(model, batch, batch)


def test_values_are_recorded_whatever_a_call_brings() -> None:
    model = fxgraft.patch(Masked(), "taps", layers="conv", input_size=SIZE)
    assert torch.equal(model(images(), mask()), Masked()(images(), mask()))


@pytest.mark.parametrize("given", [{"group": torch.arange(4)}, {"scale": 2.0}])
def test_what_follows_is_looked_at_without_conditions(given: dict[str, Any]) -> None:
    """A condition has no positions, so that statistics of them are right; but it changes the logits."""
    model = fxgraft.patch(Masked(), "crossnorm", p=1.0, layers="conv", input_size=SIZE)
    model(images(), **given)
    model = fxgraft.patch(Masked(), "rsc", layer="conv", input_size=SIZE)
    with pytest.raises(fxgraft.BypassError, match=rf"'rsc' was given '{next(iter(given))}' {ALONE}"):
        model(images(), target=LABELS, **given)


IMAGES_ALONE: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((images(), None), {"scale": 1.0}),
    ((), {"y": LABELS, "x": images()}),
    (([images()[:2], images()[2:]],), {}),
    (({"image": images()},), {}),
]


@pytest.mark.parametrize(
    ("method", "args", "kwargs"),
    # Mixtures are made of one tensor.
    [(method, *call) for method in WITH_POSITIONS for call in IMAGES_ALONE[: 2 if method == "mixmo" else 4]],
)
def test_defaults_crops_and_labels_are_nothing_else(
    method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    model = fxgraft.patch(Masked(), method, input_size=SIZE, **WITH_POSITIONS[method])
    with fxgraft.targets(LABELS):
        out = model(*args, **kwargs)
    fxgraft.loss(model, out, LABELS).backward()


@pytest.mark.parametrize("name", ["return_dict", "output_hidden_states"])
def test_what_is_returned_beside_the_logits_is_the_callers_to_say(name: str) -> None:
    config = ResNetConfig(num_labels=CLASSES, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    model = fxgraft.patch(ResNetForImageClassification(config), "rsc", input_size=SIZE).eval()
    assert torch.equal(model(images(), **{name: True}).logits, model(images()).logits)
    out = model.train()(images(), target=LABELS, **{name: True})
    fxgraft.loss(model, out, LABELS).backward()
    assert (out.hidden_states is not None) == (name == "output_hidden_states")


def naflex() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = timm.create_model(
        "naflexvit_base_patch16_gap", patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=CLASSES
    )
    there = torch.arange(16) < torch.tensor([16, 12, 8, 4]).unsqueeze(1)
    grid = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1).reshape(1, 16, 2)
    patches = torch.randn(4, 16, 192) * there.unsqueeze(-1)
    return model, {
        "patches": patches,
        "patch_coord": grid * there.unsqueeze(-1),
        "patch_valid": there,
    }


@pytest.mark.parametrize(
    ("method", "options"), [("rsc", {}), ("rsc", {"layer": "blocks.1"}), ("selfnorm", {"layers": "blocks.1"})]
)
def test_padded_patches_of_timm(method: str, options: dict[str, Any]) -> None:
    model, batch = naflex()
    fxgraft.patch(model, method, input_size=(3, 32, 32), **options)
    model(torch.randn(4, 3, 32, 32), target=LABELS)
    for call in (lambda: model(batch, target=LABELS), lambda: model(**_named(batch), target=LABELS)):
        with pytest.raises(fxgraft.BypassError, match=r"patch_(coord|valid)|attn_mask"):
            call()


def _named(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"x": batch["patches"], **{name: each for name, each in batch.items() if name != "patches"}}
