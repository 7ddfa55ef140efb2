"""The class swap: a patched model is itself, notices what changes, and copies whole."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, fx, nn

import fxgraft
from fxgraft.errors import (
    BypassError,
    FxgraftError,
    FxgraftWarning,
    SiteError,
    TargetError,
    WrappedModelError,
)
from fxgraft.graph.tracing.editing import After, Output
from fxgraft.patches.rsc.patch import record
from models.toys import (
    LABELS,
    Block,
    Gain,
    Net,
    Toy,
    assert_equal_steps,
    assert_same,
    images,
    net,
    state_of_everything,
    step,
)

pytestmark = pytest.mark.usefixtures("toy_methods")

INSIDE = (("stage1.0", After("conv1")),)


def rsc(model: nn.Module, layer: Any = "stage2", **options: Any) -> nn.Module:
    """Patch with RSC so that it always mutes the same: no chance in it."""
    options = {"scope": "spatial", "input_size": (3, 16, 16)} | options
    return fxgraft.patch(model, "rsc", layer=layer, **options)


def test_the_class_is_a_subclass_of_its_own_and_submodules_stay() -> None:
    model = net()
    modules = dict(model.named_modules())
    rsc(model)
    fxgraft.patch(model, Toy(at=INSIDE))
    assert isinstance(model, Net)
    assert isinstance(model.stage1[0], Block)
    assert type(model).__module__ == Net.__module__
    assert type(model).__doc__ == Net.__doc__
    assert {name: id(m) for name, m in model.named_modules()} == {name: id(m) for name, m in modules.items()}
    assert type(model.stage1[1]) is Block
    assert model._get_name() == "Net"


def test_the_repr_shows_the_grafts() -> None:
    model = net()
    bare = repr(model)
    rsc(model, "stage1.0.conv2")
    fxgraft.patch(model, Toy(at=INSIDE, learned=True), name="mine")
    assert repr(model).startswith("Net(\n  grafted: rsc, mine")
    assert "grafted: mine" in repr(model.stage1[0])
    assert "grafted: rsc" in repr(model.stage1[0].conv2)
    assert repr(model.stage1[1]) == repr(net().stage1[1])
    fxgraft.unpatch(model)
    assert repr(model) == bare


def test_hooks_of_the_user_fire_as_before() -> None:
    # Without RSC: its looks ahead call what comes behind its site, hooks included.
    model, fired = fxgraft.patch(net(), Toy(at=INSIDE, factor=1)), []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: fired.append(f"before {name}"))
        module.register_forward_hook(lambda *_, name=name: fired.append(f"after {name}"))
        if name in ("stem.second", "down", "pool", "fc"):  # such hooks forbid what writes to the output
            module.register_full_backward_hook(lambda *_, name=name: fired.append(f"back {name}"))
    model.stem.act.inplace = False
    model(images(), target=LABELS).sum().backward()
    patched = list(fired)
    fired.clear()
    fxgraft.unpatch(model)
    model(images()).sum().backward()
    assert patched == fired
    assert len(fired) > 60


def test_replacing_the_head_is_noticed() -> None:
    model = rsc(net())
    model(images(), target=LABELS)
    model.fc = nn.Linear(16, 9)
    out = model(images(), target=LABELS + 5)
    assert out.shape == (4, 9)
    model.fc = nn.Sequential(nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3))
    assert "modules run again" not in str(fxgraft.summary(model))
    model(images(), target=LABELS % 3)
    assert "modules run again" in str(fxgraft.summary(model))


def test_reset_classifier_works() -> None:
    model = timm.create_model("test_resnet", num_classes=4)
    rsc(model, -1, input_size=None)
    model.reset_classifier(7)
    assert model(images(size=64), target=LABELS + 3).shape == (4, 7)
    fxgraft.unpatch(model)
    assert type(model) is timm.models.ResNet
    assert model.fc.out_features == 7


def test_a_replaced_layer_is_picked_up_where_it_is_only_called() -> None:
    model, bare = net().eval(), net().eval()
    fxgraft.patch(model, Toy(at=INSIDE, factor=1))
    model(images())
    for each in (model, bare):
        torch.manual_seed(3)
        each.stage1[0].conv2 = nn.Conv2d(8, 8, 1)
    assert torch.equal(model(images()), bare(images()))


def test_a_replaced_owner_gets_the_graft_again() -> None:
    model, bare = net().eval(), net().eval()
    fxgraft.patch(model, Toy(at=INSIDE, factor=3))
    for each in (model, bare):
        torch.manual_seed(3)
        each.stage1[0] = Block(8).eval()
    fxgraft.patch(bare, Toy(at=INSIDE, factor=3))
    assert torch.equal(model(images()), bare(images()))
    assert "grafted" in repr(model.stage1[0])


class Switch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 1), nn.Linear(6, 4)
        self.double = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.double:
            x = x * 2
        return self.fc(x.mean((2, 3)))


def test_a_changed_attribute_is_traced_again() -> None:
    model = Switch().eval()
    bare = copy.deepcopy(model)
    fxgraft.patch(model, Toy(at=(("", After("conv")),), factor=3))
    bare.conv.register_forward_hook(lambda _m, _a, out: out * 3)
    for double in (False, True, False):
        model.double = bare.double = double
        assert torch.equal(model(images()), bare(images()))


def test_a_changed_attribute_behind_the_site_is_traced_again() -> None:
    model, plain = Switch(), Switch()
    plain.load_state_dict(model.state_dict())
    rsc(model, "conv", input_size=(3, 8, 8))
    model.double = plain.double = True
    rsc(plain, "conv", input_size=(3, 8, 8))
    for each in (model, plain):
        with record(each) as records:
            each(images(), target=LABELS)
        each.seen = records
    assert torch.equal(model.seen[0].selected, plain.seen[0].selected)
    assert torch.equal(model.seen[0].mask, plain.seen[0].mask)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_parts_of_the_forward_pass_through_the_graft_of_a_module(mode: str) -> None:
    model, bare = net(), net()
    for each in (model, bare):
        getattr(each, mode)()
    fxgraft.patch(model, Toy(at=(("stage2", Output()),), factor=3))
    x = images()
    features = model.forward_features(x)
    assert torch.equal(features, 3 * bare.forward_features(x))
    torch.manual_seed(5)
    ours = model.forward_head(features)
    torch.manual_seed(5)
    assert torch.equal(ours, bare.forward_head(features))


def test_forward_features_of_a_training_method_needs_labels_all_the_same() -> None:
    model = rsc(net())
    with pytest.raises(TargetError, match="'rsc' needs the labels"):
        model.forward_features(images())
    with fxgraft.targets(LABELS), record(model) as records:
        features = model.forward_features(images())
    assert len(records) == 1
    assert features.shape == (4, 16, 4, 4)
    fresh = rsc(net()).eval()
    assert torch.equal(fresh.forward_features(images()), net().eval().forward_features(images()))


@pytest.mark.parametrize("modes", ["training", "evaluation", "both"])
@pytest.mark.parametrize("edit", [After("flatten"), Output()])
def test_parts_of_the_forward_refuse_to_bypass(edit: Any, modes: Any) -> None:
    for training in (True, False):
        model = net().train(training)
        fxgraft.patch(model, Toy(at=(("", edit),), modes=modes))
        name = "training" if training else "evaluation"
        if modes in ("both", name):
            with pytest.raises(
                BypassError, match=rf"forward_features\(\) would bypass 'toy'(?s:.*)in {name} mode"
            ):
                model.forward_features(images())
            with pytest.raises(BypassError, match=r"forward_head\(\) would bypass 'toy'"):
                model.forward_head(torch.randn(2, 16, 4, 4))
        else:
            bare = net().train(training)
            assert torch.equal(model.forward_features(images()), bare.forward_features(images()))
        model(images())  # the whole of it runs in any case


@pytest.mark.parametrize(
    "act", [fxgraft.unpatch, fxgraft.sites, lambda m: fxgraft.patch(m, Toy(factor=9), name="b")]
)
@pytest.mark.parametrize("part", ["", "stage1.0"])
def test_a_class_that_changed_since_is_not_overwritten(part: str, act: Callable[[nn.Module], Any]) -> None:
    model = net()
    fxgraft.patch(model, Toy(at=(*INSIDE, ("", Output())), factor=3))
    module = model.get_submodule(part)
    grafted = type(module)
    module.__class__ = wrapped = type("Foreign", (grafted,), {})
    with pytest.raises(WrappedModelError, match="was wrapped or converted after it was patched"):
        act(model)
    assert type(module) is wrapped
    assert [g.name for g in fxgraft.grafts(model)] == ["toy"]
    module.__class__ = grafted
    fxgraft.unpatch(model)
    assert type(module) in (Net, Block)


@pytest.mark.parametrize("part", ["", "stage1.0"])
def test_a_forward_set_on_the_instance_is_refused(part: str) -> None:
    model = net()
    module = model.get_submodule(part)
    module.forward = module.forward
    before = state_of_everything(model)
    with pytest.raises(WrappedModelError, match="has a forward of its own, set on the instance"):
        fxgraft.patch(model, Toy(at=(*INSIDE, ("", Output()))))
    assert_same(before, state_of_everything(model))


def test_a_module_of_another_patched_model_is_refused() -> None:
    inner = net()
    fxgraft.patch(inner, Toy(at=(*INSIDE, ("", Output())), factor=3))
    outer = nn.Sequential(inner, nn.Softmax(1))
    before = state_of_everything(outer)
    for owner in ("0", "0.stage1.0"):
        with pytest.raises(FxgraftError, match=rf"'{owner}' is already part of another patched model"):
            fxgraft.patch(outer, Toy(at=((owner, Output()),)), input_size=(3, 8, 8))
    with pytest.raises(FxgraftError, match="The model is already part of another patched model"):
        fxgraft.patch(inner.stage1[0], Toy(), input_size=(8, 8, 8))
    assert_same(before, state_of_everything(outer))
    fxgraft.unpatch(inner)
    fxgraft.patch(outer, Toy(at=(("0", Output()),)), input_size=(3, 8, 8))


def test_a_pass_that_misses_a_graft_raises() -> None:
    class Choosy(Net):
        direct = False

        def forward_features(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            if self.__class__.direct:
                for block in self.stage1:
                    x = block(x)
            else:
                x = self.stage1(x)
            return self.stage2(self.down(x))

    model = Choosy()
    fxgraft.patch(model, Toy(at=(("stage1", Output()),)))
    model(images())
    Choosy.direct = True
    with pytest.raises(BypassError, match=r"did not reach the graft on 'stage1'"):
        model(images())


def test_the_signature_is_the_models_own_plus_the_labels() -> None:
    import inspect

    class Options(nn.Module):
        def forward(self, x: Tensor, scale: float = 2.0, **more: Any) -> Tensor:
            return x * scale

    model = Options()
    fxgraft.patch(model, Toy(at=(("", Output()),), factor=3))
    signature = inspect.signature(model.forward)
    assert list(signature.parameters) == ["x", "scale", "target", "more"]
    assert signature.parameters["target"].kind is inspect.Parameter.KEYWORD_ONLY
    assert torch.equal(model(torch.ones(1), scale=5.0), torch.full((1,), 15.0))


def test_a_graphmodule_can_be_patched_copied_recompiled_and_put_back() -> None:
    model = fx.symbolic_trace(net())
    cls, code, x = type(model), model.code, images()
    expected = step(model, x)
    fxgraft.patch(model, Toy(at=(("", After("stage1_0_conv1")),), factor=3, learned=True))
    patched = step(model, x)
    assert not torch.equal(patched[0], expected[0])
    model.recompile()
    assert_equal_steps(step(model, x), patched)
    assert_equal_steps(step(copy.deepcopy(model), x), patched)
    assert isinstance(model, fx.GraphModule)
    fxgraft.unpatch(model)
    assert type(model) is cls
    assert model.code == code
    assert_equal_steps(step(model, x), expected)


def test_two_instances_of_one_class_share_a_grafted_class_and_nothing_else() -> None:
    a, b = net(), net()
    fxgraft.patch(a, Toy(at=INSIDE, factor=3))
    fxgraft.patch(b, Toy(at=INSIDE, factor=5))
    assert type(a) is type(b)
    fxgraft.unpatch(a)
    assert_equal_steps(step(a, images()), step(net(), images()))
    assert len(fxgraft.grafts(b)) == 1


def test_calls_of_a_part_by_hand_run_its_own_graft() -> None:
    model = net().eval()
    fxgraft.patch(model, Toy(at=(("stage1.0", Output()),), factor=3, learned=True))
    x = torch.randn(2, 8, 8, 8)
    assert torch.equal(model.stage1[0](x.clone()), 3 * net().eval().stage1[0](x.clone()))
    rsc(model.train())
    with pytest.raises((SiteError, TargetError)):
        model.stage2(torch.randn(2, 16, 4, 4))


def test_moving_and_converting_takes_the_units_along() -> None:
    model = rsc(net())
    fxgraft.patch(model, Toy(at=(*INSIDE, ("stage1", Output())), factor=1.5, learned=True)).double()
    assert all(p.dtype == torch.float64 for p in fxgraft.grafts(model)[1].parameters())
    assert model(images().double(), target=LABELS).dtype == torch.float64
    (gain,) = {type(u) for u in fxgraft.grafts(model)[1].units.values()}
    assert gain is Gain


class Stage(nn.Module):
    """Runs its children, as the stages of timm's RegNets do."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.children():
            x = block(x)
        return x


