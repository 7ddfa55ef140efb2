"""Constructors: finds out which library and arguments made a model, proves it, and calls them again.

What a model says of itself (timm's ``pretrained_cfg``, torchvision's module, a ``config`` of transformers) is a guess
at its constructor. The guess is carried out without memory (on the device "meta"), and counts where the result is the
same as the model without its grafts: classes, sharing, names and shapes of tensors, hooks, and every other attribute
of every module. Plain attributes that were changed since, as the rate of a dropout, are noted as settings.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fxgraft.errors import ConfigError, FxgraftError, RecipeError
from fxgraft.graph.grafting.state import foreign_forward, state_of
from fxgraft.graph.grafting.unit import Unit
from fxgraft.graph.names import STATE, join
from fxgraft.graph.tracing.preserve import preserved_random_state
from fxgraft.models import build_model, imported

LIBRARIES = ("timm", "torchvision", "transformers", "python")
_REFUSED = (
    "pretrained",
    "checkpoint_path",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "cache_dir",
    "weights",
)
"""Arguments that fetch or read weights, which a recipe has itself."""

_ARGUMENTS = {"pretrained_cfg", "default_cfg", "_model_args", "pretrained_model_args"}
"""What timm keeps on a model of the arguments that made it."""

_MARKS = {"_is_hf_initialized"}
"""What transformers notes on modules while it fills their weights, which needs memory."""

_SHOWN = 3
_INTERNAL = frozenset(vars(nn.Module())) | {STATE}
_HOOKS = tuple(name for name in sorted(_INTERNAL) if name.endswith("_hooks"))


@dataclasses.dataclass(frozen=True)
class Constructor:
    """How a model was made.

    Attributes:
        library: "timm", "torchvision", "transformers", or "python" for a function of one's own.
        name: the name of the model in its library, of the class in transformers, or "package.module:function".
        options: keyword arguments.
        config: timm's ``pretrained_cfg``, or the configuration of transformers.
        settings: plain attributes that were changed afterwards, by the module's name.
    """

    library: str
    name: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] | None = None
    settings: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
        called = {
            "timm": f"timm.create_model({self.name!r}",
            "torchvision": f"torchvision.models.get_model({self.name!r}",
            "transformers": f"transformers.{self.name}(config",
        }.get(self.library, f"{self.name}(")
        return f"{called}{', ' if options and not called.endswith('(') else ''}{options})"

    def as_data(self) -> dict[str, Any]:
        """Return what JSON can hold of it."""
        return dataclasses.asdict(self)

    @classmethod
    def of_data(cls, data: Any) -> Constructor:
        """Read what `as_data` returned.

        Raises:
            ValueError: it is something else.
        """
        if not isinstance(data, dict) or set(data) != {field.name for field in dataclasses.fields(cls)}:
            raise ValueError("its constructor is not whole")
        made = cls(**data)
        whole = (
            made.library in LIBRARIES
            and isinstance(made.name, str)
            and isinstance(made.options, dict)
            and isinstance(made.config, (dict, types.NoneType))
            and isinstance(made.settings, dict)
            and all(
                isinstance(own, dict)
                and all(not name.startswith("_") and _is_plain(value) for name, value in own.items())
                for own in made.settings.values()
            )
        )
        if not whole:
            raise ValueError("its constructor has an entry of the wrong kind")
        return made


class _Difference(NamedTuple):
    """One thing in which two models differ: its kind, where it is, and in words."""

    kind: Literal["structure", "class", "attribute", "configuration"]
    words: str

    def __str__(self) -> str:
        return self.words


def constructor_of(model: nn.Module) -> Constructor | str:
    """Find out how a model was made, and prove it by building it again; if that fails, say why.

    Args:
        model: bare or patched; in the second case the model without its grafts is meant.
    """
    reason = "neither timm, torchvision nor transformers made it"
    with preserved_random_state(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for guess in _guesses(model):
            tried = _tried(guess, model)
            if isinstance(tried, Constructor):
                return tried
            reason = tried
    return reason


def _tried(guess: Constructor, model: nn.Module) -> Constructor | str:
    try:
        return proved(guess, model)
    except FxgraftError as error:
        return str(error).splitlines()[0]
    except (
        Exception
    ) as error:  # the wrong constructor, called with another one's arguments, may raise anything
        return f"{guess} fails: {error}"


def given_constructor(given: Mapping[str, Any], model: nn.Module) -> Constructor:
    """Check what a user says of how a model was made: it has to make the same one.

    Args:
        given: "library", "name" and perhaps "options".
        model: bare or patched.

    Raises:
        ConfigError: it isn't a constructor, cannot be called, or makes another model; lists differences.
    """
    form = 'Pass for example build={"library": "timm", "name": "resnet50", "options": {"num_classes": 7}}.'
    if (
        not isinstance(given, Mapping)
        or not {"library", "name"} <= set(given) <= {"library", "name", "options"}
        or given["library"] not in LIBRARIES
    ):
        raise ConfigError(
            f"build says how the model was made, and {given!r} does not.\n"
            f'It has "library" ({", ".join(LIBRARIES)}), "name" and perhaps "options".\n{form}'
        )
    config = _plain_config(getattr(model, "pretrained_cfg", None)) if given["library"] == "timm" else None
    if given["library"] == "transformers":
        config = _config_data(getattr(model, "config", None))
    made = Constructor(given["library"], given["name"], dict(given.get("options", {})), config)
    if made.library == "python" and made.name.startswith("__main__:"):
        raise ConfigError(
            f"{made.name!r} is in the script that runs now, where another process would not find it.\n"
            'Move the function into a module, and pass "my_models:build".'
        )
    try:
        with preserved_random_state(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return proved(made, model)
    except (ConfigError, ImportError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{made} does not make this model: {error}\n"
            "Whoever loads the file would get another one.\nCorrect build=, or leave it out."
        ) from error


def proved(guess: Constructor, model: nn.Module) -> Constructor:
    """Call a constructor, and return it with the settings that make its result equal to a model.

    Raises:
        ConfigError: it is another model; lists differences.
    """
    try:
        guess = Constructor.of_data(json.loads(json.dumps(guess.as_data())))
    except TypeError as error:
        raise ConfigError(f"JSON cannot hold its arguments: {error}.") from error
    settings, others = _differences(model, _without_memory(functools.partial(make, guess)))
    if others:
        raise ConfigError(f"{guess} differs from it in {few([str(other) for other in others])}.")
    unsaved = dict(_unsaved(model))
    if unsaved:  # the constructor computes these values, so it has to run with memory
        made = dict(_unsaved(make(guess)))
        others = sorted(path for path, value in unsaved.items() if not _same_values(value, made.get(path)))
        if others:
            raise ConfigError(f"{guess} differs from it in the numbers of {', '.join(others[:_SHOWN])}.")
    return dataclasses.replace(guess, settings=settings)


def few(differences: list[str]) -> str:
    """Write the first differences, and how many more there are."""
    left = len(differences) - _SHOWN
    return ", ".join(differences[:_SHOWN]) + (f", and {left} more" if left > 0 else "")


def differences_from(made: Constructor, model: nn.Module) -> list[str]:
    """List in which classes and attributes a model differs from what a constructor makes; weights don't count.

    Hooks and configurations, which have a history of their own, are left out, and where the constructor cannot be
    called here, nothing is known.

    Args:
        made: of a library, or of a function that is trusted.
        model: bare.
    """
    try:
        with preserved_random_state(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settings, others = _differences(model, _without_memory(functools.partial(make, made)))
    except Exception:  # a constructor may raise anything
        return []
    named = [f"the attribute {join(path, name)!r}" for path, own in settings.items() for name in own]
    return named + [str(other) for other in others if other.kind in ("class", "attribute")]


def make(made: Constructor) -> nn.Module:
    """Call a constructor, and apply the settings.

    Raises:
        ConfigError: it names something that cannot be, or what is loaded from elsewhere.
        ImportError: its library or module is not installed.
    """
    refused = [name for name in _REFUSED if name in made.options and made.library != "python"]
    if refused:
        raise ConfigError(f"{refused[0]!r} is about weights, which a recipe has itself.")
    options = _with_tuples(made.options)
    if made.library == "timm":
        import timm

        if not timm.is_model(made.name.partition(".")[0]):
            raise ConfigError(f"timm {timm.__version__} has no model {made.name!r}.")
        config = None if made.config is None else _with_tuples(made.config)
        model = timm.create_model(made.name, pretrained=False, pretrained_cfg=config, **options)
    elif made.library == "torchvision":
        model = build_model(f"torchvision/{made.name}", **options)
    elif made.library == "transformers":
        model = _transformers(made, options)
    else:
        model = imported(made.name)(**options)
        if not isinstance(model, nn.Module):
            raise ConfigError(f"{made.name!r} returned a {type(model).__name__}, and not a torch.nn.Module.")
    modules = dict(model.named_modules())
    for path, settings in made.settings.items():
        own = vars(modules[path]) if path in modules else {}
        for name, value in settings.items():
            if name not in own or name.startswith("_") or not _is_plain(own[name]):
                raise ConfigError(f"{made} makes no module {path!r} with an attribute {name!r}.")
            own[name] = tuple(value) if isinstance(value, list) else value
    return model


def _transformers(made: Constructor, options: dict[str, Any]) -> nn.Module:
    import transformers

    cls = getattr(transformers, made.name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)) or made.config is None:
        raise ConfigError(f"transformers {transformers.__version__} has no model {made.name!r}.")
    config: Any = cls.config_class
    return cls(config.from_dict(made.config), **options)


def load_constructed(made: Constructor, trust: bool, file: Path) -> nn.Module:
    """Make the model of a recipe.

    Args:
        made: what the recipe says.
        trust: import a function that the recipe names.
        file: the file of the recipe, for messages.

    Raises:
        RecipeError: what has to be called is not installed, or code that was not trusted, or it fails.
    """
    which = f"The model of {str(file)!r} was made by {made}"
    if made.library == "python" and not trust:
        raise RecipeError(
            f"{which}, and a file does not decide which code runs here.\n"
            "To import it is to run it.\n"
            f"Pass trust=True if you trust the file, or the model itself: model={made}."
        )
    try:
        return make(made)
    except Exception as error:  # a constructor may raise anything
        if isinstance(error, ImportError) or isinstance(error.__cause__, ImportError):
            raise RecipeError(
                f"{which}, which cannot be imported: {str(error).splitlines()[0]}\n"
                "It is not installed here, or not where Python looks for it.\n"
                "Install it, or build the model otherwise and pass model=."
            ) from error
        raise RecipeError(
            f"{which}, which fails here: {error}\n"
            "Its library is of another version, perhaps, or the recipe was changed.\n"
            "Build the model as it was built then, and pass model=."
        ) from error


def _without_memory(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model on the device "meta", or as it is where its constructor computes with values."""
    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, NotImplementedError):
        return build()


