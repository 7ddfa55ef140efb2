"""The overhead measurement: turns, ratios, memory, JSON, and what it refuses."""

from __future__ import annotations

import gc
import json

import pytest
import torch
from torch import nn

from fxgraft.arguments import checked_device
from fxgraft.bench.bare_and_patched import BARE, CONTROL, FORWARD, MEASURES, PATCHED, RIVAL, TRAINING_STEP
from fxgraft.bench.memory import memory_kind, peak_memory, peak_of_events
from fxgraft.bench.overhead import ALLOCATOR, measure, turn_order
from fxgraft.bench.overhead_report import OverheadReport, Spread, read_size
from fxgraft.errors import ConfigError
from fxgraft.spec import describe
from models.volumes import video_net

CPU = torch.device("cpu")


def tiny() -> nn.Module:
    body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


def quick(model=tiny, patches=(), **options) -> OverheadReport:
    return measure(model, patches, **{"batch": 4, "size": 16, "rounds": 3, "min_run_time": 0.0, **options})


@pytest.fixture(scope="module")
def report() -> OverheadReport:
    return quick()


def test_rows_pair_each_network_with_each_call(report):
    assert [(row.what, row.network) for row in report.rows] == [
        (w, n) for w in MEASURES for n in (BARE, CONTROL)
    ]
    assert all(row.ratio is None for row in report.rows if row.network == BARE)
    for row in report.rows:
        assert 0 < row.seconds.low <= row.seconds.median <= row.seconds.high


def test_bare_and_control_need_the_same_memory(report):
    for what in MEASURES:
        assert report.row(what, BARE).peak_bytes == report.row(what, CONTROL).peak_bytes > 0
    assert report.row(TRAINING_STEP, BARE).peak_bytes > report.row(FORWARD, BARE).peak_bytes


def test_json_round_trip(report):
    text = report.to_json()
    assert OverheadReport.from_json(text) == report
    assert json.loads(text)["rows"][0]["seconds"]["median"] == report.rows[0].seconds.median


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "rows": [{}]}'])
def test_from_json_refuses_other_files(text):
    with pytest.raises(ConfigError, match=r"isn.t an overhead report"):
        OverheadReport.from_json(text)


def test_from_json_refuses_another_format(report):
    with pytest.raises(ConfigError, match="format 99"):
        OverheadReport.from_json(report.to_json().replace('"format": 1', '"format": 99'))


def test_report_prints_its_numbers_and_conditions(report):
    text = str(report)
    for word in (
        "bare again",
        "training step",
        "batch 4 at 16×16",
        f"threads: {report.threads}",
        "rounds: 3",
    ):
        assert word in text


def test_missing_row_says_what_was_measured(report):
    with pytest.raises(ConfigError, match="forward/bare again"):
        report.row(FORWARD, PATCHED)


def test_measures_only_what_is_asked():
    only = quick(what=[FORWARD], rounds=1)
    assert {row.what for row in only.rows} == {FORWARD}
    assert only.rows[0].seconds.low == only.rows[0].seconds.high


def test_every_six_turns_each_order_comes_once():
    names = ["a", "b", "c"]
    orders = [tuple(turn_order(names, turn)) for turn in range(6)]
    assert len(set(orders)) == 6
    # Each pair comes first equally often, and a round is followed by its reverse.
    assert all(orders[turn + 1] == orders[turn][::-1] for turn in (0, 2, 4))


def test_progress_counts_to_the_total():
    seen: list[tuple[int, int]] = []
    quick(rounds=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 8) for done in range(1, 9)]


def test_leaves_the_process_as_it_was():
    state, threads, frozen = torch.get_rng_state(), torch.get_num_threads(), gc.get_freeze_count()
    assert quick(rounds=1, threads=threads + 1).threads == threads + 1
    assert torch.equal(torch.get_rng_state(), state)
    assert (torch.get_num_threads(), gc.get_freeze_count(), gc.isenabled()) == (threads, frozen, True)


@pytest.mark.parametrize(("frozen", "calls"), [(0, ["freeze", "unfreeze"]), (7, [])])
def test_the_collector_rests_during_the_timings(monkeypatch, frozen, calls):
    """Unless the caller has frozen it, and would be thawed."""
    seen = []
    monkeypatch.setattr(gc, "get_freeze_count", lambda: frozen)
    for name in ("freeze", "unfreeze"):
        monkeypatch.setattr(gc, name, lambda name=name: seen.append(name))
    quick(rounds=1)
    assert seen == calls


def test_memory_of_other_devices_is_not_measured():
    other, calls = torch.device("mps"), []
    assert peak_memory(lambda: calls.append(1), other) is None
    assert (calls, memory_kind(other)) == ([1], "not measured on this device")


def test_spread_of_known_numbers():
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_describe_writes_the_command_line_form():
    assert describe("rsc", {"layer": "layer4", "batch_share": 0.5}) == "rsc:layer=layer4,batch_share=0.5"
    assert describe("rsc", {}) == "rsc"


