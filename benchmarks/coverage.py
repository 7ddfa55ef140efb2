"""One architecture: does every method go on, train and evaluate, how long does the plan take, what do refusals say?

Nothing is computed: the network is on the meta device, where its operations give shapes alone.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import time
import warnings
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from tools.readme import own_methods
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxgraft
from fxgraft.graph.grafting.graft import Graft
from fxgraft.graph.grafting.graft_registry import GraftRegistry
from fxgraft.graph.tracing.observe import default_input_size, observe

CLASSES = 10
STACK = ("taps", "rsc", "crossnorm", "selfnorm", "diversification")
SMALL = (96, 128, 112)
"""Sides of images that the strides and windows of most networks divide."""

SIZES = {"torchvision/inception_v3": (3, 299, 299)}
"""Where a network does not say itself what images it wants."""

Record = dict[str, Any]


def architectures() -> list[str]:
    """List what is tried, as "timm/NAME" and "torchvision/NAME"; no quantised, video or detection models."""
    models = torchvision.models
    tv = models.list_models(module=models) + models.list_models(module=models.segmentation)
    return [f"timm/{name}" for name in timm.list_models()] + [f"torchvision/{name}" for name in tv]


def family(name: str) -> str:
    """Return the model file that an architecture is from."""
    library, _, model = name.partition("/")
    entry = timm.model_entrypoint(model) if library == "timm" else torchvision.models.get_model_builder(model)
    return f"{library}/{entry.__module__.rpartition('.')[2]}"


def build(name: str) -> nn.Module:
    """Build an architecture on the meta device, for `CLASSES` classes."""
    try:
        with torch.device("meta"):
            return _built(name)
    except NotImplementedError:  # torchvision's RegNets compute their widths as tensors
        return _built(name).to("meta")


def _built(name: str, **given: int) -> nn.Module:
    library, _, model = name.partition("/")
    if library == "timm":
        return timm.create_model(model, num_classes=CLASSES, **given)
    options = {"weights_backbone": None} if hasattr(torchvision.models.segmentation, model) else {}
    return torchvision.models.get_model(model, weights=None, num_classes=CLASSES, **options, **given)


def random_network(name: str) -> nn.Module:
    """Build an architecture with random weights, for `CLASSES` classes."""
    return _built(name)


def small_network(name: str) -> tuple[nn.Module, tuple[int, ...]] | None:
    """Build an architecture for small images, with random weights; None where it takes none.

    Returns:
        The network, and (C, H, W) of the images.
    """
    library = name.partition("/")[0]
    for side in SMALL:
        options = {"img_size": side} if library == "timm" else {"image_size": side}
        for given in (options, {}):
            try:
                with torch.device("meta"):
                    network = _built(name, **given)
                if given and default_input_size(network)[1] != side:
                    continue
                for training in (False, True):  # auxiliary classifiers run in training alone
                    observe(network, (3, side, side), training=training)
            except Exception:  # whatever it raises that is not built for such images
                continue
            return _built(name, **given), (3, side, side)
    return None


def structure(name: str) -> Record:
    """Say what an architecture is made of, so that two of one structure can stand for each other.

    Structures are the same when the classes, names and switches (booleans and words) of their modules are, a run of
    blocks that are alike counting as one of them: ResNet-50 and ResNet-101 are of one structure, as are the sizes of
    a ViT.

    Returns:
        "family"; "structure", a digest; "modules" and "parameters", how many there are. Or "family" and "unbuilt",
        the error.
    """
    warnings.simplefilter("ignore")
    try:
        model = build(name)
    except Exception as error:  # some want packages that are not here
        return {"family": family(name), "unbuilt": _shown(error)}
    return {
        "family": family(name),
        "structure": _digest(model),
        "modules": sum(1 for _ in model.modules()),
        "parameters": sum(each.numel() for each in model.parameters()),
    }


def _digest(module: nn.Module) -> str:
    children: list[object] = [(name, _digest(child)) for name, child in module.named_children()]
    if isinstance(module, (nn.Sequential, nn.ModuleList)):
        children = [digest for digest, _ in itertools.groupby(_digest(child) for child in module)]
    switches = sorted(
        (name, value)
        for name, value in vars(module).items()
        if (value is None or isinstance(value, (bool, str))) and name != "training" and name[0] != "_"
    )
    own = sorted(name for name, _ in module.named_parameters(recurse=False))
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    return hashlib.sha256(repr((kind, switches, own, children)).encode()).hexdigest()[:16]


def examine(name: str, known: Record | None = None) -> Record:
    """Try every method that comes with fxgraft on one architecture, and all that go together.

    Args:
        name: of the architecture.
        known: its record from when there were fewer methods: those that it lacks are tried.

    Returns:
        "family"; "build" in seconds; "bare", None or how it fails by itself; "methods" and "stack", each with "plan"
        in seconds and with "refused" (the text), "failed" (a crash), or "steps": None, or how a training step or
        an evaluation fails. "inexact" beside it says what makes a training pass differ where the method does nothing.
    """
    warnings.simplefilter("ignore")
    record: Record = {**known} if known else {"family": family(name)}
    began = time.process_time()
    model = build(name)
    size = SIZES.get(name) or default_input_size(model)
    if known is None:
        record["build"] = _since(began)
        record["bare"] = steps(model, size)
    record["methods"] = dict(record.get("methods", {}))
    for row in lacking(record):
        method, options = tried_methods()[row]
        tried = record["methods"][row] = graft(model, [method], size, options)
        if "refused" not in tried and "failed" not in tried:
            tried |= inexact(model)
            tried["steps"] = record["bare"] or steps(model, size)
            fxgraft.unpatch(model)
    if known is not None:
        return record
    goes_on = [m for m in STACK if not {"refused", "failed"} & record["methods"][m].keys()]
    stack = record["stack"] = {"of": goes_on, **graft(model, goes_on, size)}
    if "refused" not in stack and "failed" not in stack:
        stack["steps"] = record["bare"] or steps(model, size)
    return record


def tried_methods() -> dict[str, tuple[str, dict[str, Any]]]:
    """Return what is tried on every architecture: the methods and their options, EFDMix as one of its own."""
    own = {method: (method, dict[str, Any]()) for method in own_methods()}
    return {**own, "mixstyle:match=histogram": ("mixstyle", {"match": "histogram"})}


def lacking(record: Record) -> list[str]:
    """List the methods that a record says nothing of."""
    return [row for row in tried_methods() if row not in record["methods"]]


def inexact(model: nn.Module) -> Record:
    """Return what makes the methods on a model differ from the bare network where they do nothing; '' for nothing."""
    return {"inexact": "; ".join(filter(None, (g.patch.inexact(g) for g in fxgraft.grafts(model))))}


def graft(
    model: nn.Module, methods: list[str], size: tuple[int, ...], options: dict[str, Any] | None = None
) -> Record:
    """Put methods on, planned together; return how long that took, and what came of it.

    Args:
        model: the network.
        methods: by name.
        size: of its input.
        options: of the methods, beside those of their examples.
    """
    chosen = [own_methods()[method] for method in methods]
    grafts = [Graft(each.method, each(**each.example, **options or {}), input_size=size) for each in chosen]
    began = time.process_time()
    try:
        GraftRegistry().install(model, grafts)
    except fxgraft.FxgraftError as error:
        return {"plan": _since(began), "refused": _anywhere(f"{type(error).__name__}: {error}")}
    except Exception as error:  # a crash is what this looks for
        return {"plan": _since(began), "failed": _shown(error)}
    return {"plan": _since(began)}


def steps(model: nn.Module, size: tuple[int, ...]) -> str | None:
    """Make a training step and an evaluation of two images; return what goes wrong, or None."""
    x = torch.empty(2, *size, device="meta")
    dense = type(model).__module__.startswith("torchvision.models.segmentation")
    y = torch.zeros((2, *size[1:]) if dense else (2,), dtype=torch.long, device="meta")
    options = {"target": y} if fxgraft.grafts(model) else {}
    for training in (True, False):
        model.train(training)
        try:
            with torch.set_grad_enabled(training):
                out = model(x, **options)
            if training:
                _objective(model, out, y).backward()
        except Exception as error:  # as above
            return f"{'training' if training else 'evaluation'}: {_shown(error)}"
        finally:
            model.zero_grad()
    return None


def _objective(model: nn.Module, out: Any, y: Tensor) -> Tensor:
    if isinstance(out, Tensor):
        return fxgraft.loss(model, out, y)
    leaves = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
    return torch.stack([F.cross_entropy(leaf, y) for leaf in leaves]).sum()


def _shown(error: BaseException) -> str:
    return _anywhere(f"{type(error).__name__}: {error}")[:400]


def _anywhere(text: str) -> str:
    """Name installed files as they are named on every machine: from the package on."""
    return re.sub(r"\S*/site-packages/", "", text)


def _since(began: float) -> float:
    """Return CPU seconds: other work beside this one's does not count."""
    return round(time.process_time() - began, 3)


def category(refusal: str) -> str:
    """Return what refusals of one kind have in common: the first line, without names and numbers."""
    first = refusal.splitlines()[0]
    first = re.sub(r"'[^']*'( \(\w+\))?", "…", first)
    first = re.sub(r"\([\d, ]+\)|\b\d+\b", "…", first)
    return re.sub(r"(?<=\b(?:of|in) )[A-Z]\w*|\b[A-Z]\w*(?:[A-Z0-9]\w*)+\b(?<!Error)", "…", first)


def meta_dirichlet() -> Callable[[], None]:
    """Give Dirichlet draws shapes on the meta device, where torch has no kernel for them; return what undoes that."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_sample_dirichlet", lambda alpha, generator=None: torch.empty_like(alpha), "Meta")
    return library._destroy