# --- guesses


def _guesses(model: nn.Module) -> Iterator[Constructor]:
    home = type(model).__module__ if state_of(model) is None else state_of(model).base.__module__  # type: ignore[union-attr]
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict) and config.get("architecture"):
        yield from _of_timm(model, config)
    elif home.partition(".")[0] == "torchvision":
        yield from _of_torchvision(model, home)
    elif home.partition(".")[0] == "transformers":
        state = state_of(model)
        cls = type(model) if state is None else state.base
        yield Constructor("transformers", cls.__name__, {}, _config_data(getattr(model, "config", None)))


def _of_timm(model: nn.Module, config: dict[str, Any]) -> Iterator[Constructor]:
    tag = config.get("tag")
    name = f"{config['architecture']}.{tag}" if tag else config["architecture"]
    options = dict(vars(model).get("_model_args", {}))  # newer releases of timm note them
    classifier = config.get("classifier")
    head = dict(model.named_modules()).get(
        classifier if isinstance(classifier, str) else (classifier or ("",))[0]
    )
    if isinstance(head, (nn.Linear, nn.Conv2d)):  # the attribute may have been set since
        options["num_classes"] = head.weight.shape[0]
    yield Constructor("timm", name, options, _plain_config(config))


def _of_torchvision(model: nn.Module, home: str) -> Iterator[Constructor]:
    from torchvision.models import get_model_builder, list_models

    own = {key: tuple(value.shape) for key, value in _bare_tensors(model)}
    for name in list_models():
        if get_model_builder(name).__module__ != home:
            continue
        guess = Constructor("torchvision", name)
        built = {
            key: tuple(value.shape)
            for key, value in _bare_tensors(_without_memory(functools.partial(make, guess)))
        }
        if own.keys() != built.keys():
            continue
        # A classifier of another size differs in the number of its rows.
        rows = {own[key][0] for key in own if own[key] != built[key] and own[key][1:] == built[key][1:]}
        if all(own[key] == built[key] for key in own):
            yield guess
        elif len(rows) == 1:
            yield Constructor("torchvision", name, {"num_classes": rows.pop()})


