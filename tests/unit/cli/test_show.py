"""`fxgraft show graph`: the forward before and after, and the picture of the grafted graph."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import fxgraft
from fxgraft.cli.commands import app
from fxgraft.graph.grafting.views import view_grafts
from fxgraft.viz import graphs
from fxgraft.viz.code_difference import difference, differences
from fxgraft.viz.graphs import draw_graph
from models.toys import net
from sweeping import some

SIZE = (3, 8, 8)


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["show", "graph", *arguments])
    assert result.exit_code == code, result.output
    return result.output


def changed(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("+", "-"))]


def test_a_block_is_shown_once_for_all_that_are_changed_alike() -> None:
    model = fxgraft.patch(net(), "selfnorm", input_size=SIZE)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    (part,) = view_grafts(model)
    assert part.kind == "Block"
    assert part.paths == ("stage1.0", "stage1.1", "stage2.0", "stage2.1")
    plain = differences([part]).plain
    assert "Block: stage1.0, stage1.1, stage2.0, stage2.1" in plain
    assert changed(plain) == [
        "+     graft_selfnorm = self.graft_selfnorm(add)",
        "-     act2 = self.act2(add)",
        "+     act2 = self.act2(graft_selfnorm)",
    ]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [graft.name for graft in fxgraft.grafts(model)] == ["selfnorm"], "looking takes nothing off"


def test_lines_are_coloured() -> None:
    model = fxgraft.patch(net(), "selfnorm", input_size=SIZE)
    styles = {line.plain[:1]: str(line.style) for line in difference(view_grafts(model)[0])}
    assert (styles["+"], styles["-"], styles[" "]) == ("green", "red", "dim")


def test_what_acts_around_a_module_is_shown_in_it() -> None:
    model = fxgraft.patch(net(), "mixmo", input_size=SIZE)
    root, stem, head = view_grafts(model)
    assert "+     graft_mixmo_inputs = self.graft_mixmo_inputs(x)" in changed(differences([root]).plain)
    assert (stem.paths, head.paths) == (("stem.first",), ("fc",))
    assert "conv2d" in stem.before
    assert "conv2d" not in stem.after
    assert [node.shape for node in stem.nodes] == [(2, 3, 8, 8), (2, 8, 8, 8), None]
    by_name = {node.name: node for node in root.nodes}
    assert by_name["graft_mixmo_inputs"].graft == "mixmo"
    assert by_name["stem"].inputs == ("graft_mixmo_inputs",)
    assert by_name["stem"].shape == (2, 8, 8, 8)
    assert by_name["graft_mixmo_members"].shape == (2, 4)


def test_evaluation_shows_what_stays() -> None:
    model = fxgraft.patch(net(), "rsc", layer="stage2", input_size=SIZE)
    assert view_grafts(model, training=False) == []
    assert len(view_grafts(model)) == 1


class Stubborn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[i : i + 1] for i in range(len(x))])


def test_a_module_that_cannot_be_opened_is_one_call() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Stubborn())
    fxgraft.patch(model, "taps", layers="1", input_size=SIZE)
    (part,) = view_grafts(model)
    assert "forward = self.forward(x)" in part.before
    assert "graft_taps = self.graft_taps(forward)" in part.after
    assert [node.label for node in part.nodes] == ["input", "Stubborn.forward", "Tap", "output"]


def test_a_bare_model_has_nothing_to_show() -> None:
    with pytest.raises(fxgraft.UnknownGraftError, match="no graft on this Net"):
        view_grafts(net())


@pytest.mark.parametrize("ending", some(["html", "svg", "png"], 1))
def test_the_graph_is_drawn(ending: str, tmp_path) -> None:
    model = fxgraft.patch(timm.create_model("test_resnet"), "selfnorm", input_size=(3, 32, 32))
    fxgraft.patch(model, "rsc", input_size=(3, 32, 32))
    path = tmp_path / "new" / f"graph.{ending}"
    draw_graph(view_grafts(model), path, "a < b")
    if ending == "png":
        with Image.open(path) as picture:
            assert picture.width > 300
        return
    text = path.read_text()
    assert text.count("<svg") == 1
    assert {"#f4a582", "#92c5de", "#e6e6e6"} <= set(re.findall(r"#[0-9a-f]{6}", text)), "two grafts, and grey"
    assert "<!-- SelfNormUnit" in text
    assert re.search(r"<!-- \d+×\d+×\d+ -->", text), "shapes on the edges"
    assert (ending == "html") == text.startswith("<!doctype html>")


def test_edges_are_clear_of_boxes(monkeypatch) -> None:
    figures: list = []
    monkeypatch.setattr(graphs, "write_picture", lambda figure, *_: figures.append(figure))
    model = fxgraft.patch(timm.create_model("test_vit"), "mixmo + selfnorm", input_size=(3, 160, 160))
    draw_graph(view_grafts(model), Path("graph.png"), "graph")
    (figure,) = figures
    figure.draw_without_rendering()
    shortcuts = 0
    for axis in figure.axes:
        texts = [text for text in axis.texts if not hasattr(text, "arrow_patch") and text.zorder == 3]
        boxes = [text.get_bbox_patch().get_window_extent() for text in texts]
        for line in axis.lines:
            shortcuts += 1
            points = axis.transData.transform(line.get_xydata())
            (x, top), (_, bottom) = points[-2:]
            for box in boxes:
                assert not (box.x0 < x < box.x1 and bottom < box.y1 and box.y0 < top)
        for arrow in (each.arrow_patch for each in axis.texts if hasattr(each, "arrow_patch")):
            inner = [box.padded(-1) for box in boxes]
            assert not any(box.contains(*point) for box in inner for point in arrow.get_path().vertices[-4:])
    assert shortcuts >= 5


def test_a_graph_is_the_same_file_each_time(tmp_path) -> None:
    model = fxgraft.patch(net(), "selfnorm", input_size=SIZE)
    for name in ("one.svg", "two.svg"):
        draw_graph(view_grafts(model), tmp_path / name, "graph")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_the_command(tmp_path) -> None:
    out = tmp_path / "graph.svg"
    said = run("test_resnet", "--graft", "rsc:layer=-1", "--size", "32", "--out", str(out))
    assert "rsc = rsc:" in said
    assert re.search(r"^\+     graft_rsc = self.graft_rsc\(", said, re.MULTILINE)
    assert out.exists()
    again = run("test_resnet", "--graft", "rsc:layer=-1", "--size", "32", "--mode", "evaluation")
    assert "the model runs its own code" in again


def test_the_command_says_what_is_wrong() -> None:
    assert "at least one --graft" in run("test_resnet", code=2)
    assert "is written to .svg" in run("test_resnet", "--graft", "rsc", "--out", "graph.bmp", code=2)
    assert "timm has no model 'resnet5o'" in run("resnet5o", "--graft", "rsc", code=2)
