"""The picture of class maps, and its command."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

from fxgraft.cli.commands import app
from fxgraft.cli.pictures import look
from fxgraft.errors import ConfigError
from fxgraft.experiments.images import decode, to_floats
from fxgraft.patches.diversification.patch import maps

SIZE = ("--model", "resnet18", "--classes", "5", "--size", "96")


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=5, channels=(8, 8, 8, 8), output_stride=16).eval()


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.effect_noise((120, 100), 80).convert("RGB").save(path)
    return path


def read_image(path, size):
    return to_floats(decode(str(path), lambda: path.open("rb"), size))


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.output


def test_the_classes_drawn_are_those_with_the_highest_scores(photo):
    model, image = network(), read_image(photo, 96)
    shown = look(model, image, top=2)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    batch = ((image - mean) / std)[None]
    logits = model(batch)[0]
    assert list(shown.classes) == logits.topk(2).indices.tolist()
    assert shown.scores == pytest.approx(logits.topk(2).values.tolist(), abs=1e-5)
    assert torch.equal(shown.maps, maps(model, batch)[0, list(shown.classes)])
    assert torch.equal(shown.maps[shown.peaks], shown.maps.amax((1, 2)))


def test_the_draw_follows_the_seed(photo):
    model, image = network(), read_image(photo, 96)
    first, again, other = (look(model, image, top=5, seed=seed).damped for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_command_writes_a_picture(photo, tmp_path):
    weights = tmp_path / "weights.pth"
    torch.manual_seed(1)
    torch.save(timm.create_model("resnet18", num_classes=5).state_dict(), weights)
    out = tmp_path / "new" / "maps.png"
    said = run("show", "maps", str(photo), *SIZE, "--weights", str(weights), "--out", str(out))
    assert re.search(r"class maps of 3×3 for classes \d \(", said)
    with Image.open(out) as picture:
        assert picture.width > 3 * picture.height


def test_the_command_says_what_is_wrong(photo, tmp_path):
    other = tmp_path / "text.png"
    other.write_text("no image")
    assert "as an image" in run("show", "maps", str(other), *SIZE, code=2)
    assert "larger than the class maps of 3×3" in run(
        "show", "maps", str(photo), *SIZE, "--patch", "4", code=2
    )
    missing = run("show", "maps", str(photo), *SIZE, "--weights", str(tmp_path / "none.pth"), code=2)
    assert "Cannot load" in missing
    assert "at least one class" in run("show", "maps", str(photo), *SIZE, "--top", "0", code=2)
    assert "at least 1 pixel" in run("show", "maps", str(photo), "--size", "0", code=2)
    token = run("show", "maps", str(photo), "--model", "vit_tiny_patch16_224", "--size", "32", code=2)
    assert "a class token" in token


def test_a_model_of_nothing_cannot_be_shown(photo):
    with pytest.raises(ConfigError, match="at least one class"):
        look(network(), read_image(photo, 96), top=0)
