"""RSC through `fxgraft.patch` against the numbers of the authors' release and of DomainBed."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgraft
from fxgraft.patches.rsc.patch import RSCRecord, record
from golden_data import GoldenCase, load_golden
from models.small import OpaqueLinear, exactly, final_mask

OFFICIAL = [*load_golden("rsc_official_spatial"), *load_golden("rsc_official_channel")]
DOMAINBED = list(load_golden("rsc_domainbed"))
# float64: rounding of a different order of sums. float32: ten times what separates the reference's two runs.
TOLERANCE = {torch.float64: {"rtol": 1e-10, "atol": 1e-12}, torch.float32: {"rtol": 1e-5, "atol": 1e-5}}
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
official = pytest.mark.parametrize("case", OFFICIAL, ids=str)


class Stage(nn.Module):
    """The value at the site, brought to a layout: the identity on (B, C, H, W), or a permutation of it."""

    def __init__(self, layout: str, prefix: int = 0) -> None:
        super().__init__()
        self.layout = layout
        self.prefix = prefix

    def forward(self, z: Tensor) -> Tensor:
        if self.layout == "NCHW":
            return z
        if self.layout == "NHWC":
            return z.permute(0, 2, 3, 1)
        tokens = z.flatten(2)
        if self.layout == "NCL":
            return tokens
        tokens = tokens.transpose(1, 2)
        # Token values that would rank highest, were they positions.
        return torch.cat((tokens.new_full((len(z), self.prefix, z.shape[1]), 50.0), tokens), dim=1)


class Head(nn.Module):
    """The authors' network from its last stage on: average pooling over positions, one linear layer."""

    def __init__(self, case: GoldenCase, dtype: torch.dtype, layout: str, linear: type, prefix: int) -> None:
        super().__init__()
        inputs = case.inputs_as(dtype)
        self.num_prefix_tokens = prefix
        self.map = nn.Identity()
        self.features = Stage(layout, prefix)
        self.fc = linear(inputs["W"].shape[1], inputs["W"].shape[0], dtype=dtype)
        self.fc.load_state_dict({"weight": inputs["W"], "bias": inputs["b"]})
        self.dims = {"NCHW": (2, 3), "NHWC": (1, 2), "NLC": (1,), "NCL": (2,)}[layout]

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(self.map(x))
        return self.fc((x[:, self.num_prefix_tokens :] if self.num_prefix_tokens else x).mean(self.dims))


def patched_head(
    case: GoldenCase,
    dtype: torch.dtype,
    epoch: int = 1,
    layout: str = "NCHW",
    linear: type = nn.Linear,
    prefix: int = 0,
) -> nn.Module:
    """The head with RSC as it stands at an epoch of the case."""
    model = Head(case, dtype, layout, linear, prefix)
    # The release updates its share only in epochs 0, 10, 20, ...; before the first of them it is 1/3.
    schedule: dict[str, Any] = {"batch_schedule": "authors", "epochs": 50} if epoch % 10 == 0 else {}
    fxgraft.patch(
        model,
        "rsc",
        layer="features",
        scope=case.settings["mode"],
        layout="NCL" if layout == "NCL" else None,
        input_size=tuple(case.inputs["z"].shape[1:]),
        **schedule,
    )
    fxgraft.set_progress(model, epoch / 50)
    return model


def step(model: nn.Module, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, RSCRecord]:
    """A training step that leaves gradients: logits, loss, and what was muted."""
    with record(model) as records:
        logits = model(z, target=y)
    loss = fxgraft.loss(model, logits, y)
    loss.backward()
    (entry,) = records
    return logits, loss, entry


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), **TOLERANCE[actual.dtype])


@dtypes
@pytest.mark.parametrize("linear", [nn.Linear, OpaqueLinear], ids=["closed_form", "general"])
@official
def test_official(case: GoldenCase, linear: type, dtype: torch.dtype) -> None:
    for e, epoch in enumerate(case.settings["epochs"]):
        inputs = case.inputs_as(dtype)
        z = inputs["z"].requires_grad_()
        model = patched_head(case, dtype, epoch, linear=linear)
        assert ("closed form" in str(fxgraft.summary(model))) == (linear is nn.Linear)
        logits, loss, entry = step(model, z, inputs["y"])

        assert entry.mask.dtype == dtype
        exactly(entry.mask, case.outputs["mask_pre"].to(dtype))
        exactly(entry.selected.long(), case.outputs["e_drop_index_fg"][e].long())
        exactly(final_mask(entry), case.outputs["e_mask_final"][e].to(dtype))
        close(logits, case.expected("e_logits_masked", dtype)[e])
        close(loss, case.expected("e_loss_ce", dtype)[e])
        close(z.grad, case.expected("e_grad_loss_z", dtype)[e])
        close(model.fc.weight.grad, case.expected("e_grad_loss_W", dtype)[e])
        close(model.fc.bias.grad, case.expected("e_grad_loss_b", dtype)[e])
        assert not z.grad[(final_mask(entry) == 0).expand_as(z)].any()


def test_the_epochs_of_a_case_select_different_samples() -> None:
    selected = load_golden("rsc_official_spatial")["sp0"].outputs["e_drop_index_fg"]
    assert len({int(row.sum()) for row in selected}) > 2, "else the schedule above is not tested"


