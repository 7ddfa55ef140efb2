"""Taps in compiled and exported models, in copies and wrappers, under autocast and activation checkpointing."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

import fxgraft
from fxgraft.errors import BypassError
from fxgraft.graph.tracing.observe import tensors
from fxgraft.patches.rsc.patch import record
from methods.taps.taps_tools import SIZE, odd, seen_by_hooks, tapped_net
from models.toys import LABELS, assert_equal_steps, images, net, step
from sweeping import some

SITES = ("stage1.0.conv2", "stage1.1.add", "stage1", "stem.act_1", "fc")


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("training", "detach"),
    [
        (True, False),
        *(pytest.param(*each, marks=pytest.mark.sweep) for each in ((True, True), (False, False))),
    ],
)
def test_compiled_taps_give_the_eager_values_and_gradients(training: bool, detach: bool) -> None:
    model = tapped_net(SITES, detach=detach).train(training)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for index in range(3):
        x = images(seed=index)
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            # Fetched after some passes and left to the next one after others.
            out, acts = fxgraft.tapped(compiled, x) if index < 2 else (compiled(x), {})
        acts = acts or fxgraft.activations(model)
        torch.manual_seed(0)
        expected, wanted = fxgraft.tapped(twin, x)
        assert list(acts) == list(wanted) == list(SITES)
        for name in SITES[:-1]:  # the last comes after a dropout, which compiled code draws by itself
            close(acts[name], wanted[name])
            assert acts[name].requires_grad == wanted[name].requires_grad
        if not training:
            close(out, expected)
            close(acts["fc"], wanted["fc"])
        if not detach:
            acts["stage1"].square().sum().backward()
            wanted["stage1"].square().sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_passes_that_nobody_fetches_from_do_not_recompile() -> None:
    model = tapped_net(SITES)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(images())
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(images())
        fxgraft.activations(model)
        compiled(images())


@pytest.mark.parametrize("layers", [["stage1"], SITES])
def test_export_is_that_of_the_bare_model(layers: Any) -> None:
    bare, model = net().eval(), tapped_net(layers).eval()
    programs = [torch.export.export(each, (images(),)) for each in (bare, model)]
    nodes = [[(n.op, n.name, n.target, str(n.args)) for n in p.graph.nodes] for p in programs]
    assert nodes[0] == nodes[1]
    assert torch.equal(programs[1].module()(images()), bare(images()))
    with pytest.raises(BypassError, match=r"of torch\.export leaves nothing"):
        fxgraft.activations(model)


COPIES: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model, _: _saved(model),
    "save": lambda model, path: fxgraft.load(net(), fxgraft.save(model, path)),
}


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", some(COPIES, 2))
def test_copies_record_their_own_values_and_inherit_none(way: str, tmp_path: Path) -> None:
    model = tapped_net(SITES)
    model(images(seed=3))  # recorded and not fetched
    twin = COPIES[way](model, tmp_path)
    with pytest.raises(BypassError, match="no pass"):
        fxgraft.activations(twin)
    mine = fxgraft.activations(model)
    assert list(mine) == list(SITES)
    model.eval(), twin.eval()
    _, theirs = fxgraft.tapped(twin, images())
    with pytest.raises(BypassError, match="no pass"):
        fxgraft.activations(model)
    _, mine = fxgraft.tapped(model, images())
    assert list(theirs) == list(SITES)
    assert [name for name in SITES if not torch.equal(mine[name], theirs[name])] == []


def test_merge_and_unpatch_give_the_bare_model() -> None:
    model = tapped_net(SITES)
    for plain in (fxgraft.merge(model), fxgraft.unpatch(model)):
        assert type(plain) is type(net())
        assert list(plain.state_dict()) == list(net().state_dict())
        assert fxgraft.grafts(plain) == []
        assert_equal_steps(step(plain, images()), step(net(), images()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    bare, model = net(), tapped_net(["stage1.0.conv2", "stage1.0.bn", "stage2"])
    seen = seen_by_hooks(bare, ("stage1.0.conv2", "stage1.0.bn", "stage2"))
    with torch.autocast("cpu", dtype=dtype):
        bare(images())
        _, acts = fxgraft.tapped(model, images())
    assert acts["stage1.0.conv2"].dtype == dtype
    for name, value in acts.items():
        assert value.dtype == seen[name].dtype
        assert torch.equal(value, seen[name])


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_memory_format_is_the_sites(layout: torch.memory_format) -> None:
    model = tapped_net(["stage1.0.conv2", "stage2"]).to(memory_format=layout)
    _, acts = fxgraft.tapped(model, images().contiguous(memory_format=layout))
    assert all(value.is_contiguous(memory_format=layout) for value in acts.values())


@pytest.mark.parametrize("way", [torch.no_grad, torch.inference_mode])
def test_without_gradients(way: Any) -> None:
    bare, model = net().eval(), tapped_net(SITES).eval()
    seen = seen_by_hooks(bare, ("stage1.0.conv2", "stage1", "fc"))
    with way():
        bare(images())
        _, acts = fxgraft.tapped(model, images())
        assert acts["stage1"].is_inference() == (way is torch.inference_mode)
    assert not any(value.requires_grad for value in acts.values())
    assert [name for name, value in seen.items() if not torch.equal(acts[name], value)] == []


@pytest.mark.parametrize(
    ("layer", "when"),
    [
        ("layer2.0.add", "before"),
        *(
            pytest.param(*each, marks=pytest.mark.sweep)
            for each in (("layer2", "before"), ("layer2", "after"), ("layer2.0.conv1", "after"))
        ),
    ],
)
def test_checkpointed_regions_are_recorded_once(layer: str, when: str) -> None:
    """In backward they run again; what was recorded in the pass stays, and gradients flow through it."""

    def backbone() -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model("resnet18", num_classes=5, channels=(8, 16, 16, 24))

    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    plain, model = backbone(), backbone()
    if when == "before":
        model.set_grad_checkpointing(True)
    for each in (plain, model):
        fxgraft.patch(each, "taps", layers=layer, input_size=(3, 64, 64))
    if when == "after":
        model.set_grad_checkpointing(True)
    runs: list[None] = []
    model.layer1[0].conv1.register_forward_hook(lambda *_: runs.append(None))
    results = []
    for each in (plain, model):
        out, acts = fxgraft.tapped(each, x)
        (out.square().sum() + acts[layer].square().sum()).backward()
        with pytest.raises(BypassError, match="no pass"):
            fxgraft.activations(each)
        results.append((out, acts[layer], {name: p.grad for name, p in each.named_parameters()}))
    assert len(runs) == 2, "the first stage must be computed again in backward"
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    for name, gradient in results[0][2].items():
        torch.testing.assert_close(results[1][2][name], gradient, rtol=1e-4, atol=1e-5)


# Beside another method.


def test_a_look_ahead_of_another_method_is_not_recorded() -> None:
    """RSC runs the rest of the network before it mutes; what taps record there is of the pass itself."""
    alone = fxgraft.patch(net(), "rsc", layer="stage1", scope="channel", batch_share=1.0, input_size=SIZE)
    both = fxgraft.patch(
        copy.deepcopy(alone), "taps", layers=["stage1.1.conv2", "down", "fc"], input_size=SIZE
    )
    with record(alone) as records:
        expected = step(alone, images(), target=LABELS)
    assert (records[0].mask == 0).any()
    seen = seen_by_hooks(alone, ("down", "fc"))
    step(alone, images(), target=LABELS)
    assert_equal_steps(step(both, images(), target=LABELS), expected)
    acts = fxgraft.activations(both)
    assert [name for name in seen if not torch.equal(acts[name], seen[name])] == []
    assert list(acts) == ["stage1.1.conv2", "down", "fc"]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.sweep
def test_compiled_beside_a_method_that_looks_ahead() -> None:
    model = fxgraft.patch(net(), "rsc", layer="stage1", scope="channel", batch_share=1.0, input_size=SIZE)
    fxgraft.patch(model, "taps", layers=["stage1.1.conv2", "down"], input_size=SIZE)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(images(), target=LABELS)
    twin(images(), target=LABELS)
    acts, wanted = fxgraft.activations(model), fxgraft.activations(twin)
    for name in wanted:
        close(acts[name], wanted[name])


# What other libraries give.


@pytest.mark.parametrize("training", [True, False])
def test_torchvisions_feature_extractor(training: bool) -> None:
    nodes = ["relu", "layer1.0.add", "layer1.0.relu_1", "layer2.0.downsample", "layer3", "flatten", "fc"]
    torch.manual_seed(0)
    model = resnet18(num_classes=5)
    extractor = create_feature_extractor(copy.deepcopy(model), nodes).train(training)
    x = torch.randn(2, 3, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = extractor(x)
    fxgraft.patch(model, "taps", layers=nodes, input_size=(3, 64, 64))
    _, acts = fxgraft.tapped(model.train(training), x)
    assert list(acts) == list(expected) == nodes
    # The extractor's own value of an addition is written over by the activation after it.
    written = {"layer1.0.add"}
    assert torch.equal(expected["layer1.0.add"], expected["layer1.0.relu_1"])
    assert torch.equal(acts["layer1.0.add"].relu(), expected["layer1.0.add"])
    assert [n for n in nodes if n not in written and not torch.equal(acts[n], expected[n])] == []


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("resnet18", {"channels": (8, 16, 16, 24)}, 64),
        pytest.param("convnext_atto", {}, 64, marks=pytest.mark.sweep),
        pytest.param("mobilenetv3_small_050", {}, 64, marks=pytest.mark.sweep),
    ],
)
def test_timms_features_only(name: str, options: dict[str, Any], size: int) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options).eval()
    features = timm.create_model(name, features_only=True, **options).eval()
    features.load_state_dict({key: model.state_dict()[_own(key, model)] for key in features.state_dict()})
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = features(x)
        fxgraft.patch(model, "taps", layers=list(range(len(model.feature_info))), input_size=(3, size, size))
        _, acts = fxgraft.tapped(model, x)
    assert len(acts) == len(expected)
    assert list(map(torch.equal, acts.values(), expected)) == [True] * len(expected)


def _own(key: str, model: nn.Module) -> str:
    """Find a key of timm's feature extractor in the model: its flattened names join levels by an underscore."""
    if key in model.state_dict():
        return key
    head, _, rest = key.partition(".")
    return f"{head.replace('_', '.')}.{rest}"


