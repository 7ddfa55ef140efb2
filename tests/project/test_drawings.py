"""What the documentation draws: the places of methods in networks, and thumbnails."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
import torch
from tools.pictures import scheme, small
from tools.where import WIDTH, drawing, drawings, marks, network, rows

import fxgraft
from fxgraft.patches.pictures import Panel

RESNET, TRANSFORMER = "test_resnet", "test_vit"


def planned(model: str, method: str, **options) -> fxgraft.Plan:
    plan = fxgraft.patch(network(model), method, dry_run=True, **options)
    assert isinstance(plan, fxgraft.Plan)
    return plan


def drawn(model: str, method: str, **options) -> ElementTree.Element:
    html = drawing(model, planned(model, method, **options))
    return ElementTree.fromstring(html[: html.index("</svg>") + len("</svg>")])


def count(svg: ElementTree.Element, tag: str, kind: str | None = None) -> int:
    return sum(1 for each in svg.iter(tag) if kind is None or each.get("class") == kind)


def test_the_layers_are_those_of_the_network():
    layers = rows(RESNET)
    assert (layers[0].label, layers[-1].label) == ("input", "output")
    stem, *_ = inner = [row.name for row in layers[1:-1]]
    assert (stem, inner[-6:]) == ("conv1", ["layer1", "layer2", "layer3", "layer4", "global_pool", "fc"])
    (stage,) = (row for row in layers if row.name == "layer4")
    assert [cell for cell, _ in stage.cells] == [f"layer4.{n}" for n in range(len(network(RESNET).layer4))]
    wanted = fxgraft.sites(network(RESNET), "layer4")[0].shape
    assert wanted is not None
    assert stage.size == " × ".join(map(str, wanted[1:]))


@pytest.mark.parametrize(
    ("model", "method", "options", "expected"),
    [
        (RESNET, "rsc", {"layer": "layer4"}, {"on": ["layer4"]}),
        (RESNET, "mixmo", {}, {"ends": ["input", "output"], "instead": ["conv1.0", "fc"]}),
        (RESNET, "diversification", {}, {"instead": ["global_pool", "fc"]}),
        (RESNET, "crossnorm", {}, {"in": [f"layer{n}.0" for n in (1, 2, 3, 4)]}),
        (TRANSFORMER, "taps", {"layers": "blocks.2"}, {"on": ["blocks.2"]}),
    ],
)
def test_units_are_marked_where_the_plan_puts_them(model, method, options, expected):
    found = marks(planned(model, method, **options), rows(model))
    assert {mark: names for mark, names in found.items() if names} == expected


def test_each_kind_of_mark_is_drawn():
    assert count(drawn(RESNET, "rsc"), "circle") == 1
    mixed = drawn(RESNET, "mixmo")
    assert (count(mixed, "circle"), count(mixed, "rect", "instead")) == (2, 2)
    assert count(drawn(RESNET, "crossnorm"), "rect", "in") == 4
    assert "after layer4" in (drawn(RESNET, "rsc", layer="layer4").get("aria-label") or "")


def test_a_layer_that_passes_its_input_on_is_drawn_where_a_unit_sits():
    assert "pos_drop" not in [row.name for row in rows(TRANSFORMER)]
    labels = [text.text for text in drawn(TRANSFORMER, "taps", layers=["pos_drop"]).iter("text")]
    assert labels.index("patch_embed") < labels.index("pos_drop") < labels.index("blocks")


@pytest.mark.parametrize("model", [RESNET, TRANSFORMER])
def test_everything_lies_within_the_drawing(model):
    svg = drawn(model, "dsu")
    height = float(svg.get("height") or 0)
    for box in svg.iter("rect"):
        x, y, width, tall = (float(box.get(key) or 0) for key in ("x", "y", "width", "height"))
        assert x + width <= WIDTH
        assert 0 <= y <= y + tall <= height
    for dot in svg.iter("circle"):
        assert 0 <= float(dot.get("cx") or 0) <= WIDTH
        assert 0 <= float(dot.get("cy") or 0) <= height


def test_where_a_method_does_not_go_the_error_stands():
    html = drawings("diversification", [RESNET, TRANSFORMER])
    assert html.count("<svg") == 1
    assert "StructureError" in html
    assert re.search(r"reads? a class token|global average", html)


def test_a_thumbnail_is_the_panel_without_what_is_around_it():
    image = torch.zeros(3, 20, 20)
    image[0] = 1
    red = small(Panel("a title", image, heat=None))
    assert red.size[0] == red.size[1] > 128
    assert red.getcolors() == [(red.size[0] * red.size[1], (255, 0, 0))]
    curves = {"before": torch.linspace(0, 1, 500), "after": torch.linspace(1, 0, 500)}
    assert len(small(Panel("two curves", curves=curves)).getcolors(100_000) or ()) > 2
    assert scheme().size == (300, 300)
