"""Comparisons of a few steps: what is paired, kept, resumed, tuned and refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch import nn

import fxgraft
from fxgraft.comparison import checks, experiment, runs
from fxgraft.comparison.runs import Job, Setup, Variant, carry_out, parse_variant
from fxgraft.comparison.training import Images, Training
from fxgraft.errors import ConfigError, FxgraftError, RecipeError, SiteError
from unit.comparison.images import write_classes
from unit.comparison.small import Small

ROOT = Path(__file__).parents[3]


class Plain(Small):
    """The same without a norm."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.norm = nn.Identity()  # type: ignore[assignment]


def without_times(records):
    return [{k: v for k, v in each.items() if k not in ("seconds", "step_seconds")} for each in records]


def test_pairs_share_weights_batches_and_transforms(run):
    """A graft that does nothing yet is the bare network, to the bit."""
    before = torch.get_rng_state()
    found = run(grafts=["rsc:start=1.0", "rsc"])
    assert torch.equal(torch.get_rng_state(), before)
    for bare, same in found.pairs("rsc:start=1.0"):
        assert bare["epoch_loss"] == pytest.approx(same["epoch_loss"], rel=1e-6)
        assert bare["scores"] == pytest.approx(same["scores"], rel=1e-5)
    assert any(bare["epoch_loss"] != other["epoch_loss"] for bare, other in found.pairs("rsc"))
    assert [each.variant for each in found.verdicts] == ["rsc:start=1.0", "rsc"]
    assert found.complete
    assert all(len(each["epoch_validation"]) == 1 and each["steps"] == 3 for each in found.records)
    assert all(
        "rsc.muted" in each["epoch_diagnostics"][0] for each in found.records if each["variant"] == "rsc"
    )


def test_it_goes_on_where_it_was_interrupted(run, tmp_path):
    def stop(result, left):
        if len(result.records) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(progress=stop)
    file = tmp_path / "out" / "runs.jsonl"
    kept = file.read_text()
    assert kept.count("\n") == 3
    file.write_text(kept + kept.splitlines()[0][:40])  # a line that a killed process has half written
    calls = []
    again = run(progress=lambda result, left: calls.append(left))
    assert len(calls) == 1
    whole = run(out=tmp_path / "other")
    assert without_times(again.records) == without_times(whole.records)
    assert run(progress=calls.append).complete
    assert len(calls) == 1


def test_more_grafts_and_seeds_add_what_is_missing(run):
    first = run()
    more = run(grafts=["rsc", "crossnorm:layers=input"], seeds=3)
    assert more.records[:4] == first.records
    assert len(more.records) == 9
    assert run(seeds=[2], grafts="rsc").seeds == [2]


def test_another_protocol_is_refused_by_name(run, data):
    run(seeds=1)
    with pytest.raises(
        ConfigError, match=r"another protocol:\n  size: 16 there, 32 now\n  training.epochs: 1 th"
    ):
        run(seeds=1, size=32, training={"epochs": 2, "batch_size": 8})
    (data / "red" / "dots" / "0.png").unlink()
    with pytest.raises(ConfigError, match=r"images.red: 16 there, 15 now"):
        run(seeds=1)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("protocol.json", None, "holds runs without their protocol"),
        ("protocol.json", "{", r"protocol.json is damaged"),
        ("runs.jsonl", "{\n", r"runs.jsonl is damaged in line 1: .*\nRemove that line"),
        ("runs.jsonl", "{}\n", r"runs.jsonl is damaged in line 1: it is no record of a run"),
        ("runs.jsonl", "[1]\n", r"runs.jsonl is damaged in line 1: it is no record of a run"),
    ],
)
def test_a_damaged_folder_is_refused(run, tmp_path, name, text, message):
    run(seeds=1)
    file = tmp_path / "out" / name
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        run(seeds=1)


def test_the_damaged_line_is_named(run, tmp_path):
    run(seeds=1)
    file = tmp_path / "out" / "runs.jsonl"
    first, second = file.read_bytes().splitlines()
    file.write_bytes(first + b"\n" + second.replace(b'"task"', b'"t\xff"') + b"\n")
    with pytest.raises(ConfigError, match=r"damaged in line 2: .*utf-8"):
        run(seeds=1)
    with file.open("ab") as cut_off:
        cut_off.write(b"{")
    with pytest.raises(ConfigError, match=r"damaged in line 2: .*utf-8"):
        run(seeds=1)
    file.write_bytes(first + b"\n" + second + b"\n{")  # cut off: done again
    assert run(seeds=1).complete


