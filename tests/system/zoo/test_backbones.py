"""The list in `backbones.py` is complete and true to the installed libraries. Builds nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torchvision
from timm.models import model_entrypoint

from models.backbones import BACKBONES, EXCLUDED, Backbone, available

COVERED = {f"{backbone.library}/{backbone.family}" for backbone in BACKBONES}
MAKERS: dict[str, Callable[[str], Any]] = {
    "timm": model_entrypoint,
    "torchvision": lambda model: getattr(torchvision.models, model),
}


def installed() -> dict[str, str]:
    """Every family that the installed libraries have, each with the name of one of its models."""
    makers = [("timm", model_entrypoint(name), name) for name in timm.list_models()]
    makers += [
        ("torchvision", torchvision.models.get_model_builder(name), name)
        for name in torchvision.models.list_models(module=torchvision.models)
    ]
    families = {}
    for library, maker, name in makers:
        package, _, family = maker.__module__.rpartition(".")
        if package == f"{library}.models":  # not what other tests may have registered
            families.setdefault(f"{library}/{family}", name)
    return families


def test_every_installed_family_is_listed_or_excluded():
    unknown = {
        family: name for family, name in installed().items() if family not in COVERED | EXCLUDED.keys()
    }
    assert not unknown, (
        f"families without a backbone in tests/models/backbones.py, each with one of its models: {unknown}; "
        "add a small one to BACKBONES, or the reason against it to EXCLUDED"
    )


def test_exclusions_have_reasons_and_are_not_listed():
    assert not COVERED & EXCLUDED.keys()
    assert all(EXCLUDED.values())


def test_names_are_unique():
    names = [backbone.name for backbone in BACKBONES]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("backbone", available())
def test_family_is_the_file_of_the_model(backbone: Backbone):
    assert (
        MAKERS[backbone.library](backbone.model).__module__ == f"{backbone.library}.models.{backbone.family}"
    )


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_model_of_another_version_is_skipped_with_the_reason(library, monkeypatch):
    unknown = Backbone(f"{library}/from_the_future", "future", (3, 32, 32))
    monkeypatch.setattr("models.backbones.BACKBONES", (unknown,))
    (parameter,) = available()
    (mark,) = parameter.marks
    assert mark.name == "skip"
    assert f"{library} " in mark.kwargs["reason"]
    assert "has no from_the_future" in mark.kwargs["reason"]
