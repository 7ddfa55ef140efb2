"""The door for other people's methods: its documentation runs, and what authors get wrong is said."""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgraft
from fxgraft import extend
from fxgraft.patches import registry
from models.toys import LABELS, Gain, Net, Scale, images, net
from sweeping import some
from third_party_package import HERE, METHODS, install

SIZE = (3, 8, 8)


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    fxgraft.methods()
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))


def example() -> str:
    """The method in the documentation of `fxgraft.extend`."""
    lines = inspect.cleandoc(extend.__doc__ or "").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("    from"))
    end = max(i for i, line in enumerate(lines) if line.startswith("    "))
    code = [line for line in lines[start : end + 1] if line.startswith("    ") or not line]
    return textwrap.dedent("\n".join(code))


def test_the_documented_method_runs() -> None:
    namespace: dict[str, Any] = {}
    exec(
        compile(example().replace('"style_swap"', '"documented"'), "extend.py", "exec", dont_inherit=True),
        namespace,
    )
    model, bare, x = net(), net(), images()
    fxgraft.patch(model, "documented", layers=["stage1", "stage2"], p=1.0, input_size=SIZE)
    assert "swaps styles at stage1, stage2" in str(fxgraft.summary(model))
    torch.manual_seed(0)
    mixed = model(x)
    torch.manual_seed(0)
    assert not torch.equal(mixed, bare(x))
    bare.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x), bare.eval()(x))
    with pytest.raises(fxgraft.ConfigError, match="p must be a share"):
        fxgraft.patch(net(), "documented", p=2)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_from_outside_imports_three_modules(name: str) -> None:
    tree = ast.parse((HERE / f"{name}.py").read_text())
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner if node.module == "fxgraft" else {str(node.module)}
    ours = {each for each in found if each.partition(".")[0] not in sys.stdlib_module_names | {"torch"}}
    assert "fxgraft.extend" in ours <= {"fxgraft", "fxgraft.extend"}


def test_an_installed_package_brings_its_methods(tmp_path: Path) -> None:
    code = "import fxgraft; print([*fxgraft.methods()]); print(fxgraft.methods()['padain'].__module__)"
    path = str(install(tmp_path / "site"))
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    names, module = done.stdout.splitlines()
    assert {"padain", "manifold_mixup", "rsc"} <= set(ast.literal_eval(names))
    assert module == "fxgraft_third_party.padain"


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def method(returned: Any = None, unit: Any = None) -> type[extend.Patch]:
    """A method whose `place` returns something, or makes a unit of some class."""

    @dataclass(frozen=True, kw_only=True)
    class Wrong(extend.Patch):
        title = "Wrong"

        def place(self, backbone: extend.Backbone, make: extend.Make) -> Any:
            if unit is None:
                return returned
            (site,) = backbone.sites("stage1")
            return backbone.place(site, make("stage1", unit))

    return Wrong


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (method(returned=None), r"Wrong\.place returned nothing\.\nplace\(\) returns what backbone\.place"),
        (method(returned=[("stage1", Plain())]), r"returned a tuple among its placements(?s:.*)with yield"),
        (method(returned="stage1"), "returned a str"),
        (method(returned=Plain()), "returned a Plain"),
        (method(unit=Plain), r"make\('stage1', \.\.\.\) was to build a unit(?s:.*)class Plain\(Unit\)"),
    ],
)
def test_what_place_must_return_is_said(wrong: type[extend.Patch], message: str) -> None:
    fxgraft.register("wrong")(wrong)
    model = net()
    with pytest.raises(fxgraft.MethodError, match=message):
        fxgraft.patch(model, "wrong", input_size=SIZE)
    assert type(model) is Net


def test_one_key_is_one_units() -> None:
    class A(extend.Unit):
        def forward(self, x: Tensor) -> Tensor:
            return x

    class B(A):
        pass

    @dataclass(frozen=True, kw_only=True)
    class Twice(extend.Patch):
        def place(self, backbone: extend.Backbone, make: extend.Make) -> Any:
            return [backbone.after(make("key", kind), "key") for kind in (A, B)]

    fxgraft.register("twice")(Twice)
    with pytest.raises(fxgraft.MethodError, match=r"make\('key', B\) asks for the key of a A"):
        fxgraft.patch(net(), "twice", input_size=SIZE)


def test_units_come_from_make() -> None:
    """One that place() builds itself would be another one after the next plan, without what it has learned."""

    @dataclass(frozen=True, kw_only=True)
    class Itself(extend.Patch):
        def place(self, backbone: extend.Backbone, make: extend.Make) -> Any:
            yield backbone.place(backbone.sites("stage1")[0], Gain(3.0))

    fxgraft.register("itself")(Itself)
    model = net()
    with pytest.raises(fxgraft.MethodError, match=r"a Gain at 'stage1' that make\(\) did not build"):
        fxgraft.patch(model, "itself", input_size=SIZE)
    assert type(model) is Net


