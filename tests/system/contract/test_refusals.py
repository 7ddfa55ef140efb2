"""Where a method does not go: the errors are typed and say why, and the model is as it was."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import fxgraft
from models.backbones import BACKBONES
from system.contract.cases import METHODS, SMALL, Cell, cells, fresh, untouched
from system.contract.expectations import EXPECTED

# One backbone for each kind of reason.
FEW = (
    "timm/deit_tiny_distilled_patch16_224",
    "timm/swiftformer_xs",
    "timm/test_nfnet",
    "timm/test_vit",
    "timm/tnt_s_patch16_224",
    "timm/vgg11",
    "timm/volo_d1_224",
    "torchvision/squeezenet1_1",
)


def test_the_table_names_methods_and_backbones_that_exist() -> None:
    names = {backbone.name for backbone in BACKBONES}
    assert EXPECTED.keys() <= set(METHODS)
    assert {name for each in EXPECTED.values() for name in each.refusals} <= names
    assert names >= set(FEW)
    assert SMALL.name not in {name for each in EXPECTED.values() for name in each.refusals}


@pytest.mark.parametrize("cell", cells(lambda cell: cell.refusal is not None, FEW))
def test_backbones_that_do_not_have_what_it_takes(cell: Cell) -> None:
    model = fresh(cell.backbone)
    with (
        untouched(model),
        pytest.raises(
            (fxgraft.StructureError, fxgraft.SiteError, fxgraft.TraceError), match=cell.refusal.match
        ),
    ):
        cell.patch(model, cell.expected.options)


WRONG: dict[str, tuple[dict[str, Any], type[fxgraft.FxgraftError], str]] = {
    "option": ({"no_such_option": 1}, fxgraft.ConfigError, "has no option 'no_such_option'"),
    "name": ({"name": "two words"}, fxgraft.ConfigError, "must be an identifier"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("method", METHODS)
def test_wrong_calls(method: str, wrong: str) -> None:
    more, error, message = WRONG[wrong]
    model = fresh(SMALL)
    with untouched(model), pytest.raises(error, match=message):
        Cell(method, SMALL).patch(model, {**Cell(method, SMALL).options(), **more})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", ["nowhere", "no.such.place", 99])
def test_wrong_places(method: str, place: str | int) -> None:
    named = [f.name for f in dataclasses.fields(fxgraft.methods()[method]) if f.name in ("layer", "layers")]
    if not named:
        return  # it finds its places by itself
    model = fresh(SMALL)
    with untouched(model), pytest.raises(fxgraft.SiteError, match=r"(?i)there (is|are) "):
        Cell(method, SMALL).patch(model, {**Cell(method, SMALL).options(), named[0]: place})


@pytest.mark.parametrize("cell", cells(backbones=[SMALL.name]))
def test_a_patched_model_refuses(cell: Cell, tmp_path: Path) -> None:
    """A plan changes nothing; the same twice, without labels, or an unknown name are errors, and the model goes on."""
    method = fxgraft.methods()[cell.method]
    model = fresh(SMALL)
    with untouched(model, draws=method.adds_parameters):
        plan = fxgraft.patch(model, cell.method, dry_run=True, input_size=SMALL.input_size, **cell.options())
    assert plan.name == cell.method
    cell.patch(model)
    with untouched(model):
        with pytest.raises(fxgraft.ConfigError, match="on the model already"):
            cell.patch(model)
        with pytest.raises(fxgraft.ConfigError, match="with these settings"):
            cell.patch(model, name="again")
        with pytest.raises(fxgraft.UnknownGraftError, match="no graft 'other'"):
            fxgraft.unpatch(model, "other")
    if method.needs_labels:
        state = model.train().state_dict()
        with pytest.raises(fxgraft.TargetError, match=f"(?s){cell.method}.*none were given"):
            model(SMALL.inputs())
        assert list(model.state_dict()) == list(state)
    if not method.saves:
        with untouched(model), pytest.raises(fxgraft.RecipeError, match=f"{cell.method!r}.* cannot be saved"):
            fxgraft.save(model, tmp_path)
    assert [graft.name for graft in fxgraft.grafts(model)] == [cell.method]
