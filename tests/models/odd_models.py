"""Networks with what people bring: regions without gradients, hooks, arguments, adapters, lists, signals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

BLOCKS = (
    *("plain", "branch", "no_grad", "set_grad", "decorated", "helper", "enable_grad", "nested"),
    *("autocast_off", "autocast_on", "detach", "scaled", "keyword", "reversed"),
)
STATEFUL = ("counter", "buffer", "cache")
"""Blocks whose forward writes to the module: a graft may only leave them closed, or refuse."""


@torch.no_grad()
def mean_without_gradient(x: Tensor) -> Tensor:
    """Return the mean over positions, as a constant."""
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


class Reversed(torch.autograd.Function):
    """Hands on what it gets, and minus half of the gradient, as layers between a network and its adversary do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return -0.5 * gradient


class Block(nn.Module):
    """A residual block whose forward does one thing that graphs of values do not show."""

    def __init__(self, kind: str, width: int, dims: int, norm: bool) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d)[dims - 1]
        batch_norm = (nn.BatchNorm1d, nn.BatchNorm2d)[dims - 1]
        self.kind = kind
        self.conv1 = conv(width, width, 3, padding=1)
        self.norm = batch_norm(width) if norm else nn.Identity()
        self.conv2 = conv(width, width, 1)
        self.act = nn.ReLU()
        self.drop = nn.Dropout(0.0)
        self.calls = 0
        self.steps, self.options = [1.0], {"gain": 1.0}
        self.scale = nn.Parameter(torch.full((), 0.5))
        if kind == "buffer":
            self.register_buffer("seen", torch.zeros(()))

    @torch.no_grad()
    def shift(self, x: Tensor) -> Tensor:
        """Return the mean over positions, as a constant."""
        return x.mean(tuple(range(2, x.ndim)), keepdim=True)

    def branch(self, x: Tensor) -> Tensor:
        """Return what the block adds."""
        return self.conv2(self.act(self.norm(self.conv1(x))))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        scale = scale * self.steps[0] * self.options["gain"] * (1 - self.drop.p)
        return self.act(x + getattr(self, f"_{self.kind}")(x) * scale)

    def _plain(self, x: Tensor) -> Tensor:
        return self.conv2(self.act(self.norm(self.conv1(x))))

    _branch = _keyword = branch

    def _no_grad(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            shift = x.mean(tuple(range(2, x.ndim)), keepdim=True)
        return self.branch(x - shift)

    def _set_grad(self, x: Tensor) -> Tensor:
        before = torch.is_grad_enabled()
        with torch.set_grad_enabled(False):
            shift = self.conv2(x).mean(tuple(range(2, x.ndim)), keepdim=True)
        with torch.set_grad_enabled(before):
            return self.branch(x) - shift

    def _decorated(self, x: Tensor) -> Tensor:
        return self.branch(x - self.shift(x))

    def _helper(self, x: Tensor) -> Tensor:
        return self.branch(x) * mean_without_gradient(x).sigmoid()

    def _nested(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            shift = self.conv2(x)
            with torch.enable_grad():
                grown = self.branch(x)
            shift = shift * 0.5
        return grown - shift

    def _enable_grad(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return self.branch(x)

    def _autocast_off(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.branch(x.float())

    def _autocast_on(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = self.conv2(self.act(self.conv1(x)))
        return out.float()

    def _detach(self, x: Tensor) -> Tensor:
        return self.branch(x) + x.detach().mean()

    def _reversed(self, x: Tensor) -> Tensor:
        out: Tensor = Reversed.apply(self.branch(x))  # type: ignore[no-untyped-call]
        return out

    def _scaled(self, x: Tensor) -> Tensor:
        return self.scale * self.branch(x)

    def _counter(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.branch(x) * (1.0 + 0.01 * self.calls)

    def _buffer(self, x: Tensor) -> Tensor:
        self.seen.add_(x.detach().mean())  # type: ignore[operator]
        return self.branch(x) + self.seen

    def _cache(self, x: Tensor) -> Tensor:
        self.last = x.detach()
        return self.branch(x)


class Low(nn.Module):
    """A low-rank adapter around a layer, as adapter libraries put it in the layer's place."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        if isinstance(base, nn.Linear):
            self.down: nn.Module = nn.Linear(base.in_features, 2, bias=False)
            self.up: nn.Module = nn.Linear(2, base.out_features, bias=False)
        else:
            conv: Any = base
            self.down = type(conv)(
                conv.in_channels, 2, conv.kernel_size, conv.stride, conv.padding, bias=False
            )
            self.up = type(conv)(2, conv.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x)) * 2.0


@dataclass(frozen=True)
class Odd:
    """A network as data, so that the same one can be built twice.

    Attributes:
        blocks: kinds of the blocks.
        dims: 1 for signals, 2 for images.
        classes: number of logits.
        width: number of channels.
        argument: what the forward takes besides the input: "", "target" (a margin on the label's logit), "labels"
            (not used) or "kwargs".
        frozen_stem: whether the stem runs without gradients.
        crops: whether the forward takes a list of inputs.
        adapter: which layer has a low-rank adapter: "", "conv" or "fc".
        hook: where a hook changes values: "", "stem", "block", "pool" or "fc".
        hook_kind: "forward", "pre" or "replaced", a forward of the instance's own.
        hook_first: whether it is there before the graft.
        replaced: the layer that is replaced after the graft by one of the same shapes: "", "stem", "conv" or "fc".
        changed: what is set otherwise after the graft: "", "kind", "list", "entry", "closed" (of a layer that forwards
            read), "appended" or "frozen".
        images: inputs in a batch.
        norm: whether blocks have batch normalisation, which acts differently in evaluation.
    """

    blocks: tuple[str, ...] = ("plain",)
    dims: int = 2
    classes: int = 4
    width: int = 5
    argument: str = ""
    frozen_stem: bool = False
    crops: bool = False
    adapter: str = ""
    hook: str = ""
    hook_kind: str = "forward"
    hook_first: bool = True
    replaced: str = ""
    changed: str = ""
    images: int = 4
    norm: bool = True

    def build(self) -> Net:
        """Build the network, in training mode, the same each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = {"": Net, "target": Margin, "labels": Labelled, "kwargs": Keywords}[self.argument](self)
            if self.adapter == "conv":
                model.blocks[0].conv1 = Low(model.blocks[0].conv1)
            elif self.adapter == "fc":
                model.fc = Low(model.fc)
        if self.hook and self.hook_first:
            self.add_hook(model)
        return model

    def add_hook(self, model: Net) -> None:
        """Put the hook on."""
        module: nn.Module = model.blocks[0] if self.hook == "block" else getattr(model, self.hook)
        if self.hook_kind == "pre":
            module.register_forward_pre_hook(_shift_input)
        elif self.hook_kind == "replaced":
            own = module.forward
            module.forward = lambda *args, **kwargs: own(*args, **kwargs) * 1.5  # type: ignore[method-assign]
        else:
            module.register_forward_hook(_scale_output)

    def finish(self, model: Net) -> None:
        """Do what is done to a model after it was patched."""
        if self.hook and not self.hook_first:
            self.add_hook(model)
        self.change(model)
        if not self.replaced:
            return
        holder: Any = model.blocks[0] if self.replaced == "conv" else model
        name = "conv1" if self.replaced == "conv" else self.replaced
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            old = getattr(holder, name)
            old = old.base_layer if isinstance(old, Low) else old
            own: Any = getattr(type(old), "_fxgraft_base", type(old))
            new = (
                own(old.in_features, old.out_features)
                if isinstance(old, nn.Linear)
                else own(old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding)
            )
        setattr(holder, name, new)

    def change(self, model: Net) -> None:
        """Set something otherwise that forwards read."""
        block = model.blocks[0]
        if self.changed == "kind":
            block.kind = "branch"
        elif self.changed == "list":
            block.steps[0] = 0.5
        elif self.changed == "entry":
            block.options["gain"] = 0.5
        elif self.changed == "closed":
            block.drop.p = 0.5
        elif self.changed == "frozen":
            block.requires_grad_(False)
        elif self.changed == "appended":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(8)
                model.blocks.append(Block("plain", self.width, self.dims, self.norm).train(model.training))

    def batch(self, seed: int = 0) -> tuple[Any, Tensor]:
        """Return inputs and labels."""
        g = torch.Generator().manual_seed(seed)
        size = (12, 10)[: self.dims]
        x: Any = torch.randn(self.images, 3, *size, generator=g)
        if self.crops:
            x = [x[: self.images // 2], x[self.images // 2 :]]
        return x, torch.randint(max(self.classes, 2), (self.images,), generator=g)

    @property
    def input_size(self) -> tuple[int, ...]:
        """The shape of one input."""
        return (3, *(12, 10)[: self.dims])


def _scale_output(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * 1.5 + 0.1


def _shift_input(module: nn.Module, args: Any) -> Any:
    return (args[0] * 0.5, *args[1:])


class Net(nn.Module):
    """A stem, blocks, average pooling and a classifier."""

    def __init__(self, odd: Odd) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d)[odd.dims - 1]
        self.odd = odd
        self.stem = conv(3, odd.width, 3, padding=1)
        self.blocks = nn.ModuleList(Block(kind, odd.width, odd.dims, odd.norm) for kind in odd.blocks)
        self.pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)[odd.dims - 1](1)
        self.fc: nn.Module = nn.Linear(odd.width, odd.classes)

    def logits(self, x: Any) -> Tensor:
        """Return the logits (N, K) of a batch, or of the crops in a list."""
        if isinstance(x, list):
            x = torch.cat(x)
        if self.odd.frozen_stem:
            with torch.no_grad():
                x = self.stem(x)
        else:
            x = self.stem(x)
        for block in self.blocks:
            x = block(x, scale=0.5) if block.kind == "keyword" else block(x)
        return self.fc(self.pool(x).flatten(1))

    def forward(self, x: Any) -> Tensor:
        return self.logits(x)


class Margin(Net):
    """Takes a margin off the label's logit in training, as margin heads do."""

    def forward(self, x: Any, target: Tensor | None = None) -> Tensor:
        logits = self.logits(x)
        if target is None or not self.training or self.odd.classes == 1:
            return logits
        return logits - 0.3 * nn.functional.one_hot(target, self.odd.classes)


class Labelled(Net):
    """Names labels, and does not read them."""

    def forward(self, x: Any, labels: Tensor | None = None) -> Tensor:
        return self.logits(x)


class Keywords(Net):
    """Takes anything, and scales by one of it."""

    def forward(self, x: Any, **kwargs: Any) -> Tensor:
        return self.logits(x) * (2.0 if "target" in kwargs else 1.0)


@st.composite
def odds(draw: st.DrawFn) -> Odd:
    """Random networks, mostly with one or two oddities."""
    few = st.sampled_from  # "" stands several times where it is the usual case
    kinds = draw(st.lists(few((*BLOCKS, *STATEFUL)), min_size=1, max_size=2))
    return Odd(
        blocks=tuple(kinds),
        dims=draw(few((2, 2, 2, 1))),
        classes=draw(few((4, 4, 4, 1))),
        width=draw(few((5, 10, 12))),
        argument=draw(few(("", "", "", "target", "labels", "kwargs"))),
        frozen_stem=draw(few((False, False, False, True))),
        crops=draw(few((False,) * 7 + (True,))),
        adapter=draw(few(("", "", "", "conv", "fc"))),
        hook=draw(few(("", "", "", "stem", "block", "pool", "fc"))),
        hook_kind=draw(few(("forward", "pre", "replaced"))),
        hook_first=draw(st.booleans()),
        replaced=draw(few(("", "", "", "", "stem", "conv", "fc"))),
        changed=draw(few(("", "", "", "kind", "list", "entry", "closed", "appended", "frozen"))),
        images=draw(few((4, 4, 3, 2, 1, 0))),
    )
