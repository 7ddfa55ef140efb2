"""Scripts of timm with grafts on the model that they build: ``python -m fxgraft.timm``."""

from __future__ import annotations

import atexit
import csv
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.utils
import torch
from PIL import Image
from torch import Tensor, nn

import fxgraft
from fxgraft import extend
from fxgraft.cli.merging import merge_file
from fxgraft.integrations.timm import launching
from fxgraft.integrations.timm.grafting import Grafting, _in_torch
from fxgraft.integrations.timm.launching import launch
from fxgraft.patches import registry

SCRIPT = Path(__file__).with_name("timm_script.py")
IMAGES, BATCH, CLASSES, TERM = 8, 4, 2, 100.0
STEPS = IMAGES // BATCH
SCRIPTS = os.environ.get("FXGRAFT_TIMM_SCRIPTS")

seen: list[tuple[Tensor, float]] = []
"""Labels and progress of every training pass of `Witness`."""
judged: list[int] = []
"""Rows of every output whose loss it was asked for."""


@dataclass(frozen=True, kw_only=True)
class Witness(extend.LayeredPatch):
    """Notes labels and progress, adds to the loss, and has a parameter to train."""

    title = "Witness"
    layers: extend.SiteSpec | None = -1

    def place(self, backbone: extend.Backbone, make: extend.Make) -> Any:
        for site in backbone.sites(self.layers):
            yield backbone.place(site, make(site.name, WitnessUnit, self))

    def losses(self, graft: extend.Graft, out: Any, y: Any, criterion: Any) -> Mapping[str, Tensor]:
        judged.append(len(out))
        return {"term": torch.tensor(TERM)}


class WitnessUnit(extend.Unit):
    def __init__(self, config: Witness) -> None:
        super().__init__()
        self.config = config
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        run = self.current
        if run is not None and run.training:
            seen.append((run.labels(len(x)).clone(), self.context.progress))
        return x * self.scale


