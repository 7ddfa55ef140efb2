"""Gaussian matching as a part of the target network: in a step, in evaluation, undone and merged."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgraft
from methods.gam.gam_tools import SIZE, contents, images, patched, unchanged
from models.small import Net, exactly, net

EPS = 1e-5


class Typed(nn.Module):
    """A `Net` with the matching typed into its forward, at the places in `taps`."""

    def __init__(self, inner: Net, taps: list[str]) -> None:
        super().__init__()
        self.inner, self.taps = inner, taps
        self.seen: dict[str, Tensor] = {}
        self.sources: dict[str, Tensor] | None = None
        self.history: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in taps}
        self.momentum = 0.1

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner
        x = self.tap("layer1", inner.layer1(x))
        x = self.tap("act2", inner.act2(inner.layer2(inner.act1(x))))
        return self.tap("fc", inner.fc(inner.drop(x.mean((2, 3)))))

    def tap(self, name: str, x: Tensor) -> Tensor:
        if name not in self.taps:
            return x
        if self.sources is not None:
            source = self.sources[name]
            self.history[name].append((moments(source.detach()), moments(x.detach())))
            (ms, vs), (mt, vt) = moments(source), moments(x)
            x = (x - over(mt, x)) / over((vt + EPS).sqrt(), x) * over((vs + EPS).sqrt(), x) + over(ms, x)
        elif self.history[name]:
            (ms, vs), (mt, vt) = (self.running(name, domain) for domain in (0, 1))
            x = (x - over(mt, x)) / over((vt + EPS).sqrt(), x) * over((vs + EPS).sqrt(), x) + over(ms, x)
        self.seen[name] = x
        return x

    def running(self, name: str, domain: int) -> tuple[Tensor, Tensor]:
        """Mean and variance of the mixture of all batches so far, each weighed as the averages weigh it."""
        first = second = torch.zeros(())
        for count, pair in enumerate(self.history[name]):
            weight = max(1 / (count + 1), self.momentum)
            mean, variance = pair[domain]
            first = (1 - weight) * first + weight * mean
            second = (1 - weight) * second + weight * (variance + mean**2)
        return first, second - first**2


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    others = [d for d in range(x.ndim) if d != 1]
    return x.mean(others), x.var(others, correction=0)


def over(each: Tensor, x: Tensor) -> Tensor:
    return each.view(1, -1, *[1] * (x.ndim - 2))


def played(layers: list[str], steps: int = 4, model: nn.Module | None = None, **options: Any) -> nn.Module:
    """A model after some steps of the game, in evaluation mode."""
    model = patched(model or net(seed=1), layers=layers, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for index in range(steps):
        optimizer.zero_grad()
        pair = images(5, index), 2 * images(6, 100 + index) + 1
        dtype = next(model.parameters()).dtype
        fxgraft.gam.gam_losses(model, *(x.to(dtype) for x in pair)).mapping.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_it_trains_and_predicts_as_the_network_with_the_formula_typed_in(dtype: torch.dtype) -> None:
    taps = ["layer1", "act2", "fc"]
    source = net(seed=1).to(dtype).eval().requires_grad_(False)
    model = patched(net(seed=2).to(dtype), layers=taps, source=source, drift=0.3)
    plain, frozen = Typed(net(seed=2).to(dtype), taps), Typed(source, taps)
    judges = fxgraft.patches.gam.discriminators(model)
    judges.requires_grad_(False)  # the reference below asks them as they are, and nobody trains them here
    optimizers = [torch.optim.SGD(each.parameters(), 0.05) for each in (model, plain.inner)]
    close = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-5}
    for index in range(5):
        x_source, x_target = images(5, index).to(dtype), 2 * images(7, 50 + index).to(dtype)
        step = fxgraft.gam.gam_losses(model, x_source, x_target)
        frozen(x_source)
        plain.sources = frozen.seen
        plain(x_target)
        plain.sources = None
        fooled = [
            weight
            * F.cross_entropy(judges[key](plain.seen[key]), torch.zeros_like(judges[key](s)[:, 0]).long())
            for (key, s), weight in zip(plain.seen.items(), (0.1, 0.1, 1.0), strict=True)
        ]
        drift = sum(
            (a - b).square().mean()
            for a, b in zip(source.parameters(), plain.inner.parameters(), strict=True)
        )
        expected = torch.stack(fooled).sum() + 0.3 * drift
        torch.testing.assert_close(step.mapping, expected, **close)
        for optimizer, loss in zip(optimizers, (step.mapping, expected), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for name, p in plain.inner.named_parameters():
            torch.testing.assert_close(model.get_parameter(name), p, **close)
        for each in (model, plain):
            each.eval()
        x = images(3, 99).to(dtype)
        torch.testing.assert_close(model(x), plain(x), **close)
        for each in (model, plain):
            each.train()


def test_before_the_first_step_it_is_the_bare_network_to_the_bit() -> None:
    for training in (True, False):
        bare = net(dropout=0.3).train(training)
        model = patched(copy.deepcopy(bare))
        outs = []
        for each in (bare, model):
            torch.manual_seed(0)
            outs.append(each(images()))
            outs[-1].square().sum().backward()
        exactly(*outs)
        for name, p in bare.named_parameters():
            exactly(model.get_parameter(name).grad, p.grad)
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in bare.named_parameters()]


def test_steps_bring_the_moments_of_what_the_target_gives_to_the_sources() -> None:
    model = patched(net(seed=1).eval(), layers=["layer1"])
    x = 3 * images(8, 5) + 2
    before = moments(net(seed=1).eval().layer1(x))[0]
    for index in range(6):
        fxgraft.gam.gam_losses(model, images(8, index), x)
    with torch.no_grad():
        out = model.layer1(x)
    wanted = torch.stack([moments(net(seed=1).eval().layer1(images(8, i)))[0] for i in range(6)]).mean(0)
    assert (moments(out)[0] - wanted).abs().max() < 0.2 * (before - wanted).abs().max()


class Flat(nn.Module):
    """A map that is flattened into a linear layer, and a convolution without padding; no normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.act = nn.Tanh()
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(4 * 22 * 22, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.act(self.conv(x)).flatten(1)))


