"""Exporters beside torch.export: ONNX in onnxruntime, and TorchScript."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from torch import Tensor, nn

import fxgraft
from contract.cases import METHODS, SMALL, Cell, evaluated

torchscript = pytest.mark.filterwarnings(
    r"ignore:`torch\.jit\.\w+` is deprecated:FutureWarning",
    r"ignore:`torch\.jit\.\w+` is deprecated:DeprecationWarning",
    "ignore::torch.jit.TracerWarning",  # of checks of sizes, constants from then on
)


@pytest.fixture(params=METHODS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    """A small network with one method on it, whose parameters are no longer those it starts with."""
    model = Cell(request.param, SMALL).patch(SMALL.build())
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=g)
    return model.eval()


def dynamo(model: nn.Module, x: Tensor) -> bytes:
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None
    return program.model_proto.SerializeToString()


def legacy(model: nn.Module, x: Tensor) -> bytes:
    written = io.BytesIO()
    torch.onnx.export(model, (x,), written, dynamo=False)
    return written.getvalue()


@pytest.mark.works_with("ONNX, in onnxruntime")
@pytest.mark.parametrize("export", [dynamo, legacy])
def test_onnxruntime_computes_the_same(
    model: nn.Module, export: Callable[[nn.Module, Tensor], bytes]
) -> None:
    x = SMALL.inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own
        written = export(model, x)
    session = onnxruntime.InferenceSession(written, providers=["CPUExecutionProvider"])
    assert len(session.get_inputs()) == len(session.get_outputs()) == 1
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(out, evaluated(model, x).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.works_with("`torch.jit.trace`, evaluation")
@torchscript
def test_torchscript_traces_the_evaluation(model: nn.Module) -> None:
    x = SMALL.inputs()
    traced = torch.jit.trace(model, x)
    with torch.no_grad():
        torch.testing.assert_close(traced(x.flip(0)), model(x.flip(0)), rtol=1e-5, atol=1e-6)


@torchscript
def test_torchscript_refuses_to_compile_what_is_patched(model: nn.Module) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = model

        def forward(self, x: Tensor) -> Tensor:
            return self.backbone(x)

    for patched in (model, Around()):
        with pytest.raises(
            fxgraft.BypassError, match=r"cannot compile a patched Random(?s:.*)fxgraft\.merge"
        ):
            torch.jit.script(patched)


@torchscript
def test_torchscript_compiles_what_is_patched_no_more() -> None:
    x = torch.randn(2, 3, 32, 32)
    for undo in (fxgraft.merge, fxgraft.unpatch):
        model = undo(fxgraft.patch(timm.create_model("resnet10t"), "rsc", input_size=(3, 32, 32))).eval()
        with torch.no_grad():
            torch.testing.assert_close(torch.jit.script(model)(x), model(x))