def _plain_config(config: Any) -> dict[str, Any] | None:
    return (
        {key: value for key, value in config.items() if _is_data(value)} if isinstance(config, dict) else None
    )


def _config_data(config: Any) -> dict[str, Any] | None:
    """Return a configuration of transformers as data; None for something else."""
    return json.loads(config.to_json_string(use_diff=False)) if _is_configuration(config) else None


def _is_configuration(value: Any) -> bool:
    return hasattr(value, "to_json_string")  # one of transformers, with entries of its own history


# --- comparison


def _bare_children(module: nn.Module) -> Iterator[tuple[str, nn.Module | None]]:
    return ((name, child) for name, child in module._modules.items() if not isinstance(child, Unit))


def _bare_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name all modules but those of grafts; a shared one by each of its names."""
    modules, waiting = {}, [("", model)]
    while waiting:
        path, module = waiting.pop()
        modules[path] = module
        waiting += [(join(path, name), child) for name, child in _bare_children(module) if child is not None]
    return modules


def _bare_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in _bare_modules(model).items():
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None:
                yield join(path, name), value


def _unsaved(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name the tensors that a state dict leaves out: buffers that aren't saved, and those in plain attributes."""
    for path, module in _bare_modules(model).items():
        buffers = {name: module._buffers[name] for name in module._non_persistent_buffers_set}
        for name, value in {**vars(module), **buffers}.items():
            if isinstance(value, Tensor):
                yield join(path, name), value


