"""Base of methods that put one unit into every block of a network, and the units that follow joined values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor, nn

from fxgraft.errors import SiteError
from fxgraft.graph.grafting.backbone import Backbone
from fxgraft.graph.grafting.graft import Graft, Make
from fxgraft.graph.grafting.placement import Placement
from fxgraft.graph.grafting.unit import Unit
from fxgraft.graph.structure.dense import DENSE
from fxgraft.graph.structure.positions import RESIDUAL
from fxgraft.graph.structure.site import Site
from fxgraft.graph.tracing.editing import Edge
from fxgraft.patches.base import LayeredPatch
from fxgraft.patches.preset import Structure

Position = Literal[
    "pre",
    "pre_with_projection",
    "residual",
    "identity",
    "post",
    "output",
    "conv1_pre",
    "conv1_post",
    "conv2_post",
    "conv",
    "norm",
    "act",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockPatch(LayeredPatch):
    """Base of methods that put one unit into every block of a network.

    Args:
        position: where in its block a unit sits. Residual blocks: "pre" (what the branch sees of the block's
            input), "pre_with_projection" (the same, and where the shortcut projects the input, what that sees),
            "residual" (the end of the branch), "identity" (the shortcut, after any downsampling), "post" (the sum,
            before the last activation) or "output" (behind that activation; the sum, where none follows). Densely
            connected layers: "conv1_pre" (the layer's joined input, before its first norm and for all that is
            concatenated with it onwards), "conv1_post" (behind its first convolution), "conv2_post" (behind its
            second, if there is one). Plain stacks: behind every "conv", "norm" or "act". Default: "post"; in a
            network without residual blocks, or with few of them among others, "conv1_pre" of its densely connected
            layers, or else "conv". What a residual block is: `fxgraft.graph.structure.joins`. Depthwise convolutions
            with a shortcut, as convolutional position encodings have, count among them; the summary says how many.
        layers: only these blocks: names of blocks or of modules around them, globs, stage numbers, names from
            ``fxgraft.sites(model, "residual")``; a name without such a block stands for its own output, and
            "input" for the image. Default: every block.
        layer: the same, for one.
        layout: meaning of the dimensions at the sites, one of NCHW, NHWC, NLC, NCL, NCDHW and NDHWC; found if left out.
    """

    where = (
        "inside every residual block, by default before its last activation; networks without: in dense layers, or "
        "behind convolutions"
    )

    position: Position | None = None
    layout: Literal["NCHW", "NHWC", "NLC", "NCL", "NCDHW", "NDHWC"] | None = None

    def put(
        self, backbone: Backbone, make: Make, site: Site, unit: Unit, *, evaluation: bool = True
    ) -> Iterator[list[Placement]]:
        """Place a unit at a position of a block. If its value was joined from parts, later users get the changed parts.

        Args:
            backbone: the bare model.
            make: the maker of units that `place` gets.
            site: a site from ``backbone.positions``.
            unit: the unit that acts there.
            evaluation: whether it acts in evaluation, too.
        """
        unit.bind(position=site.position or "by name", block=_block(backbone, site), kind=site.kind)
        unit.bind(left_out=site.left_out, closed=site.closed)
        yield backbone.place(site, unit, evaluation=evaluation)
        if not any(_users(part) for part in site.onward):
            return
        joined = make(f"{site.name}:joined", Joined, site.name)
        joined.bind(sizes=[part.value.shape[1] for part in site.onward])
        yield backbone.place(site, joined, key=f"{site.name}:joined", evaluation=evaluation)
        for index, part in enumerate(site.onward):
            if _users(part):
                unit = make(part.name, Part, site.name, index)
                unit.bind(always=evaluation)
                yield backbone.place(part, unit, evaluation=evaluation)

    def built(self, graft: Graft) -> Structure | None:
        """Say how many blocks have units, and how many convolutions these blocks have."""
        units: list[Any] = [unit for unit in graft.units.values() if hasattr(unit, "block")]
        blocks = [unit.block for unit in units]
        kinds = {block.blocks for block in blocks}
        if len(kinds) != 1:
            return None
        counts = [block.convolutions for block in blocks if block.convolutions is not None]
        return Structure(
            blocks=kinds.pop(),
            units=len(blocks) if self.layers is None else None,
            convolutions=min(counts, default=None),
            groups=max(block.groups for block in blocks),
            instance_norm=any(block.instance_norm for block in blocks),
        )

    def placed_at(self, graft: Graft) -> str:
        """Describe where the units of a graft are: positions, kinds of blocks, and how many were left out."""
        units: list[Any] = [unit for unit in graft.units.values() if hasattr(unit, "position")]
        said = [", ".join(dict.fromkeys(str(unit.position) for unit in units))]
        kinds = [unit.kind for unit in units]
        said += [f"{kinds.count(kind)} {text}" for kind, text in _KINDS.items() if kind in kinds]
        left_out = max((unit.left_out for unit in units), default=0)
        said += [f"{left_out} more {_LEFT_OUT}"] if left_out else []
        closed = max((unit.closed for unit in units), default=0)
        said += [f"{closed} modules {_CLOSED}"] if closed else []
        return "; ".join(said)


_KINDS = {
    "depthwise": "of them on depthwise convolutions with a shortcut, as of position encodings",
    "part": "of them on a part of their blocks' channels",
}
_LEFT_OUT = (
    "have none: their values have other rows than one per image, or one position, or no prediction reads them"
)
_CLOSED = "cannot be looked into, and may be residual blocks: name their sites by layers= if so"


def _block(backbone: Backbone, site: Site) -> Structure:
    """Describe the block that a site is a position of."""
    families = ((RESIDUAL, "residual blocks"), (DENSE, "dense layers"))
    kind = next((name for positions, name in families if site.position in positions), "")
    if not kind or not site.block:
        return Structure(blocks=kind or f"{site.position or 'named'} sites", units=1)
    modules = list(backbone.trace.module(site.block).modules())
    convs = [module for module in modules if isinstance(module, (nn.Conv2d, nn.Conv3d))]
    return Structure(
        blocks=kind,
        units=1,
        convolutions=len(convs),
        groups=max((conv.groups for conv in convs), default=1),
        instance_norm=any(isinstance(module, (nn.InstanceNorm2d, nn.InstanceNorm3d)) for module in modules),
    )


def _users(part: Site) -> bool:
    edit = None if part.edits is None else part.edits.evaluation
    return isinstance(edit, Edge) and bool(edit.users)


class Joined(Unit):
    """Returns a joined value, which was changed, and gives it to the `Part` units of its graft.

    Args:
        key: the name to hand it over by.
    """

    sizes: list[int]

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` (B, C, *S) as it is; its parts go to the units that hand them on."""
        run = self.current
        if run is not None:
            run.put(self.key, x.split(self.sizes, 1))
        return x


class Part(Unit):
    """Returns one part of a changed joined value, in place of the value that the part was joined from.

    Args:
        key: the name that `Joined` hands it over by.
        index: number of the part.
    """

    always: bool

    def __init__(self, key: str, index: int) -> None:
        super().__init__()
        self.key = key
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        """Return the part (B, C_i, *S). Outside of a pass that is ``x``, if the unit before acts in passes only.

        Raises:
            SiteError: a part of the model was called by itself, and a unit that acts in evaluation changed the value;
                or the block is called without its layers.
        """
        run = self.run if self.always else self.current
        if run is None:
            return x
        parts = run.get(self.key)
        if parts is None:
            raise SiteError(
                f"{self.graft!r} changes what {self.key!r} joins, and the block around it was looked at without it.\n"
                "A method cannot start inside a densely connected block that another changes from within.\n"
                "Choose a site outside of the block, or another position."
            )
        return parts[self.index]