@pytest.fixture(autouse=True)
def _witness(monkeypatch: pytest.MonkeyPatch) -> None:
    fxgraft.methods()
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    fxgraft.register("witness")(Witness)
    seen.clear()


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small images of two classes."""
    root = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for number in range(IMAGES):
        place = root / "train" / "ab"[number % CLASSES]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(place / f"{number}.png")
    return root


def run(images: Path, output: Path, *arguments: object, grafts: tuple[str, ...] = ("witness",)) -> Path:
    launch(SCRIPT, [str(images), "--output", str(output), *map(str, arguments)], grafts)
    return output


def steps_of(output: Path) -> list[tuple[Tensor, float]]:
    return torch.load(output / "steps-0.pt")


WAYS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "hard labels": ("--smoothing", "0"),
    "no prefetcher": ("--no-prefetcher",),
    "mixed by the loader": ("--mixup", "1"),
    "mixed by the loop": ("--mixup", "1", "--no-prefetcher"),
    "task": ("--task",),
    "task, mixed by the loop": ("--task", "--mixup", "1", "--no-prefetcher"),
    "bfloat16": ("--amp",),
    "averaged": ("--model-ema",),
    "schedule by updates": ("--sched-on-updates",),
    "plateau": ("--plateau",),
}


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated:FutureWarning")
@pytest.mark.parametrize("way", WAYS)
def test_labels_progress_loss_and_optimiser(way: str, images: Path, tmp_path: Path) -> None:
    if "--task" in WAYS[way]:
        pytest.importorskip("timm.task", reason="this version of timm has no tasks")
    steps = steps_of(run(images, tmp_path, *WAYS[way]))
    assert len(steps) == len(seen) == 2 * STEPS
    for (target, loss), (labels, _) in zip(steps, seen, strict=True):
        assert torch.equal(labels, target)
        assert TERM < loss < TERM + 10
    assert [progress for _, progress in seen] == [step / len(steps) for step in range(len(steps))]
    if "--mixup" in WAYS[way]:
        assert any(((y > 0.1) & (y < 0.9)).any() for y, _ in seen)
    weights = torch.load(tmp_path / "weights-0.pt")
    (scale,) = (value for key, value in weights.items() if key.endswith("scale"))
    assert scale != 1


def test_the_summary_holds_the_diagnostics(images: Path, tmp_path: Path) -> None:
    """Every row has the columns of the first, whatever its last pass has measured."""
    run(images, tmp_path, grafts=("rsc:layer=layer3", "selfnorm"))
    with (tmp_path / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    columns = {f"train_rsc.{name}" for name in fxgraft.RSC.measures} | {
        "train_selfnorm.gate",
        "train_selfnorm.mean_gate",
    }
    assert set(rows[0]) == columns | {"epoch", "train_loss", "eval_loss", "lr"}
    assert all(
        0 < float(row["train_rsc.muted"]) < 1 and float(row["train_selfnorm.gate"]) > 0 for row in rows
    )
    assert [row["train_selfnorm.mean_gate"] for row in rows] == ["nan", "nan"], "it has one gate"


@pytest.mark.parametrize("way", ["plain", "hard labels", "mixed by the loop"])
def test_members_take_every_loss(way: str, images: Path, tmp_path: Path) -> None:
    steps = steps_of(run(images, tmp_path, *WAYS[way], grafts=("mixmo", "rsc:layer=layer4")))
    assert all(0 < loss < 10 for _, loss in steps)


@pytest.mark.parametrize("way", ["plain", "hard labels"])
def test_a_loss_in_the_place_of_the_scripts(way: str, images: Path, tmp_path: Path) -> None:
    graft = "diversification:patch=1,loss=gradient_boosting,loss_k=1"
    assert all(0 < loss < 10 for _, loss in steps_of(run(images, tmp_path, *WAYS[way], grafts=(graft,))))
    with pytest.raises(fxgraft.TargetError, match="takes class indices"):
        run(images, tmp_path, "--mixup", 1, grafts=(graft,))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_cross_entropy_of_timm_and_of_torch(smoothing: float) -> None:
    """Where a method stands in for cross-entropy, the script's goes by torch's name and is the same."""
    out, y = torch.randn(4, CLASSES), torch.tensor([0, 1, 1, 0])
    for criterion, target in (
        (timm.loss.LabelSmoothingCrossEntropy(smoothing), y),
        (timm.loss.SoftTargetCrossEntropy(), torch.rand(4, CLASSES).softmax(1)),
    ):
        torch.testing.assert_close(_in_torch(criterion)(out, target), criterion(out, target))
    assert _in_torch(same := nn.BCEWithLogitsLoss()) is same


def test_accumulated_gradients(images: Path, tmp_path: Path) -> None:
    steps = steps_of(run(images, tmp_path, "--accumulate", 2))
    assert [progress for _, progress in seen] == [0, 0, 0.5, 0.5]
    assert all(TERM / 2 < loss < TERM / 2 + 10 for _, loss in steps)


@pytest.mark.sweep
def test_compiled_as_eager(images: Path, tmp_path: Path) -> None:
    grafts = ("rsc:layer=layer4,batch_share=1.0",)
    given = ("--mixup", 1, "--no-prefetcher", "--epochs", 1)
    eager = steps_of(run(images, tmp_path / "eager", *given, grafts=grafts))
    compiled = steps_of(run(images, tmp_path / "compiled", *given, "--torchcompile", grafts=grafts))
    assert [loss for _, loss in compiled] == pytest.approx([loss for _, loss in eager], rel=1e-4)


def test_resumed(images: Path, tmp_path: Path) -> None:
    first = run(images, tmp_path / "first", "--stop-epoch", 1)
    seen.clear()
    run(images, tmp_path / "second", "--resume", first / "last.pth.tar")
    assert [progress for _, progress in seen] == [0.5, 0.75]


def test_the_same_numbers_as_by_hand(images: Path, tmp_path: Path) -> None:
    """A graft that does nothing leaves the script's run as it is."""
    run(images, tmp_path / "grafted", grafts=("rsc:batch_share=0.0,layer=layer4",))
    with launching._as_program(SCRIPT, [str(images), "--output", str(tmp_path / "plain")]):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    for (y, loss), (other_y, other) in zip(
        steps_of(tmp_path / "grafted"), steps_of(tmp_path / "plain"), strict=True
    ):
        assert torch.equal(y, other_y)
        assert loss == other


