"""GAM on models: which loss reaches what, what never changes, and what is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxgraft
from fxgraft.patches.gam import step as gam
from fxgraft.patches.gam import tensors as core
from fxgraft.patches.gam.discriminator import Discriminator
from methods.gam.gam_tools import SIZE, TAPS, contents, gradients, images, patched, unchanged
from models.small import Net, exactly, net

GANS = pytest.mark.parametrize("gan", ["jsd", "lsgan"])


def activations(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What the taps see, computed without any of this library; activations of a `Net` that writes nothing in place."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: seen.update({name: out}))
        for name in TAPS
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return seen


@GANS
@pytest.mark.parametrize("invert", ["target", "both"])
@pytest.mark.parametrize("matching", [None, "gaussian"])
def test_losses_are_those_of_the_functions(gan: Any, invert: Any, matching: Any):
    source, target = net(seed=0), net(seed=3)
    source.eval().requires_grad_(False)
    reference = copy.deepcopy(target)
    options = {"matching": matching, "match_in": "discriminators", "drift": 0.5, "weights": [1, 2, 3]}
    patched(target, source=source, gan=gan, invert=invert, **options)
    x_source, x_target = images(5, 1), images(7, 2)
    step = fxgraft.gam.gam_losses(target, x_source, x_target)
    judges = gam.discriminators(target)
    seen = activations(source, x_source), activations(reference, x_target)
    sides = [torch.zeros(()), torch.zeros(())]
    for weight, (name, judge) in zip((1, 2, 3), judges.items(), strict=True):
        s, t = (each[name] for each in seen)
        if matching:
            t = core.gaussian_match(t, *core.channel_moments(s, eps=1e-5))
        told = weight * core.discriminator_loss(judge(s), judge(t), gan)
        fooled = weight * core.mapping_loss(judge(t), judge(s), gan=gan, invert=invert)
        torch.testing.assert_close(step.parts[f"discriminator.{name}"], told)
        torch.testing.assert_close(step.parts[f"mapping.{name}"], fooled)
        exactly(step.accuracy[name], core.discriminator_accuracy(judge(s), judge(t), gan))
        sides = [sides[0] + told, sides[1] + fooled]
    drift = 0.5 * sum(
        (a - b).square().mean() for a, b in zip(source.parameters(), reference.parameters(), strict=True)
    )
    torch.testing.assert_close(step.parts["drift"], drift)
    torch.testing.assert_close(step.discriminator, sides[0])
    torch.testing.assert_close(step.mapping, sides[1] + drift)
    step.mapping.backward()
    (sides[1] + drift).backward()
    assert gradients(target).keys() == gradients(reference).keys()
    for name, gradient in gradients(target).items():
        torch.testing.assert_close(gradient, reference.get_parameter(name).grad)


@GANS
@pytest.mark.parametrize("order", [("discriminator", "mapping"), ("mapping", "discriminator")])
def test_each_loss_reaches_its_own_side_in_any_order(gan: Any, order: tuple[str, str]):
    model = patched(gan=gan, drift=1.0)
    judges = gam.discriminators(model)
    sides = {"discriminator": judges, "mapping": model}
    optimizers = {name: torch.optim.SGD(side.parameters(), lr=0.1) for name, side in sides.items()}
    found = {}
    for steps_between in (False, True):
        torch.manual_seed(0)
        twin = copy.deepcopy(model)
        sides = {"discriminator": gam.discriminators(twin), "mapping": twin}
        optimizers = {name: torch.optim.SGD(side.parameters(), lr=0.1) for name, side in sides.items()}
        step = fxgraft.gam.gam_losses(twin, images(4, 1), images(6, 2))
        for name in order:
            other = sides["mapping" if name == "discriminator" else "discriminator"]
            before = {k: g.clone() for k, g in gradients(other).items()}
            getattr(step, name).backward()
            assert gradients(sides[name]).keys() == dict(sides[name].named_parameters()).keys()
            assert gradients(other).keys() == before.keys()
            for key, gradient in gradients(other).items():
                exactly(gradient, before[key])
            if steps_between:
                optimizers[name].step()
        found[steps_between] = {k: g for side in sides.values() for k, g in gradients(side).items()}
    for key, gradient in found[False].items():
        exactly(gradient, found[True][key])


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["batch", "running"]),
    st.sampled_from(["jsd", "lsgan"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 100),
)
@pytest.mark.sweep
def test_the_source_never_changes(
    statistics: Any, gan: Any, given_one: bool, training: bool, seed: int
) -> None:
    user = net(seed=seed).requires_grad_(False) if given_one else None
    model = patched(net(seed=seed + 1), source=user, statistics=statistics, gan=gan)
    before = contents(gam.source(model))
    if user is not None:
        own, modes = contents(user), [m.training for m in user.modules()]
    judges = gam.discriminators(model)
    optimizers = [torch.optim.Adam(part.parameters(), lr=0.05) for part in (judges, model)]
    model.train(training)
    start = contents(model)
    for index in range(3):
        step = fxgraft.gam.gam_losses(model, images(4, seed + index), images(5, seed + 7 + index))
        for loss, optimizer in zip((step.discriminator, step.mapping), optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    source = gam.source(model)
    unchanged(source, before)
    assert not any(m.training for m in source.modules())
    assert not any(p.requires_grad or p.grad is not None for p in source.parameters())
    assert not torch.equal(model.fc.weight, start["fc.weight"])
    if user is not None:
        unchanged(user, own)
        assert [m.training for m in user.modules()] == modes
        assert type(user) is Net


def test_without_a_source_it_is_the_model_as_it_was_patched():
    model = net()
    before = contents(model)
    patched(model)
    unchanged(gam.source(model), before)
    step = fxgraft.gam.gam_losses(model.eval(), images(4), images(4))
    assert step.parts["drift"] == 0
    # The same network on the same images: nothing to tell apart, nothing to move.
    exactly(step.accuracy["act2"], torch.tensor(0.5))
    (drift,) = torch.autograd.grad(step.parts["drift"], model.fc.weight)
    exactly(drift, torch.zeros_like(drift))


def test_a_source_keeps_the_grafts_that_act_in_it():
    model = net()
    fxgraft.patch(model, "selfnorm", position="norm", input_size=SIZE)
    fxgraft.patch(model, "crossnorm", position="norm", input_size=SIZE)
    model.eval()
    expected = model(images())
    patched(model)
    source = gam.source(model)
    exactly(source(images()), expected)
    assert [graft.name for graft in fxgraft.grafts(source)] == ["selfnorm", "gam_source"]
    own = {p.data_ptr() for p in model.parameters()}
    assert not own & {p.data_ptr() for p in source.parameters()}
    # In the drift only the network's own weights are paired.
    fxgraft.gam.gam_losses(model, images(), images()).mapping.backward()


def test_a_patched_source_is_taken_as_it_is():
    source = net(seed=5)
    fxgraft.patch(source, "selfnorm", position="norm", input_size=SIZE)
    source.eval().requires_grad_(False)
    model = patched(net(seed=5), source=source)
    exactly(gam.source(model)(images()), source(images()))
    assert [graft.name for graft in fxgraft.grafts(source)] == ["selfnorm"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("options", [{"matching": None}, {"match_in": "discriminators"}], ids=str)
def test_outside_of_a_step_the_model_is_the_bare_one(training: bool, inplace: bool, options: Any):
    bare = net(inplace=inplace, dropout=0.3).train(training)
    model = patched(copy.deepcopy(bare), **options)
    assert list(model.state_dict()) == list(bare.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in bare.named_parameters()]
    assert [name for name, _ in model.named_modules()] == [name for name, _ in bare.named_modules()]
    outs = []
    for each in (bare, model):
        torch.manual_seed(0)
        out = each(images())
        out.square().sum().backward()
        outs.append(out)
    exactly(*outs)
    for name, gradient in gradients(bare).items():
        exactly(model.get_parameter(name).grad, gradient)
    unchanged(model, contents(bare))
    context = model.layer1.__dict__["_fxgraft"].context
    assert not context.left.recorded
    assert context.current is None


def test_values_are_those_before_what_writes_over_them():
    source, target = (net(seed=4, inplace=True) for _ in range(2))
    plain = net(seed=4)
    for each in (source, target, plain):
        each.eval()
    patched(target, source=source.requires_grad_(False), gan="lsgan", matching=None)
    step = fxgraft.gam.gam_losses(target, images(5, 1), images(7, 2))
    judge = gam.discriminators(target)["layer1"]
    s, t = (activations(plain, images(*args))["layer1"] for args in ((5, 1), (7, 2)))
    torch.testing.assert_close(
        step.parts["discriminator.layer1"], 0.1 * core.discriminator_loss(judge(s), judge(t), "lsgan")
    )
    assert s.min() < 0


def test_running_statistics():
    options = {"match_in": "discriminators", "statistics": "running", "momentum": 0.5}
    model = patched(net(seed=1), source=net(seed=2).requires_grad_(False), **options)
    reference = copy.deepcopy(model).eval()
    model.eval()
    source = gam.source(model)
    batches = [(images(1, 10 + i), images(1, 20 + i)) for i in range(4)]
    for pair in batches:  # a batch of one has no statistics of its own
        step = fxgraft.gam.gam_losses(model, *pair)
    assert torch.isfinite(step.mapping)
    seen = [(activations(source, s)["fc"], activations(reference, t)["fc"]) for s, t in batches]
    moments = torch.zeros(2, 2, 5)
    for count, pair in enumerate(seen):
        weight = max(1 / (count + 1), 0.5)
        moments = torch.stack([core.update_moments(moments[d], pair[d], weight) for d in (0, 1)])
    judges = gam.discriminators(model)
    torch.testing.assert_close(judges.state_dict()["moments/fc"], moments.detach())
    mean, std = moments[:, 0], (moments[:, 1] + 1e-5).sqrt()
    t = core.gaussian_match(seen[-1][1], mean[0], std[0], target_mean=mean[1], target_std=std[1])
    torch.testing.assert_close(step.parts["mapping.fc"], core.mapping_loss(judges["fc"](t)))
    assert not [name for name, _ in judges.named_parameters() if "moments" in name]
    again = patched(net(seed=1), **options)
    gam.discriminators(again).load_state_dict(judges.state_dict())
    assert gam.discriminators(again).get_buffer("steps") == 4


def test_accuracy_says_whether_the_game_is_lost():
    model = patched(net(seed=1), layers=["fc"], matching=None, drift=0)
    judges = gam.discriminators(model)
    optimizer = torch.optim.Adam(judges.parameters(), lr=1e-3)
    for index in range(40):
        step = fxgraft.gam.gam_losses(model, images(16, index), 0.2 * images(16, 100 + index) + 2)
        optimizer.zero_grad()
        step.discriminator.backward()
        optimizer.step()
    assert step.accuracy["fc"] > 0.95
    assert step.mapping > step.discriminator


def test_taps_come_in_the_order_asked_for_with_the_releases_weights():
    model = patched(layers=["fc", "layer1"])
    assert list(gam.discriminators(model)) == ["fc", "layer1"]
    one = fxgraft.gam.gam_losses(model.eval(), images(), images(seed=3))
    other = fxgraft.gam.gam_losses(
        patched(net(), layers=["fc", "layer1"], weights=[1, 1]).eval(), images(), images(seed=3)
    )
    assert [0.02 < one.parts[f"mapping.{tap}"] < 0.2 for tap in ("fc", "layer1")] == [True, False]
    assert all(value > 0.2 for name, value in other.parts.items() if name != "drift")


def test_parameters_are_listed_apart_from_the_models():
    model = patched()
    (graft,) = fxgraft.grafts(model)
    judges = gam.discriminators(model)
    assert [id(p) for p in graft.parameters()] == [id(p) for p in judges.parameters()]
    assert not {id(p) for p in graft.parameters()} & {id(p) for p in model.parameters()}
    assert judges["layer1"].layers[0].weight.shape == (500, 8, 1, 1)
    assert judges["fc"].layers[2].weight.shape == (2, 500)
    assert "layer1 (NCHW), act2 (NCHW), fc (NC)" in str(fxgraft.summary(model))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_behave_the_same_and_share_nothing(how: str):
    model = patched(
        source=net(seed=3).requires_grad_(False),
        discriminator=lambda shape: Discriminator(shape[0]),
        layers=["fc"],
        statistics="running",
    )
    fxgraft.gam.gam_losses(model, images(), images())
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    parts = [(gam.source(m), gam.discriminators(m), m) for m in (model, twin)]
    pointers = [{t.data_ptr() for part in each for t in part.state_dict().values()} for each in parts]
    assert not pointers[0] & pointers[1]
    steps = [fxgraft.gam.gam_losses(m, images(), images(seed=9)) for m in (model, twin)]
    for name, value in steps[0].parts.items():
        exactly(steps[1].parts[name], value)
    steps[1].mapping.backward()
    assert gradients(twin)
    assert not gradients(model)


def test_unpatch_and_merge_leave_the_adapted_network():
    bare = net()
    model = patched(copy.deepcopy(bare), match_in="discriminators")
    fxgraft.gam.gam_losses(model, images(), images()).mapping.backward()
    with torch.no_grad():
        model.fc.weight.add_(1)
    merged = fxgraft.merge(model)
    assert type(merged) is Net
    unchanged(merged, contents(model))
    fxgraft.unpatch(model, "gam")
    assert type(model) is Net
    assert "_fxgraft" not in model.__dict__
    with pytest.raises(fxgraft.UnknownGraftError, match="is not patched with GAM"):
        fxgraft.gam.gam_losses(model, images(), images())


def test_saving_says_what_to_do_instead(tmp_path):
    model = patched()
    with pytest.raises(fxgraft.RecipeError, match=r"'gam' .* cannot be saved.*\n.*unpatch\(model, 'gam'\)"):
        fxgraft.save(model, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_everything_follows_the_model():
    model = patched(statistics="running").to(torch.float64)
    step = fxgraft.gam.gam_losses(model, images().double(), images().double())
    assert step.mapping.dtype == torch.float64
    assert gam.source(model).fc.weight.dtype == torch.float64
    assert gam.discriminators(model)["fc"].layers[0].weight.dtype == torch.float64
    model.to(torch.bfloat16)
    step = fxgraft.gam.gam_losses(model, images().bfloat16(), images().bfloat16())
    step.mapping.backward()
    assert step.mapping.dtype == torch.float32
    assert gam.discriminators(model)["fc"].layers[0].weight.dtype == torch.float32
    assert model.layer1[0].weight.grad.dtype == torch.bfloat16


def test_a_source_switched_to_training_is_switched_back():
    model = patched()
    before = contents(gam.source(model))
    gam.source(model).train()
    fxgraft.gam.gam_losses(model, images(), images())
    unchanged(gam.source(model), before)


@GANS
def test_autocast(gan: Any):
    model = patched(gan=gan)
    judges = gam.discriminators(model)
    with torch.autocast("cpu", torch.bfloat16):
        step = fxgraft.gam.gam_losses(model, images(), images(seed=4))
    assert step.mapping.dtype == step.discriminator.dtype == torch.float32
    step.discriminator.backward()
    with torch.no_grad():
        for p in judges.parameters():
            p.add_(1)
    step.mapping.backward()
    assert all(torch.isfinite(g).all() for g in gradients(model).values())


@pytest.mark.sweep
def test_full_graph_compile():
    model = patched(layers=["layer1", "fc"]).eval()
    expected = fxgraft.gam.gam_losses(model, images(), images(seed=4))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    step = fxgraft.gam.gam_losses(compiled, images(), images(seed=4))
    torch.testing.assert_close(step.mapping, expected.mapping)
    exactly(compiled(images()), model(images()))


def test_two_sources_have_names():
    model = net()
    patched(model, source=net(seed=1).requires_grad_(False))
    patched(model, source=net(seed=2).requires_grad_(False), name="second")
    with pytest.raises(fxgraft.UnknownGraftError, match="2 times: 'gam', 'second'"):
        fxgraft.gam.gam_losses(model, images(), images())
    with pytest.raises(fxgraft.UnknownGraftError, match="no GAM named 'secnd'"):
        gam.source(model, "secnd")
    drifts = [
        fxgraft.gam.gam_losses(model, images(), images(), name=n).parts["drift"] for n in ("gam", "second")
    ]
    assert drifts[0] != drifts[1]
    source = net().requires_grad_(False)
    model = patched(net(), source=source)
    with pytest.raises(fxgraft.ConfigError, match="on the model already with these settings"):
        patched(model, source=source, name="third")


class OwnJudge(nn.Module):
    """A user's discriminator with state, dropout, and one decision per image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.drop, self.fc = nn.BatchNorm1d(channels), nn.Dropout(0.2), nn.Linear(channels, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.norm(x.mean((2, 3)))))


