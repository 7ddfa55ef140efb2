"""Models that something has wrapped, compiled or exported already, or does so while they are patched."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import fxgraft
from fxgraft.errors import WrappedModelError
from models.toys import Toy, images, net

pytestmark = pytest.mark.usefixtures("toy_methods")

SIZE = (3, 16, 16)


VERBS = {
    name: list(inspect.signature(verb).parameters.values())
    for name in fxgraft.__all__
    if name != "compare"  # builds its models, from names
    and inspect.isfunction(verb := getattr(fxgraft, name))
    and "model" in inspect.signature(verb).parameters
}
GIVEN = {"fraction": 0.5, "path": "run"}


@pytest.mark.parametrize("given", ["resnet18", Toy], ids=["a name", "a class"])
@pytest.mark.parametrize("name", VERBS)
def test_what_is_no_model(name: str, given: object) -> None:
    first, *others = VERBS[name]
    arguments = {
        p.name: GIVEN.get(p.name)
        for p in [first, *others]
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
    with pytest.raises(WrappedModelError, match=r"this is of type (str|type).\nPass the model itself"):
        getattr(fxgraft, name)(**{**arguments, "model": given})


@pytest.fixture(scope="module")
def _process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    file: Path = tmp_path_factory.mktemp("store") / "file"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def distributed(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def shards_a_part(model: nn.Module) -> nn.Module:
    sharded(model.stage1[0])  # type: ignore[index]
    return model


def compiles_in_place(model: nn.Module) -> nn.Module:
    model.compile()
    return model


def compiles_a_part(model: nn.Module) -> nn.Module:
    model.stage1[0].compile()  # type: ignore[index,operator]
    return model


def exported(model: nn.Module) -> nn.Module:
    return torch.export.export(model.eval(), (images(),)).module()


def scripted(model: nn.Module) -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(model.eval(), images())


def holds(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    return lambda model: nn.Sequential(wrap(model), nn.Identity())


WRAPPERS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "DDP": (
        distributed,
        r"DistributedDataParallel cannot be patched: it is already wrapped by DistributedDataParallel",
    ),
    "DataParallel": (nn.DataParallel, r"it is already wrapped by DataParallel"),
    "FSDP2": (sharded, r"it is already wrapped by FSDP2 \(fully_shard\)"),
    "FSDP2 of a part": (shards_a_part, r"its part 'stage1\.0' is already wrapped by FSDP2"),
    "torch.compile": (torch.compile, r"it is already wrapped by torch\.compile"),
    "compile()": (compiles_in_place, r"Net cannot be patched: it is already wrapped by module\.compile\(\)"),
    "compile() of a part": (
        compiles_a_part,
        r"its part 'stage1\.0' is already wrapped by module\.compile\(\)",
    ),
    "torch.export": (exported, r"it is already wrapped by torch\.export"),
    "TorchScript": (scripted, r"it is already wrapped by TorchScript"),
    "DDP inside": (
        holds(distributed),
        r"Sequential cannot be patched: its part '0' is already wrapped by Distributed",
    ),
    "compiled inside": (holds(torch.compile), r"its part '0' is already wrapped by torch\.compile"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.usefixtures("_process_group")
def test_a_wrapped_model_is_refused(wrapper: str) -> None:
    wrap, message = WRAPPERS[wrapper]
    model = wrap(net())
    modules = [(name, id(m), type(m), list(m.__dict__), m.training) for name, m in model.named_modules()]
    tensors = {key: value.clone() for key, value in model.state_dict().items() if type(value) is Tensor}
    for act in (lambda: fxgraft.patch(model, "rsc"), lambda: fxgraft.patch(model, Toy(), dry_run=True)):
        with pytest.raises(WrappedModelError, match=message + r"(?s:.*)Patch first, wrap after"):
            act()
        assert [
            (name, id(m), type(m), list(m.__dict__), m.training) for name, m in model.named_modules()
        ] == modules
        assert all(torch.equal(model.state_dict()[key], value) for key, value in tensors.items())


@pytest.mark.usefixtures("_process_group")
def test_sharding_after_patching_and_taking_off_again() -> None:
    model = fxgraft.patch(net(), "rsc", layer="stage2", input_size=SIZE)
    sharded(model)
    kind = type(model)
    for act in (fxgraft.unpatch, lambda m: fxgraft.sites(m, input_size=SIZE)):
        with pytest.raises(WrappedModelError, match=r"was wrapped or converted after it was patched"):
            act(model)
        assert type(model) is kind


def test_sites_of_a_wrapped_bare_model_are_those_that_can_be_patched():
    model = net()
    wrapped = torch.compile(model, backend="eager")
    assert fxgraft.sites(wrapped, input_size=SIZE).names == fxgraft.sites(model, input_size=SIZE).names
    own = nn.Sequential()
    own.module = model  # a model of the user's with one part, and no wrapper
    assert fxgraft.sites(own, "**stage2", input_size=SIZE).names == ["module.stage2"]


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda model: torch.compile(nn.DataParallel(model), backend="eager")]
)
def test_looking_on_needs_no_unwrapping(wrap):
    model = timm.create_model("test_resnet", num_classes=4)
    fxgraft.patch(model, "crossnorm", consistency=True, p=1.0, input_size=(3, 32, 32))
    wrapped = wrap(model)
    assert [graft.name for graft in fxgraft.grafts(wrapped)] == ["crossnorm"]
    assert fxgraft.sites(wrapped).names == fxgraft.sites(model).names
    assert str(fxgraft.summary(wrapped)) == str(fxgraft.summary(model))
    fxgraft.set_progress(wrapped, 0.5)
    assert fxgraft.grafts(model)[0].units.popitem()[1].context.progress == 0.5
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
    assert set(fxgraft.losses(wrapped, wrapped(x), y)) == {"criterion", "crossnorm.consistency"}
