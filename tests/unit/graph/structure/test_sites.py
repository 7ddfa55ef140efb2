"""From words to sites, and the listing of them."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections import OrderedDict
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn

import fxgraft
from fxgraft.errors import SiteError, StructureError
from fxgraft.graph.structure.positions import positions
from fxgraft.graph.structure.site import Edits, Sites, edits_of
from fxgraft.graph.structure.sites import SiteSpec, resolve
from fxgraft.graph.structure.stages import stages
from fxgraft.graph.tracing.editing import After, Output
from fxgraft.graph.tracing.model_trace import ModelTrace
from models.toys import Net, Toy, assert_same, images, net, register_toys, state_of_everything

SIZE = (3, 16, 16)


def names(model: nn.Module, words: SiteSpec, size: tuple[int, int, int] | None = SIZE) -> list[str]:
    return [site.name for site in resolve(ModelTrace(model, size), words)]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("stage1", ["stage1"]),
        ("stage1.0.bn", ["stage1.0.bn"]),
        (["fc", "stage1"], ["fc", "stage1"]),
        (["stage1", "stage1"], ["stage1"]),
        (("stage1.*", "stage1.1"), ["stage1.0", "stage1.1"]),
        ("stage?", ["stage1", "stage2"]),
        ("stage[2]", ["stage2"]),
        ("stage*.0", ["stage1.0", "stage2.0"]),
        ("*", ["stem", "stage1", "down", "stage2", "pool", "flatten", "drop", "fc"]),
        ("stem.act*", ["stem.act", "stem.act_1"]),
        ("stage1.0.*d*", ["stage1.0.add"]),
        ("**.bn", ["stage1.0.bn", "stage1.1.bn", "stage2.0.bn", "stage2.1.bn"]),
        ("**conv1", ["stage1.0.conv1", "stage1.1.conv1", "stage2.0.conv1", "stage2.1.conv1"]),
        ("stem.act", ["stem.act"]),
        ("stem.act_1", ["stem.act_1"]),
        ("stage1.0.add", ["stage1.0.add"]),
        ("flatten", ["flatten"]),
        ("stage1.*.add", ["stage1.0.add", "stage1.1.add"]),
    ],
)
def test_words_become_sites(words: SiteSpec, expected: list[str]) -> None:
    assert names(net(), words) == expected


def test_globs_are_in_running_order() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.b(x))

    assert names(Backwards(), "*") == ["b", "a"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("stage3", r"no site 'stage3' in Net(?s:.*)Close matches: .*'stage[12]'"),
        ("conv1", r"'conv1' is ambiguous in Net: 4 modules(?s:.*)\*\*\.conv1"),
        ("second", r"no site 'second' in Net\.\nThere are: 'stem\.second'|Close matches: 'stem\.second'"),
        ("spare", r"'spare' is a module of Net, but its forward is never called"),
        ("zzzzzz", r"no site 'zzzzzz'(?s:.*)There are: .*… \(\d+ in all\)"),
        ("[", r"no site '\['"),
        ("stage1*[", r"No site matches 'stage1\*\['"),
        ("zz*", r"No site matches 'zz\*'(?s:.*)'\*' stands for one part of a name"),
        ("stem.act_2", r"no site 'stem\.act_2'"),
        ("", r"no site ''"),
        ([], "No site was named"),
        (["stage1", "nope"], "no site 'nope'"),
        (True, r"not True \(bool\)"),
        (1.5, r"not 1\.5 \(float\)"),
        ([["stage1"]], r"not \['stage1'\] \(list\)"),
    ],
)
def test_words_that_miss(words: SiteSpec, message: str) -> None:
    model = net()
    model.spare = nn.ReLU()
    before = state_of_everything(model)
    with pytest.raises(SiteError, match=message):
        resolve(ModelTrace(model, SIZE), words)
    with pytest.raises(SiteError, match=message):
        fxgraft.patch(model, "rsc", layer=words, input_size=SIZE)
    assert_same(before, state_of_everything(model))


@pytest.mark.parametrize("index", [*range(5), *range(-5, 0)])
def test_stage_numbers_are_indices_into_feature_info(index: int) -> None:
    model = timm.create_model("test_resnet", num_classes=5)
    assert names(model, index, None) == [model.feature_info[index]["module"]]


@pytest.mark.parametrize("index", [5, -6, 99])
def test_a_stage_out_of_range_lists_the_stages(index: int) -> None:
    model = timm.create_model("test_resnet", num_classes=5)
    with pytest.raises(SiteError, match=rf"no stage {index} in ResNet, which has 5(?s:.*)'act1'.*'layer4'"):
        resolve(ModelTrace(model), index)


@pytest.mark.parametrize(
    ("build", "last"),
    [
        (lambda: torchvision.models.resnet18(num_classes=5), "layer4"),
        (lambda: torchvision.models.mobilenet_v3_small(num_classes=5), "features"),
        (lambda: fx.symbolic_trace(net().eval()), "stage2.1.act2"),
    ],
)
def test_without_feature_info_stages_are_the_last_maps_of_each_size(build: object, last: str) -> None:
    assert stages(ModelTrace(build(), (3, 64, 64)))[-1].name == last  # type: ignore[operator]


def test_stages_of_a_network_without_feature_info() -> None:
    assert [stage.name for stage in stages(ModelTrace(net(), SIZE))] == ["stage1", "stage2"]


class Scales(nn.Module):
    """Three stages, of which heads read the maps of several sizes."""

    def __init__(self, ways: str) -> None:
        super().__init__()
        self.ways = ways
        widths = (3, 8, 12, 16)
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()) for a, b in itertools.pairwise(widths)
        )
        self.fuse = nn.ModuleList(nn.Conv2d(each, 6, 1) for each in widths[1:])
        self.logits = Fused() if ways == "one head" else nn.Identity()
        kind = nn.Linear if ways == "classifiers" else partial(nn.Conv2d, kernel_size=3, padding=1)
        self.heads = nn.ModuleList(kind(each, 5) for each in widths[1:])
        self.joint = nn.ModuleList(nn.Linear(sum(widths[1:]), 5) for _ in range(2))
        self.norm = nn.LayerNorm(sum(widths[1:]))

    def forward(self, x: Tensor) -> Tensor:
        maps, size = [], x.shape[-2:]
        for part in self.parts:
            x = part(x)
            maps.append(x)
        if self.ways == "one head":
            return F.interpolate(
                self.logits([f(each) for f, each in zip(self.fuse, maps, strict=True)]), size
            )
        if "one vector" in self.ways:
            vector = self.norm(torch.cat([each.mean((2, 3)) for each in maps], 1))
            return sum(head(vector) for head in (self.joint if "heads" in self.ways else self.joint[:1]))
        if self.ways == "classifiers":
            return sum(head(each.mean((2, 3))) for head, each in zip(self.heads, maps, strict=True))
        return sum(F.interpolate(head(each), size) for head, each in zip(self.heads, maps, strict=True))


class Fused(nn.Module):
    """A head that reads maps of several sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(18, 5, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.last(torch.cat([F.interpolate(each, maps[0].shape[-2:]) for each in maps], 1))


@pytest.mark.parametrize(
    "ways", ["classifiers", "maps of classes", "one head", "one vector", "heads on one vector"]
)
def test_stages_that_heads_read_are_counted_to_the_last(ways: str) -> None:
    """What goes on from a map beside its head goes to other heads, and around none of them."""
    found = [stage.name for stage in stages(ModelTrace(Scales(ways), SIZE))]
    assert found == (
        ["fuse.0", "fuse.1", "fuse.2"] if ways == "one head" else ["parts.0", "parts.1", "parts.2"]
    )
    model = fxgraft.patch(Scales(ways), "rsc", input_size=SIZE)
    (graft,) = fxgraft.grafts(model)
    assert graft.patch.describe(graft).startswith(f"{found[-1]} (NCHW")


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([{"module": "nowhere"}, {"module": "stage2"}], ["stage2"]),
        ([{"module": ""}, {"num_chs": 8}, {"module": "stage1", "num_chs": 8}, {"module": "fc"}], ["stage1"]),
        ([{"module": "stage1", "num_chs": 9}], ["stage1"]),
        ([{"module": "stage1"}, {"module": "stage1"}], ["stage1", "stage2"]),
        ([{"module": "nowhere"}], ["stage1", "stage2"]),
    ],
)
def test_entries_of_feature_info_that_work_are_used(
    entries: list[dict[str, object]], expected: list[str]
) -> None:
    model = net()
    model.feature_info = entries
    assert [stage.name for stage in stages(ModelTrace(model, SIZE))] == expected


