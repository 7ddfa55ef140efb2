"""Layouts, stages and pooled maps of published architectures, on the meta device, against the table."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from fxgraft.graph.structure.head import pooled_map
from fxgraft.graph.structure.layout import layout_of
from fxgraft.graph.structure.positions import spots
from fxgraft.graph.structure.stages import stages
from fxgraft.graph.tracing.model_trace import ModelTrace
from zoo.layouts import PLACES, Places

FAST = {"mobilevitv2_050", "vit_tiny_patch16_224", "tv:mnasnet0_5", "tv:squeezenet1_1", "levit_128s"}
AUXILIARY = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
}


def build(name: str) -> nn.Module:
    with torch.device("meta"):
        if not name.startswith("tv:"):
            return timm.create_model(name)
        return getattr(torchvision.models, name[3:])(**AUXILIARY.get(name[3:], {}))


def spread(lines: tuple[str, ...]) -> Iterator[str]:
    """Write out the stages of each number."""
    for line in lines:
        numbers = re.match(r"(\S*?)(\d+)-(\d+)(\S* .*)", line)
        if numbers is None:
            yield line
        else:
            start, first, last, end = numbers.groups()
            yield from (f"{start}{number}{end}" for number in range(int(first), int(last) + 1))


def cases() -> list[object]:
    return [
        pytest.param(
            each,
            id=each.name,
            marks=[
                *([] if each.name in FAST else [pytest.mark.sweep]),
                pytest.mark.skipif(
                    ":" not in each.name and not timm.is_model(each.name), reason="timm has no such model"
                ),
            ],
        )
        for each in PLACES
    ]


@pytest.mark.parametrize("places", cases())
def test_layouts_stages_and_pooled_maps(places: Places) -> None:
    trace = ModelTrace(build(places.name))
    outputs = trace.observation.calls
    layouts = {
        path: str(layout_of(trace, outputs[path][0].output, path, strict=False) or "")
        for path in places.layouts
    }
    assert layouts == places.layouts
    found = stages(trace)
    assert [f"{each.name} {'x'.join(map(str, (each.shape or ())[1:]))} {each.layout}" for each in found] == [
        *spread(places.stages)
    ]
    pooled = pooled_map(trace)
    assert (None if pooled is None else f"{pooled.name} {pooled.layout}") == places.pooled


@pytest.mark.parametrize(
    "name",
    [
        "test_resnet",
        "test_efficientnet",
        pytest.param("test_vit", marks=pytest.mark.sweep),
        pytest.param("mobilevitv2_050", marks=pytest.mark.sweep),
        pytest.param("efficientvit_b0", marks=pytest.mark.sweep),
        pytest.param("tv:swin_t", marks=pytest.mark.sweep),
        pytest.param("tv:convnext_tiny", marks=pytest.mark.sweep),
    ],
)
def test_units_see_images_and_as_many_channels_at_every_size(name: str) -> None:
    """No unit's value has another batch than the images, and none takes places for channels."""
    seen = []
    for scale in (1, 2) if name != "test_vit" else (1,):
        trace = ModelTrace(build(name))
        channels, *size = trace.image_size
        trace = ModelTrace(trace.model, (channels, *(scale * n for n in size)))
        found = {}
        for spot in spots(trace):
            assert isinstance(spot.value, Tensor)
            assert spot.value.shape[0] == 2
            layout = layout_of(trace, spot.value, spot.path)
            assert layout is not None
            found[spot.name] = layout.canonical(spot.value).shape[1]
        seen.append(found)
    assert seen[0] == seen[-1]
