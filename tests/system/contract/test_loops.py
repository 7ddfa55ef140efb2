"""In other people's loops: labels, losses and steps of many kinds of loops, each against the plain one.

A loop trains a small network with a method on it for some steps. Its parameters have to end where those of the plain
loop end, which hands the labels to every call and makes one pass, one loss and one step for each batch.
"""

from __future__ import annotations

import asyncio
import copy
import pickle
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tools.readme import own_methods
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxgraft
from system.contract.cases import SMALL
from system.contract.expectations import expectation

LOSSES: dict[str, dict[str, Any]] = {
    "crossnorm": {"consistency": True},
    "diversification": {"loss": "gradient_boosting"},
}
METHODS = {name: {**expectation(name).options, **LOSSES.get(name, {})} for name in own_methods()}
STEPS, BATCH, CLASSES = 3, 4, 4
IMAGES = torch.randn(STEPS * BATCH, *SMALL.input_size, generator=torch.Generator().manual_seed(0))
LABELS = (torch.arange(STEPS * BATCH) * 7 // 3) % CLASSES

FOLDER = Path(tempfile.gettempdir())
"""For a library that wants one, and writes nothing."""

Batches = list[tuple[Tensor, Tensor]]


class Loop:
    """A model in training, with what a loop does around a pass and its loss."""

    def __init__(self, model: nn.Module, rate: float = 0.1) -> None:
        self.model, self.rate = model, rate
        self.optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
        self.whole = model  # what the loss is asked for
        self.reseeds = True  # before a loss, where draws of the passes may lie between

    def begin(self, step: int) -> None:
        fxgraft.set_progress(self.model, step / STEPS)
        torch.manual_seed(step)

    def call(self, x: Tensor, **labels: Any) -> Any:
        return self.whole(x, **labels)

    def loss(self, out: Any, y: Any, **criterion: Any) -> Tensor:
        if self.reseeds:
            torch.manual_seed(100)
        return fxgraft.loss(self.whole, out, y, **criterion)

    def end(self, loss: Tensor | None = None) -> None:
        if loss is not None:
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def batches() -> Batches:
    """Every batch in memory of its own."""
    return [(x.clone(), y.clone()) for x, y in zip(IMAGES.split(BATCH), LABELS.split(BATCH), strict=True)]


def plain(loop: Loop, reseeds: bool = True, **criterion: Any) -> None:
    loop.reseeds = reseeds
    for step, (x, y) in enumerate(batches()):
        loop.begin(step)
        loop.end(loop.loss(loop.call(x, target=y), y, **criterion))


# What labels a pass takes.


def in_a_block(loop: Loop) -> None:
    for step, (x, y) in enumerate(batches()):
        loop.begin(step)
        with fxgraft.targets(y):
            out = loop.call(x)
        loop.end(loop.loss(out, y))


def from_a_loader(loop: Loop, loader: Iterable[Any] | None = None, x: Any = 0, y: Any = 1) -> None:
    for step, batch in enumerate(fxgraft.with_targets(batches() if loader is None else loader, y)):
        loop.begin(step)
        loop.end(loop.loss(loop.call(batch[x]), batch[y]))


def by_next(loop: Loop) -> None:
    labelled = fxgraft.with_targets(batches())
    for step in range(STEPS):
        x, y = next(labelled)
        loop.begin(step)
        loop.end(loop.loss(loop.call(x), y))
    labelled.close()


def ahead(loop: Loop, count: int, slices: bool = False) -> None:
    """Fetch some batches before the pass of the first of them."""
    found = list(zip(IMAGES.split(BATCH), LABELS.split(BATCH), strict=True)) if slices else batches()
    waiting: list[Any] = []
    step = 0

    def train() -> None:
        nonlocal step
        x, y = waiting.pop(0)
        loop.begin(step)
        loop.end(loop.loss(loop.call(x), y))
        step += 1

    for batch in fxgraft.with_targets([*found, *[(torch.zeros(1), torch.zeros(1))] * count]):
        waiting.append(batch)
        if len(waiting) > count:
            train()


def zipped(loop: Loop) -> None:
    other = [(-x, y.flip(0)) for x, y in batches()]
    for step, ((x, y), _) in enumerate(
        zip(fxgraft.with_targets(batches()), fxgraft.with_targets(other), strict=True)
    ):
        loop.begin(step)
        loop.end(loop.loss(loop.call(x), y))


def one_hot(loop: Loop) -> None:
    for step, (x, y) in enumerate(batches()):
        loop.begin(step)
        soft = F.one_hot(y, CLASSES).float()
        loop.end(loop.loss(loop.call(x, target=soft), soft))


def narrow(loop: Loop) -> None:
    for step, (x, y) in enumerate(batches()):
        loop.begin(step)
        loop.end(loop.loss(loop.call(x, target=y.int()), y))


# What a loss is of.


def evaluated_between(loop: Loop) -> None:
    for step, (x, y) in enumerate(batches()):
        loop.begin(step)
        out = loop.call(x, target=y)
        with torch.no_grad():
            loop.model.eval()(x.flip(0))
        loop.model.train()
        loop.end(loop.loss(out, y))


def two_views(loop: Loop, together: bool, convert: Callable[[Tensor], Tensor] = lambda out: out) -> None:
    """Two passes of other images; their losses after both, or each after its pass."""
    for step, (x, y) in enumerate(batches()):
        made = []
        for view, labels in ((x, y), (x.flip(0), y.flip(0))):
            loop.begin(step)
            made.append((convert(loop.call(view, target=labels)), labels))
            if not together:
                loop.loss(*made.pop()).backward()
        for out, labels in made:
            loop.loss(out, labels).backward()
        loop.end()


def converted(loop: Loop, convert: Callable[[Tensor], Tensor]) -> None:
    for step, (x, y) in enumerate(batches()):
        loop.begin(step)
        loop.end(loop.loss(convert(loop.call(x, target=y)), y))


def in_parts(loop: Loop) -> None:
    for step, (x, y) in enumerate(batches()):
        loop.begin(step)
        out = loop.call(x, target=y)
        torch.manual_seed(100)
        loop.end(sum(fxgraft.losses(loop.whole, out, y).values()))  # type: ignore[arg-type]


def with_a_loss_of_its_own(loop: Loop) -> None:
    for step, (x, y) in enumerate(batches()):
        loop.begin(step)
        out = loop.call(x, target=y)
        torch.manual_seed(100)
        extra = fxgraft.extra_loss(loop.whole, out, y)
        loop.end(F.cross_entropy(out, y) + extra)


WEIGHTS = torch.arange(1.0, CLASSES + 1)


def smooth(out: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(out, y, label_smoothing=0.1, reduction=reduction)


def logged(loop: Loop) -> None:
    """Diagnostics and the summary are read in every step."""
    for step, (x, y) in enumerate(batches()):
        loop.begin(step)
        out = loop.call(x, target=y)
        fxgraft.diagnostics(loop.whole)
        fxgraft.summary(loop.whole)
        loop.end(loop.loss(out, y))


# What a step is.


def accumulated(loop: Loop, scale: float = 0.5) -> None:
    for step, (x, y) in enumerate(batches()):
        for part, labels in zip(x.split(2), y.split(2), strict=True):
            loop.begin(step)
            (loop.loss(loop.call(part, target=labels), labels) * scale).backward()
        loop.end()


def accumulated_by_hand(loop: Loop) -> None:
    """The mean of the gradients of two micro-batches, each computed by itself."""
    parameters = list(loop.model.parameters())
    for step, (x, y) in enumerate(batches()):
        found = []
        for part, labels in zip(x.split(2), y.split(2), strict=True):
            loop.begin(step)
            loss = loop.loss(loop.call(part, target=labels), labels)
            found.append(torch.autograd.grad(loss, parameters, allow_unused=True))
        for p, *both in zip(parameters, *found, strict=True):
            p.grad = None if both[0] is None else (both[0] + both[1]) / 2
        loop.end()


def scaled(loop: Loop) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step, (x, y) in enumerate(batches()):
        loop.begin(step)
        scaler.scale(loop.loss(loop.call(x, target=y), y)).backward()
        scaler.step(loop.optimizer)
        scaler.update()
        loop.optimizer.zero_grad(set_to_none=False)


def clipped(loop: Loop) -> None:
    for step, (x, y) in enumerate(batches()):
        loop.begin(step)
        loop.loss(loop.call(x, target=y), y).backward()
        nn.utils.clip_grad_norm_(loop.model.parameters(), 1e9)
        loop.end()


def in_a_closure(loop: Loop) -> None:
    for step, (x, y) in enumerate(batches()):

        def closure(step: int = step, x: Tensor = x, y: Tensor = y) -> Tensor:
            loop.begin(step)
            loss = loop.loss(loop.call(x, target=y), y)
            loss.backward()
            return loss

        loop.optimizer.step(closure)  # type: ignore[arg-type]
        loop.optimizer.zero_grad()


def by_gradients(loop: Loop) -> None:
    parameters = list(loop.model.parameters())
    for step, (x, y) in enumerate(batches()):
        loop.begin(step)
        found = torch.autograd.grad(loop.loss(loop.call(x, target=y), y), parameters, allow_unused=True)
        for p, gradient in zip(parameters, found, strict=True):
            p.grad = gradient
        loop.end()


def added_groups(loop: Loop) -> None:
    own = {id(p) for graft in fxgraft.grafts(loop.model) for p in graft.parameters()}
    loop.optimizer = torch.optim.SGD(
        [p for p in loop.model.parameters() if id(p) not in own], 0.1, momentum=0.9
    )
    if own:
        loop.optimizer.add_param_group(
            {"params": [p for g in fxgraft.grafts(loop.model) for p in g.parameters()]}
        )
    plain(loop)


def sharpness_aware(loop: Loop, block: bool) -> None:
    """Two passes of each batch, the second from weights that were moved uphill."""
    for step, (x, y) in enumerate(batches()):
        with fxgraft.targets(y) if block else torch.enable_grad():
            labels = {} if block else {"target": y}
            loop.begin(step)
            loop.loss(loop.call(x, **labels), y).backward()
            moved = [(p, 0.01 * p.grad) for p in loop.model.parameters() if p.grad is not None]
            with torch.no_grad():
                for p, by in moved:
                    p += by
            loop.optimizer.zero_grad()
            loop.begin(step)
            loop.loss(loop.call(x, **labels), y).backward()
            with torch.no_grad():
                for p, by in moved:
                    p -= by
        loop.end()


# Where it runs, and what comes between.


def resumed(loop: Loop, how: str) -> None:
    """Go on in a copy after the first step."""
    for step, (x, y) in enumerate(batches()):
        if step == 1:
            other = {
                "state": lambda: loop.model,
                "copy": lambda: copy.deepcopy(loop.model),
                "pickle": lambda: pickle.loads(pickle.dumps(loop.model)),
            }[how]()
            states = copy.deepcopy((loop.model.state_dict(), loop.optimizer.state_dict()))
            going_on = Loop(other)
            if how == "state":
                for p in other.parameters():
                    p.data.zero_()
                other.load_state_dict(states[0])
            going_on.optimizer.load_state_dict(states[1])
            first, loop.whole, loop.optimizer = loop.model, going_on.whole, going_on.optimizer
            loop.model = other
        loop.begin(step)
        loop.end(loop.loss(loop.call(x, target=y), y))
    first.load_state_dict(loop.model.state_dict())


def validated(loop: Loop) -> None:
    for step, (x, y) in enumerate(batches()):
        loop.begin(step)
        loop.end(loop.loss(loop.call(x, target=y), y))
        loop.model.eval()
        with torch.inference_mode():
            fxgraft.loss(loop.model, loop.model(x), y)
        loop.model.train()


def with_a_teacher(loop: Loop) -> None:
    teacher = copy.deepcopy(loop.model).eval()
    for step, (x, y) in enumerate(batches()):
        loop.begin(step)
        out = loop.call(x, target=y)
        with torch.no_grad():
            teacher(x)
        loop.end(loop.loss(out, y) + 0 * teacher(x).sum())


class Around(nn.Module):
    """A model of the user's around a patched one."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor, **labels: Any) -> Any:
        return self.backbone(x, **labels)


def around(loop: Loop) -> None:
    loop.whole = Around(loop.model)
    plain(loop)


def student_and_teacher(loop: Loop) -> None:
    """Both in one module, patched and in training mode."""

    class Pair(Around):
        def forward(self, x: Tensor, **labels: Any) -> Any:
            out = self.backbone(x, **labels)
            state = torch.get_rng_state()
            with torch.no_grad():
                self.teacher(x, **labels)
            torch.set_rng_state(state)
            return out

    loop.whole = Pair(loop.model)
    loop.whole.teacher = copy.deepcopy(loop.model)
    plain(loop)


def in_a_thread(loop: Loop) -> None:
    failed: list[BaseException] = []

    def run() -> None:
        try:
            from_a_loader(loop)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def in_tasks(loop: Loop) -> None:
    """While another task goes through a loader of its own."""

    async def train() -> None:
        for step, (x, y) in enumerate(fxgraft.with_targets(batches())):
            await asyncio.sleep(0)
            loop.begin(step)
            loop.end(loop.loss(loop.call(x), y))

    async def other() -> None:
        for _ in fxgraft.with_targets([(-x, y.flip(0)) for x, y in batches()]):
            await asyncio.sleep(0)

    async def both() -> None:
        await asyncio.gather(train(), other())

    asyncio.run(both())


def keyed() -> Iterator[dict[str, Tensor]]:
    for x, y in batches():
        yield {"image": x, "label": y}


# Libraries that have the loop.


def of_accelerate(loop: Loop) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True)
    data = DataLoader(TensorDataset(IMAGES, LABELS), BATCH)
    loop.whole, loop.optimizer, data = accelerator.prepare(loop.model, loop.optimizer, data)
    for step, (x, y) in enumerate(fxgraft.with_targets(data)):
        loop.begin(step)
        accelerator.backward(loop.loss(loop.call(x), y))
        loop.end()


def of_lightning(loop: Loop) -> None:
    lightning = pytest.importorskip("lightning")
    from fxgraft.integrations.lightning import Grafts

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = loop.model

        def training_step(self, batch: Any, index: int) -> Tensor:
            torch.manual_seed(index)
            return loop.loss(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return loop.optimizer

    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = lightning.Trainer(callbacks=[Grafts()], accelerator="cpu", max_epochs=1, **quiet)
    trainer.fit(Module(), DataLoader(TensorDataset(IMAGES, LABELS), BATCH))


class Items(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": IMAGES[index], "labels": LABELS[index]}


def of_transformers(loop: Loop, folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from fxgraft.integrations.transformers import Trainer

    class Seeded(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            torch.manual_seed(self.state.global_step)
            return super().compute_loss(*args, **kwargs)

    args = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        max_grad_norm=0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    steady = torch.optim.lr_scheduler.LambdaLR(loop.optimizer, lambda _: 1.0)
    Seeded(model=loop.model, args=args, train_dataset=Items(), optimizers=(loop.optimizer, steady)).train()


Way = Callable[[Loop], None]
SITUATIONS: dict[str, tuple[Way, Way]] = {
    "`with targets(y)` around the call": (in_a_block, plain),
    "`with_targets` over a list": (from_a_loader, plain),
    "`with_targets` over a `DataLoader`": (
        lambda loop: from_a_loader(loop, DataLoader(TensorDataset(IMAGES, LABELS), BATCH)),
        plain,
    ),
    "`with_targets`, batches that are dictionaries": (
        lambda loop: from_a_loader(loop, keyed(), "image", "label"),
        plain,
    ),
    "`with_targets` by `next`": (by_next, plain),
    "`with_targets`, one batch ahead": (partial(ahead, count=1), plain),
    "`with_targets`, two batches ahead": (partial(ahead, count=2), plain),
    "`with_targets`, one batch ahead, slices of one tensor": (partial(ahead, count=1, slices=True), plain),
    "two loaders with labels, zipped": (zipped, plain),
    "labels as one-hot vectors": (one_hot, plain),
    "labels as 32-bit integers": (narrow, plain),
    "an evaluation between pass and loss": (evaluated_between, plain),
    "two training passes, then both losses": (
        partial(two_views, together=True),
        partial(two_views, together=False),
    ),
    "two training passes, outputs converted, then both losses": (
        partial(two_views, together=True, convert=lambda out: out.double().float()),
        partial(two_views, together=False),
    ),
    "an output that was copied": (partial(converted, convert=lambda out: out.clone()), plain),
    "an output that was scaled and cut": (
        partial(converted, convert=lambda out: (2 * out / 2)[..., :]),
        plain,
    ),
    "the sum of `losses`": (in_parts, plain),
    "a loss of its own, and `extra_loss`": (with_a_loss_of_its_own, plain),
    "class weights in a function": (
        partial(plain, criterion=lambda out, y: F.cross_entropy(out, y, weight=WEIGHTS)),
        partial(plain, criterion=nn.CrossEntropyLoss(WEIGHTS)),
    ),
    "class weights in `functools.partial`": (
        partial(plain, criterion=partial(F.cross_entropy, weight=WEIGHTS)),
        partial(plain, criterion=nn.CrossEntropyLoss(WEIGHTS)),
    ),
    "label smoothing in a function that takes `reduction`": (
        partial(plain, criterion=smooth),
        partial(plain, criterion=nn.CrossEntropyLoss(label_smoothing=0.1)),
    ),
    "diagnostics and summary in every step": (logged, plain),
    "micro-batches that are accumulated": (accumulated, accumulated_by_hand),
    "`GradScaler`, gradients set to zero": (scaled, plain),
    "clipped gradients": (clipped, plain),
    "a closure of the optimiser": (in_a_closure, plain),
    "`torch.autograd.grad`": (by_gradients, plain),
    "parameters of grafts in a group of their own": (added_groups, plain),
    "two passes of one batch (SAM)": (
        partial(sharpness_aware, block=True),
        partial(sharpness_aware, block=False),
    ),
    "going on from state dicts": (partial(resumed, how="state"), plain),
    "going on in a deep copy": (partial(resumed, how="copy"), plain),
    "going on in a pickled model": (partial(resumed, how="pickle"), plain),
    "validation after every step": (validated, plain),
    "a teacher beside the model": (with_a_teacher, plain),
    "a student and a teacher in one module, both training": (student_and_teacher, plain),
    "a patched part of a model": (around, plain),
    "another thread": (in_a_thread, plain),
    "tasks of asyncio": (in_tasks, plain),
    "accelerate": (of_accelerate, plain),
    "Lightning, with `Grafts`": (of_lightning, plain),
    "transformers, with `fxgraft.integrations.transformers.Trainer`": (
        partial(of_transformers, folder=FOLDER),
        partial(plain, reseeds=False),
    ),
}

_OWN_LOSS = "refused: `loss` takes the criterion, which the method weighs or replaces"
_ROWS = "refused: the loss of single rows does not follow from that of a batch; `functools.partial` of a loss says it"
_BOOSTING = (
    "refused with its gradient-boosting loss, which stands in for cross-entropy alone and takes class indices"
)
REFUSED = {
    ("a loss of its own, and `extra_loss`", "mixmo"): _OWN_LOSS,
    ("a loss of its own, and `extra_loss`", "diversification"): _OWN_LOSS,
    ("class weights in a function", "mixmo"): _ROWS,
    ("class weights in a function", "diversification"): _BOOSTING,
    ("label smoothing in a function that takes `reduction`", "diversification"): _BOOSTING,
    ("labels as one-hot vectors", "diversification"): _BOOSTING,
}
# In every run; the sweep goes through all of them.
USUAL = ("mixmo", "rsc")


@lru_cache
def patched(method: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = fxgraft.patch(SMALL.build(), method, input_size=SMALL.input_size, **METHODS[method])
    return model, copy.deepcopy(model.state_dict())


def trained(method: str, way: Way) -> dict[str, Tensor]:
    model, state = patched(method)
    model.load_state_dict(state)
    model.train().zero_grad()
    loop = Loop(model)
    way(loop)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@lru_cache
def expected(method: str, way: Way) -> dict[str, Tensor]:
    return trained(method, way)


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated")  # by Lightning
@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[] if m in USUAL else pytest.mark.sweep) for m in METHODS]
)
@pytest.mark.parametrize(
    "situation", [pytest.param(name, marks=pytest.mark.works_with(f"loop: {name}")) for name in SITUATIONS]
)
def test_a_loop(situation: str, method: str, request: pytest.FixtureRequest) -> None:
    reason = REFUSED.get((situation, method))
    if reason is not None:
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True, raises=fxgraft.FxgraftError))
    way, reference = SITUATIONS[situation]
    wanted = expected(method, reference)
    found = trained(method, way)
    _, start = patched(method)
    assert any(not torch.equal(start[name], value) for name, value in wanted.items())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