class Branches(nn.Module):
    """Gives a map of its input's size, and one of half of it with other channels."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(3, 6, 3, 2, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.fine(x), self.coarse(x)]


class Joined(nn.Module):
    """Two branches between a stem and a last layer that sees both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branches = nn.Conv2d(3, 3, 3, 2, 1), Branches()
        self.down, self.last, self.fc = (
            nn.Conv2d(8, 6, 3, 2, 1),
            nn.Conv2d(6, 12, 1),
            nn.Linear(12, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        fine, coarse = self.branches(self.stem(x))
        return self.fc(self.last(self.down(fine) + coarse).mean((2, 3)))


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        ([12], ["stem", "last"]),  # of what is made of both branches: neither of them is the stage
        ([6, 8], ["branches.fine", "branches.coarse"]),
        ([6], ["branches.coarse"]),
    ],
)
def test_a_branch_is_a_stage_where_feature_info_says_so(channels: list[int], expected: list[str]) -> None:
    model = Joined()
    model.feature_info = [{"module": "branches", "num_chs": each} for each in channels]
    assert [stage.name for stage in stages(ModelTrace(model, SIZE))] == expected


@pytest.mark.parametrize("stride", [1, 2])
def test_a_stage_whose_value_an_encoder_hands_on_in_an_object_is_no_less_one(stride: int) -> None:
    """What has no name as the encoder's value has one as the stage's."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Sequential(nn.Conv2d(n, 2 * n, 3, stride, 1), nn.GELU()) for n in (3, 6, 12)
            )

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            for layer in self.layers:
                x = layer(x)
            return OrderedDict(last=2 * x)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.fc = Encoder(), nn.Linear(24, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.encoder(x)["last"].mean((2, 3)))

    assert [stage.name for stage in stages(ModelTrace(Whole(), SIZE))] == [
        f"encoder.layers.{i}" for i in range(3)
    ]


def test_a_network_without_maps_has_no_stages() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    with pytest.raises(StructureError, match="no feature_info and no feature maps"):
        resolve(ModelTrace(model, SIZE), -1)


def test_a_sequential_run_member_by_member_means_its_last_member() -> None:
    class Walks(Net):
        def forward_features(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.stage1:
                x = block(x)
            return self.stage2(self.down(x))

    assert names(Walks(), "stage1") == ["stage1.1"]


def test_the_listing_shows_shape_dtype_layout_and_order() -> None:
    listed = {site.name: site for site in fxgraft.sites(net(), input_size=SIZE)}
    order = list(listed)
    assert listed["stage1.0"].shape == (2, 8, 16, 16)
    assert listed["stage2"].shape == (2, 16, 8, 8)
    assert (listed["stage2"].dtype, listed["stage2"].layout, listed["stage2"].op) == (
        "float32",
        "NCHW",
        "Sequential",
    )
    assert (listed["fc"].shape, listed["fc"].layout, listed["fc"].op) == ((2, 4), "NC", "Linear")
    assert listed["stage1.0.add"].op == "iadd"
    assert (
        order.index("stem.act")
        < order.index("stem.act_1")
        < order.index("stage1.0.conv1")
        < order.index("fc")
    )
    assert all(site.shape is not None for site in listed.values())
    assert len(set(order)) == len(order)


def test_every_name_that_is_listed_resolves_to_itself() -> None:
    trace = ModelTrace(net(), SIZE)
    for site in fxgraft.sites(net(), input_size=SIZE):
        (found,) = resolve(trace, site.name)
        assert (found.name, found.shape) == (site.name, site.shape)


def test_every_second_tensor_that_is_listed_can_be_patched() -> None:
    x, y = images(), torch.arange(4)
    for site in fxgraft.sites(net(), input_size=SIZE)[1::2]:
        if site.shape is None or len(site.shape) not in (2, 4) or not site.layout or site.name == "fc":
            continue  # what "fc" gives are the logits
        model = net()
        fxgraft.patch(model, "rsc", layer=site.name, scope="spatial", input_size=SIZE)
        model(x, target=y).sum().backward()
        assert model.stem.first.weight.grad is not None


def test_the_listing_is_a_sequence_that_prints_as_a_table() -> None:
    listed = fxgraft.sites(net(), "stage1.0.*", input_size=SIZE)
    assert set(listed.names) == {f"stage1.0.{n}" for n in ("conv1", "bn", "act", "conv2", "add", "act2")}
    assert len(listed) == 6
    assert listed[0] in listed
    assert isinstance(listed[1:3], Sites)
    assert len(listed[1:3]) == 2
    lines = repr(listed).splitlines()
    assert lines[0] == "Net, batch of 2"
    assert lines[1].split() == ["site", "op", "shape", "dtype", "layout"]
    assert any(
        line.split() == ["stage1.0.bn", "BatchNorm2d", "2×8×16×16", "float32", "NCHW"] for line in lines
    )
    assert listed.__rich__().row_count == 6


def test_the_listing_of_a_patched_model_is_that_of_the_bare_one(monkeypatch: pytest.MonkeyPatch) -> None:
    register_toys(monkeypatch)
    bare = list(fxgraft.sites(net(), input_size=SIZE))
    model = net()
    fxgraft.patch(model, "rsc", layer="stage2", input_size=SIZE)
    fxgraft.patch(model, Toy(at=(("stage1.0", After("conv2")), ("stage1", After("_0"))), learned=True))
    before = state_of_everything(model)
    assert list(fxgraft.sites(model, input_size=SIZE)) == bare
    assert fxgraft.sites(model, input_size=SIZE).title == "Net, batch of 2"
    with pytest.raises(SiteError):
        fxgraft.sites(model, "nope", input_size=SIZE)
    assert_same(before, state_of_everything(model))


def test_sites_of_a_traced_module_are_its_nodes() -> None:
    model = fx.symbolic_trace(net().eval())
    listed = fxgraft.sites(model, input_size=SIZE).names
    assert [name for name in listed if name.startswith(("add", "flatten"))] == [
        "add",
        "add_1",
        "add_2",
        "add_3",
        "flatten",
    ]
    assert names(model, "flatten") == ["flatten"]


def test_sites_of_a_torchvision_model() -> None:
    model = torchvision.models.resnet18(num_classes=5)
    assert names(model, "layer1.0.add", (3, 64, 64)) == ["layer1.0.add"]
    assert names(model, "layer1.0.relu_1", (3, 64, 64)) == ["layer1.0.relu_1"]


def test_a_module_that_cannot_be_traced_is_listed_by_its_output() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            return y if not isinstance(x, fx.Proxy) else y[y.sum() > 0 and 1]

    model = nn.Sequential(nn.Conv2d(3, 3, 1), Branches())
    assert fxgraft.sites(model, input_size=SIZE).names == ["0", "1"]


def test_a_site_knows_its_value_and_a_copy_keeps_its_shape() -> None:
    (site,) = fxgraft.sites(net(), "stage1", input_size=(3, 8, 8))
    assert (site.owner, site.shape, site.dtype) == ("", tuple(site.value.shape), "float32")
    assert f"shape={site.shape}" in repr(site)
    for twin in (copy.deepcopy(site), pickle.loads(pickle.dumps(site))):
        assert twin == site
        assert (twin.shape, twin.dtype, twin.value.device.type) == (site.shape, site.dtype, "meta")


@pytest.mark.parametrize("words", ["stage1.0", "stage1.0.add", "stage1.0.add:post"])
def test_a_site_says_what_a_unit_does_there_in_each_mode(words: str) -> None:
    trace = ModelTrace(net(), (3, 8, 8))
    (site,) = positions(trace, "post", words) if ":" in words else resolve(trace, words)
    edits = edits_of(trace, site)
    on_module = Edits("stage1.0", Output(), Output())
    assert edits == (on_module if words == "stage1.0" else Edits("stage1.0", After("add"), After("add")))
