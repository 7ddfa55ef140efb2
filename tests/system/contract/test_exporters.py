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
from torch.fx.experimental.proxy_tensor import make_fx

import fxgraft
from system.contract.cases import METHODS, SMALL, Cell, evaluated

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


class Step(nn.Module):
    """A training pass with its labels, for exporters that take tensors by position."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.model(x, target=y)
        return out


RECORDERS: dict[str, Callable[[nn.Module, Tensor, Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "torch.export": lambda step, x, y: torch.export.export(step, (x, y)).module(),
    "torch.jit.trace": lambda step, x, y: torch.jit.trace(step, (x, y), check_trace=False),
    "make_fx": lambda step, x, y: make_fx(step)(x, y),
}
TRAINED: dict[str, tuple[str, dict[str, object]]] = {
    **{method: (method, {**Cell(method, SMALL).options(), "p": 0.5}) for method in ("crossnorm", "mixmo")},
    **{
        method: (method, Cell(method, SMALL).options())
        for method in ("diversification", "gam", "selfnorm", "taps")
    },
    "rsc": ("rsc", {}),
    "rsc, early": ("rsc", {"layer": 0}),
}
BOTH_ENDS = {("rsc, early", "torch.export"), ("rsc, early", "torch.jit.trace")}


@torchscript
@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in ("crossnorm", "rsc, early") else pytest.mark.sweep) for n in TRAINED],
)
def test_a_training_pass_is_recorded_with_its_draws(name: str, recorder: str) -> None:
    """Decisions and labels are data in the record: it draws again, and judges by the labels that it is given."""
    method, options = TRAINED[name]
    step = Step(fxgraft.patch(SMALL.build(), method, input_size=SMALL.input_size, **options))
    x, y = SMALL.inputs(), torch.arange(4)
    state = {key: value.clone() for key, value in step.state_dict().items()}
    if (name, recorder) in BOTH_ENDS:
        with pytest.raises(
            fxgraft.WrappedModelError, match=r"cannot hold a training pass of 'rsc'(?s:.*)closed form"
        ):
            RECORDERS[recorder](step, x, y)
        return
    recorded = RECORDERS[recorder](step, x, y)
    for seed in range(6):
        found = []
        for call in (recorded, torch.compile(step, backend="eager")):
            step.load_state_dict(state)
            torch.manual_seed(seed)
            found.append(call(x.flip(0), y.flip(0)))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


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
