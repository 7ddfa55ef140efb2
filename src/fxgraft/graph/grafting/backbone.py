"""The network as a method sees it: questions about its structure, and placements of units."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import nn

from fxgraft.graph.grafting.placement import Placement
from fxgraft.graph.grafting.state import state_of
from fxgraft.graph.grafting.unit import Unit
from fxgraft.graph.structure.affine_fold import Absorber, absorber_of
from fxgraft.graph.structure.blocks import blocks_before
from fxgraft.graph.structure.heads.head import Head, find_head, pooled_map
from fxgraft.graph.structure.heads.per_position_head import PositionwiseHead, positionwise
from fxgraft.graph.structure.heads.stem_and_classifier import (
    Stem,
    check_classified,
    find_classifiers,
    find_stems,
)
from fxgraft.graph.structure.joins import Join, residual_joins
from fxgraft.graph.structure.layout import Layout
from fxgraft.graph.structure.onward import without_idle
from fxgraft.graph.structure.positions import no_positions, positions
from fxgraft.graph.structure.rest_of_network import Rest, reads_places, rest_of_network, span_to_output
from fxgraft.graph.structure.site import Site, edits_of, layout_at
from fxgraft.graph.structure.sites import SiteSpec, list_sites, named_sites, resolve
from fxgraft.graph.structure.stages import main_stages, stages, stem_output
from fxgraft.graph.tracing.editing import Input, Instead, Output
from fxgraft.graph.tracing.model_trace import ModelTrace


class Backbone:
    """A network to be patched: questions about the bare model, and places for units.

    Nothing here changes the model. All questions raise typed errors that say what was looked for and what is
    there; see the functions of `fxgraft.graph.structure`.

    Args:
        trace: the trace of the model.

    Attributes:
        trace: the trace of the model, for questions that this class does not answer.
        model: a look-alike of the model without its grafts: new modules around the model's tensors. A layer that a
            unit keeps has to come from `module`.
    """

    def __init__(self, trace: ModelTrace) -> None:
        self.trace = trace
        self.model: nn.Module = trace.model

    @classmethod
    def of(cls, model: nn.Module, input_size: tuple[int, ...] | None = None) -> Backbone:
        """Look at another model, such as a second network that a method works with."""
        return cls(ModelTrace(model, input_size))

    @property
    def name(self) -> str:
        """The class of the model, for messages."""
        return self.trace.name

    @property
    def input_size(self) -> tuple[int, ...] | None:
        """(C, H, W) that shapes are propagated with; None for the model's own."""
        return self.trace.input_size

    @property
    def output(self) -> Any:
        """What the model returns for a batch of 2, tensors fake."""
        return self.trace.observation.output("")

    @property
    def fake_mode(self) -> Any:
        """The `FakeTensorMode` that `value` and `output` are of, to run a module on them."""
        return self.trace.observation.mode

    def module(self, path: str) -> nn.Module:
        """Return the model's own module of that qualified name, which a unit may keep; '' is the model."""
        return self.trace.original(path)

    # Questions

    def sites(self, words: SiteSpec) -> list[Site]:
        """Resolve what users write for ``layers=``: names, globs, stage numbers, alone or several."""
        return resolve(self.trace, words)

    def stages(self) -> list[Site]:
        """List the stages, in running order; a stage number is an index into them."""
        return stages(self.trace)

    def main_stages(self) -> list[Site]:
        """List the last four stages, as those of a ResNet behind its stem; four shares of the blocks of a plain ViT."""
        return main_stages(self.trace)

    def stem_output(self) -> Site | None:
        """Find what the first of the `main_stages` takes in; None where that is the image, or cannot be told."""
        return stem_output(self.trace)

    def module_outputs(self) -> list[Site]:
        """List the outputs of modules that compute something, in running order."""
        passing = (nn.Identity, nn.Dropout, nn.Dropout2d)
        sites = (site for site in list_sites(self.trace) if site.on_module)
        return [site for site in sites if not isinstance(self.trace.module(site.path), passing)]

    def named_sites(self, words: SiteSpec) -> dict[str, Site]:
        """Resolve words as `sites` does, by the names of the values: a word that names one site becomes its name."""
        return named_sites(self.trace, words)

    def positions(self, position: str | None = None, layers: SiteSpec | None = None) -> list[Site]:
        """Find the sites at one position of blocks ("post", "conv1_pre", "conv", ...) or the usual one, as they run.

        A site behind which only a class token is read is left out: a unit on the other tokens would change nothing.
        """
        return self.read(positions(self.trace, position, layers))

    def read(self, sites: list[Site]) -> list[Site]:
        """Leave out the sites that no prediction reads, such as tokens of which only the class token goes on.

        Raises:
            SiteError: none is left.
        """
        kept = without_idle(self.trace, sites)
        return [replace(site, left_out=site.left_out + len(sites) - len(kept)) for site in kept]

    def blocks_before(self, site: Site) -> list[Site]:
        """List the blocks that run before a site and give as many channels, the nearest first."""
        return blocks_before(self.trace, site)

    def layout(self, site: Site, name: str | None = None, *, places: bool = False) -> Layout:
        """Tell which dimension of a site's value holds channels, or check what the user says of it.

        Args:
            site: a site that holds one tensor.
            name: the layout that the user names, a `LayoutName`.
            places: whether to refuse values with less than two positions, which have no statistics over positions:
                vectors, pooled maps, class tokens by themselves.

        Raises:
            SiteError: no tensor, a layout that cannot be told, one that does not fit the value, or too few positions.
        """
        layout = layout_at(self.trace, site, name)
        if places and layout.canonical(site.value)[0, 0].numel() < 2:
            raise no_positions(site)
        return layout

    def joins(self) -> list[Join]:
        """Find the residual joins, in running order."""
        return residual_joins(self.trace)

    def head(self, name: str | None = None, output: str | int | None = None) -> Head:
        """Find the average pooling and linear classifier that the network ends in."""
        return find_head(self.trace, name, output)

    def pooled_map(self, output: str | int | None = None) -> Site | None:
        """Find the last map before the average that a linear classifier reads; None if there is no such head."""
        return pooled_map(self.trace, output)

    def check_logits(self, output: str | int | None = None, returned: bool = False) -> None:
        """Raise `StructureError` where a model is seen to give features or probabilities in place of logits.

        Args:
            output: which entry of a structured output holds the logits.
            returned: whether training passes have to return them; a `Rest` ends before a last sigmoid or softmax.
        """
        check_classified(self.trace, output, returned)

    def positionwise(self, head: Head) -> PositionwiseHead:
        """Return a head's layers as they apply to every position of its map, in training."""
        return positionwise(self.trace, head)

    def stems(self) -> tuple[Stem, ...]:
        """Find the linear layers that all of the image goes through first."""
        return find_stems(self.trace)

    def classifiers(self, output: str | int | None = None) -> tuple[str, ...]:
        """Find the linear layers whose outputs make up the logits, by qualified name.

        Args:
            output: which entry of a structured output holds the logits; None for the usual names.
        """
        return find_classifiers(self.trace, output)

    def rest(
        self,
        site: Site,
        output: str | int | None = None,
        behind: Collection[str] | None = None,
        bare: Rest | None = None,
    ) -> Rest:
        """Split off the rest of the network after a site, as a function of its value.

        Args:
            site: where it starts.
            output: which entry of a structured output holds the logits.
            behind: in `Patch.on_installed`, the grafts before this one: the rest starts after their change of the
                site's value, and their units record what else it needs.
            bare: the rest of the bare model. Where no unit acts in what it runs, it is that of the patched one as well.
        """
        if bare is not None and not self._acts_in(bare):
            return bare
        acted = None if behind is None else lambda unit: getattr(unit, "graft", None) in behind
        return rest_of_network(self.trace, site, output, acted)

    def _acts_in(self, rest: Rest) -> bool:
        """Say whether a unit acts in evaluation in a forward that a rest runs."""
        states = (
            (path, state_of(module)) for path, module in self.model.named_modules(remove_duplicate=False)
        )
        return any(
            state is not None and not state.evaluation.empty and rest.runs(path) for path, state in states
        )

    def reads_places(self, rest: Rest, prefix: int, compute: bool = False) -> bool:
        """Say whether the logits read anything of a site's value but its first ``prefix`` tokens.

        Args:
            rest: the rest of the network after the site.
            prefix: how many class and register tokens come first.
            compute: whether to look for a gradient as well, on two random images, where the weights are there.
        """
        return reads_places(self.trace, rest, prefix, compute)

    def absorber(self, site: Site, layout: Layout) -> Absorber | None:
        """Find the layer that can take a scale and a shift per channel of a site's value into its weights."""
        return absorber_of(self.trace, site, layout)

    def check_reaches_output(self, site: Site, output: str | int | None = None) -> None:
        """Raise `SiteError` where the output does not depend on a site."""
        span_to_output(self.trace, site, output)

    # Places

    def place(
        self,
        site: Site,
        unit: Unit,
        *,
        training: bool = True,
        evaluation: bool = True,
        key: str | None = None,
    ) -> list[Placement]:
        """Run a unit on a value: what used the value uses the unit's output.

        Args:
            site: a site from ``sites`` or ``positions``, or a value that a `Rest` needs.
            unit: the unit from ``make``.
            training: whether it acts in training.
            evaluation: whether it acts in evaluation.
            key: the unit's name within its graft; by default that of the site.
        """
        edits, key = edits_of(self.trace, site), key or site.name
        if training and evaluation and edits.training == edits.evaluation:
            return [Placement(edits.module, edits.training, key, unit)]
        placed = []  # each mode separately, since the two graphs name the site differently
        if training:
            placed.append(Placement(edits.module, edits.training, key, unit, evaluation=False))
        if evaluation:
            placed.append(Placement(edits.module, edits.evaluation, key, unit, training=False))
        return placed

    def before(self, unit: Unit, key: str, *, training: bool = True, evaluation: bool = True) -> Placement:
        """Run a unit on the model's first argument."""
        return Placement("", Input(), key, unit, training, evaluation)

    def after(self, unit: Unit, key: str, *, training: bool = True, evaluation: bool = True) -> Placement:
        """Run a unit on what the model returns."""
        return Placement("", Output(), key, unit, training, evaluation)

    def instead(self, path: str, unit: Unit) -> Placement:
        """Call a unit in place of a module's forward, as ``unit(module, *args, **kwargs)``."""
        return Placement(path, Instead(), path, unit)

    def replace_head(self, head: Head, unit: Unit, key: str) -> Placement:
        """Give a unit the map that a head pools, in training, and take the logits from it."""
        return Placement(head.owner, head.span, key, unit, evaluation=False)