def test_from_training_over_merging_to_validation(images: Path, tmp_path: Path) -> None:
    grafts = ("mixmo:members=2", "rsc:layer=layer4")
    run(images, tmp_path / "run", "--model-ema", "--epochs", 1, grafts=grafts)
    checkpoint, merged = tmp_path / "run" / "last.pth.tar", tmp_path / "merged.safetensors"
    for ema in (False, True):
        run(images, tmp_path / "a", "--evaluate", checkpoint, *["--use-ema"][:ema], grafts=grafts)
        merge_file(tmp_path / "run", merged, grafts=grafts, ema=ema, classes=CLASSES)
        run(images, tmp_path / "b", "--evaluate", merged, grafts=grafts[1:])
        found, expected = (torch.load(tmp_path / each / "evaluation.pt") for each in "ab")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_initial_weights_of_bare_and_of_patched_runs(images: Path, tmp_path: Path) -> None:
    first = torch.load(run(images, tmp_path / "first", "--epochs", 1) / "weights-0.pt")
    path = tmp_path / "first.pth"
    torch.save(first, path)
    with Grafting(["witness"]) as grafting:
        model = timm.create_model("test_resnet", num_classes=CLASSES, checkpoint_path=str(path))
        assert grafting.model is model
    assert all(torch.equal(value, first[key]) for key, value in model.state_dict().items())

    bare = timm.create_model("test_resnet", num_classes=CLASSES)
    torch.save(bare.state_dict(), path)
    with Grafting(["witness"]):
        model = timm.create_model("test_resnet", num_classes=CLASSES, checkpoint_path=str(path))
    assert torch.equal(model.fc.weight, bare.fc.weight)


def test_one_model_at_a_time(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path, "--teacher", "test_vit", "--epochs", 1)
    with Grafting(["rsc:layer=layer4"]) as grafting:
        first = timm.create_model("test_resnet")
        other = timm.models.create_model("test_vit")
        assert [len(fxgraft.grafts(model)) for model in (first, other)] == [1, 0]
        del first
        again = timm.create_model("test_resnet")
        assert grafting.model is again
        assert len(fxgraft.grafts(again)) == 1


def test_teachers_of_distillation_are_left_alone() -> None:
    distillation = pytest.importorskip("timm.task.distillation", reason="this version of timm has no tasks")
    with Grafting(["rsc:layer=layer4"]):
        assert fxgraft.grafts(distillation.create_model("test_resnet")) == []


def test_what_compares_rows_is_refused_where_images_share_them() -> None:
    tasks = pytest.importorskip("timm.task", reason="this version of timm has no tasks")
    with Grafting(["mixmo"]):
        model = timm.create_model("test_resnet", num_classes=CLASSES)
        teacher = tasks.distillation.create_model("test_resnet", num_classes=CLASSES)
        with pytest.raises(fxgraft.ConfigError, match=r"'mixmo' has several images share.*teacher"):
            tasks.LogitDistillationTask(model, teacher)
        with pytest.raises(fxgraft.ConfigError, match=r"'mixmo' has several images share.*Jensen-Shannon"):
            timm.loss.JsdCrossEntropy()(torch.zeros(3, 2), torch.tensor([0, 1, 1]))


def test_losses_in_evaluation_and_of_others_are_what_they_were() -> None:
    y = torch.tensor([0, 1])
    criterion = nn.CrossEntropyLoss()
    with Grafting(["witness"]):
        assert criterion(torch.zeros(2, 2), y) < TERM
        model = timm.create_model("test_resnet", num_classes=CLASSES)
        assert criterion(torch.zeros(2, 2), target=y) > TERM
        jsd = timm.loss.JsdCrossEntropy(num_splits=2)  # which calls another one for the first half
        assert TERM < jsd(torch.zeros(4, 2), y.repeat(2)) < 2 * TERM
        assert judged[-1] == 4
        with torch.no_grad():
            assert criterion(torch.zeros(2, 2), y) < TERM
        model.eval()
        assert criterion(torch.zeros(2, 2), y) < TERM


