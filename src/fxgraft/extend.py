'''The door for methods: all that the author of one needs, inside this package or outside of it.

The words, each used for one thing:

- A **method** is a published training technique, known by a name such as ``"rsc"``: a class that derives from `Patch`.
- A **patch** is a method with its settings, before it is on a model: ``fxgraft.RSC(layers=-1)``.
- A **graft** is a patch on one model, with its units: `fxgraft.patch` puts it there, `fxgraft.unpatch` takes it off.
- A **site** is a place in a model where a value can be changed: a module's output, or a sum inside a block.
- A **unit** is the module of a graft that acts at one site. Its parameters are the graft's.
- A **tap** is a site whose value is recorded and handed out, not changed.
- A **member** is one of the networks of an ensemble that share most of their weights, as in MixMo.
- A **bare** model has no graft on it: what it was before the first, and is again after the last comes off.

A method's author imports torch, `fxgraft` and `fxgraft.extend`. A whole one, after Permuted AdaIN (Nuriel, Benaim,
Wolf, CVPR 2021), which swaps the channel statistics of the images of a batch:

    from dataclasses import dataclass

    import fxgraft
    from fxgraft import extend

    @fxgraft.register("style_swap")
    @dataclass(frozen=True, kw_only=True)
    class StyleSwap(extend.LayeredPatch):
        """Swap channel means and deviations within the batch, in training.

        Args:
            p: probability that a pass is swapped.
        """

        title = "Permuted AdaIN"
        paper = "Nuriel, Benaim, Wolf: Permuted AdaIN. CVPR 2021"
        url = "https://arxiv.org/abs/2010.05785"
        where = "behind the first stages"
        cost = "training: one pass over each map; evaluation: none"
        train_only = True

        layers: extend.SiteSpec | None = (0, 1)
        p: float = 0.01

        def __post_init__(self, layer):
            super().__post_init__(layer)
            extend.check_share(self, "p")

        def place(self, backbone, make):
            for site in backbone.sites(self.layers):
                unit = make(site.name, StyleSwapUnit, self)
                unit.bind(layout=backbone.layout(site))
                yield backbone.place(site, unit, evaluation=False)

        def describe(self, graft):
            return f"swaps styles at {graft.where()} with probability {self.p:g}"

    class StyleSwapUnit(extend.Unit):
        layout: extend.Layout

        def __init__(self, config):
            super().__init__()
            self.config = config

        def forward(self, x):
            run = self.current
            if run is None:
                return x
            on = run.shared("on", lambda: extend.draws.coin(self.config.p, x.device))
            return extend.draws.choose(on, lambda: self.swapped(x), x)

        def swapped(self, x):
            z = self.layout.canonical(x)  # (B, C, *positions), whatever the network's layout
            dims = tuple(range(2, z.ndim))
            mean = z.mean(dims, keepdim=True)
            std = (z.var(dims, keepdim=True, correction=0) + 1e-5).sqrt()
            order = extend.draws.permutation(len(z), z.device)
            return self.layout.restore(x, (z - mean) / std * std[order] + mean[order])

A method like this one, which changes maps by the other images of the batch, is shorter with `MapPatch` as its base,
which brings the unit; the built-in MixStyle and DSU are written so.

What a method can do beyond this:

- Ask the `Backbone`: ``sites``, ``positions`` inside blocks, ``main_stages``, ``layout``, ``joins``, ``head``,
  ``stems``, ``classifiers``, ``rest`` (the network after a site, as a function), ``absorber`` (who takes in a scale).
  A `Site` is one value of the forward pass: it knows its ``name``, its ``owner`` (the module whose forward holds it)
  and its fake ``value``. A backbone looks at a shadow of the model, ``backbone.model``, so that nothing of it shows on
  the model; a layer that a unit keeps is the model's own, ``backbone.module(path)``. The same model and options give
  the same places: a graft is asked for them again only where the model has changed.
- Place units: ``backbone.place`` at a site, ``before`` and ``after`` the model, ``instead`` of a module,
  ``replace_head``. Units come from ``make(key, UnitClass, *args)``; ``unit.bind(...)`` holds what is found again on
  every model. ``set_progress``, ``stale`` and ``restart`` of a `Unit` follow a schedule, notice a changed model, and
  take up weights that were loaded into it.
- Use the pass that runs, as the graft's units see it (`PassView`). ``self.run`` of a unit raises outside of a pass,
  ``self.current`` is None there. It has ``labels``, ``relabel`` for those that other grafts see, ``options`` of the
  call, ``shared`` for one draw for all units of a graft, ``put`` and ``get`` between them, and ``remember``, which
  ``graft.recall(out)`` finds again when the loss is computed. `look_ahead` runs a rest in the middle of a pass.
- Take part in the loss: `Patch.criterion` and `Patch.losses`; where options switch these off, say so in
  `Patch.replaces_criterion` and `Patch.contributes_loss`. Fold into stock weights: `Patch.merge`.
- Run a stem or a classifier with other tensors than its own: `layer_tensors` are its parameters, `effective` what it
  multiplies with and adds, `apply_layer` the call, and `write_effective` gives the layer a sum of such weights. Not
  where the weight is made from others (`is_derived`, in every call: `made_by_hooks`) or belongs to others as well
  (`sharers`), nor where hooks or a forward of its own have a part in the layer's calls (`acted_on`).
- Say what a training pass did, as scalars for loggers: ``self.run.measure("ratio", ratio)`` in a unit is all it
  takes; `fxgraft.diagnostics` gives the means by name. Where more arithmetic is needed, `Patch.diagnostics`.
- Show what the method does with an image: `Patch.picture` returns a `Picture` of `Panel` objects (images with heat maps
  and hatched cells, curves), and ``fxgraft show effect METHOD IMAGE`` draws it.
- Fill its card, ``fxgraft info METHOD``: ``idea``, ``equation``, ``works_with``, ``hurts``, ``measures`` (what the
  names of its diagnostics mean), beside ``where`` and ``cost``; what is not declared is left out.
- Name published settings: ``presets = presets_by_name(Preset(name=..., options=..., source=...))``.

The method is found by name once its module is imported. Without that, on the command line too, it is found through an
entry point in the metadata of its package: in ``pyproject.toml``, under
``[project.entry-points."fxgraft.patches"]``, the line ``style_swap = "my_package.styles:StyleSwap"``.
'''