# Wrappers.


def test_wrappers_are_looked_through(tmp_path: Path) -> None:
    model = tapped_net(["stage1"])
    _, acts = fxgraft.tapped(nn.DataParallel(model), images())  # without GPUs it calls the model itself
    assert list(acts) == ["stage1"]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # a second pass fails where a parameter of the first got no gradient
            out, acts = fxgraft.tapped(wrapped, images())
            (out.sum() + acts["stage1"].square().sum()).backward()
        assert all(p.grad is not None for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_replicas_keep_their_values_to_themselves() -> None:
    model = tapped_net(SITES)
    copies = {m: m._replicate_for_data_parallel() for m in model.modules()}
    for original, replica in copies.items():
        replica._modules.update({name: copies[child] for name, child in original._modules.items()})
        replica._parameters.update(original._parameters)
        replica._buffers.update({name: b.clone() for name, b in original._buffers.items()})
        replica._is_replica = True
    replica = copies[model]
    x = images()
    torch.manual_seed(0)
    out = replica(x)
    with pytest.raises(BypassError, match="of a DataParallel replica"):
        fxgraft.activations(model)
    torch.manual_seed(0)
    assert torch.equal(out, model(x))
    assert list(fxgraft.activations(model)) == list(SITES)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_containers() -> None:
    model = fxgraft.patch(odd(), "taps", layers=["conv", "pair", "grown"], input_size=SIZE).eval()
    wanted = fxgraft.tapped(copy.deepcopy(model), images())[1]
    _, acts = fxgraft.tapped(torch.compile(model, fullgraph=True, backend="aot_eager"), images())
    assert [type(value) for value in acts.values()] == [Tensor, tuple, list]
    for mine, theirs in zip(tensors(acts), tensors(wanted), strict=True):
        close(mine, theirs)
