"""Where methods belong in published architectures, on the meta device, against the tables in `places/`.

The tables were decided by reading the networks' sources, and are the reference for the rules. For each architecture
(of timm; "tv:" of torchvision, at 224×224):

- why: the reason for the joins, by the code of the blocks.
- joins: how many residual sums there are, by the name of the module whose forward adds, "#" for numbers. "depthwise"
  and "part" are kinds of their own; see `fxgraft.graph.structure.joins`.
- layouts: of the outputs of some modules, one of the first layers, one inside and one of the last. "" says that a value
  isn't a map: attention weights, windows or heads among the images, tables that no image has a part in.
- stages: with their shapes and layouts, in running order. "blocks.0-11" stands for one of each number. What a function
  makes has the name that torch.fx gives it.
- pooled: the map whose average a linear classifier reads; null where there is none.
- head: whether the classifier's maps average to the logits: "exact", "not exact" with the layer that makes the
  difference, or "none" with what the classifier reads instead.
- stems, classifiers: the layers that take the image, and those whose outputs make up the logits; "none" with the
  reason.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import yaml
from benchmarks.zoo_tables import decided
from torch import nn

from fxgraft.errors import StructureError, TraceError
from fxgraft.graph.structure.heads.head import find_head, pooled_map
from fxgraft.graph.structure.heads.per_position_head import positionwise
from fxgraft.graph.structure.heads.stem_and_classifier import find_classifiers, find_stems
from fxgraft.graph.structure.joins import residual_joins
from fxgraft.graph.structure.layout import layout_of
from fxgraft.graph.structure.stages import stages
from fxgraft.graph.tracing.model_trace import ModelTrace

TABLES = sorted((Path(__file__).parent / "places").glob("*.yaml"))
SECOND = Path(__file__).parent / "second.yaml"
PLACES: dict[str, dict[str, Any]] = {
    name: places
    for table in TABLES
    for name, places in yaml.safe_load(table.read_text(encoding="utf-8")).items()
}
IN_EVERY_RUN = {"hgnet_tiny", "resnet18", "tv:mnasnet0_5", "tv:squeezenet1_1", "vit_tiny_patch16_224"}
CLASSES = {"num_classes": 10}  # of those that timm builds without any
OPTIONS: dict[str, dict[str, Any]] = {
    "davit_base_fl": CLASSES,
    "deepseek_vit_412m": CLASSES,
    "gemma4_vit_167m": CLASSES,
    "qwen3_vit_88m": CLASSES,
    "qwen3_vit_88m_merge": CLASSES,
    "samvit_base_patch16": CLASSES,
    "vit_base_patch16_siglip_224": CLASSES,
    "tv:deeplabv3_resnet50": {"weights_backbone": None},
    "tv:fcn_resnet50": {"weights_backbone": None},
    "tv:googlenet": {"aux_logits": False, "init_weights": False},
    "tv:inception_v3": {"aux_logits": False, "init_weights": False},
    "tv:lraspp_mobilenet_v3_large": {"weights_backbone": None},
}


def build(name: str) -> nn.Module:
    def built() -> nn.Module:
        options = OPTIONS.get(name, {})
        if not name.startswith("tv:"):
            return timm.create_model(name, **options)
        return torchvision.models.get_model(name[3:], weights=None, **options)

    try:
        with torch.device("meta"):
            return built().eval()
    except NotImplementedError:  # torchvision's RegNets compute their widths as tensors
        return built().to("meta").eval()


def spread(lines: list[str]) -> Iterator[str]:
    """Write out the stages of each number."""
    for line in lines:
        numbers = re.match(r"(\S*?)(\d+)-(\d+)([ .].*)", line)
        if numbers is None:
            yield line
        else:
            start, first, last, end = numbers.groups()
            yield from (f"{start}{number}{end}" for number in range(int(first), int(last) + 1))


def reason(found: Callable[[], Any], wanted: Any) -> Any:
    """Return what is found; where it is refused and the table gives a reason why there is none, that reason."""
    try:
        return found()
    except (StructureError, TraceError) as error:
        return wanted if isinstance(wanted, str) and wanted.startswith("none: ") else f"refused: {error}"


def joins(trace: ModelTrace) -> dict[str, int]:
    found = Counter((re.sub(r"\d+", "#", each.owner), each.kind) for each in residual_joins(trace))
    return {
        owner if kind == "block" else f"{owner} ({kind})": count for (owner, kind), count in found.items()
    }


def layouts(trace: ModelTrace, paths: list[str]) -> dict[str, str]:
    calls = trace.observation.calls
    return {path: str(layout_of(trace, calls[path][0].output, path, strict=False) or "") for path in paths}


def head(trace: ModelTrace, wanted: str) -> str:
    inexact = ", ".join(positionwise(trace, find_head(trace)).inexact)
    if not inexact:
        return "exact"
    named = wanted.removeprefix("not exact: ")
    return wanted if named != wanted and named in inexact else f"not exact: {inexact}"


def found_places(name: str, wanted: dict[str, Any]) -> dict[str, Any]:
    """Find the same for a network as the table says of it."""
    trace = ModelTrace(build(name))
    pooled = pooled_map(trace)
    return {
        "why": wanted["why"],
        "joins": joins(trace),
        "layouts": layouts(trace, list(wanted["layouts"])),
        "stages": [
            f"{each.name} {'x'.join(map(str, (each.shape or ())[1:]))} {each.layout}"
            for each in stages(trace)
        ],
        "pooled": None if pooled is None else f"{pooled.name} {pooled.layout}",
        "head": reason(lambda: head(trace, wanted["head"]), wanted["head"]),
        "stems": reason(lambda: sorted(stem.path for stem in find_stems(trace)), wanted["stems"]),
        "classifiers": reason(lambda: sorted(find_classifiers(trace)), wanted["classifiers"]),
    }


def cases() -> list[Any]:
    return [
        pytest.param(
            name,
            marks=[
                *([] if name in IN_EVERY_RUN else [pytest.mark.sweep]),
                pytest.mark.skipif(
                    ":" not in name and not timm.is_model(name), reason="timm has no such model"
                ),
            ],
        )
        for name in PLACES
    ]


@pytest.mark.parametrize("name", cases())
def test_places(name: str) -> None:
    wanted = {**PLACES[name], "stages": [*spread(PLACES[name]["stages"])]}
    for column in ("stems", "classifiers"):
        if not isinstance(wanted[column], str):
            wanted[column] = sorted(wanted[column])
    assert found_places(name, wanted) == wanted


def test_the_tables_are_whole() -> None:
    assert sorted(decided()) == sorted(PLACES)
    columns = {"why", "joins", "layouts", "stages", "pooled", "head", "stems", "classifiers"}
    assert all(places.keys() == columns for places in PLACES.values())
    assert all(len(places["layouts"]) >= 3 for places in PLACES.values())
    assert (
        sum(len(yaml.safe_load(table.read_text(encoding="utf-8"))) for table in TABLES) == len(PLACES) >= 120
    )
    kinds = ("exact", "not exact: ", "none: ")
    assert all(places["head"].startswith(kinds) for places in PLACES.values())
    assert all(
        (places["pooled"] is None) or not places["head"].startswith("none") for places in PLACES.values()
    )


def same(first: str, second: str) -> bool:
    """Say whether two stages are one: a module and what makes its value have a name in common."""
    names, others = zip(first.split(" ", 1), second.split(" ", 1), strict=True)
    return others[0] == others[1] and f"{max(names, key=len)}.".startswith(f"{min(names, key=len)}.")


def test_the_second_decision_is_the_first_but_where_it_says_so() -> None:
    second = yaml.safe_load(SECOND.read_text(encoding="utf-8"))
    assert len(second) >= 20
    differing = set()
    for name, decided_again in second.items():
        stages_of = [[*spread(places["stages"])] for places in (PLACES[name], decided_again)]
        alike = len(stages_of[0]) == len(stages_of[1]) and all(map(same, *stages_of))
        if not alike or PLACES[name]["layouts"] != decided_again["layouts"]:
            differing.add(name)
    assert differing == {name for name, each in second.items() if "differs" in each}