from fxgraft.errors import (
    BypassError,
    ConfigError,
    FxgraftWarning,
    MergeError,
    MethodError,
    SiteError,
    StructureError,
    TargetError,
    TraceError,
    UnknownGraftError,
    WrappedModelError,
    because,
    candidates,
)
from fxgraft.functional.modulation import modulated
from fxgraft.graph.grafting.backbone import Backbone
from fxgraft.graph.grafting.graft import Graft, Make
from fxgraft.graph.grafting.lookup import add_graft, copy_with, grafts_in, grafts_on, unwrapped
from fxgraft.graph.grafting.placement import Placement
from fxgraft.graph.grafting.tap_unit import Tap, take, tap_placements
from fxgraft.graph.grafting.unit import Capture, PassView, Unit, look_ahead, recomputed
from fxgraft.graph.names import is_graft_key
from fxgraft.graph.runtime.forward_context import Arguments, Context
from fxgraft.graph.runtime.labels import binary_labels, check_criterion, check_label_range, check_soft_labels
from fxgraft.graph.structure.affine_fold import Absorber
from fxgraft.graph.structure.heads.head import Head
from fxgraft.graph.structure.heads.linear import (
    apply_layer,
    effective,
    is_derived,
    layer_tensors,
    made_by_hooks,
    sharers,
    write_effective,
)
from fxgraft.graph.structure.heads.outputs import take_logits, with_logits
from fxgraft.graph.structure.heads.per_position_head import PositionwiseHead, gathered, position_scores
from fxgraft.graph.structure.heads.stem_and_classifier import Stem
from fxgraft.graph.structure.joins import Join
from fxgraft.graph.structure.layout import DIMENSIONS, Layout, LayoutName
from fxgraft.graph.structure.rest_of_network import Rest, tail_layer
from fxgraft.graph.structure.site import Site
from fxgraft.graph.structure.sites import SiteSpec
from fxgraft.graph.tracing.observe import tensors
from fxgraft.graph.tracing.preserve import preserved_modes
from fxgraft.graph.tracing.settings import acted_on
from fxgraft.patches import draws
from fxgraft.patches.base import LayeredPatch, Patch, recording
from fxgraft.patches.blocks import BlockPatch
from fxgraft.patches.maps import MapPatch
from fxgraft.patches.options import check_count, check_positive, check_share, is_count, is_number
from fxgraft.patches.pictures import Panel, Picture, View
from fxgraft.patches.preset import Preset, Structure, Training, presets_by_name
from fxgraft.patches.registry import register

__all__ = [
    "DIMENSIONS",
    "Absorber",
    "Arguments",
    "Backbone",
    "BlockPatch",
    "BypassError",
    "Capture",
    "ConfigError",
    "Context",
    "FxgraftWarning",
    "Graft",
    "Head",
    "Join",
    "LayeredPatch",
    "Layout",
    "LayoutName",
    "Make",
    "MapPatch",
    "MergeError",
    "MethodError",
    "Panel",
    "PassView",
    "Patch",
    "Picture",
    "Placement",
    "PositionwiseHead",
    "Preset",
    "Rest",
    "Site",
    "SiteError",
    "SiteSpec",
    "Stem",
    "Structure",
    "StructureError",
    "Tap",
    "TargetError",
    "TraceError",
    "Training",
    "Unit",
    "UnknownGraftError",
    "View",
    "WrappedModelError",
    "acted_on",
    "add_graft",
    "apply_layer",
    "because",
    "binary_labels",
    "candidates",
    "check_count",
    "check_criterion",
    "check_label_range",
    "check_positive",
    "check_share",
    "check_soft_labels",
    "copy_with",
    "draws",
    "effective",
    "gathered",
    "grafts_in",
    "grafts_on",
    "is_count",
    "is_derived",
    "is_graft_key",
    "is_number",
    "layer_tensors",
    "look_ahead",
    "made_by_hooks",
    "modulated",
    "position_scores",
    "preserved_modes",
    "presets_by_name",
    "recomputed",
    "recording",
    "register",
    "sharers",
    "tail_layer",
    "take",
    "take_logits",
    "tap_placements",
    "tensors",
    "unwrapped",
    "with_logits",
    "write_effective",
]