def test_a_unit_with_tensors_is_no_child_of_what_runs_its_children() -> None:
    class Staged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stage, self.fc = Stage(), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.stage(x).mean((2, 3)))

    x = torch.randn(2, 3, 8, 8)
    model = Staged()
    expected = model.fc(3 * model.stage(x).mean((2, 3)))
    fxgraft.patch(model, Toy(at=(("stage", Output()),), learned=True, factor=3), input_size=(3, 8, 8))
    assert len(list(model.stage.children())) == 2
    torch.testing.assert_close(model(x), expected)
    assert [key for key in model.state_dict() if "graft_" in key]


def test_a_part_that_is_in_evaluation_mode_alone_is_told() -> None:
    model, part = net(), "stage2"
    rsc(model, batch_share=1.0).train().get_submodule(part).eval()
    with pytest.warns(
        FxgraftWarning, match=r"'rsc' did nothing in a training pass: 'stage2' is in evaluation mode"
    ):
        model(images(), target=LABELS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images(), target=LABELS)  # told once
        rsc(net()).eval()(images())  # no training pass
        looked_through = fxgraft.patch(rsc(net(), "stage1"), "crossnorm", layers="stage2", p=1.0)
        looked_through(images(), target=LABELS)  # RSC looks ahead through the other, in evaluation mode