@pytest.mark.parametrize("option", ["name", "preset", "input_size"])
def test_options_do_not_have_the_names_of_the_calls_arguments(option: str) -> None:
    named = dataclasses.make_dataclass(
        "Named", [(option, str, "a")], bases=(extend.MapPatch,), frozen=True, kw_only=True
    )
    with pytest.raises(fxgraft.MethodError, match=f"Named has an option '{option}', which is an argument of"):
        fxgraft.register("named")(named)


def test_what_a_class_must_be_is_said() -> None:
    class NoDataclass(extend.Patch):
        strength: float = 1.0

        def place(self, backbone: Any, make: Any) -> Any:
            return []

    @dataclass(kw_only=True, unsafe_hash=True)
    class Loose:
        strength: float = 1.0

    @dataclass(frozen=True, kw_only=True)
    class NoPlace(extend.Patch):
        strength: float = 1.0

    with pytest.raises(
        fxgraft.MethodError,
        match=r'(?s)NoDataclass isn.t a dataclass.*register\("mine"\)\n@dataclass\(frozen',
    ):
        fxgraft.register("mine")(NoDataclass)
    with pytest.raises(fxgraft.MethodError, match=r"isn.t a subclass of fxgraft\.Patch"):
        fxgraft.register("mine")(Loose)  # type: ignore[type-var]
    with pytest.raises(
        fxgraft.MethodError, match=r"(?s)NoPlace does not implement place.*def place\(self, backbone, make\)"
    ):
        fxgraft.register("mine")(NoPlace)
    for bad in ("my method", "1st", ""):
        with pytest.raises(fxgraft.MethodError, match="must be an identifier"):
            fxgraft.register(bad)
    assert "mine" not in fxgraft.methods()


def test_a_choice_is_checked_without_a_word_of_the_author() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Choosing(extend.Patch):
        mode: Literal["a", "b"] = "a"

        def place(self, backbone: Any, make: Any) -> Any:
            return []

    fxgraft.register("choosing")(Choosing)
    for wrong in (lambda: fxgraft.patch(net(), "choosing", mode="c"), lambda: Choosing(mode="c")):  # type: ignore[arg-type]
        with pytest.raises(fxgraft.ConfigError, match="mode must be one of 'a', 'b', got 'c'"):
            wrong()


def mixup(model: nn.Module | None = None, **options: Any) -> Any:
    options = {"layers": ["stage1", "stage2"], "input_size": SIZE, **options}
    return fxgraft.patch(net() if model is None else model, "manifold_mixup", **options)


def test_manifold_mixup_mixes_the_losses_of_the_pass_it_mixed() -> None:
    model, x = mixup(), images()
    out = model(x, target=LABELS)
    mixture = fxgraft.grafts(model)[0].recall(out)
    loss = fxgraft.loss(model, out, LABELS)
    share, order = mixture.share, mixture.order
    expected = share * F.cross_entropy(out, LABELS) + (1 - share) * F.cross_entropy(out, LABELS[order])
    torch.testing.assert_close(loss, expected)
    other = model(x, target=LABELS)  # a later pass has a mixture of its own, and the earlier one keeps its
    torch.testing.assert_close(fxgraft.loss(model, out, LABELS), expected)
    assert not torch.equal(fxgraft.grafts(model)[0].recall(other).share, share)


def test_manifold_mixup_leaves_evaluation_alone() -> None:
    model, bare, x = mixup(), net(), images()
    fxgraft.loss(model, model(x), LABELS).backward()
    out = model.eval()(x)
    bare.load_state_dict(model.state_dict())
    assert torch.equal(out, bare.eval()(x))
    assert torch.equal(fxgraft.loss(model, out, LABELS), F.cross_entropy(out, LABELS))


def test_its_labels_reach_a_stacked_rsc() -> None:
    model = mixup(image=False, layers="stage1")
    fxgraft.patch(model, "rsc", layer="stage2", input_size=SIZE)
    seen: list[Tensor] = []
    unit = fxgraft.grafts(model)[1].units["stage2"]
    unit.register_forward_pre_hook(lambda *_: seen.append(unit.run.target))
    out = model(images(), target=LABELS)
    mixture = fxgraft.grafts(model)[0].recall(out)
    soft = F.one_hot(LABELS, out.shape[1]).float()
    torch.testing.assert_close(seen[0], mixture.share * soft + (1 - mixture.share) * soft[mixture.order])
    fxgraft.loss(model, out, LABELS).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", some(METHODS, 1))
def test_methods_from_outside_compile_in_one_graph(name: str) -> None:
    torch._dynamo.reset()
    model = timm.create_model("test_resnet", num_classes=4)
    fxgraft.patch(model, name, input_size=(3, 32, 32))
    fxgraft.patch(model, "rsc", input_size=(3, 32, 32))
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        loss = fxgraft.loss(model, compiled(x, target=y), y)
        loss.backward()
        assert loss.isfinite()
    expected = copy.deepcopy(model).eval()(x)
    torch.testing.assert_close(torch.compile(model.eval(), fullgraph=True, backend="aot_eager")(x), expected)