@pytest.mark.parametrize(("layout", "prefix"), [("NHWC", 0), ("NLC", 0), ("NLC", 1), ("NLC", 3), ("NCL", 0)])
@official
def test_layouts_agree(case: GoldenCase, layout: str, prefix: int) -> None:
    inputs = case.inputs_as(torch.float64)
    results = []
    for variant in ({}, {"layout": layout, "prefix": prefix}, {"layout": layout, "linear": OpaqueLinear}):
        z = inputs["z"].clone().requires_grad_()
        model = patched_head(case, torch.float64, **variant)
        logits, _, entry = step(model, z, inputs["y"])
        results.append((entry.mask.flatten(2), entry.selected, logits, z.grad, model.fc.weight.grad))
    for other in results[1:]:
        for expected, actual in zip(results[0][:2], other[:2], strict=True):
            exactly(actual, expected)
        for expected, actual in zip(results[0][2:], other[2:], strict=True):
            close(actual, expected)


@pytest.mark.parametrize("scope", ["spatial", "channel"])
@pytest.mark.parametrize("prefix", [1, 3])
def test_prefix_tokens_are_never_muted(scope: str, prefix: int) -> None:
    case = load_golden(f"rsc_official_{scope}")["sp0" if scope == "spatial" else "ch0"]
    inputs = case.inputs_as(torch.float64)
    model = patched_head(case, torch.float64, layout="NLC", prefix=prefix)
    assert f"NLC, {prefix} prefix" in str(fxgraft.summary(model))
    seen: list[Tensor] = []
    model.features.register_forward_hook(lambda _, args, out: seen.append(out.detach()))
    _, _, entry = step(model, inputs["z"], inputs["y"])

    bare = Head(case, torch.float64, "NLC", nn.Linear, prefix).features(inputs["z"])
    exactly(seen[-1][:, :prefix], bare[:, :prefix])  # the looks ahead run the hook before
    muted = (final_mask(entry) == 0).movedim(1, -1).expand(*bare[:, prefix:].shape)
    assert muted.any()
    assert not seen[-1][:, prefix:][muted].any()
    exactly(seen[-1][:, prefix:][~muted], bare[:, prefix:][~muted])


class Classifier(nn.Module):
    """DomainBed's classifier on the pooled features that it is given."""

    def __init__(self, case: GoldenCase, dtype: torch.dtype) -> None:
        super().__init__()
        inputs = case.inputs_as(dtype)
        parameters = [inputs[f"p{i}"] for i in range(len(inputs) - 2)]
        layers: list[nn.Module] = []
        for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
            linear = nn.Linear(*reversed(weight.shape), dtype=dtype)
            linear.load_state_dict({"weight": weight, "bias": bias})
            layers += [nn.ReLU(), linear] if layers else [linear]
        self.featurizer = nn.Identity()
        self.classifier = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.featurizer(x))


@dtypes
@pytest.mark.parametrize("case", DOMAINBED, ids=str)
def test_domainbed(case: GoldenCase, dtype: torch.dtype) -> None:
    inputs = case.inputs_as(dtype)
    features = inputs["f"].requires_grad_()
    model = Classifier(case, dtype)
    fxgraft.patch(
        model,
        "rsc",
        layer="featurizer",
        vector_drop=case.settings["drop_f"],
        batch_share=case.settings["drop_b"],
        input_size=tuple(features.shape[1:]),
    )
    parameters = list(model.parameters())
    assert len(parameters) == (6 if case.settings["nonlinear"] else 2)
    optimizer = torch.optim.SGD(parameters, lr=case.settings["lr"])
    logits, loss, entry = step(model, features, inputs["y"])

    assert entry.scope == "vector"
    exactly(entry.mask, case.outputs["mask_f"].to(dtype))
    exactly((~entry.selected).unsqueeze(1), case.outputs["mask_b"].bool())
    exactly(final_mask(entry), case.outputs["mask"].to(dtype))
    close(logits, case.expected("all_p_muted_again", dtype))
    close(loss, case.expected("loss", dtype))
    close(features.grad, case.expected("grad_loss_f", dtype))
    for i, parameter in enumerate(parameters):
        close(parameter.grad, case.expected(f"grad_loss_p{i}", dtype))
    optimizer.step()
    for i, parameter in enumerate(parameters):
        close(parameter.detach(), case.expected(f"p{i}_after_sgd", dtype))
    assert not features.grad[final_mask(entry) == 0].any()


@official
def test_evaluation_is_the_probe_of_the_reference(case: GoldenCase) -> None:
    inputs = case.inputs_as(torch.float64)
    model = patched_head(case, torch.float64).eval()
    close(model(inputs["z"]), case.outputs["logits_before"])
    exactly(model(inputs["z"]), F.linear(inputs["z"].mean((2, 3)), inputs["W"], inputs["b"]))


def test_it_goes_to_the_map_before_pooling_and_by_number_to_the_stage() -> None:
    def described(name: str, **options: Any) -> str:
        model = timm.create_model(name, num_classes=4)
        return str(fxgraft.summary(fxgraft.patch(model, "rsc", **options)))

    assert "bn2 (NCHW; closed form)" in described("test_efficientnet")
    assert "blocks.4 (NCHW; " in described("test_efficientnet", layers=-1)
    assert "layer4 (NCHW; closed form)" in described("test_resnet")
    assert "blocks." in described("test_vit")  # its head reads the class token: a block before it