def _same_values(a: Tensor, b: Tensor | None) -> bool:
    """Say whether two tensors hold the same numbers; the device and the dtype were the user's to choose."""
    if b is None or a.shape != b.shape:
        return False
    return torch.equal(a.detach().cpu().double(), b.detach().cpu().double()) or torch.equal(
        a.detach().cpu(), b.detach().cpu().to(a.dtype)
    )


def _differences(model: nn.Module, other: nn.Module) -> tuple[dict[str, dict[str, Any]], list[_Difference]]:
    """Compare the bare part of a model with another one.

    Returns:
        Plain attributes in which they differ, as the model has them, by the name of the module; and all else.
    """
    mine, theirs = _bare_modules(model), _bare_modules(other)
    if mine.keys() != theirs.keys():
        return {}, [_structure(f"the module {path!r}") for path in sorted(mine.keys() ^ theirs.keys())]
    paths = [{id(module): path for path, module in reversed(modules.items())} for modules in (mine, theirs)]
    settings: dict[str, dict[str, Any]] = {}
    tensors = [dict(_bare_tensors(network)) for network in (model, other)]
    shared = [*_differently_shared(mine, theirs), *_differently_shared(*tensors)]
    apart = [_structure(f"the sharing of {path!r}") for path in shared]
    for path, module in mine.items():
        twin, state = theirs[path], state_of(module)
        if (type(module) if state is None else state.base) is not type(twin):
            apart.append(_Difference("class", f"the class of {path!r}"))
            continue
        for kind in ("_parameters", "_buffers"):
            own, its = vars(module)[kind], vars(twin)[kind]
            names = {n for n in own.keys() | its.keys() if _shape(own.get(n, ...)) != _shape(its.get(n, ...))}
            apart += [_structure(f"the tensor {join(path, name)!r}") for name in sorted(names)]
        if module._non_persistent_buffers_set != twin._non_persistent_buffers_set:
            apart.append(_structure(f"which buffers of {path!r} are saved"))
        if [name for name, _ in _bare_children(module)] != [name for name, _ in _bare_children(twin)]:
            apart.append(_structure(f"the order of what is in {path!r}"))
        hooks = [kind for kind in _HOOKS if not _alike(_hooks(module, kind), _hooks(twin, kind), {}, paths)]
        apart += [_structure(f"{kind[1:]} on {path!r}") for kind in hooks]
        own = {name: value for name, value in vars(module).items() if name not in _INTERNAL}
        its = {name: value for name, value in vars(twin).items() if name not in _INTERNAL}
        if state is not None and not foreign_forward(module):
            own.pop("forward", None)
        for name in (own.keys() | its.keys()) - _MARKS - (_ARGUMENTS if not path else set()):
            both = name in own and name in its
            if both and _alike(own[name], its[name], {}, paths):
                continue
            noted = name not in its and name.startswith("_") and _is_plain(own[name])
            if noted and name not in _names_in(type(twin)):
                continue  # set by a trainer, such as accelerate; the class doesn't read it
            if both and not name.startswith("_") and _is_plain(own[name]) and _is_plain(its[name]):
                settings.setdefault(path, {})[name] = own[name]
            else:
                kept = _is_configuration(own.get(name, its.get(name)))
                kind = "configuration" if kept else "attribute"
                apart.append(_Difference(kind, f"the attribute {join(path, name)!r}"))
    return settings, apart