@pytest.mark.parametrize("name", METHODS)
def test_methods_from_outside_are_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = fxgraft.patch(net(), name, layers=["stage1"], input_size=SIZE)
    again = fxgraft.load(net(), fxgraft.save(model, tmp_path / "run"))
    assert fxgraft.grafts(again)[0].patch == fxgraft.grafts(model)[0].patch
    outs = []
    for each in (model, again):
        torch.manual_seed(3)
        outs.append(each(images(), target=LABELS))
    assert torch.equal(*outs)


def test_layer_and_layers_are_one_option() -> None:
    for cls in fxgraft.methods().values():
        if not issubclass(cls, extend.LayeredPatch):
            continue
        assert cls(layer="layer3") == cls(layers="layer3")  # type: ignore[call-arg]
        assert cls(layer=-1).layer == cls(layers=-1).layers == -1  # type: ignore[call-arg]
        with pytest.raises(fxgraft.ConfigError, match="the same option, and both are given"):
            cls(layer="a", layers="b")  # type: ignore[call-arg]
        patch = cls(layer="layer3")  # type: ignore[call-arg]
        assert dataclasses.replace(patch) == patch
        assert dataclasses.replace(patch, layers="layer4", layer=None) == cls(layers="layer4")  # type: ignore[call-arg]


def test_a_method_for_training_alone_places_nothing_in_evaluation() -> None:
    class Everywhere(extend.Patch):
        train_only = True

        def place(self, backbone: extend.Backbone, make: extend.Make) -> Any:
            (site,) = backbone.sites("stage1")
            return backbone.place(site, make("stage1", Scale, 2.0))

    fxgraft.register("everywhere")(Everywhere)
    with pytest.raises(fxgraft.MethodError, match=r"Everywhere says train_only(?s:.*)evaluation=False"):
        fxgraft.patch(net(), "everywhere", input_size=SIZE)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.zeros(()), r"Losing\.losses returned a tensor of shape \(\)"),
        (None, "losses returned nothing"),
        ({"a": 1.0}, "losses returned a float as 'a'"),
        ({"a": torch.zeros(3)}, r"returned a tensor of shape \(3,\) as 'a'"),
    ],
)
def test_what_losses_must_return_is_said(returned: Any, message: str) -> None:
    class Losing(extend.Patch):
        def place(self, backbone: extend.Backbone, make: extend.Make) -> Any:
            return []

        def losses(self, *args: Any) -> Any:
            return returned

    fxgraft.register("losing")(Losing)
    model = fxgraft.patch(net(), "losing", input_size=SIZE)
    out = torch.zeros(2, 5)
    with pytest.raises(fxgraft.MethodError, match=message):
        fxgraft.loss(model, out, torch.zeros(2, dtype=torch.long))


def test_what_criterion_must_return_is_said() -> None:
    class Judging(extend.Patch):
        def place(self, backbone: extend.Backbone, make: extend.Make) -> Any:
            return []

        def replaces_criterion(self) -> bool:
            return True

        def criterion(self, *args: Any) -> Any:
            return None

    fxgraft.register("judging")(Judging)
    model = fxgraft.patch(net(), "judging", input_size=SIZE)
    with pytest.raises(fxgraft.MethodError, match=r"Judging\.criterion returned nothing"):
        fxgraft.loss(model, torch.zeros(2, 5), torch.zeros(2, dtype=torch.long))


def test_a_switch_is_checked_without_a_word_of_the_author() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Switching(extend.Patch):
        on: bool = True

        def place(self, backbone: Any, make: Any) -> Any:
            return []

    fxgraft.register("switching")(Switching)
    with pytest.raises(fxgraft.ConfigError, match="on must be True or False, got 'no'"):
        fxgraft.patch(net(), "switching", on="no")


def test_the_summary_names_the_units_where_a_method_says_nothing() -> None:
    class Silent(extend.Patch):
        def place(self, backbone: extend.Backbone, make: extend.Make) -> Any:
            (site,) = backbone.sites("stage1")
            return backbone.place(site, make("stage1", Scale, 2.0))

    fxgraft.register("silent")(Silent)
    assert "silent = silent: stage1;" in str(fxgraft.summary(fxgraft.patch(net(), "silent", input_size=SIZE)))


@pytest.mark.parametrize("value", [{1: 0.5}, ((1, 2), (3, 4)), {"a": (1, 2)}])
def test_options_that_would_come_back_from_a_file_as_others(value: Any, tmp_path: Path) -> None:
    @extend.register("told")
    @dataclass(frozen=True, kw_only=True)
    class Told(extend.Patch):
        """Does nothing."""

        told: Any = None

        def place(self, backbone: extend.Backbone, make: extend.Make) -> list[extend.Placement]:
            return []

    file = fxgraft.save(
        fxgraft.patch(net(), "told", told=(1, "a", [2], {"b": [3]})), tmp_path / "run.safetensors"
    )
    assert fxgraft.grafts(fxgraft.load(file, net()))[0].patch == Told(told=(1, "a", [2], {"b": [3]}))
    before = file.read_bytes()
    with pytest.raises(fxgraft.RecipeError, match=r"told=.* of 'told' would come back from the file as"):
        fxgraft.save(fxgraft.patch(net(), "told", told=value), file)
    assert file.read_bytes() == before
