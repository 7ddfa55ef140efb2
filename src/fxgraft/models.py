"""Build a backbone from one name, of timm, of torchvision or of a function, and load its weights from a file.

``resnet50`` and ``timm/resnet50`` are timm's, ``torchvision/resnet50`` is torchvision's. Names of the Hugging
Face hub that timm reads (``hf-hub:owner/model``) go to timm untouched. ``my_package.my_module:build`` is a function of
one's own. Nothing is downloaded unless ``pretrained=True``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fxgraft.arguments import path_at
from fxgraft.errors import ConfigError, FxgraftError, RecipeError, candidates
from fxgraft.io.reachable import offline_where_unreachable

Model = str | Callable[..., nn.Module]

LIBRARIES = ("timm", "torchvision")
_TIMM_SCHEMES = ("hf-hub:", "hf_hub:", "local-dir:")
# Their constructors warn for as long as the caller has not said how to initialise.
_WANT_INIT_WEIGHTS = ("googlenet", "inception_v3")


def build_model(
    name: Model,
    num_classes: int | None = None,
    *,
    pretrained: bool = False,
    input_size: int | None = None,
    **options: Any,
) -> nn.Module:
    """Build the named backbone.

    Args:
        name: a model name, optionally led by ``timm/`` or ``torchvision/``; without a prefix it is timm's. Or a
            function, or ``"package.module:function"``, which is called with ``num_classes=`` and the options.
        num_classes: outputs of the classifier; None keeps the library's own number.
        pretrained: load the library's default weights (this downloads them).
        input_size: side of the square images to come. Only models tied to one size (most vision transformers)
            are built differently for it.
        **options: handed to the model's constructor as they are.

    Raises:
        ConfigError: no such library, no such model (with close matches), options that the model refuses, or a function
            that cannot be imported or returns no module.
    """
    if not isinstance(name, str) or is_own(name):
        if pretrained:
            raise ConfigError(
                f"pretrained=True asks for a library's weights, and {name!r} is a function of one's own.\n"
                "Let the function load its weights, or pass a file: weights=FILE."
            )
        return _build_own(name, num_classes, options)
    library, model = split_name(name)
    if num_classes is not None and num_classes < 0:
        raise ConfigError(f"num_classes must be 0 or more, got {num_classes}.")
    build = _build_timm if library == "timm" else _build_torchvision
    remote = pretrained or name.startswith(_TIMM_SCHEMES)
    try:
        with offline_where_unreachable() if remote else nullcontext():
            return build(model, num_classes, pretrained, input_size, options)
    except ConfigError:
        raise
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        given = {**({} if num_classes is None else {"num_classes": num_classes}), **options}
        raise ConfigError(
            f"{library} could not build {model!r}: {error}"
            + (f"\nCorrect what it was given, or leave it out: {_arguments(given)}." if given else "")
        ) from error
    except Exception as error:  # a hub's client without a connection may raise anything
        if not remote:
            raise
        raise ConfigError(
            f"{library} could not fetch {model!r}: {type(error).__name__}: {str(error).partition(chr(10))[0]}\n"
            "Weights of a library and models of a hub come over the network, and are then kept on disk.\n"
            "Check the connection and the name; or leave pretrained weights out and load a file: --weights FILE on the "
            "command line, in Python weights=FILE of fxgraft.compare, or fxgraft.models.load_weights(model, FILE)."
        ) from error


def is_own(model: Model) -> bool:
    """Say whether a model is a function of one's own, or the path of one, and no library's name."""
    return not isinstance(model, str) or (":" in model and not model.startswith(_TIMM_SCHEMES))


def _build_own(model: Model, num_classes: int | None, options: dict[str, Any]) -> nn.Module:
    function = imported(model) if isinstance(model, str) else model
    arguments = options if num_classes is None else {"num_classes": num_classes, **options}
    try:
        built = function(**arguments)
    except FxgraftError:
        raise
    except TypeError as error:
        raise ConfigError(
            f"{model!r} could not be called with {_arguments(arguments) or 'no arguments'}: {error}\n"
            "Let it take these arguments, or leave them out."
        ) from error
    except Exception as error:  # code of the user's may raise anything
        raise ConfigError(
            f"{model!r} fails with {_arguments(arguments) or 'no arguments'}: {type(error).__name__}: {error}\n"
            "Mend the function; what it was called with is above."
        ) from error
    if not isinstance(built, nn.Module):
        raise ConfigError(
            f"{model!r} returned a {type(built).__name__}, and not a torch.nn.Module.\n"
            "Return the model alone, which is then patched and trained."
        )
    return built


def _arguments(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in given.items())


def imported(path: str) -> Any:
    """Return what ``package.module:name`` names; modules of the working directory are found too."""
    module, _, name = path.partition(":")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"Cannot import {path!r}: {error}\nWrite it as package.module:function.") from error
    except Exception as error:  # a module of the user's may raise anything
        raise ConfigError(
            f"Cannot import {path!r}: {type(error).__name__}: {error}\nMend the module {module!r}."
        ) from error
    finally:
        if added:
            sys.path.remove(here)


def split_name(name: str) -> tuple[str, str]:
    """Split ``library/model`` into its two parts; without a prefix the library is timm."""
    if name.startswith(_TIMM_SCHEMES):
        return "timm", name
    library, slash, model = name.partition("/")
    if not slash:
        return "timm", name
    if library not in LIBRARIES or not model:
        raise ConfigError(
            f"{name!r} names no model of timm or torchvision. "
            "Write 'resnet50', 'timm/resnet50' or 'torchvision/resnet50'."
        )
    return library, model


def _build_timm(
    model: str, num_classes: int | None, pretrained: bool, input_size: int | None, options: dict[str, Any]
) -> nn.Module:
    import timm

    if not model.startswith(_TIMM_SCHEMES):
        _check_timm_name(model)
        config = timm.get_pretrained_cfg(model.partition(".")[0])
        if input_size is not None and config is not None and config.fixed_input_size:
            options = {"img_size": input_size, **options}
    if num_classes is not None:
        options = {"num_classes": num_classes, **options}
    return timm.create_model(model, pretrained=pretrained, **options)


def _check_timm_name(model: str) -> None:
    import timm
    from torchvision.models import list_models as torchvision_models

    architecture, _, tag = model.partition(".")
    if not timm.is_model(architecture):
        hint = f" torchvision has it: 'torchvision/{model}'." if model in torchvision_models() else ""
        raise ConfigError(
            f"timm has no model {model!r}.{hint or ' ' + candidates(model, timm.list_models())}"
        )
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise ConfigError(f"timm's {architecture!r} has no weights tagged {tag!r}. {candidates(tag, tags)}")


def _build_torchvision(
    model: str, num_classes: int | None, pretrained: bool, input_size: int | None, options: dict[str, Any]
) -> nn.Module:
    from torchvision import models

    known = models.list_models()
    if model not in known:
        raise ConfigError(f"torchvision has no model {model!r}. {candidates(model, known)}")
    options = dict(options)
    segmentation = model in models.list_models(module=models.segmentation)
    detection = model in models.list_models(module=models.detection)
    if not pretrained and (segmentation or detection):
        # Left alone, these download the weights of their backbone even when none were asked for the whole.
        options.setdefault("weights_backbone", None)
    if not pretrained and model in _WANT_INIT_WEIGHTS:
        options.setdefault("init_weights", True)
    if input_size is not None and model.startswith("vit_"):
        options.setdefault("image_size", input_size)
    if input_size is not None and model.startswith("maxvit"):
        options.setdefault("input_size", (input_size, input_size))
    if num_classes is None:
        return models.get_model(model, weights="DEFAULT" if pretrained else None, **options)
    options.setdefault("num_classes", num_classes)
    if not pretrained:
        return models.get_model(model, weights=None, **options)
    if segmentation or detection:
        raise ConfigError(
            f"torchvision's pretrained {model!r} keeps the classes it was trained with.\n"
            "Leave num_classes out and replace its heads yourself."
        )
    return _with_new_classifier(model, options)


def _with_new_classifier(model: str, options: dict[str, Any]) -> nn.Module:
    """Build a network of torchvision with its weights, and the classifier that one without weights would have.

    torchvision itself insists on the number of classes that the weights were trained with.
    """
    from torchvision import models

    same = {name: value for name, value in options.items() if name != "num_classes"}
    trained = models.get_model(model, weights="DEFAULT", **same)
    if model in _WANT_INIT_WEIGHTS:
        options["init_weights"] = True
    fresh = models.get_model(model, weights=None, **options)
    known, new = trained.state_dict(), fresh.state_dict()
    other = [name for name in known if name in new and known[name].shape != new[name].shape]
    for path in dict.fromkeys(name.rpartition(".")[0] for name in other):
        parent, _, name = path.rpartition(".")
        setattr(trained.get_submodule(parent), name, fresh.get_submodule(path))
    if hasattr(trained, "num_classes"):
        trained.num_classes = options["num_classes"]
    return trained


_WEIGHTS = "Pass a state dict that torch.save wrote, or safetensors."


def load_weights(model: nn.Module, path: str | Path, *, new_classifier: bool = False) -> None:
    """Load a ``state_dict`` from a file of safetensors, or one that ``torch.save`` wrote.

    Args:
        model: the model whose weights they are.
        path: the file; a "~" at its start is the user's home.
        new_classifier: leave a classifier of another number of classes as it is in the model.

    Raises:
        RecipeError: there is no such file, it cannot be read, or it does not fit; lists the tensors.
    """
    from timm.models import load_state_dict

    file = path_at(path)
    if not file.is_file():
        raise RecipeError(f"There is no file {str(file)!r} with weights.\n{_WEIGHTS}")
    try:
        weights = load_state_dict(str(file), device="cpu")
    except Exception as error:  # torch's and safetensors' own, of many classes
        problem = str(error).partition(chr(10))[0]  # torch goes on with advice that can't be followed here
        raise RecipeError(f"{file} holds no weights that can be read: {problem}\n{_WEIGHTS}") from error
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise RecipeError(f"{file} holds something other than tensors by name.\n{_WEIGHTS}")
    own = model.state_dict()
    classifiers = _classifiers(model) if new_classifier else ()
    head = {f"{name}.{kind}" for name in classifiers for kind in ("weight", "bias")}
    for name in head & set(weights) & set(own):
        if weights[name].shape != own[name].shape:
            del weights[name]
    lacking = sorted(set(own) - set(weights) - head)
    foreign = sorted(set(weights) - set(own))
    shapes = [name for name in weights if name in own and weights[name].shape != own[name].shape]
    if lacking or foreign or shapes:
        parts = [
            f"{what} {', '.join(names[:4])}{', …' if len(names) > 4 else ''}"
            for what, names in (("it lacks", lacking), ("it adds", foreign), ("of another shape are", shapes))
            if names
        ]
        raise RecipeError(
            f"{file} does not fit the model: {'; '.join(parts)}.\nPass the checkpoint of this model."
        )
    model.load_state_dict(weights, strict=False)


def _classifiers(model: nn.Module) -> list[str]:
    declared = getattr(model, "default_cfg", None) or {}
    named = declared.get("classifier", ()) if isinstance(declared, dict) else ()
    names: list[str] = [named] if isinstance(named, str) else list(named or ())
    return names or [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1:]
