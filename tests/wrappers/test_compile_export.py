"""torch.compile, torch.export and ONNX of patched models."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import fxgraft
from fxgraft.patches.rsc.patch import record
from patches.small import CLASSES, final_mask, net

SIZE = 64
# Pooling and a linear layer follow the last stage; a whole stage follows the one before.
SITES = pytest.mark.parametrize("layer", ["layer1", "act2"], ids=["general", "closed_form"])
SCOPES = pytest.mark.parametrize("scope", ["spatial", "channel"])
LARGER = [
    ("resnet18", "layer3"),
    ("resnet18", "layer4"),
    ("test_vit", "blocks.2"),
    ("convnext_atto", "stages.3"),
]


def backbone(name: str = "", **options: Any) -> nn.Module:
    if not name:
        return net()  # small, since compiling takes most of the time
    torch.manual_seed(0)
    if name == "test_vit":
        options = {"img_size": SIZE, **options}
    return timm.create_model(name, num_classes=CLASSES, **options)


def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, SIZE, SIZE, generator=g), torch.randint(CLASSES, (4,), generator=g)


def patched(layer: Any, scope: str = "channel", name: str = "", **options: Any) -> nn.Module:
    return fxgraft.patch(
        backbone(name), "rsc", layer=layer, scope=scope, input_size=(3, SIZE, SIZE), **options
    )


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch.compiler.reset()
    with warnings.catch_warnings():
        # Raised inside torch's own compiler, not by what is compiled.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\..*")
        yield
    torch.compiler.reset()


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def check(layer: str, scope: str, name: str, batch_share: float = 0.5) -> None:
    """Two compiled training steps and an evaluation are those of an eager copy."""
    model = patched(layer, scope, name, batch_share=batch_share)
    twin = copy.deepcopy(model)
    x, y = batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        out = compiled(x, target=y)
        with record(twin) as records:
            expected = twin(x, target=y)
        assert records[0].selected.any()
        close(out, expected)
        for each, result in ((model, out), (twin, expected)):
            fxgraft.loss(each, result, y).backward()
    for (key, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        scale = theirs.grad.abs().max().item()
        assert (mine.grad - theirs.grad).abs().max().item() <= 1e-3 * scale + 1e-5, key
    for mine, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        close(mine, theirs)
    close(compiled.eval()(x), twin.eval()(x))


@SITES
@SCOPES
def test_compiled_training_and_evaluation_are_the_eager_ones(layer: str, scope: str) -> None:
    check(layer, scope, "")


@pytest.mark.sweep
@SCOPES
@pytest.mark.parametrize(("name", "layer"), LARGER)
def test_larger_backbones_compile(name: str, layer: str, scope: str) -> None:
    # Fresh weights start these so even that no label loses enough to be selected: mute all samples.
    check(layer, scope, name, batch_share=1.0)


@SITES
def test_both_scopes_are_drawn_in_one_graph(layer: str) -> None:
    """The draw is data there: over some seeds, both scopes come out."""
    model = patched(layer, "both", batch_share=1.0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    x, y = batch()
    wanted = {}
    for scope in ("spatial", "channel"):
        with record(fixed := patched(layer, scope, batch_share=1.0)) as records:
            fixed.load_state_dict(model.state_dict())
            for module in fixed.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
            wanted[scope] = fixed(x, target=y).detach()
        assert (final_mask(records[0]) == 0).any()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    seen = set()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(12):
            torch.manual_seed(seed)
            out = compiled(x, target=y)
            matching = {s for s, each in wanted.items() if torch.allclose(out, each, rtol=1e-4, atol=1e-5)}
            assert len(matching) == 1
            seen |= matching
    assert seen == {"spatial", "channel"}


@SITES
def test_progress_does_not_recompile(layer: str) -> None:
    model = patched(layer, "both")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, y = batch()
    compiled(x, target=y).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for fraction in (0.1, 0.5, 1.0):
            fxgraft.set_progress(model, fraction)
            compiled(x.flip(0), target=y.roll(1)).sum().backward()


def test_start_recompiles_once_and_then_mutes() -> None:
    model = patched("act2", start=0.5, batch_share=1.0)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, y = batch()
    outs = []
    for fraction in (0.0, 0.5, 0.75):
        for each in (model, twin):
            fxgraft.set_progress(each, fraction)
        outs.append(compiled(x, target=y))
        close(outs[-1], twin(x, target=y))
    assert not torch.allclose(outs[0], outs[1], atol=1e-3)


@pytest.mark.sweep
@SITES
def test_inductor(layer: str) -> None:
    model = patched(layer, batch_share=0.5)
    twin = copy.deepcopy(model)
    x, y = batch()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x, target=y), twin(x, target=y), rtol=1e-3, atol=1e-4)


@SITES
def test_export_is_that_of_the_bare_model(layer: str) -> None:
    x, _ = batch()
    model = backbone().eval()
    bare = torch.export.export(model, (x,))
    fxgraft.patch(model, "rsc", layer=layer, input_size=(3, SIZE, SIZE))
    exported = torch.export.export(model, (x,))
    assert [(n.op, n.name, n.target) for n in exported.graph.nodes] == [
        (n.op, n.name, n.target) for n in bare.graph.nodes
    ]
    assert str(exported.graph) == str(bare.graph)
    assert exported.state_dict.keys() == bare.state_dict.keys()
    assert torch.equal(exported.module()(x), model(x))


@SITES
def test_onnx_is_that_of_the_bare_model(layer: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    x, _ = batch()
    model = backbone().eval()
    protos = []
    for name in ("bare", "patched"):
        if name == "patched":
            fxgraft.patch(model, "rsc", layer=layer, input_size=(3, SIZE, SIZE))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own
            torch.onnx.export(model, (x,), tmp_path / f"{name}.onnx", dynamo=True, verbose=False)
        protos.append(onnx.load(tmp_path / f"{name}.onnx"))
    bare, grafted = protos
    assert [(n.op_type, list(n.input), list(n.output)) for n in grafted.graph.node] == [
        (n.op_type, list(n.input), list(n.output)) for n in bare.graph.node
    ]
    assert [i.name for i in grafted.graph.input] == [i.name for i in bare.graph.input]
    for mine, theirs in zip(grafted.graph.initializer, bare.graph.initializer, strict=True):
        assert mine.name == theirs.name
        assert np.array_equal(onnx.numpy_helper.to_array(mine), onnx.numpy_helper.to_array(theirs))
