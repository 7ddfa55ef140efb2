"""Where RSC goes by itself: a map of several positions that the logits read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

import fxgraft
from fxgraft.errors import SiteError
from fxgraft.patches.rsc.patch import record

SIDE = 16


def sites(model: nn.Module, **options: object) -> list[str]:
    size = None if hasattr(model, "default_cfg") else (3, SIDE, SIDE)
    (graft,) = fxgraft.grafts(fxgraft.patch(model, "rsc", input_size=size, **options))
    return [part.split(" ")[0] for part in graft.patch.describe(graft).split("; ") if "(" in part]


def test_a_vector_behind_a_map_is_no_map() -> None:
    """VGG's layers between the map and the pooling leave one position, which is all that muting would leave out."""
    model = nn.Sequential()
    model.features = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
    model.vector = nn.Sequential(nn.Conv2d(8, 12, 4), nn.ReLU())
    model.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))
    assert sites(model) == ["features"]


def test_the_logits_themselves_are_no_place() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    with pytest.raises(SiteError, match=r"'3' gives the logits themselves(?s:.*)in front of the classifier"):
        fxgraft.patch(model, "rsc", layer="3", input_size=(3, SIDE, SIDE))


def test_a_network_of_one_position_is_refused() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, SIDE), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    with pytest.raises(
        SiteError,
        match=r"No map of Sequential in front of its pooling has more than one position(?s:.*)input_size=",
    ):
        sites(model)


class Dense(nn.Module):
    """Its last block gives the logits: the sum of a convolution and of an activation, as a residual U-Net's does."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 5
        self.stages = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(6, 5, 3, padding=1), nn.PReLU(), Around(nn.Conv2d(5, 5, 3, padding=1))),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(x)


class Around(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_logits_are_not_what_is_muted(device: str) -> None:
    assert sites(Dense().to(device)) == ["stages.1"]
    assert sites(Dense().to(device), layers=-1) == ["stages.1"]


def test_stage_numbers_count_what_the_logits_read() -> None:
    """The last block of a network that reads its class token isn't a stage to mute, so no number means another's."""

    def where(layers: object) -> list[str]:
        return sites(timm.create_model("test_vit", num_classes=5), layers=layers)

    assert where(-1) == ["blocks.4"]
    assert where(-2) == where(3) == ["blocks.3"]
    assert where(0) == where(-5) == ["blocks.0"]
    assert where([-1, -2]) == ["blocks.4", "blocks.3"]
    with pytest.raises(
        SiteError, match=r"no stage 5 whose positions reach the logits: there are 5(?s:.*)class token"
    ):
        where(5)


class Picks(nn.Module):
    """Two blocks of tokens that are mixed, with a class token in front, and a head that picks what it reads.

    Args:
        pick: ``(tokens) -> (B, C)``.
        start: of the classifier's weights.
    """

    def __init__(self, pick: Callable[[Tensor], Tensor], start: float | None = None) -> None:
        super().__init__()
        self.pick = pick
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)
        if start is not None:
            nn.init.constant_(self.head.weight, start)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.pick(self.norm(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x)[0]
        return x + self.mlp(x)


FIRST = torch.tensor([0])
ONE_HOT = torch.eye(17)[0]


@pytest.mark.parametrize(
    ("pick", "expected"),
    [
        (lambda x: x[:, 0], "blocks.0"),
        (lambda x: x.select(1, 0), "blocks.0"),
        (lambda x: x[:, :1].squeeze(1), "blocks.0"),
        (lambda x: x.split([1, 16], 1)[0].flatten(1), "blocks.0"),
        # Those only a gradient tells.
        (lambda x: x.index_select(1, FIRST).flatten(1), "blocks.0"),
        (lambda x: torch.einsum("bnc,n->bc", x, ONE_HOT), "blocks.0"),
        (lambda x: x[:, 0] + 0 * x[:, 1:].mean(1), "blocks.0"),
        (lambda x: x[:, 0] + x[:, 1:].detach().mean(1), "blocks.0"),
        (lambda x: x[:, 1], "blocks.1"),
        (lambda x: x[:, 1:].amax(1), "blocks.1"),
        (lambda x: x[:, 0] + x[:, 1:].mean(1), "blocks.1"),
        (lambda x: x.amax(1), "blocks.1"),
    ],
)
def test_what_the_head_reads_is_found_however_it_is_picked(
    pick: Callable[[Tensor], Tensor], expected: str
) -> None:
    torch.manual_seed(0)
    model = Picks(pick)
    assert sites(model, scope="spatial", spatial_drop=1.0, batch_share=1.0) == [expected]
    model.train()
    x, y = torch.randn(4, 3, SIDE, SIDE), torch.arange(4)
    with record(model):
        muted = model(x, target=y)
    bare = fxgraft.unpatch(model)(x)
    assert (muted != bare).any(1).all()  # every image's


class Parallel(nn.Module):
    """Adds what two attentions made of tokens, and then what two branches did, each by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.stack([attention(x, x, x)[0] for attention in self.attentions]).sum(0)
        return x + torch.stack([branch(x) for branch in self.branches]).sum(0)


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("layers", [None, -1])
def test_branches_that_are_stacked_mix_no_tokens(layers: int | None, device: str) -> None:
    """Nothing in the last block's branches reaches a class token but its own."""
    with torch.device(device):
        model = Picks(lambda x: x[:, 0])
        model.blocks = nn.ModuleList(Parallel() for _ in range(2))
    assert sites(model, layers=layers) == ["blocks.0"]


class Branching(nn.Module):
    """A block of parallel branches, whose tokens are mixed behind their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2))
        self.mix = nn.Linear(17, 17)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(sum(branch(x) for branch in self.branches).mT).mT


def test_a_branch_inside_of_a_block_is_no_block_before_it() -> None:
    model = Picks(lambda x: x[:, 0])
    model.blocks = nn.ModuleList(Branching() for _ in range(2))
    model.feature_info = [{"module": "blocks.0"}, {"module": "blocks.1"}]
    assert sites(model) == ["blocks.0"]


def test_a_classifier_that_starts_at_nought_says_nothing() -> None:
    assert sites(Picks(lambda x: x[:, 1:].amax(1), start=0.0)) == ["blocks.1"]
    assert sites(Picks(lambda x: x[:, 0], start=0.0)) == ["blocks.0"]
    with torch.device("meta"):
        model = Picks(lambda x: x[:, 0])
    assert sites(model) == ["blocks.0"]


def test_a_named_place_that_nothing_reads_is_refused() -> None:
    model = Picks(lambda x: x[:, 0])
    with pytest.raises(
        SiteError, match=r"mute nothing at 'blocks\.1': the logits read its class token alone"
    ):
        sites(model, layers="blocks.1")


def test_looking_for_a_gradient_leaves_no_trace() -> None:
    model = Picks(lambda x: x[:, 0])
    model.blocks[1].register_buffer("calls", torch.zeros(()))
    fired: list[str] = []
    model.norm.register_forward_hook(lambda *_: fired.append("hook"))
    before = {name: each.clone() for name, each in model.state_dict().items()}
    state = torch.get_rng_state()
    sites(model)
    assert fired == []
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items() if name in before)
    assert all(parameter.grad is None for parameter in model.parameters())