@pytest.mark.parametrize("name", ["protocol.json", "runs.jsonl"])
def test_folders_in_place_of_its_files(run, tmp_path, name):
    run(seeds=1)
    (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / name).mkdir()
    with pytest.raises(ConfigError, match=rf"Cannot read or write .*{name}"):
        run(seeds=1)


def test_a_file_in_place_of_the_folder(run, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(ConfigError, match=r"Cannot write to .*out': File exists.\nPass another out="):
        run(seeds=1)


@pytest.mark.parametrize(
    ("model", "side"), [("timm/test_resnet.r160_in1k", 160), ("torchvision/resnet18", 224), (Small, 224)]
)
def test_images_have_the_size_that_the_model_is_made_for(model, side):
    assert experiment._own_size(model) == side


def test_two_comparisons_in_one_folder(run, tmp_path):
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / ".lock"),
        pytest.raises(ConfigError, match="Another comparison is writing"),
    ):
        run()


def test_a_full_disk_keeps_what_is_finished(run, tmp_path, monkeypatch):
    run(seeds=1)
    kept = (tmp_path / "out" / "runs.jsonl").read_text()
    opened = Path.open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, text):
            self.file.write(text[:10])
            self.file.flush()
            raise OSError(28, "No space left on device")

    def open_(path, mode="r", *args, **kwargs):
        file = opened(path, mode, *args, **kwargs)
        return Full(file) if mode == "ab" and path.name == "runs.jsonl" else file

    monkeypatch.setattr(Path, "open", open_)
    with pytest.raises(ConfigError, match=r"Cannot write .*No space left on device.\nThe runs before this"):
        run()
    monkeypatch.undo()
    assert (tmp_path / "out" / "runs.jsonl").read_text() == kept
    assert run().complete


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"grafts": ()}, ConfigError, "Nothing to compare"),
        ({"grafts": ["rsc", "rsc"]}, ConfigError, r"'rsc' is given twice(.|\n)*Leave one of the two out"),
        ({"grafts": "bare"}, ConfigError, "'bare' is given twice"),
        ({"grafts": "rsc:layer=layer9"}, SiteError, "layer9"),
        ({"grafts": "rcs"}, FxgraftError, "no method 'rcs'"),
        ({"grafts": "adapt_batchnorm + rsc"}, ConfigError, "'rsc' behind an adaptation"),
        ({"grafts": "selfnorm:position=pre"}, FxgraftError, "selfnorm|SelfNorm|residual"),
        ({"model": "resnet1800"}, ConfigError, "resnet1800"),
        ({"model": "nowhere:build"}, ConfigError, r"Cannot import 'nowhere:build'"),
        ({"pretrained": True}, ConfigError, "pretrained=True asks for a library's weights, and <class"),
        ({"model": "math:floor"}, ConfigError, "math:floor. could not be called with num_classes=2"),
        ({"seeds": []}, ConfigError, "seeds is a number of at least 1"),
        ({"seeds": [1, 1]}, ConfigError, "seeds is a number of at least 1"),
        ({"seeds": [10_000]}, ConfigError, "that of tuning"),
        ({"metric": "speed"}, ConfigError, "metric must be one of accuracy"),
        ({"interest": 0}, ConfigError, "interest must be above 0"),
        ({"workers": 0}, ConfigError, "workers must be at least 1"),
        ({"device": "toaster"}, ConfigError, "no device 'toaster'"),
        ({"backend": "slurm"}, ConfigError, 'backend must be "loky", "ray" or "dask"'),
        ({"training": {"epochs": 0}}, ConfigError, "epochs must be a whole number of at least 1"),
        ({"training": {"lr": 0.0}}, ConfigError, "lr must be a positive number"),
        ({"training": {"opt": "magic"}}, ConfigError, "no optimizer 'magic'"),
        ({"training": {"sched": "magic"}}, ConfigError, "sched must be one of 'cosine'"),
        ({"training": {"sched": "step"}}, ConfigError, "sched must be one of 'cosine'"),
        ({"per_class": 0}, ConfigError, "per_class must be a whole number of at least 1, got 0"),
        ({"test_per_class": True}, ConfigError, "test_per_class must be a whole number"),
        ({"training": {"select": "test"}}, ConfigError, "select must be one of 'last', 'best'"),
        (
            {"training": {"hflip": 2}},
            ConfigError,
            r"hflip must be a share in \[0, 1\].*\nLeave it out for the default, 0.5",
        ),
        ({"training": {"train_crop": 0}}, ConfigError, "train_crop is a share"),
        ({"training": {"train_crop": "0.5"}}, ConfigError, "train_crop is a share"),
        ({"training": {"clip_grad": 0}}, ConfigError, "clip_grad must be a positive number"),
        ({"training": {"clip_grad": -1.0}}, ConfigError, "clip_grad must be a positive number"),
        ({"training": {"momentum": 1.5}}, ConfigError, "momentum must be a share"),
        ({"training": {"model_ema_decay": 2}}, ConfigError, "model_ema_decay must be a share"),
        ({"training": {"weight_decay": -1}}, ConfigError, "weight_decay must be a number of at least 0"),
        ({"training": {"color_jitter": "a"}}, ConfigError, "color_jitter must be a number of at least 0"),
        ({"training": {"warmup_epochs": 20}}, ConfigError, "warmup_epochs must be a whole number of at most"),
        (
            {"training": {"warmup_epochs": "1"}},
            ConfigError,
            "warmup_epochs must be a whole number of at most",
        ),
        ({"training": {"opt": 3}}, ConfigError, "opt must be a name, got 3"),
        ({"training": {"opt": "sgdd"}}, ConfigError, "timm has no optimizer 'sgdd'"),
        ({"training": {"speed": 2}}, ConfigError, "no setting 'speed'"),
        ({"training": {"batch_size": 64}}, ConfigError, "28 training images do not fill a batch of 64"),
        ({"tune": {"speed": [2]}}, ConfigError, "no setting 'speed'"),
        ({"tune": {"lr": 0.1}}, ConfigError, r"tune takes values to try.*got lr=0.1"),
        ({"tune": {"lr": []}}, ConfigError, r"tune takes values to try.*got lr=\[\]"),
        ({"tune": {"batch_size": [8, 64]}}, ConfigError, "28 training images do not fill a batch of 64"),
        (
            {"per_class": 1, "training": {"batch_size": 2, "select": "best"}},
            ConfigError,
            'every class has one image only.\nLeave select="best" out',
        ),
        (
            {"model": Plain, "grafts": "adapt_batchnorm"},
            ConfigError,
            "adapts BatchNorm, and the model has none",
        ),
        ({"tune": [1]}, ConfigError, r"tune takes values to try.*got \[1\]"),
        ({"size": 0}, ConfigError, "size is the side of the images in pixels, at least 1; got 0"),
        ({"seeds": [-1]}, ConfigError, r"A seed is a whole number from 0 to 2\*\*32 - 1"),
        ({"grafts": "gam:layers=features", "adapt_steps": -3}, ConfigError, "adapt_steps must be at least 1"),
        ({"adapt_lr": float("nan")}, ConfigError, "adapt_lr a positive number"),
        ({"model_options": {"pretrained": True}}, ConfigError, "pretrained, which the comparison sets"),
        ({"model_options": {"act_layer": torch.nn.ReLU}}, ConfigError, "what the protocol's file cannot"),
        ({"seeds": "5"}, ConfigError, r"seeds is declared as int \| Sequence\[int\], and got '5' \(str\)"),
        ({"training": 3}, ConfigError, "training is declared as Training"),
        ({"grafts": 3}, ConfigError, "grafts is declared as str"),
        ({"interest": "a"}, ConfigError, r"interest is declared as float, and got 'a'"),
        ({"level": "0.95"}, ConfigError, "level is declared as float, and got '0.95'"),
        ({"level": True}, ConfigError, "level is declared as float, and got True"),
        ({"workers": "2"}, ConfigError, r"workers is declared as int \| None, and got '2'"),
        ({"hold_out": 3}, ConfigError, "hold_out is declared as"),
        ({"model_options": [1]}, ConfigError, "model_options is declared as"),
        ({"train": 3}, ConfigError, "train is declared as Callable"),
        ({"measure": "a"}, ConfigError, "measure is declared as Callable"),
        ({"progress": 3}, ConfigError, "progress is declared as Callable"),
        ({"adapt_lr": "a"}, ConfigError, "adapt_lr is declared as float"),
        ({"out": 3}, ConfigError, "out is declared as"),
        ({"weights": "nowhere.pth"}, RecipeError, "There is no file '.*nowhere.pth'"),
        ({"corrupt": True, "size": 24}, ConfigError, "images of 32 pixels or more"),
        ({"tune_each": True}, ConfigError, "tune_each=True has no effect without values"),
        ({"metric": "top5"}, ConfigError, "top5 is always 100 % with 2 classes"),
    ],
)
def test_bad_settings_are_found_before_the_training(run, tmp_path, monkeypatch, options, error, message):
    monkeypatch.setattr(experiment, "carry_out", lambda *_: pytest.fail("trained before it had checked"))
    with pytest.raises(error, match=message):
        run(**options)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_runs_holds_nobody_to_its_protocol(run, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "carry_out", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(size=32)
    assert run(seeds=1).protocol["size"] == 16


@pytest.mark.parametrize("package", ["scipy", "joblib", "matplotlib"])
def test_a_missing_package_is_named_first(run, monkeypatch, package):
    found = checks.importlib.util.find_spec
    monkeypatch.setattr(
        checks.importlib.util, "find_spec", lambda name: None if name == package else found(name)
    )
    with pytest.raises(ConfigError, match=rf'need {package}.*\n.*pip install "fxgraft\[compare\]"'):
        run()


def test_weights_from_a_file(run, tmp_path):
    torch.manual_seed(3)
    torch.save(Small(5).state_dict(), tmp_path / "five.pth")  # of another number of classes
    setup = Setup(model=Small, classes=2, size=16, training=Training(), weights=str(tmp_path / "five.pth"))
    built = setup.build(Variant("bare"), 0)
    torch.manual_seed(3)
    assert torch.equal(built.stem.weight, Small(5).stem.weight)  # type: ignore[union-attr]
    assert built.fc.out_features == 2  # type: ignore[union-attr]
    torch.save(Small(2, width=4).state_dict(), tmp_path / "narrow.pth")
    with pytest.raises(RecipeError, match=r"does not fit the model: of another shape are stem.weight"):
        run(weights=tmp_path / "narrow.pth")
    torch.save({"stem.weight": torch.zeros(6, 3, 3, 3), "neck.weight": torch.zeros(1)}, tmp_path / "part.pth")
    with pytest.raises(RecipeError, match=r"it lacks norm.*it adds neck.weight"):
        run(weights=tmp_path / "part.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(RecipeError, match=r"holds no weights that can be read"):
        run(weights=tmp_path / "text.pth")


def test_weights_that_cannot_be_fetched(run, monkeypatch):
    def offline(*_, **__):
        raise OSError("We couldn't connect to the hub\nand more")

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(ConfigError, match=r"could not fetch 'resnet18': .*We couldn't.*\n.*\n.*weights=FILE"):
        run(model="resnet18", pretrained=True)


def test_a_run_that_diverges_is_kept_and_counted(run):
    wild = {"epochs": 2, "batch_size": 8, "opt": "sgd", "lr": 1e30, "sched": "none"}
    found = run(training=wild)
    assert all(each["diverged"] for each in found.records)
    assert {each["scores"]["accuracy"] for each in found.records} == {0.0}
    assert {each["scores"]["nll"] for each in found.records} == {None}
    assert "2 runs diverged; 2 bare runs diverged" in found.verdicts[0].sentence()
    assert math.isfinite(run(training=wild, metric="nll").verdicts[0].difference)


def test_the_baseline_is_tuned_on_images_that_are_set_apart(run, tmp_path):
    found = run(tune={"lr": [1e-5, 1e-2]}, seeds=1, training={"epochs": 3, "batch_size": 8})
    tried = [each for each in found.records if "tuning" in each]
    assert [(each["variant"], each["tuning"]["lr"], each["seed"]) for each in tried] == [
        ("bare", 1e-5, 10_000),
        ("bare", 1e-2, 10_000),
    ]
    assert "images" not in tried[0]  # nothing was scored on the tested domain
    best = max(tried, key=lambda each: each["scores"]["accuracy"])
    assert found.tuned == {"bare": {"red": best["tuning"]}}
    # What was tuned is shown as it was used, and not as it would have been.
    lr = best["tuning"]["lr"]
    assert "lr 0.001" not in found.to_markdown()
    assert f"tuned, all variants, red: lr {lr}" in found.to_markdown()
    page = found.to_html(tmp_path / "tuned.html").read_text()
    assert "training lr<" not in page
    assert f"lr {lr}" in page
    assert len(found.records) == 4
    options = {"training": {"epochs": 3, "batch_size": 8}, "out": tmp_path / "each"}
    each = run(tune={"lr": [1e-5, 1e-2]}, seeds=1, tune_each=True, **options)
    assert {record["variant"] for record in each.records if "tuning" in record} == {"bare", "rsc"}


def test_each_domain_is_tuned_on_images_of_its_own_source(run):
    """Of one domain's images, some are set apart in the tasks of the others and tested in its own."""
    found = run(tune={"lr": [1e-5, 1e-2]}, seeds=1, hold_out="all", training={"epochs": 2, "batch_size": 8})
    for task, chosen in found.tuned["bare"].items():
        tried = [each for each in found.records if "tuning" in each and each["task"] == task]
        assert chosen == max(tried, key=lambda each: each["scores"]["accuracy"])["tuning"]
        assert {str(run["tuned"]) for run in found.records if run["task"] == task and "tuned" in run} == {
            str(chosen)
        }
    assert list(found.tuned["bare"]) == found.tasks
    assert json.loads(found.to_json())["tuned"] == found.tuned


def test_tuning_leaves_the_adaptation_out(run, monkeypatch):
    adapted = []
    before = runs._adapted
    monkeypatch.setattr(runs, "_adapted", lambda *args: adapted.append(args[-1].tuning) or before(*args))
    run(grafts="adapt_batchnorm", tune={"lr": [1e-3, 1e-2]}, tune_each=True, seeds=1)
    assert adapted == [None, None]


def test_settings_that_all_diverge_are_not_chosen(run):
    with pytest.raises(
        ConfigError, match=r"All runs of 'bare' on 'red' that should choose(?s:.*)smaller learning"
    ):
        run(tune={"lr": [1e30, 1e31]}, training={"opt": "sgd", "epochs": 2, "batch_size": 8})


def test_the_time_left_is_of_all_runs_to_come(run):
    left = []
    run(
        tune={"lr": [1e-3, 1e-2]},
        seeds=2,
        progress=lambda result, seconds: left.append((len(result.records), seconds)),
    )
    assert [count for count, _ in left] == [1, 2, 3, 4, 5, 6]
    assert all(seconds > 0 for _, seconds in left[:-1])
    assert left[-1][1] == 0


def test_a_run_that_diverged_is_better_than_none(run):
    """An overconfident network has a larger loss than a guess, which outputs that are not finite are not."""

    def confident(model, images, validation, seed):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(50 if not fxgraft.grafts(model) else math.nan)

    found = run(grafts="mixstyle", train=confident, training=None, metric="nll", seeds=3)
    assert found.verdicts[0].diverged == 3
    assert found.verdicts[0].bare > math.log(2)
    assert found.verdicts[0].word != "helps"


def test_the_baseline_has_a_name(run):
    def broken(model, images, validation, seed):
        return [math.nan if fxgraft.grafts(model) else 1.0]

    found = run(grafts="bare", baseline="rsc", train=broken, training=None)
    assert "2 rsc runs diverged" in found.verdicts[0].sentence()


def test_adaptation_shares_the_training_and_sees_no_label(run, tmp_path, monkeypatch):
    trained = []
    fitted = runs.fit
    monkeypatch.setattr(runs, "fit", lambda *args, **kwargs: trained.append(1) or fitted(*args, **kwargs))
    found = run(grafts=["adapt_batchnorm", "rsc", "rsc + adapt_batchnorm"], seeds=1)
    assert len(trained) == 2
    by_name = {each["variant"]: each for each in found.records}
    assert by_name["bare"]["epoch_loss"] == by_name["adapt_batchnorm"]["epoch_loss"]
    assert by_name["bare"]["scores"]["nll"] != by_name["adapt_batchnorm"]["scores"]["nll"]
    assert by_name["rsc"]["scores"]["nll"] != by_name["rsc + adapt_batchnorm"]["scores"]["nll"]
    alone = run(grafts=["adapt_batchnorm"], seeds=1, out=tmp_path / "alone")
    assert alone.records[1]["scores"] == by_name["adapt_batchnorm"]["scores"]
    against = run(grafts=["rsc + adapt_batchnorm"], baseline="adapt_batchnorm", seeds=1)
    assert against.verdicts[0].bare == found.score(by_name["adapt_batchnorm"])


def test_gam_adapts_after_training(run):
    found = run(grafts=["gam:layers=[norm]"], seeds=1, adapt_steps=2)
    bare, adapted = found.pairs("gam:layers=[norm]")[0]
    assert bare["epoch_loss"] == adapted["epoch_loss"]
    assert bare["scores"]["nll"] != adapted["scores"]["nll"]
    with pytest.raises(SiteError, match="neck"):
        run(grafts=["gam:layers=[neck]"])


def test_adaptations_of_one_training_know_nothing_of_each_other(run, tmp_path):
    gam = "gam:layers=[stem]"
    found = run(grafts=["gam:layers=[norm]", "adapt_batchnorm", gam], seeds=1, adapt_steps=2)
    alone = run(grafts=gam, seeds=1, adapt_steps=2, out=tmp_path / "alone")
    assert [record["scores"] for record in found.runs(gam)] == [
        record["scores"] for record in alone.runs(gam)
    ]


def test_a_training_loop_of_ones_own(run):
    seen = []

    def train(model, images, validation, seed):
        assert isinstance(images, Images)
        assert images[0][0].shape == validation[0][0].shape == (3, 16, 16)
        seen.append((type(model).__name__, seed, len(images)))
        return [0.5]

    found = run(train=train, training={"batch_size": 8})
    assert len(seen) == 4
    assert [each["epoch_loss"] for each in found.records] == [[0.5]] * 4
    assert "loop" in found.protocol["training"]


def test_the_best_epoch_and_the_average_of_the_weights(run, tmp_path):
    for number, options in enumerate(
        ({"select": "best"}, {"model_ema": True}, {"amp": True, "clip_grad": 1.0})
    ):
        found = run(seeds=1, training={"epochs": 2, "batch_size": 8, **options}, out=tmp_path / f"{number}")
        assert not found.records[0]["diverged"]


def test_corruptions_are_the_same_for_both_of_a_pair(run, monkeypatch):
    monkeypatch.setattr(runs, "CORRUPTIONS", ("impulse_noise", "glass_blur", "snow"))
    monkeypatch.setattr(runs, "SEVERITIES", (1, 5))
    found = run(grafts="rsc:start=1.0", corrupt=True, size=32, seeds=1)
    bare, same = found.pairs("rsc:start=1.0")[0]
    assert set(bare["accuracy_by_corruption"]) == {
        f"{name}, {severity}" for name in ("impulse_noise", "glass_blur", "snow") for severity in (1, 5)
    }
    assert bare["scores"] == pytest.approx(same["scores"], rel=1e-5)
    assert sum(bare["images"]) == 6 * 16


def shares(model, validation, test):
    return {"validation": len(validation), "test": len(test), "side": test[0][0].shape[-1]}


def test_further_numbers_of_a_run(run):
    found = run(seeds=1, measure=shares)
    assert [each["measured"] for each in found.records] == [
        {"validation": 4.0, "test": 16.0, "side": 16.0}
    ] * 2
    assert ":shares#" in found.protocol["measure"]


def test_few_images_of_each_class(run):
    found = run(seeds=1, per_class=5, test_per_class=3, training={"epochs": 1, "batch_size": 4})
    assert found.records[0]["images"] == [3, 3]
    assert found.records[0]["steps"] == 4  # 5 of 2 classes of 2 domains, one of each apart
    with pytest.raises(ConfigError, match=r"another protocol:\n  per_class: 5 there, None now"):
        run(seeds=1, test_per_class=3, training={"epochs": 1, "batch_size": 4})


def test_a_run_is_found_without_a_search(run):
    found = run(seeds=1)
    record = {**found.records[0], "seed": 7}
    found.add(record)
    assert found.record("bare", "red", 7) is record
    assert found.record("bare", "red", 8) is None
    assert found.tuning("bare", "red", {"lr": 1}) is None


def test_splits_and_another_test_set(run, tmp_path):
    for name in ("train", "val", "test"):
        write_classes(tmp_path / "split" / name, count=8)
    found = run(data=tmp_path / "split", hold_out=None, seeds=1, out=tmp_path / "split-out")
    assert (found.tasks, found.protocol["kind"]) == (["test"], "splits")
    found.tasks = [""]  # images given as test= have no name
    assert found.header[:2] == ["variant", "test"]


def test_variants_are_read():
    found = parse_variant("rsc:layer=layer4 +  selfnorm + adapt_batchnorm")
    assert found.text == "rsc:layer=layer4 + selfnorm + adapt_batchnorm"
    assert found.grafts == (("rsc", {"layer": "layer4"}), ("selfnorm", {}))
    assert found.adaptation == "adapt_batchnorm"
    assert parse_variant("bare + adapt_batchnorm").trained == parse_variant("bare").trained == "bare"
    assert parse_variant("gam:layers=[fc]").adaptation == {"layers": ["fc"]}


def test_result_as_text_json_and_markdown(run):
    found = run(hold_out=["red", "blue"])
    text, markdown = str(found), found.to_markdown()
    for word in ("bare", "rsc", "red", "blue", "baseline", "80 % power"):
        assert word in text
        assert word in markdown
    kept = json.loads(found.to_json())
    assert kept["verdicts"][0]["pairs"] == 4
    assert len(kept["runs"]) == 8
    assert [each.pairs for each in found.verdicts_on("red")] == [2]
    assert found.step_ratio("rsc") > 0


def test_all_devices_of_a_folder_are_named(run, tmp_path):
    found = run()
    here = found.environment["device"]
    assert found.devices == here
    lines = [json.loads(line) for line in (tmp_path / "out" / "runs.jsonl").read_text().splitlines()]
    elsewhere = [
        {**line, "device": "an accelerator"} if line["variant"] == "bare" else line for line in lines
    ]
    (tmp_path / "out" / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in elsewhere))
    found = run()
    assert set(found.devices.split(", ")) == {"an accelerator", here}
    assert found.devices in found.to_markdown()
    assert found.devices in found.to_html(tmp_path / "report.html").read_text()


def test_the_report_is_one_file_that_asks_for_nothing(run, tmp_path):
    found = run(grafts=["rsc", "crossnorm:layers=input"], hold_out=["red", "blue"])
    page = found.to_html(tmp_path / "report.html").read_text()
    for heading in (
        "Verdicts",
        "Paired differences",
        "Learning curves",
        "Diagnostics",
        "By domain",
        "By class: rsc",
        "Cost",
    ):
        assert f">{heading}</h2>" in page
    assert "What the methods do to an image" in page
    assert page.count("untrained weights") >= 2
    assert 'src="data:image/png;base64,' in page
    assert not [word for word in ("<script", "<link", 'src="http', 'href="http') if word in page]
    assert page.count("<svg") == 3
    assert found.to_html(tmp_path / "again.html").read_text() == page


def test_one_run_gives_the_same_numbers_in_any_place(data):
    setup = Setup(model=Small, classes=2, size=16, training=Training(epochs=1, batch_size=8))
    task = experiment.read_data(data, hold_out="red").tasks[0]
    job = Job((parse_variant("rsc"),), task, 0, "cpu", setup.training)
    threads = torch.get_num_threads()
    first, again = carry_out(setup, job), carry_out(setup, job)
    assert torch.get_num_threads() == threads
    assert without_times(first) == without_times(again)


@pytest.mark.sweep
@pytest.mark.parametrize("backend", ["loky", "ray"])
def test_workers_give_the_numbers_of_one_process(data, tmp_path, backend):
    """In processes of their own, on this machine or through a cluster's backend."""
    if backend == "ray":
        pytest.importorskip("ray")
    options = [
        "--model",
        "test_resnet",
        "--graft",
        "rsc",
        "--hold-out",
        "red",
        "--seeds",
        "2",
        "--size",
        "32",
    ]
    options += ["--epochs", "1", "--batch-size", "8"]
    found = []
    for number, more in enumerate((["--workers", "1"], ["--workers", "2", "--backend", backend])):
        command = [sys.executable, "-c", "from fxgraft.cli.commands import app; app()", "compare", str(data)]
        command += [*options, *more]
        out = tmp_path / str(number)
        subprocess.run([*command, "--out", str(out)], check=True, capture_output=True, cwd=tmp_path)
        records = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
        found.append(sorted(without_times(records), key=lambda each: (each["seed"], each["variant"])))
        assert (out / "report.html").exists()
    assert found[0] == found[1]


def test_a_domain_that_is_named_twice_is_tested_once(run):
    found = run(hold_out=["red", "red"], seeds=[np.int64(0)], size=np.int64(16), level=np.float32(0.05))
    assert len(found.records) == 2
    assert json.loads(found.to_json())