def test_own_discriminators():
    shapes = []

    def build(shape: tuple[int, ...]) -> nn.Module:
        shapes.append(shape)
        return OwnJudge(shape[0])

    model = patched(layers=["layer1", "act2"], discriminator=build)
    assert shapes == [(8, 12, 12), (12, 6, 6)]
    judge = gam.discriminators(model)["layer1"]
    assert judge.training
    assert judge.norm.num_batches_tracked == 0
    step = fxgraft.gam.gam_losses(model, images(), images())
    assert judge.norm.num_batches_tracked == 2  # source and target; not the look of the target network
    step.mapping.backward()
    assert not gradients(judge)
    step.discriminator.backward()
    assert gradients(judge)


def test_layers_of_a_bare_call_and_the_loss_are_left_alone():
    model = patched()
    y = torch.tensor([0, 1, 2, 3, 4, 0])
    exactly(fxgraft.loss(model, model(images()), y), F.cross_entropy(model(images()), y))
    assert fxgraft.patch(net(), "gam", layers=TAPS, input_size=SIZE, dry_run=True).description.startswith(
        "taps"
    )


class NoRead(TorchDispatchMode):
    """Fails where a value of a tensor is read, which would make the host wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@GANS
@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_a_step_reads_no_value(gan: Any, statistics: Any):
    model = patched(gan=gan, statistics=statistics, invert="both")
    with NoRead():
        step = fxgraft.gam.gam_losses(model, images(), images(seed=2))
        step.discriminator.backward()
        step.mapping.backward()
    with pytest.raises(AssertionError), NoRead():
        step.mapping.item()
