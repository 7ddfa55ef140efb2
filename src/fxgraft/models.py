"""Build a backbone from one name, from timm or from torchvision.

``resnet50`` and ``timm/resnet50`` are timm's, ``torchvision/resnet50`` is torchvision's. Names of the Hugging
Face hub that timm reads (``hf-hub:owner/model``) go to timm untouched. Nothing is downloaded unless
``pretrained=True``.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fxgraft.errors import ConfigError, candidates

LIBRARIES = ("timm", "torchvision")
_TIMM_SCHEMES = ("hf-hub:", "hf_hub:", "local-dir:")
# Their constructors warn for as long as the caller has not said how to initialise.
_WANT_INIT_WEIGHTS = ("googlenet", "inception_v3")


def build_model(
    name: str,
    num_classes: int | None = None,
    *,
    pretrained: bool = False,
    input_size: int | None = None,
    **options: Any,
) -> nn.Module:
    """Build the named backbone.

    Args:
        name: a model name, optionally led by ``timm/`` or ``torchvision/``; without a prefix it is timm's.
        num_classes: outputs of the classifier; None keeps the library's own number.
        pretrained: load the library's default weights (this downloads them).
        input_size: side of the square images to come. Only models tied to one size (most vision transformers)
            are built differently for it.
        **options: handed to the model's constructor as they are.

    Raises:
        ConfigError: no such library, no such model (with close matches), or options that the model refuses.
    """
    library, model = split_name(name)
    if num_classes is not None and num_classes < 0:
        raise ConfigError(f"num_classes must be 0 or more, got {num_classes}.")
    build = _build_timm if library == "timm" else _build_torchvision
    try:
        return build(model, num_classes, pretrained, input_size, options)
    except ConfigError:
        raise
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{library} could not build {model!r}: {error}") from error
    except Exception as error:  # whatever a hub's client raises where it does not get through
        if not (pretrained or name.startswith(_TIMM_SCHEMES)):
            raise
        raise ConfigError(
            f"{library} could not fetch {model!r}: {type(error).__name__}: {str(error).partition(chr(10))[0]}\n"
            "Weights of a library and models of a hub come over the network, and are then kept on disk.\n"
            "Check the connection and the name; or build it without pretrained weights, and load your own."
        ) from error


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
    if num_classes is not None:
        if pretrained:
            # torchvision insists on the number its weights were trained with; timm makes a fresh classifier.
            raise ConfigError(
                f"torchvision's pretrained {model!r} keeps the classifier it was trained with. "
                "Leave num_classes out and replace the classifier yourself, or take timm's model."
            )
        options.setdefault("num_classes", num_classes)
    return models.get_model(model, weights="DEFAULT" if pretrained else None, **options)
