"""The demo, on a handful of images."""

import io
import json
import sys
import warnings

import pytest
import torch
from PIL import Image
from rich.console import Console

from fxgraft.errors import ConfigError, SiteError, UnknownMethodError
from fxgraft.comparison import demo, surgery
from fxgraft.models import RepeatedBackbone
from fxgraft.comparison.demo import DemoSettings, run_demo
from fxgraft.comparison.digits import digits_domains
from benchmarks.loops.domains import Domain
from fxgraft.experiments.muting import muting_picture
from fxgraft.experiments.report import DemoReport, Run


@pytest.fixture
def few_digits(monkeypatch):
    """A few digits per domain in place of all."""

    def cut(size):
        return tuple(Domain(d.name, d.images[:24], d.labels[:24], d.classes) for d in digits_domains(size))

    monkeypatch.setattr(demo, "digits_domains", cut)


@pytest.fixture
def without_surgery(monkeypatch):
    """It takes seconds, and most tests are about what comes after."""
    monkeypatch.setattr(demo, "surgery", lambda *_, **__: iter(()))


def settings(tmp_path, **options):
    return DemoSettings(**{"epochs": 1, "quiet": True, "out": tmp_path / "out", **options})


def quiet_console():
    return Console(file=io.StringIO(), width=120)


def test_demo_on_digits(tmp_path, few_digits):
    console = quiet_console()
    report = run_demo(settings(tmp_path), console=console)
    variants = ["bare", "rsc", "crossnorm", "rsc + crossnorm"]
    assert [(run.seed, run.held_out, run.variant) for run in report.runs] == [
        (seed, "sketch", variant) for seed in (0, 1, 2) for variant in variants
    ]
    assert len(report.surgery) == 7
    assert all(check.holds for check in report.surgery)
    assert all(0 <= run.accuracy <= 1 and run.step_seconds > 0 and run.steps == 2 for run in report.runs)
    written = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert written == json.loads(report.to_json())
    assert written["protocol"]["model_options"] == {"output_stride": 8}
    assert written["seeds"] == [0, 1, 2]
    assert set(written["environment"]) >= {"torch", "timm", "fxgraft", "python", "device"}
    assert [row["variant"] for row in written["summary"]] == variants
    with Image.open(tmp_path / "out" / "muted.png") as picture:
        assert min(picture.size) > 100
    table = console.file.getvalue()
    for word in (
        "✓ undone by fxgraft.unpatch",
        "bare",
        "rsc + crossnorm",
        "sketch",
        "cannot show",
        "ratio",
        "demo.json",
        "muted.png",
    ):
        assert word in table


@pytest.mark.parametrize("patch", ["rsc", pytest.param("selfnorm", marks=pytest.mark.sweep)])
def test_demo_is_deterministic_and_leaves_the_generator_alone(tmp_path, few_digits, patch, without_surgery):
    before = torch.get_rng_state()
    first, again = (
        run_demo(settings(tmp_path, seeds=[3], patch=[patch]), console=quiet_console()) for _ in range(2)
    )
    assert torch.equal(before, torch.get_rng_state())
    numbers = [[(run.accuracy, run.epoch_loss) for run in report.runs] for report in (first, again)]
    assert numbers[0] == numbers[1]


def test_first_loss_is_shared_by_the_variants(tmp_path, few_digits, without_surgery):
    # Nothing is muted before `start`, so the variants differ in nothing: same weights, same batches.
    report = run_demo(settings(tmp_path, patch=["rsc:start=1.0"], seeds=[0]), console=quiet_console())
    for bare, patched in zip(report.runs[::2], report.runs[1::2], strict=True):
        assert bare.epoch_loss == pytest.approx(patched.epoch_loss, rel=1e-4)


def test_demo_on_own_data(tmp_path, without_surgery):
    for domain in ("photo", "sketch"):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / "data" / domain / name
            folder.mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (40, 40), (200 * label, 10 * index, 0)).save(folder / f"{index}.jpg")
    report = run_demo(
        settings(
            tmp_path,
            data=tmp_path / "data",
            size=32,
            seeds=[0, 1],
            patch=["rsc", "rsc:scope=spatial"],
            all=True,
        ),
        console=quiet_console(),
    )
    assert len(report.runs) == 2 * 2 * 3
    assert report.protocol["data"] == "data"
    assert report.protocol["domains"] == {"photo": 8, "sketch": 8}
    assert len(report.accuracies("rsc:scope=spatial", "photo")) == 2


def test_the_domains_that_are_named_are_left_out(tmp_path, few_digits, without_surgery):
    report = run_demo(
        settings(tmp_path, patch=["none"], seeds=[0], held_out=["thick", "plain"]), console=quiet_console()
    )
    assert report.held_out == ["plain", "thick"]


def test_a_line_that_does_not_hold_is_marked(tmp_path, few_digits, monkeypatch):
    monkeypatch.setattr(surgery, "_exported", lambda *_: object())
    console = quiet_console()
    report = run_demo(settings(tmp_path, patch=["none"], seeds=[0]), console=console)
    assert [check.holds for check in report.surgery] == [True] * 6 + [False]
    assert "✗ and the graph" in console.file.getvalue()