def test_cpu_peak_sees_a_known_allocation():
    def call() -> None:
        first = torch.empty(1_000_000)
        second = torch.empty(500_000)
        del first, second
        torch.empty(10)

    assert peak_memory(call, CPU) == 6_000_000
    assert "CPU" in memory_kind(CPU)


def test_cpu_peak_looks_inside_functional_gradients():
    values = torch.randn(1000)
    peak = peak_memory(lambda: torch.func.grad(lambda x: x.sin().exp().sum())(values), CPU)
    assert peak is not None
    assert peak >= 2 * values.nbytes


def test_peak_of_a_trace_without_memory_events_is_unknown():
    assert peak_of_events([{"name": "aten::add"}]) is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"size": -3}, "size must be at least 1"),
        ({"size": (4, 0, 12)}, "size must be at least 1"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"min_run_time": -1.0}, "min_run_time is a number of seconds, 0 or more"),
        ({"what": ["backward"]}, "'forward', 'training step'"),
        ({"what": "forward"}, "one or more of"),
        ({"what": []}, "one or more of"),
        ({"device": "warp"}, "no device 'warp'"),
        ({"device": "meta"}, "computes nothing"),
        ({"rival": lambda model: None, "compiled": True}, "Pass one of the two"),
    ],
)
def test_refuses_wrong_arguments(wrong, message):
    with pytest.raises(ConfigError, match=message):
        quick(**wrong)


def test_checked_device_returns_the_device():
    assert checked_device("cpu") == CPU


def test_refuses_images_the_model_cannot_take():
    with pytest.raises(ConfigError, match="Conv2d does not run on 2×2 images"):
        quick(lambda: nn.Conv2d(3, 4, 3), size=2)
    with pytest.raises(ConfigError, match="Conv2d does not run on 4×12×12 clips"):
        quick(lambda: nn.Conv2d(3, 4, 3), size=(4, 12, 12))


def test_refuses_a_batch_that_has_no_variance():
    def norm_of_one_value():
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2))

    with pytest.raises(ConfigError, match=r"one value per channel(?s:.*)larger batch, as batch= or --batch"):
        quick(norm_of_one_value, size=8, batch=1)


def test_measures_a_network_of_clips():
    found = quick(video_net, [("rsc", {"layer": "layer1"})], size=(4, 12, 12), rounds=1)
    assert OverheadReport.from_json(found.to_json()) == found
    assert "batch 4 at 4×12×12 on cpu" in str(found)


def test_sizes_of_the_command_line():
    assert [read_size(each) for each in ("64", "48x64", "4x12x12")] == [64, (48, 64), (4, 12, 12)]
    for wrong in ("", "0", "-3", "4x", "16×112", "1x2x3x4", "1.5"):
        with pytest.raises(ConfigError, match=r"(?s)--size must be .*of clips and volumes 16x112x112"):
            read_size(wrong)


def test_refuses_maps_naming_their_shape():
    with pytest.raises(ConfigError, match=r"shape \(4, classes\).*shape \(4, 3, 16, 16\)"):
        quick(nn.Identity)


def test_measures_a_patched_model():
    patched = quick("resnet18", [("rsc", {"layer": "layer4"})], size=32, rounds=1)
    assert patched.patches == ("rsc:layer=layer4",)
    for what in MEASURES:
        ratio = patched.row(what, PATCHED).ratio
        assert ratio is not None
        assert ratio.median > 0
    # What acts in training only is absent from the evaluation graph: no extra memory either.
    assert patched.row(FORWARD, PATCHED).peak_bytes == patched.row(FORWARD, BARE).peak_bytes


def test_a_report_says_how_memory_was_allocated(monkeypatch):
    for name in ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    plain = quick()
    assert plain.allocator == {}
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "8000000000")
    report = quick()
    assert report.allocator == {"MALLOC_TRIM_THRESHOLD_": "8000000000"}
    assert OverheadReport.from_json(report.to_json()) == report
    assert "MALLOC_TRIM_THRESHOLD_=8000000000" in str(report)
    assert "MALLOC" not in str(plain)


def test_compiled_networks_are_all_compiled(monkeypatch):
    compiled = []

    def compiling(model, **options):
        compiled.append(options)
        return model

    monkeypatch.setattr(torch, "compile", compiling)
    report = quick(patches=[("rsc", {"layer": "0"})], compiled=True)
    assert compiled == [{"fullgraph": True}] * 3
    assert report.compiled
    assert OverheadReport.from_json(report.to_json()) == report
    assert "compiled" in str(report)
    assert "compiled" not in str(quick())


def test_measures_another_way_to_the_same():
    seen = []

    def by_hand(model):
        model.register_forward_hook(lambda module, args, out: seen.append(out.shape))
        return lambda x, y: nn.functional.cross_entropy(model(x), y)

    found = quick(patches=[("taps", {"layers": "0"})], rounds=1, rival=by_hand)
    assert {row.network for row in found.rows} == {BARE, CONTROL, PATCHED, RIVAL}
    assert found.row(TRAINING_STEP, RIVAL).ratio.median > 0
    assert set(seen) == {(4, 5)}
