"""Networks beyond the image architectures of timm and torchvision: transformers' classifiers, clips, volumes.

    python -m benchmarks beyond
    python -m benchmarks beyond --filter "torchvision/*"

Each is built on the meta device with the options that its library has for it, and every method tried: a plan, a
training step and an evaluation of two inputs. What is in the file is kept, unless the filter names it.
"""

from __future__ import annotations

import fnmatch
import json
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tools.readme import markdown_table, own_methods
from torch import nn

import fxgraft
from benchmarks.coverage import CLASSES, Record, graft, meta_dirichlet
from fxgraft.environment import environment
from fxgraft.graph.tracing.observe import default_input_size
from fxgraft.io.atomic_write import write_text

PROTOCOL = (
    "each method with its example options (in a clip or volume patches of the diversification block that fit its last "
    "map), a training step and an evaluation of two inputs on the meta device"
)
Entry = tuple[Callable[[], nn.Module], tuple[int, ...] | None]
"""How to build a network, and the size of its input; None for its own."""

SMALL = {
    # Of the size that the library takes by default, a plan takes minutes; the structure is the same.
    "EfficientNetForImageClassification": {
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
        "image_size": 224,
        "hidden_dim": 1280,
    },
}
NO_IMAGES = {
    "ImageGPTForImageClassification": "takes indices of colours",
    "PerceiverForImageClassificationLearned": "does not run with its default configuration",
    "PerceiverForImageClassificationFourier": "is not built with its default configuration",
    "PerceiverForImageClassificationConvProcessing": "is not built with its default configuration",
    "ShieldGemma2ForImageClassification": "takes words beside images",
    "Siglip2ForImageClassification": "takes patches that were cut before",
    "DinatForImageClassification": "needs natten, which is built for one version of torch",
}
"""Classes of transformers that are left out, and why."""


def networks() -> dict[str, Entry]:
    """List what is tried, by name: "transformers/CLASS", "torchvision/NAME" and "monai/NAME"."""
    return {**_transformers(), **_clips(), **_volumes()}


def _transformers() -> dict[str, Entry]:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as KNOWN

    def build(name: str) -> nn.Module:
        kind = getattr(transformers, name)
        return kind(kind.config_class(num_labels=CLASSES, **SMALL.get(name, {})))  # type: ignore[no-any-return]

    groups = [(names,) if isinstance(names, str) else names for names in KNOWN.values()]
    names = [name for group in groups for name in group if name not in NO_IMAGES]
    return {f"transformers/{name}": (partial(build, name), None) for name in names}


def _clips() -> dict[str, Entry]:
    import torchvision.models as zoo

    build = partial(zoo.get_model, weights=None, num_classes=CLASSES)
    return {f"torchvision/{name}": (partial(build, name), None) for name in zoo.list_models(module=zoo.video)}


def _volumes() -> dict[str, Entry]:
    """Build MONAI's; the U-Net's sum of a convolution and an activation looks like features, so it says its classes."""
    try:
        from monai.networks import nets
    except ImportError:
        return {}
    classes = {"spatial_dims": 3, "in_channels": 1, "out_channels": CLASSES}
    plain = {"spatial_dims": 3, "n_input_channels": 1, "num_classes": CLASSES}
    logits = {"classification": True, "num_classes": CLASSES, "post_activation": None}
    found: dict[str, Callable[[], nn.Module]] = {
        "DenseNet121": partial(nets.DenseNet121, **classes),
        "resnet18": partial(nets.resnet18, **plain),
        "SEResNet50": partial(nets.SEResNet50, spatial_dims=3, in_channels=1, num_classes=CLASSES),
        "ViT": partial(nets.ViT, 1, (64, 64, 64), (16, 16, 16), **logits),
        "UNet": lambda: declared(
            nets.UNet(**classes, channels=(16, 32, 64), strides=(2, 2), num_res_units=2)
        ),
        "SwinUNETR": lambda: unchecked(nets.SwinUNETR(1, CLASSES, feature_size=12)),
    }
    return {f"monai/{name}": (build, (1, 64, 64, 64)) for name, build in found.items()}


def declared(model: nn.Module) -> nn.Module:
    """Have a model say how many classes it has."""
    model.num_classes = CLASSES  # type: ignore[assignment]
    return model


def unchecked(model: nn.Module) -> nn.Module:
    """Leave out a check of the input's size, which hands it to numpy: that cannot be traced."""
    model._check_input_size = lambda spatial_shape: None  # type: ignore[assignment]
    return model


