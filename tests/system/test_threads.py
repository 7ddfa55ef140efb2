"""Several threads, tasks, loaders and models at once: nothing of one is found by another."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fxgraft
from fxgraft.errors import TargetError
from fxgraft.graph.tracing.editing import Output
from models.toys import LABELS, Net, Toy, images, net

SIZE = (3, 8, 8)
THREADS = 8
METHODS: dict[str, dict[str, Any]] = {
    "rsc": {"layer": "stage2"},
    "crossnorm": {},
    "selfnorm": {},
    "mixmo": {"members": 2},
    "taps": {"layers": ["stage1", "stage2"]},
    "diversification": {},
}


def in_threads(work: Callable[[int], Any], count: int = THREADS) -> list[Any]:
    """Run ``work(0)``, ... at the same time; what one raises is raised."""
    barrier = threading.Barrier(count)

    def run(index: int) -> Any:
        barrier.wait()
        return work(index)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def evaluate(method: str, calls: int) -> None:
    model = fxgraft.patch(net().eval(), method, input_size=SIZE, **METHODS[method])

    def look(x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            if method == "taps":
                out, values = fxgraft.tapped(model, x)
                return [out, *values.values()]
            return [model(x)] + ([fxgraft.mixmo.member_logits(model, x).logits] if method == "mixmo" else [])

    batches = [images(2, seed=seed) for seed in range(2 * THREADS)]
    expected = [look(x) for x in batches]

    def work(index: int) -> None:
        for call in range(calls // THREADS):
            number = (index + call) % len(batches)
            for value, right in zip(look(batches[number]), expected[number], strict=True):
                assert torch.equal(value, right)

    in_threads(work)


@pytest.mark.parametrize("method", METHODS)
def test_threads_evaluate_one_model(method: str) -> None:
    evaluate(method, 200)


@pytest.mark.sweep
@pytest.mark.parametrize("method", METHODS)
def test_threads_evaluate_one_model_many_times(method: str) -> None:
    evaluate(method, 3000)


def test_models_train_in_threads_with_their_own_labels() -> None:
    seen: list[list[tuple[int, int]]] = [[], []]

    models = [net(), net()]

    def work(index: int) -> None:
        model = fxgraft.patch(models[index], "rsc", layer="stage2", input_size=SIZE)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        batches = [(images(seed=s), (LABELS + s + index) % 4) for s in range(20)]
        for x, y in fxgraft.with_targets(batches):
            out = model(x)
            fxgraft.loss(model, out, y).backward()
            optimizer.step()
            optimizer.zero_grad()
            taken = fxgraft.graph.runtime.published_labels._published.get()[-1].known[-1].value
            seen[index].append((int(taken[0]), int(y[0])))
            assert torch.isfinite(out).all()

    in_threads(work, 2)
    assert all(a == b for each in seen for a, b in each)
    assert [len(each) for each in seen] == [20, 20]


# Patching beside others.


def test_another_thread_runs_models_while_one_patches() -> None:
    bystander, hooked = net().eval(), []
    bystander.stage1.register_forward_hook(lambda *_: hooked.append(1))
    patched = fxgraft.patch(net().eval(), Toy(at=(("stage1", Output()),)), name="toy")
    x = images()
    with torch.no_grad():
        right, right_patched = bystander(x), patched(x)
    hooked.clear()
    done = threading.Event()
    calls = 0

    def run(_: int) -> int:
        nonlocal calls
        while not done.is_set():
            with torch.no_grad():
                assert torch.equal(bystander(x), right)
                assert torch.equal(patched(x), right_patched)
            calls += 1
        return calls

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, 0)
        for _ in range(3):
            model = net()
            fxgraft.patch(model, "crossnorm", input_size=SIZE)
            fxgraft.sites(model, input_size=SIZE)
            fxgraft.patch(model, "taps", layers="stage2", input_size=SIZE)
            fxgraft.unpatch(model)
        done.set()
        assert running.result() > 0
    assert len(hooked) == calls


def test_a_trace_hands_through_what_other_threads_call_and_read() -> None:
    """At the very moment: from inside the forward that is traced."""
    other = net().eval()
    x = images()
    with torch.no_grad():
        right = other(x)
    found: list[Any] = []

    class Waits(Net):
        def forward_head(self, value: Tensor) -> Tensor:
            def call() -> None:
                with torch.no_grad():
                    found.append((other(x), type(other.fc.weight)))

            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
            return super().forward_head(value)

    model = Waits()
    fxgraft.patch(
        model, Toy(at=(("", fxgraft.graph.tracing.editing.After("fc")),)), name="toy", input_size=SIZE
    )
    assert len(found) > 1  # observed, then traced for both modes
    for out, kind in found:
        assert torch.equal(out, right)
        assert kind is nn.Parameter


def test_threads_patch_at_the_same_time() -> None:
    expected = fxgraft.patch(net().eval(), "rsc", layer="stage2", input_size=SIZE)(images())

    models = [net().eval() for _ in range(4)]

    def work(index: int) -> Tensor:
        model = models[index]
        fxgraft.patch(model, "rsc", layer="stage2", input_size=SIZE)
        fxgraft.patch(model, "crossnorm", input_size=SIZE)
        fxgraft.unpatch(model, "crossnorm")
        assert len(fxgraft.sites(model, input_size=SIZE)) > 5
        return model(images())

    call = nn.Module.__call__
    assert all(torch.equal(out, expected) for out in in_threads(work, 4))
    assert nn.Module.__call__ is call


def test_a_stale_model_is_planned_again_once_for_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fxgraft.patch(net().eval(), "rsc", layer="stage2", input_size=SIZE)
    renewed: list[int] = []
    kind = type(fxgraft.api.registry_of(model))
    renew = kind.renew
    monkeypatch.setattr(kind, "renew", lambda self, m: (renewed.append(1), renew(self, m))[1])
    model.stage2 = copy.deepcopy(net().stage2)
    model.eval()
    expected = net().eval()(images())
    assert all(torch.equal(out, expected) for out in in_threads(lambda index: model(images())))
    assert renewed == [1]


# A patched model inside of another.


class Twice(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x))


def test_a_patched_model_inside_of_a_patched_model() -> None:
    inner = fxgraft.patch(net(), "rsc", layer="stage2", input_size=SIZE)
    outer = Twice(inner)
    bare = Twice(net())
    bare.last.load_state_dict(outer.last.state_dict())
    fxgraft.patch(outer, "taps", layers="last", input_size=SIZE)
    x = images()
    out, values = fxgraft.tapped(outer.eval(), x)
    assert torch.equal(out, bare.eval()(x))
    assert torch.equal(values["last"], out)
    outer.train()
    for x, _ in fxgraft.with_targets([(images(), LABELS), (images(seed=1), LABELS)]):
        outer(x).sum().backward()  # one batch, one pass: of both
        with pytest.raises(TargetError, match="left over"):
            outer(x)
    twin = copy.deepcopy(outer).eval()
    assert torch.equal(twin(x), outer.eval()(x))
    assert [g.name for g in fxgraft.grafts(twin.inner)] == ["rsc"]
    fxgraft.unpatch(outer)
    fxgraft.unpatch(inner)
    assert type(outer) is Twice
    assert type(inner) is Net


# Labels.


def spy(model: nn.Module) -> list[Any]:
    """Patch a model that takes labels; what it takes is listed."""
    seen: list[Any] = []

    class Reads(fxgraft.extend.Unit):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(int(self.run.labels(4)[0]))
            return x

    class Spy(Toy):
        def unit(self) -> Any:
            return Reads()

    fxgraft.patch(model, Spy(), name="spy")
    return seen


def batches(first: int, count: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(images(seed=first + i), (LABELS * 0) + first + i) for i in range(count)]


def test_labels_are_those_of_a_thread_and_of_a_task() -> None:
    model = net()
    seen = spy(model)

    async def task(number: int) -> None:
        with fxgraft.targets(LABELS * 0 + number):
            await asyncio.sleep(0)
            model(images())
            assert seen[-1] == number
            await asyncio.sleep(0)
            model(images())
            assert seen[-1] == number

    async def both() -> None:
        await asyncio.gather(*(task(n) for n in range(4)))

    asyncio.run(both())
    with (
        fxgraft.targets(LABELS),
        ThreadPoolExecutor(1) as pool,
        pytest.raises(TargetError, match="none were given"),
    ):
        pool.submit(lambda: model(images())).result()


def test_two_loaders_at_once_are_told_by_their_batches() -> None:
    model = net()
    seen = spy(model)
    for (x, _), (other, _) in zip(
        fxgraft.with_targets(batches(0)), fxgraft.with_targets(batches(10)), strict=True
    ):
        model(x)
        model(other[:].view_as(other))
    assert seen == [0, 10, 1, 11, 2, 12]


def test_two_loaders_that_cannot_be_told_need_a_model() -> None:
    model, second = net(), net()
    seen, seen_second = spy(model), spy(second)
    a, b = batches(0), batches(10)
    for (x, _), _ in zip(fxgraft.with_targets(a), fxgraft.with_targets(b), strict=True):
        with pytest.raises(
            TargetError, match=r"two loaders of fxgraft\.with_targets are open(?s:.*)model=model"
        ):
            model(x + 0)
        model(x + 0, target=LABELS)
        with fxgraft.targets(LABELS):
            model(x + 0)
    seen.clear()
    for (x, _), (other, _) in zip(
        fxgraft.with_targets(a, model=model), fxgraft.with_targets(b, model=second), strict=True
    ):
        model(x + 0)
        second(other + 0)
    assert (seen, seen_second) == ([0, 1, 2], [10, 11, 12])
    for x, _ in fxgraft.with_targets(a, model=second):
        with pytest.raises(TargetError, match="none were given"):
            model(x)


def test_a_loop_that_looks_one_batch_ahead() -> None:
    model = net()
    seen = spy(model)
    run = iter(fxgraft.with_targets(batches(0)))
    current = next(run)
    for following in run:
        model(current[0])
        current = following
    assert seen == [0, 1]


def test_a_labelled_loader_is_the_loader_in_all_other_respects() -> None:
    model = net()
    seen = spy(model)
    data = [(x, y) for batch in batches(0, 2) for x, y in zip(*batch, strict=True)]
    loader = DataLoader(data, batch_size=4)
    wrapped = fxgraft.with_targets(loader)
    assert len(wrapped) == 2
    assert wrapped.sampler is loader.sampler
    assert wrapped.dataset is data
    wrapped.mixup_enabled = False
    assert loader.mixup_enabled is False
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = wrapped.nothing_like_it
    for _ in range(2):
        for x, _ in wrapped:
            model(x)
    assert seen == [0, 1, 0, 1]
    next(wrapped)
    wrapped.close()
    with pytest.raises(TargetError, match="none were given"):
        model(images())
