"""``fxgraft compare``: options reach the comparison, and what goes wrong is a message."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fxgraft.cli.commands import app
from fxgraft.cli.compare import _duration, _Running, _variants
from fxgraft.comparison import experiment
from unit.comparison.images import write_domains

SMALL = ("--model", "test_resnet", "--size", "32", "--epochs", "1", "--batch-size", "8", "--workers", "1")


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["compare", *arguments], env={"COLUMNS": "150"})
    assert result.exit_code == code, result.output
    return result.output


def test_a_comparison_from_the_command_line(tmp_path):
    data = write_domains(tmp_path / "data")
    out = tmp_path / "out"
    arguments = (str(data), *SMALL, "--graft", "rsc", "--hold-out", "red", "--seeds", "2", "--out", str(out))
    text = run(*arguments)
    assert re.search(r"rsc, red, seed 1: \d+\.\d; about 0 s left", text)
    assert f"Report: {out / 'report.html'}" in text
    assert "fxgraft compare" not in text
    assert (out / "table.md").read_text().count("\n|") == 4
    assert "left" not in run(*arguments), "nothing is done twice"


def test_what_a_line_of_progress_is_about(tmp_path):
    data = write_domains(tmp_path / "data")
    arguments = (str(data), *SMALL, "--hold-out", "red", "--seeds", "1", "--out", str(tmp_path / "out"))
    text = run(*arguments, "--graft", "adapt_batchnorm", "--tune", "lr=0.001,0.01")
    assert re.search(r"bare, red, tuning on images set apart, lr 0.001: \d+\.\d; about", text)
    assert re.search(r"\nbare, red, seed 0: \d+\.\d; about 0 s left\nadapt_batchnorm, red, seed 0: ", text)
    assert "bare, red, seed 0" not in run(*arguments, "--graft", "rsc", "--tune", "lr=0.001,0.01")


def test_options_become_arguments(tmp_path, monkeypatch):
    given = {}

    class StopHere(Exception):  # noqa: N818 - ends the command before it prints
        pass

    def stand_in(data, **options):
        given.update(options, data=data)
        raise StopHere

    monkeypatch.setattr(experiment, "compare", stand_in)
    CliRunner().invoke(
        app,
        [
            *("compare", "DATA", "--graft", "rsc", "--graft", "rsc + selfnorm", "--hold-out", "all"),
            *("--seeds", "3,4", "--lr", "0.1", "--set", "amp=true", "--set", "train_crop=0.5"),
            *("--model-option", "output_stride=8", "--model-option", "img_size=(96,64)"),
            *("--tune", "lr=0.1,0.2", "--tune", "opt=sgd,adamw"),
            *("--tune", "sched=cosine, none", "--set", "select=last", "--set", "clip_grad=none"),
            *("--baseline", "adapt_batchnorm", "--corrupt"),
        ],
    )
    assert given["grafts"] == ["rsc", "rsc + selfnorm"]
    assert (given["hold_out"], given["seeds"], given["corrupt"]) == ("all", [3, 4], True)
    assert given["training"] == {
        **{"lr": 0.1, "amp": True, "train_crop": 0.5},
        **{"select": "last", "clip_grad": None},
    }
    assert given["model_options"] == {"output_stride": 8, "img_size": (96, 64)}
    assert given["tune"] == {"lr": [0.1, 0.2], "opt": ["sgd", "adamw"], "sched": ["cosine", "none"]}
    assert given["baseline"] == "adapt_batchnorm"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("/nowhere/at/all", "--graft", "rsc"), r"There is no /nowhere/at/all"),
        (("DATA",), r"at least one graft"),
        (("DATA", "--seeds", "one"), r"--seeds takes a number of seeds"),
        (("DATA", "--set", "amp"), r"--set takes KEY=VALUE"),
        (("DATA", "--graft", "rsc", "--set", "lr=0.1,0.2"), r"--set lr takes one value, got 2.\n.*--tune"),
        (("DATA", "--graft", "rsc", "--model-option", "x=1,2"), r"--model-option x takes one value, got 2"),
        (("DATA", "--graft", "rsc", "--model-option", "x=(1,2),a"), r"mixes words with brackets"),
        (("DATA", "--tune", "lr"), r"--tune takes KEY=VALUE"),
        (("DATA", "--graft", "rsc", "--tune", "lr=0.1,"), r"--tune lr takes a value, or values with commas"),
        (("DATA", "--graft", "rsc:"), r"a colon and no options"),
        (
            ("DATA", "--graft", "rsc", "--tune", "lr=1", "--tune", "lr=2"),
            r"--tune gives lr twice, 1 and 2.\n.*lr=0.003,",
        ),
        (("DATA", "--graft", "rsc", "--set", "lr=1", "--set", "lr=2"), r"--set gives lr twice, 1 and 2"),
        (
            ("DATA", "--graft", "rsc", "--lr", "1", "--set", "lr=2"),
            r"lr is given twice, by --lr and by --set",
        ),
    ],
)
def test_errors_are_one_plain_message(arguments, message):
    text = run(*arguments, code=2)
    assert re.search(message, text)
    assert "Traceback" not in text


def test_on_a_terminal_the_table_grows_and_a_stop_says_what_is_kept():
    console = Console(file=io.StringIO(), force_terminal=True, width=80)

    def stopped() -> None:
        with _Running(console) as running:
            running("the table so far", 200.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    text = re.sub(r"\x1b\[[0-9;?]*\w", "", console.file.getvalue())
    assert "the table so far" in text
    assert "about 3 min left" in text
    assert "Stopped. 1 runs of this call are kept" in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(99.4, "99 s"), (100, "2 min"), (5000, "83 min"), (7200, "2.0 h")]
)
def test_times_are_said_in_words(seconds, text):
    assert _duration(seconds) == text


def test_variants_of_a_file_come_first(tmp_path):
    (tmp_path / "grafts.yaml").write_text("- rsc + selfnorm\n- {method: mixstyle, p: 1.0}\n")
    found = _variants(["dsu"], tmp_path / "grafts.yaml")
    assert found == ["rsc + selfnorm", "mixstyle:p=1.0", "dsu"]
