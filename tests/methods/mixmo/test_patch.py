"""MixMo on models: both ends against the authors', folding, copies, undoing, compiling, other grafts beside it."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import fxgraft
from fxgraft.patches.mixmo.masks import MIXINGS
from fxgraft.patches.mixmo.pairing import Pairing
from fxgraft.patches.mixmo.patch import Encoders, Heads
from golden_data import GoldenCase, load_golden
from methods.mixmo.mixing import SMALL, last_pairing, patched, trained, unit
from models.small import CLASSES, Net, batch, net
from models.toys import assert_same, state_of_everything

CHANNELS = (8, 12, 16, 20)


# Both ends, against the authors' network.


class Ends(nn.Module):
    """The authors' stem and a head of 20 features, which the test puts in by a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 2, 1, bias=False)
        self.fc = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv1(x).mean((2, 3))[:, :20])


@pytest.mark.parametrize("init", ["random", "pretrained"])
@pytest.mark.parametrize("case", list(load_golden("mixmo_net")), ids=str)
def test_both_ends_are_the_authors(case: GoldenCase, init: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    members, given = case.settings["M"], case.inputs_as(torch.float64)
    model: Any = fxgraft.patch(
        Ends(), "mixmo", members=members, init=init, spread=0, input_size=(3, 12, 12)
    ).double()
    scale = members if init == "pretrained" else 1
    with torch.no_grad():
        for index in range(members):
            encoder = (
                model.conv1.weight if index == 0 else model.get_parameter(f"conv1.graft_mixmo.weight_{index}")
            )
            encoder.copy_(scale * given[f"conv1_{index}"])
            for name, key in (("weight", "w"), ("bias", "b")):
                own = (
                    getattr(model.fc, name)
                    if index == 0
                    else model.get_parameter(f"fc.graft_mixmo.{name}_{index}")
                )
                own.copy_(given[f"fc_{key}{index}"])

    # The authors store one mask for two members, and round its complement in float32.
    stored = case.inputs["masks"].float()
    masks = torch.cat((stored, 1 - stored)) if members == 2 else stored

    def draw(self: Pairing, *args: Any, **kwargs: Any) -> None:
        self.masks, self.shares = masks.double(), masks.mean((2, 3, 4)).t()
        self.weights = torch.ones_like(self.shares)

    monkeypatch.setattr(Pairing, "draw", draw)
    maps: list[Tensor] = []
    model.conv1.register_forward_hook(lambda module, args, out: maps.append(out))
    model.fc.register_forward_pre_hook(lambda module, args: (given["feats"],))
    pixels = given["pixels"].chunk(members, 1)
    labels = [torch.zeros(len(pixels[0]), dtype=torch.long)] * members
    out = model.train()(fxgraft.mixmo.MixMoInput(pixels), target=labels)
    torch.testing.assert_close(maps[0], case.outputs["stem_train"], rtol=1e-6, atol=1e-6)
    for index in range(members):
        torch.testing.assert_close(out[index], case.outputs[f"logits_{index}"], rtol=1e-12, atol=1e-12)

    torch.testing.assert_close(model.eval()(pixels[0]), case.outputs["logits"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(maps[1], case.outputs["stem_infer_3ch"], rtol=1e-12, atol=1e-12)


# Training.


@pytest.mark.parametrize("members", [2, 3])
@pytest.mark.parametrize("mixing", MIXINGS)
def test_every_mixing_trains_every_member(mixing: Any, members: int) -> None:
    model = patched(mixing=mixing, members=members, p=1.0)
    x, y = batch()
    out = model(x, target=y)
    assert out.shape == (members, len(x), CLASSES)
    fxgraft.loss(model, out, y).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    last = last_pairing(model)
    torch.testing.assert_close(last.shares.sum(1), torch.ones(len(x)))
    torch.testing.assert_close(last.masks.expand(members, 6, 8, 12, 12).sum(0), torch.ones(6, 8, 12, 12))


@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_a_pass_mixes_the_encodings_of_its_pairs(init: Any) -> None:
    model = patched(mixing="linear", init=init, r=1.0, spread=0)
    x, y = batch()
    seen: list[Tensor] = []
    model.layer1[0].register_forward_hook(lambda module, args, out: seen.append(out))
    out = model(x, target=y)
    last, own = last_pairing(model), unit(model, Encoders)
    first = F.conv2d(x, model.layer1[0].weight, model.layer1[0].bias, 2, 1)
    second = F.conv2d(x[last.permutations[1]], own.weight_1, own.bias_1, 2, 1)
    share = last.shares[:, 0].reshape(-1, 1, 1, 1)
    factor = 1 if init == "pretrained" else 2
    torch.testing.assert_close(seen[0], factor * (share * first + (1 - share) * second))
    expected = sum(
        (2 * last.shares[:, i] * F.cross_entropy(out[i], y[last.permutations[i]], reduction="none")).mean()
        for i in range(2)
    )
    torch.testing.assert_close(fxgraft.loss(model, out, y), expected)


def test_sums_weigh_all_members_alike() -> None:
    model = patched(mixing="sum", members=3)
    x, y = batch()
    out = model(x, target=y)
    last = last_pairing(model)
    assert torch.equal(last.weights, torch.ones(len(x), 3))
    expected = sum(F.cross_entropy(out[i], y[last.permutations[i]]) for i in range(3))
    torch.testing.assert_close(fxgraft.loss(model, out, y), expected)


def test_the_probability_falls_at_the_end() -> None:
    model = patched(mixing="cut", p=1.0)
    x, y = batch()
    for fraction, cut in ((0.0, True), (0.9, True), (1.0, False)):
        fxgraft.set_progress(model, fraction)
        model(x, target=y)
        masks = last_pairing(model).masks
        assert (masks.shape[-1] > 1) is cut
    patched_half = patched(mixing="cut", p=0.5)
    seen = set()
    for _ in range(20):
        patched_half(x, target=y)
        seen.add(last_pairing(patched_half).masks.shape[-1])
    assert seen == {1, 12}


def test_roles_are_dealt_anew() -> None:
    x, y = batch()

    def firsts(**options: Any) -> set[int]:
        """Of three members: who has a whole box, so that the others share its complement."""
        torch.manual_seed(0)
        model, found = patched(members=3, p=1.0, **options), set()
        for _ in range(15):
            model(x, target=y)
            masks = last_pairing(model).masks
            binary = ((masks == 0) | (masks == 1)).flatten(1).all(1)
            found.add(int(binary.int().argmax()))
        return found

    assert firsts(shuffle_roles=False) == {0}
    assert firsts() == {0, 1, 2}


def test_repetitions_and_kept_rows() -> None:
    x, y = batch()
    model = patched(repetitions=3)
    out = model(x, target=y)
    assert out.shape == (2, 18, CLASSES)
    fxgraft.loss(model, out, y).backward()
    kept = patched(kept=1.0, repetitions=2)
    kept(x, target=y)
    first, second = last_pairing(kept).permutations
    assert torch.equal(first, second)


def test_same_seed_same_pass() -> None:
    model = patched()
    x, y = batch()
    outs = []
    for _ in range(2):
        torch.manual_seed(5)
        outs.append(model(x, target=y))
    assert torch.equal(*outs)


# Folding.


@pytest.mark.parametrize("members", [2, 3])
@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_evaluation_follows_the_weights_and_merges(members: int, init: Any) -> None:
    model = trained(patched(members=members, init=init)).eval()
    x, _ = batch()
    all_members = model(x, members=True)
    torch.testing.assert_close(model(x), all_members.mean(0))
    assert not torch.equal(all_members[0], all_members[1])
    merged = fxgraft.merge(model)
    fresh = Net()
    fresh.load_state_dict(merged.state_dict(), strict=True)
    torch.testing.assert_close(fresh.eval()(x), model(x), rtol=1e-6, atol=1e-6)
    assert type(merged) is Net
    with torch.no_grad():
        unit(model, Heads).bias_1 += members
    torch.testing.assert_close(model(x), merged.eval()(x) + 1)


def test_unpatching_leaves_member_zero_and_everything_else_to_the_bit() -> None:
    model = net()
    before = state_of_everything(model)
    fxgraft.unpatch(patched(model, spread=0))
    assert_same(before, state_of_everything(model))
    fxgraft.unpatch(patched(model))
    torch.set_rng_state(before["random"])  # the members' offsets were drawn
    assert_same(before, state_of_everything(model))
    weight = trained(patched(model)).layer1[0].weight.clone()
    fxgraft.unpatch(model)
    assert torch.equal(model.layer1[0].weight, weight)
    assert list(model.state_dict()) == list(net().state_dict())


def test_member_logits_in_one_pass_and_in_the_mode_it_found() -> None:
    model = trained(patched(members=3))
    model.layer2[1].eval()  # frozen by the user
    modes = [module.training for module in model.modules()]
    calls: list[int] = []
    model.layer2.register_forward_hook(lambda *_: calls.append(1))
    x, _ = batch()
    found = fxgraft.mixmo.member_logits(model, x)
    assert calls == [1]
    assert [module.training for module in model.modules()] == modes
    model.eval()
    assert torch.equal(found.logits, model(x, members=True))
    torch.testing.assert_close(found.ensemble, model(x))
    votes = found.logits.argmax(-1)
    pairs = [(votes[i] != votes[j]).float().mean() for i in range(3) for j in range(i)]
    torch.testing.assert_close(found.disagreement, torch.stack(pairs).mean())
    assert found.entropy.shape == (6,)
    with pytest.raises(fxgraft.SiteError, match="has no members"):
        fxgraft.mixmo.member_logits(net(), x)


def test_parts_of_the_network_by_themselves() -> None:
    model = timm.create_model("resnet18", num_classes=4, channels=CHANNELS)
    x, y = torch.randn(2, 3, 64, 64), torch.arange(2)
    fxgraft.patch(model, "mixmo", input_size=(3, 64, 64)).eval()
    assert torch.equal(model.forward_head(model.forward_features(x)), model(x))
    model.train()
    with pytest.raises(fxgraft.SiteError, match="acts inside a training pass"):
        model.forward_features(x)
    model.fc.eval()
    with pytest.raises(fxgraft.StructureError, match="was not in training mode"):
        model(x, target=y)


# Copies, and what users do to a patched model.


def test_copies_predict_the_same_and_share_nothing(tmp_path: Path) -> None:
    model = trained(patched(members=3)).eval()
    x, _ = batch()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    fxgraft.save(model, tmp_path)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
        fxgraft.load(Net().eval(), tmp_path),
        ModelEmaV3(model).module,
    ]
    expected = model(x, members=True)
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    for each in copies:
        assert torch.equal(each.eval()(x, members=True), expected)
        assert not own & {tensor.data_ptr() for tensor in each.state_dict().values()}
        trained(each, 1)
    assert torch.equal(model.eval()(x, members=True), expected)


def test_an_average_of_weights_follows() -> None:
    model = patched()
    average = ModelEmaV3(model, decay=0.5)
    trained(model, 1)
    average.update(model)
    mine, theirs = unit(model, Encoders).weight_1, unit(average.module, Encoders).weight_1
    assert not torch.equal(mine, theirs)
    torch.testing.assert_close(theirs, (net().layer1[0].weight + mine) / 2)


def test_another_classifier_gets_heads_of_its_own() -> None:
    model = timm.create_model("resnet18", num_classes=4, channels=CHANNELS)
    fxgraft.patch(model, "mixmo", input_size=(3, 64, 64))
    x = torch.randn(4, 3, 64, 64)
    model.reset_classifier(3)
    with pytest.warns(fxgraft.FxgraftWarning, match="was made again"):
        assert model(x, target=torch.arange(4) % 3).shape == (2, 4, 3)
    (graft,) = fxgraft.grafts(model)
    assert unit(model, Heads).weight_1.shape == (3, 20)
    assert {id(p) for p in graft.parameters()} <= {id(p) for p in model.parameters()}
    head = nn.Linear(20, 3)
    nn.init.constant_(head.weight, 50)
    model.fc = head
    with pytest.warns(fxgraft.FxgraftWarning, match=r"Lost are fc\.graft_mixmo\.weight_1"):
        model.eval()(x)
    assert torch.equal(unit(model, Heads).weight_1, head.weight)
    assert unit(model, Heads).offset_0.abs().mean() > 1


def test_another_stem_gets_encoders_of_its_own() -> None:
    model = patched()
    model.layer1[0] = nn.Conv2d(3, 8, 5, 2, 2)
    x, y = batch()
    with pytest.warns(fxgraft.FxgraftWarning, match="was made again"):
        assert model(x, target=y).shape == (2, 6, CLASSES)
    assert unit(model, Encoders).weight_1.shape == (8, 3, 5, 5)


def test_a_frozen_stem_stays_frozen() -> None:
    model = net()
    model.layer1[0].requires_grad_(False)
    before = patched(model).layer1[0].weight.clone()
    trained(model)
    assert not unit(model, Encoders).weight_1.requires_grad
    assert torch.equal(unit(model, Encoders).weight_1, before)


# Other grafts on the same model.


def test_others_see_the_labels_of_the_mixtures() -> None:
    model = patched(mixing="linear", repetitions=2)
    fxgraft.patch(model, "rsc", layer="layer1", batch_share=1.0, **SMALL)
    fxgraft.patch(model, "selfnorm", layers="layer2", **SMALL)
    x, y = batch()
    seen: list[Tensor] = []
    context = fxgraft.grafts(model)[0].units["inputs"].context
    model.layer2.register_forward_hook(lambda *_: seen.append(context.current.labels.value))
    out = model(x, target=y)
    assert out.shape == (2, 12, CLASSES)
    last = last_pairing(model)
    labels = [F.one_hot(y[order], CLASSES) for order in last.permutations]
    expected = last.shares[:, :1] * labels[0] + last.shares[:, 1:] * labels[1]
    torch.testing.assert_close(seen[-1], expected)
    fxgraft.loss(model, out, y).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    fxgraft.unpatch(model, "rsc", "selfnorm")
    assert model(x, target=y).shape == (2, 12, CLASSES)


def test_two_of_them_do_not_go_together() -> None:
    with pytest.raises(
        fxgraft.ConfigError, match="both pair every row of the output with labels of other rows"
    ):
        fxgraft.patch(patched(), "mixmo", members=3, name="more", **SMALL)
