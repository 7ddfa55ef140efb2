"""MixMo where it must run: compiled, exported, in other dtypes, replicated and sharded; stems of every layout."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fxgraft
from fxgraft.patches.mixmo.patch import Encoders
from methods.mixmo.mixing import SMALL, last_pairing, patched, trained, unit
from models.small import CLASSES, batch, net


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("methods", [["mixmo", "rsc"], ["rsc", "mixmo"]], ids="+".join)
def test_others_see_the_labels_of_the_mixtures_in_one_graph(methods: list[str]) -> None:
    model, (x, y) = net(), batch()
    for method in methods:
        fxgraft.patch(model, method, **SMALL)
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    fxgraft.loss(model, compiled(x, target=y), y).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "options", [{}, {"members": 3, "mixing": "cow", "repetitions": 2, "init": "random"}], ids=["cut", "cow"]
)
def test_compiles_once_in_both_modes(options: dict[str, Any]) -> None:
    model = patched(**options)
    x, y = batch()
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    fxgraft.loss(model, compiled(x, target=y), y).backward()
    compiled.eval()(x)
    compiled.train()
    shapes = set()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for fraction in (0.0, 0.1, 0.2, 0.95, 1.0):
            fxgraft.set_progress(model, fraction)
            model.zero_grad()
            out = compiled(x.flip(0), target=y.flip(0))
            last = last_pairing(model)
            shapes.add(bool((last.masks == 0).any()))
            expected = sum(
                (last.weights[:, i] * F.cross_entropy(out[i], y.flip(0)[order], reduction="none")).mean()
                for i, order in enumerate(last.permutations)
            )
            torch.testing.assert_close(fxgraft.loss(model, out, y.flip(0)), expected)
            expected.backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        torch.testing.assert_close(compiled.eval()(x), model(x), rtol=1e-4, atol=1e-5)
    assert shapes == {True, False}


def test_evaluation_exports() -> None:
    model = trained(patched(members=3)).eval()
    x, _ = batch()
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-5, atol=1e-6)
    convolutions = [n for n in exported.graph.nodes if "conv2d" in str(n.target)]
    assert len(convolutions) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtype_and_memory_format_are_the_models(dtype: torch.dtype) -> None:
    model = patched(net().to(dtype).to(memory_format=torch.channels_last), repetitions=2)
    assert {p.dtype for p in fxgraft.grafts(model)[0].parameters()} == {dtype}
    assert unit(model, Encoders).weight_1.is_contiguous(memory_format=torch.channels_last)
    maps: list[Tensor] = []
    model.layer1[0].register_forward_hook(lambda module, args, out: maps.append(out))
    x, y = batch()
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    out = model(x, target=y)
    assert out.dtype == maps[0].dtype == dtype
    assert maps[0].is_contiguous(memory_format=torch.channels_last)
    fxgraft.loss(model, out, y).backward()
    assert model.eval()(x).dtype == dtype


@pytest.mark.parametrize("mixing", ["linear", "cut", "patchup_soft", "sum"])
@pytest.mark.parametrize("members", [2, 3])
def test_in_float64_one_image_for_all_members_is_left_as_it_is(members: int, mixing: Any) -> None:
    """The masks of a pass sum to 1 as exactly as the network computes, or its encoding would change."""
    model = patched(net().double(), members=members, mixing=mixing, p=1.0, spread=0)
    maps: list[Tensor] = []
    model.layer1[0].register_forward_hook(lambda module, args, out: maps.append(out))
    x, y = batch()
    x = x.double()
    model(fxgraft.mixmo.MixMoInput([x] * members), target=[y] * members)
    last = last_pairing(model)
    assert last.masks.dtype == last.shares.dtype == torch.float64
    model.eval()(x)
    torch.testing.assert_close(maps[0], maps[1], rtol=1e-13, atol=1e-13)


def test_autocast() -> None:
    model = patched()
    x, y = batch()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, target=y)
        loss = fxgraft.loss(model, out, y)
    assert out.dtype == torch.bfloat16
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_replicas_of_dataparallel_evaluate_and_do_not_train() -> None:
    model = trained(patched(members=3))
    replica = copy.copy(model)
    copies = {m: m._replicate_for_data_parallel() for m in model.modules()}
    for original, twin in copies.items():
        for name, child in original._modules.items():
            twin._modules[name] = None if child is None else copies[child]
        for name, p in original._parameters.items():
            setattr(twin, name, None if p is None else p.detach().clone())
        for name, b in original._buffers.items():
            twin._buffers[name] = None if b is None else b.clone()
        twin._is_replica = True
    replica = copies[model]
    x, y = batch()
    with pytest.raises(fxgraft.WrappedModelError, match="cannot train under DataParallel"):
        replica(x, target=y)
    for module in (*copies, *copies.values()):
        module.training = False
    torch.testing.assert_close(replica(x, members=True), model(x, members=True))


# Stems that aren't convolutions.


class Tokens(nn.Module):
    """A linear patch embedding, as tokens or as a map with channels last."""

    def __init__(self, mapped: bool) -> None:
        super().__init__()
        self.mapped = mapped
        self.embed, self.fc = nn.Linear(48, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[2] // 4, x.shape[3] // 4
        x = F.unfold(x, 4, stride=4).transpose(1, 2)
        if self.mapped:
            return self.fc(self.embed(x.unflatten(1, (rows, columns))).mean((1, 2)))
        return self.fc(self.embed(x).mean(1))


@pytest.mark.parametrize("mixing", ["cut", "horizontal", "channel"])
@pytest.mark.parametrize("mapped", [False, True], ids=["tokens", "channels last"])
def test_linear_stems_are_mixed_over_rows_and_columns(mapped: bool, mixing: Any) -> None:
    torch.manual_seed(0)
    model: Any = fxgraft.patch(
        Tokens(mapped), "mixmo", mixing=mixing, p=1.0, spread=0, input_size=(3, 16, 16)
    )
    own = unit(model, Encoders)
    with torch.no_grad():
        for parameter in (model.embed.weight, own.weight_1, own.bias_1):
            parameter.zero_()
        model.embed.bias.fill_(1)
    out: list[Tensor] = []
    model.embed.register_forward_hook(lambda module, args, value: out.append(value))
    y = torch.arange(5)
    model(torch.randn(5, 3, 16, 40), target=y)  # not the shape that the model was looked at with
    last = last_pairing(model)
    found = out[0].unflatten(1, (4, 10)) if out[0].ndim == 3 else out[0]
    assert torch.equal(found.movedim(-1, 1), last.masks[0].expand(5, 4, 4, 10))
    assert 0 < found.mean() < 1
    torch.testing.assert_close(found.mean((1, 2, 3)), last.shares[:, 0])


# Several processes.


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_replicated_and_sharded_training(kind: str, tmp_path: Path) -> None:
    """In a group of one process every wrapper computes what the model does by itself."""

    def losses(wrap: bool) -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(0)
        model = whole = patched(members=3)
        if wrap and kind == "ddp":
            whole = DistributedDataParallel(model)
        elif wrap:
            mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
            for part in (model.layer1[0], model.fc, model.layer2, model):
                fully_shard(part, mesh=mesh)
        optimiser = torch.optim.SGD(model.parameters(), 0.1)
        x, y = batch()
        found = []
        for _ in range(2):
            optimiser.zero_grad()
            found.append(fxgraft.loss(model, whole(x, target=y), y))
            found[-1].backward()
            optimiser.step()
        with torch.no_grad():
            return found, whole.eval()(x, members=True)

    expected = losses(wrap=False)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.testing.assert_close(losses(wrap=True), expected)
    finally:
        dist.destroy_process_group()