class Tokens(nn.Module):
    """Tokens through LayerNorm, averaged into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 8, 8)
        self.norm = nn.LayerNorm(6)
        self.mlp = nn.Linear(6, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        return self.head((x + torch.tanh(self.mlp(self.norm(x)))).mean(1))


FOLDED = {
    "batch norm at the end of a sequence": (net, ["layer1"]),
    "the pooled map, and the logits": (net, ["act2", "fc"]),
    "a network without normalisation": (Flat, ["conv", "act", "fc"]),
    "tokens": (Tokens, ["norm", "mlp", "head"]),
}


@pytest.mark.parametrize("case", FOLDED)
def test_it_merges_exactly(case: str) -> None:
    build, layers = FOLDED[case]
    torch.manual_seed(0)
    model = played(layers, model=build().double())
    bare = fxgraft.unpatch(copy.deepcopy(model))
    x = images(4, 9).double()
    merged = fxgraft.merge(model)
    stock = build().double().eval()
    stock.load_state_dict(merged.state_dict(), strict=True)
    assert type(merged) is type(bare)
    assert (model(x) - bare(x)).abs().max() > 1e-2, "there is something to fold"
    torch.testing.assert_close(stock(x), model(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layers", [["act1"], ["layer1", "act1"]])
def test_what_no_layer_can_take_in_is_not_merged(layers: list[str]) -> None:
    model = played(layers)
    before, out = contents(model), model(images())
    with pytest.raises(
        fxgraft.MergeError, match=r"'gam' scales the channels at 'act1', and no layer can take"
    ):
        fxgraft.merge(model)
    unchanged(model, before)
    exactly(model(images()), out)
    fxgraft.merge(patched(layers=layers))  # nothing was matched yet


def test_shared_and_computed_weights_are_left_alone() -> None:
    model = net(seed=1)
    nn.utils.parametrizations.weight_norm(model.fc)
    with pytest.raises(fxgraft.MergeError, match="'fc'"):
        fxgraft.merge(played(["fc"], model=model))


def test_it_comes_off_with_the_adapted_weights_left() -> None:
    model = played(["layer1", "fc"])
    weights = {key: value for key, value in contents(model).items() if "graft_" not in key}
    fxgraft.unpatch(model)
    assert type(model) is Net
    unchanged(model, weights)
    plain = net(seed=1).eval()
    plain.load_state_dict(weights)
    exactly(model(images()), plain(images()))


def test_the_running_moments_travel() -> None:
    model = played(["layer1", "fc"])
    x = images()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        exactly(twin(x), model(x))
    again = patched(net(seed=1), layers=["layer1", "fc"]).eval()
    again.load_state_dict(model.state_dict(), strict=True)
    exactly(again(x), model(x))


def test_a_batch_of_one_needs_running_statistics() -> None:
    with pytest.raises(fxgraft.ConfigError, match='statistics="running"'):
        fxgraft.gam.gam_losses(patched(layers=["fc"]).eval(), images(1), images(1))
    model = patched(layers=["fc"], statistics="running").eval()
    assert fxgraft.gam.gam_losses(model, images(1), images(1)).mapping.isfinite()


def test_a_failed_step_leaves_the_moments() -> None:
    model = patched(net(seed=1), layers=["layer1", "fc"]).eval()
    before = contents(model)
    with pytest.raises(fxgraft.ConfigError, match="deviation"):
        fxgraft.gam.gam_losses(model, images(1), images(1))
    unchanged(model, before)


@pytest.mark.parametrize(
    ("task", "gan", "drift", "weights"),
    [("classification", "jsd", 1.0, [0.1, 0.1, 1.0]), ("dense", "lsgan", 0.1, [1.0, 1.0, 1.0])],
)
def test_a_task_has_its_defaults(task: Any, gan: str, drift: float, weights: list[float]) -> None:
    patch = fxgraft.GAM(layers=["layer1"], task=task)
    assert (patch.gan, patch.drift) == (gan, drift)
    assert fxgraft.GAM(layers=["layer1"], task=task, drift=0.7, gan="jsd").drift == 0.7
    model = fxgraft.patch(net(), "gam", layers=["layer1", "act2", "fc"], task=task, input_size=SIZE)
    assert list(fxgraft.patches.gam.game.game_of(fxgraft.grafts(model)[0]).weights.values()) == weights


@pytest.mark.sweep
def test_a_compiled_model_matches_alike() -> None:
    model = played(["layer1", "fc"], steps=2)
    model.zero_grad(set_to_none=True)
    twin = copy.deepcopy(model)
    compiled: Any = torch.compile(twin, backend="aot_eager", fullgraph=True)
    x = images()
    torch.testing.assert_close(compiled(x), model(x))
    for each in (compiled.train(), model.train()):
        fxgraft.gam.gam_losses(each, images(5, 3), images(6, 4)).mapping.backward()
    torch.testing.assert_close(dict(twin.named_buffers()), dict(model.named_buffers()))
    for name, p in model.named_parameters():
        torch.testing.assert_close(twin.get_parameter(name).grad, p.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
@pytest.mark.sweep
def test_timms_pooled_features_merge(name: str) -> None:
    options = {"global_pool": "avg"} if name == "test_vit" else {}
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options).double()
    names = dict(model.named_modules())
    last = {
        "test_vit": "fc_norm",
        "test_convnext": "head.norm",
    }  # a normalisation stands behind the pooling there
    pool = last.get(name) or next(each for each in names if each.endswith("global_pool"))
    ends = ("fc", "classifier", "head")
    head = next(n for n in names if n.split(".")[-1] in ends and hasattr(names[n], "weight"))
    fxgraft.patch(model, "gam", layers=[pool, head])
    for index in range(2):
        size = model.default_cfg["input_size"][-1]
        fxgraft.gam.gam_losses(model, *(images(4, index + i, size).double() * (i + 1) + i for i in (0, 1)))
    x = images(3, 9, size).double()
    expected = model.eval()(x)
    torch.testing.assert_close(fxgraft.merge(model)(x), expected, rtol=1e-9, atol=1e-11)
    assert (fxgraft.unpatch(model)(x) - expected).abs().max() > 1e-3
