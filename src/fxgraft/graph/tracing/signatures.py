"""Signatures of forwards: which arguments are the model's and which its grafts', and calls brought to one form."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from fxgraft._torch import pytree

INPUT: Final = type("_Input", (), {"__repr__": lambda self: "INPUT"})()
"""Marks the argument leaves that are inputs of a graph."""


TARGET, LABELS = "target", "labels"
"""Names of the arguments that hold the labels of a call: what grafts are given, and what transformers call them."""


@dataclass(frozen=True)
class Declared:
    """The arguments that a forward declares, by which those of the model and those of its grafts are told apart.

    Attributes:
        positional: names of those that may be given by position, in order, without ``self``.
        keywords: names of those that may be given by keyword.
        any_positional: whether it takes ``*args``.
        any_keyword: whether it takes ``**kwargs``.
        defaults: by name.
    """

    positional: tuple[str, ...]
    keywords: frozenset[str]
    any_positional: bool
    any_keyword: bool
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, signature: inspect.Signature) -> Declared:
        """Read a signature without ``self``."""
        kinds = inspect.Parameter
        parameters = list(signature.parameters.values())
        by_position = (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
        by_keyword = (kinds.KEYWORD_ONLY, kinds.POSITIONAL_OR_KEYWORD)
        return cls(
            tuple(parameter.name for parameter in parameters if parameter.kind in by_position),
            frozenset(parameter.name for parameter in parameters if parameter.kind in by_keyword),
            any(parameter.kind is kinds.VAR_POSITIONAL for parameter in parameters),
            any(parameter.kind is kinds.VAR_KEYWORD for parameter in parameters),
            {parameter.name: parameter.default for parameter in parameters},
        )

    def names(self, option: str) -> bool:
        """Say whether the forward has an argument of that name."""
        return option in self.keywords or option in self.positional

    def takes(self, option: str) -> bool:
        """Say whether the forward gets an option of a call: it names the option, or takes any keyword.

        A forward that names its labels ``labels`` does not get them as ``target`` as well, which it would hand on to
        functions that have a ``target`` of their own, as losses do.
        """
        if option == TARGET and self.names(LABELS):
            return self.names(option)
        return self.names(option) or self.any_keyword

    def given(self, option: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a call gives for an option, by name or by position; None where it does not give it."""
        if option in kwargs:
            return kwargs[option]
        at = self.positional.index(option) if option in self.positional else len(args)
        return args[at] if at < len(args) else None

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Return the arguments from the first one on, given by position or by name, in the order of the forward."""
        named = itertools.takewhile(kwargs.__contains__, self.positional[len(args) :])
        return (*args, *(kwargs[name] for name in named))

    def beside(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a call gives in addition to images, labels and defaults, by argument.

        Of a first argument that holds several tensors, as a dictionary of patches and a mask of them, those of another
        kind than the first are beside the images. What is the same for all images counts if the forward names it:
        trainers hand numbers, as that of the items in a batch, to all that takes any keyword.
        """
        if not kwargs and len(args) == 1 and isinstance(args[0], Tensor):
            return {}
        unnamed = range(len(self.positional), len(args))
        named = {**dict(zip((*self.positional, *map(str, unnamed)), args, strict=False)), **kwargs}
        named = {name: value for name, value in named.items() if name not in (TARGET, LABELS)}
        first = next((name for name in (*self.positional[:1], *named) if name in named), None)
        extra = {} if first is None else dict(_of_another_kind(named.pop(first)))
        for name, value in named.items():
            if self._tells(name, value):
                extra[name] = value
        return extra

    def _tells(self, name: str, value: Any) -> bool:
        if isinstance(value, Tensor):
            return value.ndim > 0 or self.names(name)
        if name in _RETURNED or not self.names(name):
            return False
        default = self.defaults[name]
        off = all(setting is None or setting is False for setting in (value, default))
        return not off and value is not default and value != default

    def own(self, options: Iterable[str], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the keywords of a call without the options that are meant for the grafts alone."""
        keywords = dict(kwargs)
        for option in options:
            if option not in keywords:
                continue
            value = keywords.pop(option)
            if self.names(option) or (self.takes(option) and value is not None):
                keywords[option] = value  # behind the model's own: the first keyword may stand for the image
        return keywords

    @property
    def labels(self) -> tuple[str, ...]:
        """Names under which the forward itself gets labels."""
        return tuple(
            name for name in (TARGET, LABELS) if self.names(name) or (name == TARGET and self.takes(name))
        )


_RETURNED = frozenset({"return_dict", "output_hidden_states", "output_attentions"})
"""Switches that all models of transformers share: they say what is returned beside the logits, and change none."""


def _of_another_kind(images: Any) -> Iterator[tuple[str, Any]]:
    """Yield the tensors in a container whose type or number of dimensions is not that of the first."""
    if isinstance(images, Tensor):
        return
    if isinstance(images, (list, tuple)):
        images = {f"[{i}]": image for i, image in enumerate(images)}
    elif not isinstance(images, Mapping):
        images = getattr(images, "__dict__", {})
    held = {str(name): image for name, image in images.items() if isinstance(image, Tensor)}
    first = next((image for image in held.values() if image.is_floating_point()), None)
    for name, image in held.items():
        if first is not None and (image.dtype, image.ndim) != (first.dtype, first.ndim):
            yield name, image


def bind(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Bring a call to one form: defaults filled in, whatever the caller left out or passed by name."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    plain = pytree.tree_map_only(torch.Size, tuple, (bound.args, bound.kwargs))
    return plain[0], plain[1]


def bare_forward(module: nn.Module) -> Callable[..., Any]:
    """Return what ``module`` runs without the bookkeeping of a patched model's outer call."""
    cls = type(module)
    return getattr(cls, "_fxgraft_forward", cls.forward)


def forward_signature(module: nn.Module) -> inspect.Signature:
    """Return the signature of the class's own forward, without ``self`` and without ``target``."""
    cls = getattr(type(module), "_fxgraft_base", type(module))
    declared = inspect.signature(cls.forward)
    return declared.replace(parameters=list(declared.parameters.values())[1:])


def leaf_names(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Name every argument leaf after the parameter it belongs to."""
    declared = list(signature.parameters)
    bases = [declared[i] if i < len(declared) else f"input_{i}" for i in range(len(args))]
    names: list[str] = []
    for base, value in [*zip(bases, args, strict=True), *kwargs.items()]:
        count = len(pytree.tree_leaves(value))
        names += [base] if count == 1 else [f"{base}_{i}" for i in range(count)]
    return names
