"""Where RSC goes: maps of several positions that the logits read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from fxgraft.extend import Backbone, Layout, Rest, Site, SiteError, SiteSpec, StructureError, take_logits

Found = tuple[Site, Layout, Rest]


def found_sites(
    backbone: Backbone, layers: SiteSpec | None, output: str | int | None, layout: str | None
) -> Iterator[Found]:
    """Find the sites with their layouts and what comes after them.

    Args:
        backbone: the bare model.
        layers: what the user names; stage numbers count the stages whose positions reach the logits. None for the
            last map of several positions, up to the pooling, whose positions do.
        output: which entry of a structured output holds the logits.
        layout: the layout that the user names.

    Raises:
        SiteError: no such site, or one where muting changes nothing.
    """
    search = _Search(backbone, output, layout)
    if layers is None:
        yield search.default()
        return
    words = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]
    if not words:
        backbone.sites(words)
    numbers = [word for word in words if isinstance(word, int) and not isinstance(word, bool)]
    stages = search.stages() if numbers else []
    by_name: dict[str, Site] = {}
    for word in words:
        sites = [_numbered(backbone, stages, word)] if word in numbers else backbone.sites([word])  # type: ignore[list-item]
        by_name |= {site.name: site for site in sites}
    for site in by_name.values():
        kind, rest = search.read_at(site)
        if rest is None:
            raise _idle(site)
        if search.gives_logits(site):
            raise SiteError(
                f"{site.name!r} gives the logits themselves, and RSC mutes what they are computed from.\n"
                "A prediction without its logits is the same for every class.\nName a layer in front of the classifier."
            )
        yield site, kind, rest


class _Search:
    def __init__(self, backbone: Backbone, output: str | int | None, layout: str | None) -> None:
        self.backbone = backbone
        self.output = output
        self.layout = layout

    def default(self) -> Found:
        """Find the map in front of the pooling, or the last one before it."""
        pooled = self.backbone.pooled_map(self.output)
        places = [pooled] if pooled is not None else []
        if not places or self.positions(places[0]) < 2:
            try:
                places += [site for _, site in reversed(self._blocks())]
            except StructureError:
                if not places:
                    raise
        several = [site for site in places if self.positions(site) > 1]
        return self._first_read(several, compute=True)

    def stages(self) -> list[Site]:
        """List the stages without those at the end whose positions no logit reads; of the last a block may be left."""
        blocks = self._blocks()
        last, _, _ = self._first_read([site for _, site in reversed(blocks)])
        number = next(number for number, site in blocks if site is last)
        return [*self.backbone.stages()[:number], last]

    def _blocks(self) -> list[tuple[int, Site]]:
        """List the blocks of all stages with the numbers of these, in running order."""
        stages = self.backbone.stages()
        names = {stage.name for stage in stages}
        blocks: list[tuple[int, Site]] = []
        for number, stage in enumerate(stages):
            own = stage.path or stage.owner
            beside = own.rpartition(".")[0]
            inner = [
                site
                for site in self.backbone.blocks_before(stage)
                if site.name not in names
                and own
                and (site.name.startswith(f"{own}.") or (beside and site.name.rpartition(".")[0] == beside))
            ]
            blocks += [(number, site) for site in [*inner[::-1], stage]]
        return blocks

    def _first_read(self, sites: Sequence[Site], compute: bool = False) -> Found:
        """Find the first of several sites whose positions the logits read."""
        failed: SiteError | None = None
        for site in sites:
            try:
                layout, rest = self.read_at(site, compute)
            except SiteError as error:  # no logit depends on it, or it cannot be followed
                failed = failed or error
                continue
            if rest is None:
                failed = failed or _idle(site)
            # The last block of a dense network may give the logits itself.
            elif not self.gives_logits(site):
                return site, layout, rest
        raise failed or SiteError(
            f"No map of {self.backbone.name} in front of its pooling has more than one position.\n"
            "Muting the only one leaves the classifier nothing but its bias.\n"
            "Pass input_size=(C, H, W) of the images you train on, or layer= with another site."
        )

    def read_at(self, site: Site, compute: bool = False) -> tuple[Layout, Rest | None]:
        """Return the layout at a site and the rest of the network, None where the logits read none of its positions."""
        layout = self._layout(site)
        rest = self.backbone.rest(site, self.output)
        return layout, rest if self.backbone.reads_places(rest, layout.prefix, compute) else None

    def gives_logits(self, site: Site) -> bool:
        """Say whether a site's value is the logits themselves."""
        return site.value is take_logits(self.backbone.output, (self.output,))

    def positions(self, site: Site) -> int:
        """Count the positions at a site."""
        layout = self._layout(site)
        return 1 if layout.name == "NC" else layout.canonical(site.value)[0, 0].numel()

    def _layout(self, site: Site) -> Layout:
        value = site.value
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = type(value).__name__ if not isinstance(value, Tensor) else f"a tensor of {value.dtype}"
            raise SiteError(
                f"RSC needs a feature map at {site.name!r}, and {site.op} returns {kind}.\n"
                "It mutes positions or channels of a floating-point tensor with the batch first.\n"
                "fxgraft.sites(model) shows what every layer returns."
            )
        return self.backbone.layout(site, self.layout)


def _numbered(backbone: Backbone, stages: list[Site], index: int) -> Site:
    if -len(stages) <= index < len(stages):
        return stages[index]
    if len(stages) == len(backbone.stages()):
        return backbone.sites(index)[0]  # there is none, which it says
    raise SiteError(
        f"There is no stage {index} whose positions reach the logits: there are {len(stages)}.\n"
        f"They are numbered 0 to {len(stages) - 1} (or from -1 backwards): "
        f"{', '.join(repr(site.name) for site in stages)}.\n"
        "Behind those a class token alone is read, and muting positions would change nothing."
    )


def _idle(site: Site) -> SiteError:
    return SiteError(
        f"RSC would mute nothing at {site.name!r}: the logits read its class token alone.\n"
        "It mutes the positions that a prediction leans on, and this one leans on none of them.\n"
        "Choose an earlier block, or build the model to pool by average (timm: global_pool='avg')."
    )