def examine(build: Callable[[], nn.Module], size: tuple[int, ...] | None) -> Record:
    """Try every method on one network; returns "size", "bare" and "methods" as `benchmarks.coverage.examine` does."""
    warnings.simplefilter("ignore")
    try:
        with torch.device("meta"):
            model = build()
    except RuntimeError:  # MONAI's SwinUNETR computes its rates of drop path as tensors
        model = build().to("meta")
    size = size or default_input_size(model)
    record: Record = {"size": list(size), "bare": _steps(model, size), "methods": {}}
    for method in own_methods() if record["bare"] is None else ():
        tried = record["methods"][method] = graft(model, [method], size)
        for patch in ((1, 3, 3), 2) if len(size) > 3 else ():
            if "class maps of" in tried.get("refused", ""):
                tried = record["methods"][method] = graft(model, [method], size, {"patch": patch})
        if "refused" not in tried and "failed" not in tried:
            tried["steps"] = _steps(model, size)
            fxgraft.unpatch(model)
    return record


def _steps(model: nn.Module, size: tuple[int, ...]) -> str | None:
    x, y = torch.empty(2, *size, device="meta"), torch.zeros(2, dtype=torch.long, device="meta")
    try:
        with fxgraft.targets(y), torch.no_grad():
            out = model.eval()(x)
            logits = fxgraft.extend.take_logits(out)
        if logits.ndim > 2:
            y = torch.zeros(2, *logits.shape[2:], dtype=torch.long, device="meta")
        with fxgraft.targets(y):
            out = model.train()(x)
            fxgraft.loss(model, out, y).backward()
    except Exception as error:  # a crash is what this looks for
        return f"{type(error).__name__}: {error}"[:400]
    finally:
        model.zero_grad()
    return None


def run(path: Path, pattern: str, say: Callable[[str], Any]) -> dict[str, Record]:
    """Try what is not in the file, or what the pattern names; write the file as it grows, and a table beside it."""
    records: dict[str, Record] = {}
    if path.exists():
        records = json.loads(path.read_text(encoding="utf-8"))["networks"]
    undo = meta_dirichlet()
    try:
        for name, (build, size) in networks().items():
            if not fnmatch.fnmatch(name, pattern) or (pattern == "*" and name in records):
                continue
            records[name] = examine(build, size)
            say(f"{name}: {', '.join(f'{m} {outcome(t)}' for m, t in records[name]['methods'].items())}")
            head = {"protocol": PROTOCOL, "environment": environment("cpu"), "networks": records}
            write_text(path, json.dumps(head, indent=1) + "\n")
            write_text(path.with_suffix(".md"), table(records))
    finally:
        undo()
    return records


def outcome(tried: Record) -> str:
    """Say in a word what came of a method."""
    if "refused" in tried or "failed" in tried:
        return "refused" if "refused" in tried else "crashed"
    return "yes" if tried["steps"] is None else "fails"


def table(records: dict[str, Record]) -> str:
    """Write shares by library, a row for each network, and the text of every refusal."""
    methods = tuple(own_methods())
    libraries = sorted({name.partition("/")[0] for name in records})
    counts = {
        library: Counter(
            (method, outcome(tried) == "yes")
            for name, record in records.items()
            if name.startswith(f"{library}/")
            for method, tried in record["methods"].items()
        )
        for library in libraries
    }
    shares = [
        (library, *(f"{count[m, True]} of {count[m, True] + count[m, False]}" for m in methods))
        for library, count in counts.items()
    ]
    rows = [
        (
            name,
            "×".join(map(str, record["size"])),
            *(outcome(record["methods"][m]) if m in record["methods"] else "" for m in methods),
        )
        for name, record in sorted(records.items())
    ]
    reasons = [
        (
            name,
            method,
            "<br>".join((tried.get("refused") or tried.get("failed") or tried["steps"]).splitlines()),
        )
        for name, record in sorted(records.items())
        for method, tried in record["methods"].items()
        if outcome(tried) != "yes"
    ]
    left_out = [(f"transformers/{name}", why) for name, why in NO_IMAGES.items()]
    left_out += [(name, r["bare"]) for name, r in sorted(records.items()) if r["bare"] is not None]
    parts = (
        f"Networks beyond the image architectures of timm and torchvision, {len(records)} tried of {len(networks())}: "
        f"{PROTOCOL}.",
        markdown_table(("library", *methods), shares),
        markdown_table(("network", "input", *methods), rows),
        "What does not go, with the text as the user sees it:",
        markdown_table(("network", "method", "the text"), reasons),
        "Not counted:",
        markdown_table(("network", "because"), left_out),
    )
    return "\n\n".join(parts) + "\n"
