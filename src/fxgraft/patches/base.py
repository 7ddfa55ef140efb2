"""`Patch`: the base class of all methods.

A method is a frozen dataclass of its options that derives from `Patch`, is decorated with `register`, and says in
`place` which units go where. No other file names it: the API, the documentation, the sweeps of the tests and the
benchmarks go through the registry.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from fxgraft.errors import ConfigError, MergeError, SiteError, candidates
from fxgraft.graph.grafting.backbone import Backbone
from fxgraft.graph.grafting.graft import Graft, Make, Placer
from fxgraft.graph.grafting.placement import Placement
from fxgraft.graph.grafting.unit import Unit
from fxgraft.graph.structure.sites import SiteSpec
from fxgraft.patches.options import check_choices, check_known, plain_number, plain_numbers, wrong_option
from fxgraft.patches.pictures import Picture, View
from fxgraft.patches.preset import Preset, Structure

P = TypeVar("P", bound="Patch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patch(Placer):
    """Base of all methods: holds the options of a method, and says what it does to a model.

    Class attributes describe the method for tables and messages:
        method: name in the registry.
        title, paper, url: the name in the paper, the paper, and its address.
        idea: a sentence or two on what it does and why; by default the description in the class docstring.
        equation: the computation, in plain text.
        where: the usual sites in a backbone, in words.
        cost: the cost in training and in evaluation, in words.
        works_with: networks, methods and tools that it does and doesn't go together with.
        hurts: when it does harm, or has no effect.
        smallest_map: how many positions a side of the map at its site has to have for it to be advised; 0 for any. It
            goes on smaller ones as well.
        measures: the meaning of each name in `diagnostics`.
        train_only: whether evaluation is the bare model's, to the bit.
        needs_labels: whether training passes need ``target``.
        adds_parameters: whether it has parameters of its own to train.
        pairs_labels: how it comes that its loss judges rows of the output by labels of several rows, as what follows
            the method's name ("mixes images again in every pass"); '' where it does not. A model takes one such
            method, and none beside it that `replays`.
        call_options: keyword arguments of the model's call that this method's units read, as ``run.options``. A model
            that names one, or takes ``**kwargs``, gets it as well; others do not see it.
        order: (group, rank): at one site the units of one group act by rank, whichever was added first.
        saves: whether its options are enough to make it again from a recipe; otherwise `fxgraft.save` refuses.
        example: options that sweeps over backbones use, where the method cannot do without any.
        presets: settings that its authors published, by name.

    Attributes:
        published_as: the preset that it was made from; None where there is none. It isn't an option, and not saved.
    """

    published_as: ClassVar[Preset | None] = None

    method: ClassVar[str] = ""
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    url: ClassVar[str] = ""
    idea: ClassVar[str] = ""
    equation: ClassVar[str] = ""
    where: ClassVar[str] = ""
    cost: ClassVar[str] = ""
    works_with: ClassVar[str] = ""
    hurts: ClassVar[str] = ""
    smallest_map: ClassVar[int] = 0
    measures: ClassVar[Mapping[str, str]] = MappingProxyType({})
    train_only: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    adds_parameters: ClassVar[bool] = False
    pairs_labels: ClassVar[str] = ""
    saves: ClassVar[bool] = True
    example: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    presets: ClassVar[Mapping[str, Preset]] = MappingProxyType({})

    def __post_init__(self) -> None:
        """Check the options that are declared as a choice; methods add their own checks after this."""
        plain_numbers(self)
        check_choices(self)

    @classmethod
    def preset(cls: type[P], name: str, **overrides: Any) -> P:
        """Make the patch with settings that its authors published.

        Args:
            name: name of the preset; ``fxgraft info METHOD`` lists them, with the training that they belong to.
            **overrides: options of the method; they win over the preset's.

        Raises:
            ConfigError: no such preset (lists close matches), no such option, or one missing that it needs.
        """
        published = cls.presets.get(name) if isinstance(name, str) else None
        if published is None:
            raise ConfigError(
                f"{cls.method!r} has no preset {name!r}.\n{candidates(str(name), cls.presets, 30)}\n"
                f"fxgraft info {cls.method} shows what each sets."
            )
        check_known(cls, cls.method, overrides)
        names = {"layers" if key == "layer" else key for key, value in overrides.items() if value is not None}
        missing = [need for need in published.needs if need not in names]
        if missing:
            raise ConfigError(
                f"The preset {name!r} of {cls.method!r} needs {' and '.join(missing)}, which depends on your "
                f"network or training.\nPass {', '.join(f'{option}=...' for option in missing)} with it."
            )
        options = {key: value for key, value in published.options.items() if key not in names}
        made = cls(**{**options, **overrides})
        object.__setattr__(made, "published_as", published)
        return made

    @classmethod
    def from_dict(cls: type[P], data: Mapping[str, Any]) -> P:
        """Make the patch from what `to_dict` returned, or from options that a file gives.

        >>> import fxgraft
        >>> fxgraft.RSC.from_dict({"method": "rsc", "layers": "layer4"}) == fxgraft.RSC(layer="layer4")
        True

        Args:
            data: options by name; "method" may be among them, and "preset".

        Raises:
            ConfigError: it is of another method, or has an option that the method does not take.
        """
        options: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
        }
        if not cls.method or options.pop("method", cls.method) != cls.method:
            raise ConfigError(
                f"{cls.__name__}.from_dict got options of {data.get('method')!r}.\n"
                "Each method reads its own.\nCall it on the class of that method, fxgraft.methods()[name]."
            )
        preset = options.pop("preset", None)
        check_known(cls, cls.method, options)
        return cls(**options) if preset is None else cls.preset(preset, **options)

    def to_dict(self) -> dict[str, Any]:
        """Return the method's name and the options that are not at their defaults, as JSON and YAML hold them."""
        options = {
            f.name: list(value) if isinstance(value := getattr(self, f.name), tuple) else value
            for f in dataclasses.fields(self)
            if f.init and getattr(self, f.name) != f.default
        }
        return {"method": self.method, **options}

    def place(self, backbone: Backbone, make: Make) -> Iterable[Placement | list[Placement]]:
        """Say which units go where on a bare model.

        Called when the patch is made and again whenever the model has to be planned again; units come from
        ``make``, so that their parameters survive.

        Args:
            backbone: the bare model.
            make: ``make(key, UnitClass, *args)``, the graft's unit of that key, built the first time it is asked
                for.

        Returns:
            What ``backbone.place``, ``before``, ``after``, ``instead`` and ``replace_head`` give.
        """
        raise NotImplementedError

    def describe(self, graft: Graft) -> str:
        """Say what the graft does on its model, in one line, for `fxgraft.summary`; by default where its units are."""
        return graft.where()

    def built(self, graft: Graft) -> Structure | None:
        """Describe the blocks of a graft's network, to compare with the network that a preset was published for."""
        return None

    def inexact(self, graft: Graft) -> str:
        """Say why a training pass on this model differs from the bare model's even where the method has no effect.

        ``describe`` says it too, and so do the tables of what works. By default nothing: ''.
        """
        return ""

    def losses(
        self, graft: Graft, out: Any, target: Any, criterion: Callable[..., Tensor]
    ) -> Mapping[str, Tensor]:
        """Return what the method adds to the loss, by name."""
        return {}

    def criterion(self, graft: Graft, criterion: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return the criterion to use in place of the user's, called as ``criterion(out, y)``.

        Where it judges a row by labels of several rows, set ``pairs_labels``.
        """
        return criterion

    def contributes_loss(self) -> bool:
        """Say whether, with these options, `losses` adds something or `criterion` replaces the user's."""
        return type(self).losses is not Patch.losses or self.replaces_criterion()

    def replaces_criterion(self) -> bool:
        """Say whether, with these options, `criterion` replaces the user's, now or later in training."""
        return type(self).criterion is not Patch.criterion

    def diagnostics(self, graft: Graft) -> Mapping[str, Any]:
        """Return scalars of the last training pass by name, for `fxgraft.diagnostics`.

        By default the means of what the units gave to `PassView.measure`. What needs more arithmetic is done here,
        where waiting for a device costs no step.

        Args:
            graft: its ``measured()`` are the numbers and tensors by name; empty before the first training pass.

        Returns:
            Numbers, or tensors of which the mean is taken.
        """
        return {name: mean_of(values) for name, values in graft.measured().items()}

    def picture(self, graft: Graft, view: View) -> Picture:
        """Show what the method does with images, for ``fxgraft show effect``; not every method has a picture.

        Args:
            graft: the graft of ``view.model``.
            view: the images, as pixels and as the model takes them, and a model of their own to run.
        """
        raise NotImplementedError

    def merge(self, graft: Graft, model: nn.Module) -> None:
        """Fold the graft into the stock weights of ``model``; a method of training alone has nothing to fold.

        Raises:
            MergeError: the method changes the trained function in a way that stock weights cannot express.
        """
        if not self.train_only:
            raise MergeError(
                f"{graft.name!r} ({self.title}) acts in evaluation too, and stock weights cannot express it.\n"
                "Keep the patched model (fxgraft.save), or unpatch it and accept another function."
            )


def mean_of(values: Iterable[Any]) -> float:
    """Return the mean of numbers and of the means of tensors, of any dtype and on any device; NaN of nothing."""
    means = [
        float(value.detach().double().mean()) if isinstance(value, Tensor) else float(value)
        for value in values
    ]
    return sum(means) / len(means) if means else math.nan


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayeredPatch(Patch):
    """Base of methods that users place with ``layers=``; ``layer=`` means the same for one.

    A method sets its own default, or none: then the option has to be given.
    """

    layers: SiteSpec | None = None
    layer: dataclasses.InitVar[SiteSpec | None] = None

    needs_layers: ClassVar[bool] = False

    def __post_init__(self, layer: SiteSpec | None) -> None:
        """Take ``layer`` for ``layers``."""
        default = next(f.default for f in dataclasses.fields(self) if f.name == "layers")
        if layer is not None:
            if self.layers not in (default, None, layer):  # the same twice is what dataclasses.replace gives
                raise ConfigError(
                    f"{type(self).__name__}: layer= and layers= are the same option, and both are given.\n"
                    "Pass layers= alone; dataclasses.replace takes layers=..., layer=None."
                )
            object.__setattr__(self, "layers", layer)
        object.__setattr__(self, "layers", self._listed(self.layers))
        single = self.layers if isinstance(self.layers, (str, int)) else None
        object.__setattr__(self, "layer", single)  # a form that the constructor takes
        if self.needs_layers and self.layers is None:
            raise ConfigError(
                f"{self.method!r} needs layers.\n"
                'Say where, as layers="layer4", layers=-1 (a stage) or a list; fxgraft.sites(model) lists names.'
            )
        super().__post_init__()

    def _listed(self, layers: Any) -> Any:
        """Return a name or a number as it is, and several of them as a tuple, which nobody can change."""
        if isinstance(layers, (bytes, Set, Mapping)):  # numbers in place of names, and no order
            raise wrong_option(self, "layers", "names or stage numbers, in order")
        layers = plain_number(layers)
        if isinstance(layers, str) or not isinstance(layers, Iterable):
            return layers
        return plain_number(tuple(layers))


@contextmanager
def recording(grafts: Iterable[Graft], kind: type[Unit], missing: str) -> Iterator[list[Any]]:
    """Let the units of one kind append to a list, as ``unit.records``, for the time of the block.

    Raises:
        SiteError: the grafts have no such unit; the message is ``missing``.
    """
    units: list[Any] = [unit for graft in grafts for unit in graft.units_of(kind)]
    if not units:
        raise SiteError(missing)
    records: list[Any] = []
    for unit in units:
        unit.bind(records=records)
    try:
        yield records
    finally:
        for unit in units:
            unit.bind(records=None)