_structure = functools.partial(_Difference, "structure")


@functools.cache
def _names_in(cls: type) -> frozenset[str]:
    """Collect the names and words in the code of a class and its bases."""
    words: set[str] = set()
    waiting: list[Any] = [value for base in cls.__mro__ for value in vars(base).values()]
    while waiting:
        value = waiting.pop()
        function = getattr(value, "fget", None) or getattr(value, "__func__", None) or value
        code = getattr(function, "__code__", function)
        if isinstance(code, types.CodeType):
            words |= {*code.co_names, *(const for const in code.co_consts if isinstance(const, str))}
            waiting += code.co_consts
    return frozenset(words)


def _differently_shared(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterable[str]:
    firsts = []
    for named in (mine, theirs):
        first: dict[int, str] = {}
        for path in sorted(named):
            first.setdefault(id(named[path]), path)
        firsts.append({path: first[id(named[path])] for path in named})
    return [path for path in firsts[0] if firsts[1].get(path, firsts[0][path]) != firsts[0][path]]


def _hooks(module: nn.Module, kind: str) -> list[Any]:
    return list((vars(module)[kind] or {}).values())


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else value


def _alike(a: Any, b: Any, seen: dict[int, Any], names: list[dict[int, str]]) -> bool:
    """Say whether two attributes have equal contents.

    Args:
        a: one of them, of the model.
        b: the other.
        seen: what was compared already, by identity.
        names: names of the modules of both models, by identity: a module is the one of the same name.
    """
    if a is b or seen.get(id(a)) is b:
        return True
    if type(a) is not type(b):
        return (
            isinstance(a, nn.Module)
            and isinstance(b, nn.Module)
            and names[0].get(id(a)) == names[1].get(id(b))
        )
    seen[id(a)] = b
    if isinstance(a, Tensor):
        return a.shape == b.shape
    if isinstance(a, nn.Module):  # compared by itself, as a part of the model
        return names[0].get(id(a)) == names[1].get(id(b))
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(_alike(a[key], b[key], seen, names) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_alike(x, y, seen, names) for x, y in zip(a, b, strict=True))
    if isinstance(a, functools.partial):
        return _alike((a.func, a.args, a.keywords), (b.func, b.args, b.keywords), seen, names)
    if isinstance(a, types.MethodType):
        return a.__func__ is b.__func__ and _alike(a.__self__, b.__self__, seen, names)
    if isinstance(a, types.FunctionType):
        held = [
            (f.__defaults__, f.__kwdefaults__, [c.cell_contents for c in f.__closure__ or ()]) for f in (a, b)
        ]
        return a.__code__ is b.__code__ and _alike(held[0], held[1], seen, names)
    if _is_configuration(a):
        return _config_data(a) == _config_data(b)
    if type(a).__eq__ is object.__eq__ and hasattr(a, "__dict__"):
        return _alike(vars(a), vars(b), seen, names)
    return bool(a == b)


def _is_plain(value: Any) -> bool:
    """Say whether a value can be a setting: a number, a text, None, or a list of these."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _is_data(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_data(item) for key, item in value.items())
    return all(map(_is_data, value)) if isinstance(value, (tuple, list)) else _is_plain(value)


def _with_tuples(value: Any) -> Any:
    """Return what JSON gave back with tuples for its lists, as constructors have them."""
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value