def test_mixing_outside_of_a_loop_is_what_it_was() -> None:
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 1, 0])
    model = fxgraft.patch(timm.create_model("test_resnet", num_classes=CLASSES), "witness")
    with Grafting(["witness"]):
        mixed, soft = timm.data.Mixup(num_classes=CLASSES)(x.clone(), y)
        assert soft.shape == (4, CLASSES)
        with fxgraft.targets(y):  # which say it for the whole block
            timm.data.Mixup(num_classes=CLASSES)(x.clone(), y)
            model(mixed)
    assert torch.equal(seen[-1][0], y)


def test_afterwards_timm_is_as_it_was() -> None:
    places = (
        timm,
        timm.models,
        timm.data,
        timm.data.Mixup,
        timm.scheduler,
        timm.scheduler.scheduler_factory,
        timm.scheduler.scheduler.Scheduler,
        timm.loss.SoftTargetCrossEntropy,
        nn.CrossEntropyLoss,
        timm.utils,
    )
    before = [dict(vars(place)) for place in places]
    with Grafting(["witness"]):
        assert [dict(vars(place)) != old for place, old in zip(places, before, strict=True)] == [True] * len(
            places
        )
    assert [dict(vars(place)) for place in places] == before
    assert sys.argv[:1] != [str(SCRIPT)]


ERRORS: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing": ((), "no script to run.*python -m fxgraft.timm train.py"),
    "no graft": (("SCRIPT", "x"), "nothing to graft.*--graft rsc"),
    "no value": (("SCRIPT", "--graft"), "--graft is the last word"),
    "no file": (("SCRIPT", "--graft-file"), "--graft-file is the last word"),
    "a file that is not there": (("SCRIPT", "--graft-file", "nowhere.yaml"), "cannot be read: No such file"),
    "no method in a file": (("SCRIPT", "IMAGES", "--graft-file=GRAFTS"), "no method 'rcs'.*'rsc'"),
    "not there": (("--graft", "rsc", "nowhere.py"), r"no script 'nowhere\.py'.*timm's repository"),
    "option before": (("--epochs", "3", "SCRIPT", "--graft", "rsc"), "'--epochs' stands before the script"),
    "grammar": (("SCRIPT", "--graft", "rsc:layer"), "not key=value.*METHOD:key=value.*for example rsc"),
    "no method": (("SCRIPT", "IMAGES", "--graft", "rcs"), "no method 'rcs'.*'rsc'"),
    "no option": (("SCRIPT", "IMAGES", "--graft=rsc:leyer=3"), "leyer"),
    "no model": (("EMPTY", "--graft", "rsc"), "nothing was grafted: it built no model.*fxgraft.patch"),
    "torchscript": (("SCRIPT", "IMAGES", "--torchscript", "--graft", "rsc"), "TorchScript.*--torchcompile"),
    "another model": (
        ("SCRIPT", "IMAGES", "--resume", "WEIGHTS", "--graft", "witness", "--model", "test_vit"),
        "does not fit the model with witness.*Missing key",
    ),
    "other grafts": (
        ("SCRIPT", "IMAGES", "--resume", "WEIGHTS", "--graft", "rsc"),
        "has tensors of 'witness'.*--graft witness",
    ),
}


