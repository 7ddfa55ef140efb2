"""The command line: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass

import pytest
from tools.readme import own_methods
from typer.testing import CliRunner

import fxgraft
from fxgraft.bench.overhead_report import OverheadReport
from fxgraft.cli import completion
from fxgraft.cli.commands import app
from fxgraft.cli.method_facts import option_docs
from fxgraft.errors import ConfigError
from fxgraft.models import build_model, split_name
from fxgraft.patches import registry

ANSI = re.compile(r"\x1b\[[0-9;]*m")
BENCH = ("bench", "resnet18", "--batch", "2", "--size", "32", "--rounds", "1", "--min-run-time", "0")


def run(*arguments: str, code: int = 0):
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return ANSI.sub("", result.stdout), ANSI.sub("", result.stderr)


def test_version_names_the_libraries():
    out, _ = run("--version")
    assert re.fullmatch(r"fxgraft \S.* \(torch \S+, timm \S+, Python \S+\)\n", out)


def test_help_lists_the_commands():
    out, _ = run("--help")
    assert all(command in out for command in ("demo", "sites", "info", "bench"))


def test_sites_of_a_model():
    out, err = run("sites", "resnet18", "layer4*", "--input-size", "64")
    assert "layer4" in out
    assert "layer1" not in out
    assert "512×2×2" in out
    assert err == ""


def test_sites_are_grouped_by_stage_and_say_which_methods_go_there():
    from fxgraft.cli.placing import NOTHING

    small = ("sites", "test_resnet", "--input-size", "64")
    rows = json.loads(run(*small, "--json")[0])
    every = json.loads(run(*small, "--all", "--json")[0])
    assert {row["op"] for row in every} - {row["op"] for row in rows} <= NOTHING
    assert [row for row in every if row["op"] not in NOTHING] == rows
    assert [row["name"] for row in every] == fxgraft.sites(
        build_model("test_resnet"), input_size=(3, 64, 64)
    ).names
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    assert stages[-2:] == ["stage 4, or -1: up to layer4", "behind the stages"]
    for method in ("rsc", "selfnorm"):
        graft = fxgraft.patch(build_model("test_resnet"), method, input_size=(3, 64, 64))
        units = list(fxgraft.grafts(graft)[0].units)
        assert [row["name"] for row in rows if method in row["default_of"]] == units
    assert next(row for row in rows if row["name"] == "fc")["default_of"] == ["mixmo"]
    joins = json.loads(run(*small[:2], "residual", "--json")[0])
    assert {row["stage"] for row in joins} == {""}, "positions of blocks are not listed among the stages"
    shown, _ = run(*small)
    assert re.search(r"\d+ rows that compute nothing are left out; --all shows them", shown)
    assert re.search(r"layer4 .*2×\d+×2×2.*rsc", shown)


def test_what_is_suggested_for_small_images_and_for_large_ones():
    def suggested(side):
        out, _ = run("suggest", "test_resnet", "--size", str(side), "--classes", "7", "--json")
        return {each["method"]: each for each in json.loads(out)}

    small, large = suggested(64), suggested(96)
    assert small.keys() == fxgraft.methods().keys()
    assert small["rsc"]["maps"] == [[2, 2]]
    assert not small["rsc"]["advised"]
    assert small["rsc"]["reason"] == "maps of 2×2 at layer4; it wants 3×3 or more"
    assert large["rsc"]["advised"]
    assert large["rsc"]["reason"] == ""
    assert "larger than the class maps of 2×2" in small["diversification"]["reason"]
    assert large["diversification"]["reason"] == "maps of 3×3 at layer4; it wants 7×7 or more"
    model = build_model("test_resnet", 7)
    before = sum(p.numel() for p in model.parameters())
    for method in ("selfnorm", "mixmo"):
        patched = fxgraft.patch(build_model("test_resnet", 7), method, input_size=(3, 96, 96))
        assert large[method]["parameters"] == sum(p.numel() for p in patched.parameters()) - before
    assert large["selfnorm"]["cost"] == "medium"
    assert "you say where" in large["taps"]["reason"]


def test_a_head_that_is_given_its_map_is_judged_by_the_map():
    """The head of timm's ConvNeXt is a module, whose own argument is the last stage's map."""
    out, _ = run("suggest", "test_convnext", "--size", "96", "--json")
    (block,) = [each for each in json.loads(out) if each["method"] == "diversification"]
    assert block["sites"] == ["stages.3"]
    assert block["maps"] == [[3, 3]]
    assert block["reason"] == "maps of 3×3 at stages.3; it wants 7×7 or more"


def test_suggestions_are_one_table():
    out, _ = run("suggest", "test_vit")
    assert re.search(r"rsc .* tokens .*yes", out)
    assert re.search(r"diversification .*no: The", out)
    assert "low below 1.1" in out


def test_sites_of_torchvision():
    out, _ = run("sites", "torchvision/resnet18", "layer4", "--input-size", "64")
    assert "layer4" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sites", "resnet5o"), r"timm has no model 'resnet5o'.*'resnet50'"),
        (("sites", "fcn_resnet50"), r"torchvision has it: 'torchvision/fcn_resnet50'"),
        (("sites", "resnet18.nope"), r"no weights tagged 'nope'"),
        (("sites", "torchvision/resnet18", "layr4"), r"layer4"),
        (("sites", "torchvision/resnet5o"), r"torchvision has no model 'resnet5o'.*'resnet50'"),
        (("sites", "keras/resnet50"), r"Write 'resnet50', 'timm/resnet50' or 'torchvision/resnet50'"),
        (("info", "rcs"), r"no method 'rcs'.*'rsc'"),
        (("bench", "resnet18"), r"at least one --graft"),
        (("bench", "resnet18", "--graft", "rsc:"), r"a colon and no options"),
        ((*BENCH, "--graft-file", "nowhere.yaml"), r"cannot be read: No such file"),
        ((*BENCH, "--graft", "rcs"), r"'rsc'"),
        ((*BENCH, "--graft", "rsc:layer=layer9"), r"layer9"),
        ((*BENCH, "--graft", "rsc:batch_share=2"), r"batch_share"),
        ((*BENCH, "--graft", "rsc", "--device", "warp"), r"no device 'warp'"),
    ],
)
def test_errors_are_one_plain_message_and_exit_code_2(arguments, message):
    out, err = run(*arguments, code=2)
    assert re.search(message, err, re.DOTALL)
    assert "Error: " in err
    assert "Traceback" not in err + out


def test_bench_refuses_a_file_it_cannot_write(tmp_path):
    blocker = tmp_path / "file"
    blocker.touch()
    _, err = run(*BENCH, "--graft", "rsc", "--out", str(blocker / "inside.json"), code=2)
    assert "Cannot write" in err
    _, err = run(*BENCH, "--graft", "rsc", "--out", str(tmp_path / "numbers.csv"), code=2)
    assert "does not end in .json" in err
    assert not (tmp_path / "numbers.csv").exists()


def test_errors_of_use_are_typers_own():
    _, err = run("bench", "resnet18", "--batch", "many", code=2)
    assert "Invalid value for '--batch'" in err


def test_info_without_a_method_lists_all():
    out, _ = run("info")
    for name in fxgraft.methods():
        assert name in out


def test_info_documents_every_option_of_every_method():
    for name, method in fxgraft.methods().items():
        out, _ = run("info", name)
        assert method.title in out
        assert method.url in out
        documented = option_docs(method)
        for field in dataclasses.fields(method):
            assert field.name in out
            assert documented.get(field.name), f"{name} does not document its option {field.name!r}"


SECTIONS = ("idea", "equation", "where", "acts", "cost", "works with", "hurts", "diagnostics", "reference")


def test_a_card_has_every_section_and_stands_for_itself():
    for name, method in own_methods().items():
        out, _ = run("info", name)
        said = [each for each in SECTIONS if re.search(rf"^{each} +\S", out, re.MULTILINE)]
        missing = {"taps": {"equation", "diagnostics"}}.get(name, set())
        assert set(SECTIONS) - set(said) == missing, name
        assert not re.search(r"see (the )?(above|below|class|docstring)", out, re.IGNORECASE), name
        assert all(each in out for each in method.measures)


def test_what_a_card_says_of_diagnostics_is_what_they_are():
    """Every name that a method gives is explained, and every explained name is given by some options."""
    from system.contract.cases import SMALL, Cell, batch

    for method in own_methods():
        declared, found = fxgraft.methods()[method].measures, set()
        options = {"selfnorm": {"gates": 2}, "crossnorm": {"consistency": True, "p": 1.0}}.get(method)
        cell = Cell(method, SMALL)
        model = cell.patch(SMALL.build(), None if options is None else cell.options(**options))
        x, y = batch(SMALL)
        if method == "gam":
            fxgraft.gam.gam_losses(model, x, x.flip(0))
        else:
            fxgraft.loss(model, model(x, target=y), y)
        for name in fxgraft.diagnostics(model):
            found |= {
                each for each in declared if re.fullmatch(re.sub("<.*>", ".*", each), name.split(".", 1)[1])
            }
            assert any(
                re.fullmatch(re.sub("<.*>", ".*", each), name.split(".", 1)[1]) for each in declared
            ), name
        assert found == set(declared)


def test_the_card_of_somebody_elses_method_leaves_out_what_it_does_not_say(monkeypatch):
    monkeypatch.setattr(registry, "_registry", dict(fxgraft.methods()))

    @fxgraft.register("foreign")
    @dataclass(frozen=True, kw_only=True)
    class Foreign(fxgraft.Patch):
        """Adds one to everything.

        Nobody knows why.

        Args:
            size: how much.
        """

        hurts = "always"
        size: int = 1

        def place(self, backbone, make):
            return []

    out, _ = run("info", "foreign")
    assert re.search(r"^idea +Adds one to everything\.", out, re.MULTILINE)
    assert "Nobody knows why." in out
    assert re.search(r"^hurts +always", out, re.MULTILINE)
    assert "how much." in out
    assert not [each for each in ("equation", "cost", "reference", "works with", "preset") if each in out]

    @fxgraft.register("silent")
    @dataclass(frozen=True, kw_only=True)
    class Silent(fxgraft.Patch):
        def place(self, backbone, make):
            return []

    out, _ = run("info", "silent")
    assert "idea" not in out
    assert "Silent(" not in out


def test_option_docs_reads_google_docstrings_and_inherits():
    class Base:
        """Base.

        Args:
            shared: from the base.
        """

    class Method(Base):
        """Method.

        Args:
            first: one line,
                and more: with a colon.
            second (int): typed.

        Raises:
            ValueError: never.
        """

    assert option_docs(Method) == {
        "shared": "from the base.",
        "first": "one line, and more: with a colon.",
        "second": "typed.",
    }


def test_bench_prints_a_table_and_writes_the_same_numbers(tmp_path):
    file = tmp_path / "deep" / "bench.json"
    grafts = tmp_path / "grafts.yaml"
    grafts.write_text("- {method: rsc, layer: layer4}")
    out, _ = run(*BENCH, "--graft-file", str(grafts), "--out", str(file))
    report = OverheadReport.from_json(file.read_text())
    assert report.patches == ("rsc:layer=layer4",)
    assert json.loads(file.read_text())["batch"] == 2
    for row in report.rows:
        assert f"{row.seconds.median * 1e3:.2f}" in out


def test_bench_says_how_far_it_is_and_how_long_it_takes_where_no_bar_can_be_drawn():
    arguments = [each for each in BENCH if each not in ("--rounds", "1", "--min-run-time", "0")]
    out, err = run(*arguments, "--quick", "--graft", "rsc:layer=layer4")
    assert "rounds: 3;" in out
    assert re.search(r"^measuring: 1 of 18, about \d+ s left$", err, re.MULTILINE)
    assert err.splitlines()[-1].startswith("measuring: 18 of 18")


@pytest.mark.parametrize(
    ("complete", "begun", "expected"),
    [
        (completion.complete_method, "r", ["rsc"]),
        (completion.complete_model, "resnet50d", ["resnet50d"]),
        (completion.complete_model, "torchvision/resnet1", ["torchvision/resnet101"]),
        (completion.complete_spec, "rs", ["rsc"]),
        (completion.complete_spec, "rsc:layer=layer4,sco", ["rsc:layer=layer4,scope="]),
    ],
)
def test_names_complete(complete, begun, expected):
    found = complete(begun)
    assert [each for each in expected if each not in found] == []
    assert all(each.startswith(begun.partition(",")[0]) for each in found)


def test_shells_are_offered_completion():
    out, _ = run("--help")
    assert "--install-completion" in out


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("resnet50", ("timm", "resnet50")),
        ("timm/resnet50", ("timm", "resnet50")),
        ("torchvision/resnet50", ("torchvision", "resnet50")),
        ("hf-hub:timm/resnet50", ("timm", "hf-hub:timm/resnet50")),
    ],
)
def test_split_name(name, parts):
    assert split_name(name) == parts


def test_build_model_sets_classes_in_both_libraries():
    assert build_model("resnet18", 7).get_classifier().out_features == 7
    assert build_model("torchvision/resnet18", 7).fc.out_features == 7


def test_build_model_fits_models_tied_to_one_size():
    assert build_model("vit_tiny_patch16_224", 3, input_size=64).patch_embed.img_size == (64, 64)
    assert build_model("torchvision/vit_b_16", 3, input_size=32).image_size == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet18", "num_classes": -1}, "num_classes must be 0 or more"),
        ({"name": "resnet18", "bogus": 1}, "timm could not build 'resnet18'.*bogus"),
        ({"name": "torchvision/vit_b_16", "input_size": 33}, "could not build 'vit_b_16'"),
        ({"name": "torchvision/fcn_resnet50", "num_classes": 7, "pretrained": True}, "keeps the classes"),
        ({"name": "torchvision/"}, "names no model"),
    ],
)
def test_build_model_refuses(arguments, message):
    with pytest.raises(ConfigError, match=message):
        build_model(**arguments)