def test_bare_alone(tmp_path, few_digits, without_surgery):
    report = run_demo(settings(tmp_path, patch=["none"], seeds=[0]), console=quiet_console())
    assert report.variants == ["bare"]
    assert report.picture is None
    assert not (tmp_path / "out" / "muted.png").exists()


def test_channel_muting_has_no_picture(tmp_path, few_digits, without_surgery):
    report = run_demo(settings(tmp_path, patch=["rsc:scope=channel"], seeds=[0]), console=quiet_console())
    assert report.picture is None


def test_a_model_that_takes_no_output_stride():
    backbone = RepeatedBackbone("test_vit", 10, 32)
    assert backbone.options == {}
    assert torch.equal(*(backbone(0).state_dict()["head.weight"] for _ in range(2)))


def test_large_images_need_no_output_stride():
    assert RepeatedBackbone("test_resnet", 10, 96).options == {}
    assert RepeatedBackbone("test_resnet", 10, 64).options == {"output_stride": 16}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": 0}, ConfigError, "epochs must be at least 1"),
        ({"batch_size": 0}, ConfigError, "batch_size must be at least 1"),
        ({"seeds": []}, ConfigError, "one or more different numbers"),
        ({"seeds": [1, 1]}, ConfigError, "one or more different numbers"),
        ({"patch": ["rsc", "rsc"]}, ConfigError, "'rsc' is given twice"),
        ({"patch": ["rsc + rscc"]}, UnknownMethodError, "rscc"),
        ({"held_out": ["paintings"]}, ConfigError, "no domain 'paintings'"),
        ({"held_out": ["plain"], "all": True}, ConfigError, "give one of the two"),
        ({"patch": ["rsc:"]}, ConfigError, "no options"),
        ({"patch": ["rscc"]}, UnknownMethodError, "rscc"),
        ({"patch": ["rsc:layer=layer9"]}, SiteError, "layer9"),
        ({"model": "resnet1800"}, ConfigError, "resnet1800"),
        ({"device": "toaster"}, ConfigError, "no device 'toaster'"),
    ],
)
def test_bad_settings_fail_before_the_training(
    tmp_path, few_digits, monkeypatch, options, error, message, without_surgery
):
    monkeypatch.setattr(demo, "train", lambda *_, **__: pytest.fail("trained before it had checked"))
    with pytest.raises(error, match=message):
        run_demo(settings(tmp_path, **options), console=quiet_console())
    assert not (tmp_path / "out").exists()


def test_one_domain_is_not_enough(tmp_path):
    (tmp_path / "data" / "photo" / "cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "photo" / "cat" / "0.jpg")
    with pytest.raises(ConfigError, match="needs two or more, and there is photo"):
        run_demo(settings(tmp_path, data=tmp_path / "data"))


def test_missing_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r'pip install "fxgraft\[demo\]"'):
        run_demo(settings(tmp_path))


# ---------------------------------------------------------------------------------------- reporting


def report_of(*rows):
    return DemoReport(
        protocol={"model": "m", "data": "d", "epochs": 1, "size": 8},
        seeds=[0, 1],
        environment={"device": "cpu", "threads": 1},
        runs=[
            Run(
                variant=variant,
                held_out=held_out,
                seed=seed,
                accuracy=accuracy,
                step_seconds=step,
                steps=1,
                train_seconds=1.0,
                epoch_loss=[1.0],
            )
            for variant, held_out, seed, accuracy, step in rows
        ],
    )


def test_report_numbers():
    bare = [("a", 0, 0.5, 1.0), ("b", 0, 0.7, 2.0), ("a", 1, 0.3, 1.0), ("b", 1, 0.5, 4.0)]
    patched = [("a", 0, 0.6, 1.2), ("b", 0, 0.8, 2.2), ("a", 1, 0.4, 1.1), ("b", 1, 0.6, 4.4)]
    report = report_of(*(("bare", *row) for row in bare), *(("x", *row) for row in patched))
    assert report.accuracies("bare", "a") == [0.5, 0.3]
    assert report.accuracies("x") == pytest.approx([0.7, 0.5])
    assert report.step_ratio("bare") == 1
    assert report.step_ratio("x") == pytest.approx(1.1)
    console = quiet_console()
    console.print(report)
    assert "60.0 ± 14.1" in console.file.getvalue()
    assert "mean" in console.file.getvalue()


def test_a_single_domain_has_no_mean():
    console = quiet_console()
    console.print(report_of(("bare", "a", 0, 0.5, 1.0), ("bare", "a", 1, 0.7, 1.0)))
    assert "mean" not in console.file.getvalue()


def test_picture_marks_the_muted_quarter(tmp_path):
    mask = torch.ones(2, 1, 2, 2)
    mask[0, 0, 0, 0] = 0
    path = tmp_path / "m.png"
    images, selected = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([True, False])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        muting_picture(images, ["a [b", "$c"], mask, selected, path)
    with Image.open(path) as image:
        colours = [colour for _, colour in image.convert("RGB").getcolors(100_000)]
    assert any(red > 120 and green < 60 and blue < 60 for red, green, blue in colours)