@pytest.mark.parametrize("what", ERRORS)
def test_mistakes_are_one_plain_message(
    what: str,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.py").write_text("print('done')")
    words, message = ERRORS[what]
    places = {
        "SCRIPT": SCRIPT,
        "IMAGES": images,
        "EMPTY": tmp_path / "empty.py",
        "WEIGHTS": tmp_path / "old.pth",
        "--graft-file=GRAFTS": f"--graft-file={tmp_path / 'grafts.yaml'}",
    }
    (tmp_path / "grafts.yaml").write_text("- {method: rcs, layer: layer4}")
    if "WEIGHTS" in words:
        with Grafting(["witness"]):
            weights = timm.create_model("test_resnet", num_classes=CLASSES).state_dict()
        torch.save({"state_dict": weights, "epoch": 0}, tmp_path / "old.pth")
    arguments = [str(places.get(word, word)) for word in words]
    if "IMAGES" in words:
        arguments += ["--output", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["fxgraft.timm", *arguments])
    with pytest.raises(SystemExit) as left:
        launching.main()
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert re.search(f"Error: .*{message}", error, re.DOTALL), error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("words", "says"), [(["--help"], "python -m fxgraft.timm SCRIPT"), ([str(SCRIPT), "-h"], "--mixup")]
)
def test_help(
    words: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fxgraft.timm", *words])
    with pytest.raises(SystemExit) as left:
        sys.exit(launching.main())
    assert not left.value.code
    assert says in capsys.readouterr().out


def start(*words: object, **environment: str) -> str:
    """Run a command in a process of its own; return what it wrote."""
    source = str(Path(fxgraft.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_as_a_module_that_the_script_imports(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that the script has taken from timm before are seen to, too."""
    monkeypatch.setenv("FXGRAFT_GRAFTS", "witness; rsc:layer=layer4")
    given = [str(images), "--output", str(tmp_path), "--device-modules", "fxgraft.timm.auto", "--mixup", "1"]
    try:
        with launching._as_program(SCRIPT, [*given, "--no-prefetcher"]):
            runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        grafting = sys.modules.pop("fxgraft.timm.auto")._grafting
        grafting.__exit__()
        atexit.unregister(grafting.warn_unless_used)
    for (target, loss), (labels, _) in zip(steps_of(tmp_path), seen, strict=True):
        assert torch.equal(labels, target)
        assert loss > TERM
    assert [progress for _, progress in seen] == [0, 0.25, 0.5, 0.75]


def test_the_module_wants_grafts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FXGRAFT_GRAFTS", raising=False)
    with pytest.raises(fxgraft.ConfigError, match="FXGRAFT_GRAFTS names no graft"):
        runpy.run_module("fxgraft.timm.auto")


def test_unused_grafts_of_the_module_warn() -> None:
    with Grafting(["rsc"]) as grafting, pytest.warns(fxgraft.FxgraftWarning, match="Nothing was grafted"):
        grafting.warn_unless_used()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.sweep
def test_two_processes(images: Path, tmp_path: Path) -> None:
    start(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "fxgraft.timm"),
        *(SCRIPT, images, "--output", tmp_path, "--epochs", 1, "--no-prefetcher", "--mixup", 1),
        *("--graft", "mixmo", "--graft", "rsc:layer=layer4", "--graft", "selfnorm"),
    )
    one, other = (torch.load(tmp_path / f"weights-{rank}.pt") for rank in range(2))
    trained = [key for key in one if "running" not in key and "num_batches" not in key]
    assert any("graft_mixmo" in key for key in trained)
    assert all(torch.equal(one[key], other[key]) for key in trained)


@pytest.mark.skipif(SCRIPTS is None, reason="FXGRAFT_TIMM_SCRIPTS names no folder with timm's train.py")
@pytest.mark.parametrize("graft", ["rsc:layer=layer4", "mixmo", "selfnorm"])
@pytest.mark.parametrize(
    "more", [(), ("--mixup", "0.5", "--no-prefetcher"), ("--model-ema", "--grad-accum-steps", "2")]
)
def test_timms_own_script(graft: str, more: tuple[str, ...], images: Path, tmp_path: Path) -> None:
    start(
        *("-m", "fxgraft.timm", Path(str(SCRIPTS)) / "train.py", images, "--graft", graft),
        *("--model", "test_resnet", "--num-classes", CLASSES, "--input-size", 3, 32, 32, "-b", BATCH),
        *(
            "--device",
            "cpu",
            "-j",
            0,
            "--epochs",
            1,
            "--warmup-epochs",
            0,
            "--lr",
            0.05,
            "--val-split",
            "train",
        ),
        *("--output", tmp_path, "--experiment", "run", *more),
    )
    out = tmp_path / "stock.safetensors"
    if graft == "selfnorm":
        return  # which cannot be merged
    merge_file(tmp_path / "run", out, grafts=[graft])
    timm.create_model("test_resnet", num_classes=CLASSES, checkpoint_path=str(out))
