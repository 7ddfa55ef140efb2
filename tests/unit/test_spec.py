"""Grafts as text: the grammar, at random as well, files of grafts, and the text in `fxgraft.patch`."""

import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import fxgraft
from fxgraft.errors import ConfigError
from fxgraft.io.graft_file import read_graft_file
from fxgraft.spec import describe, parse_grafts, parse_patch_spec, split_grafts
from models.toys import assert_same, net, state_of_everything

SIZE = (3, 8, 8)


@pytest.mark.parametrize(
    ("text", "method", "options"),
    [
        ("rsc", "rsc", {}),
        (" rsc ", "rsc", {}),
        ("rsc:layer=layer4", "rsc", {"layer": "layer4"}),
        ("rsc:layer='layer4'", "rsc", {"layer": "layer4"}),
        ("rsc:layer=-1,spatial_drop=0.5", "rsc", {"layer": -1, "spatial_drop": 0.5}),
        ("rsc:spatial_drop=1e-1,start = 0.25", "rsc", {"spatial_drop": 0.1, "start": 0.25}),
        ("rsc:layout=None,flag=True", "rsc", {"layout": None, "flag": True}),
        ('m:layers=("layer3","layer4"),k=[1, 2]', "m", {"layers": ("layer3", "layer4"), "k": [1, 2]}),
        ("m:layer='a,b',k=1", "m", {"layer": "a,b", "k": 1}),
        ("m:layer=layer[34].*", "m", {"layer": "layer[34].*"}),
        ("m:layer=stages.3", "m", {"layer": "stages.3"}),
        ("m:lr=1/3", "m", {"lr": "1/3"}),
        ("m:x={'a': 1, 'b': 2}", "m", {"x": {"a": 1, "b": 2}}),
        ("m:a=true,b=FALSE,c=none,d='none'", "m", {"a": True, "b": False, "c": None, "d": "none"}),
        (
            "m:layers=[layer3, layer4.0],k=[-1,layer2]",
            "m",
            {"layers": ["layer3", "layer4.0"], "k": [-1, "layer2"]},
        ),
        ("m:layers=(layer3,)", "m", {"layers": ["layer3"]}),
    ],
)
def test_parses(text, method, options):
    spec = parse_patch_spec(text)
    assert (spec.method, spec.options) == (method, options)
    assert spec.text == text.strip()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "does not start with the name"),
        (":layer=1", "does not start with the name"),
        ("layer=layer4", "does not start with the name"),
        ("rsc:", "a colon and no options"),
        ("rsc:layer", "'layer' in the graft .* is not key=value"),
        ("rsc:layer=", "is not key=value"),
        ("rsc:=3", "is not key=value"),
        ("rsc:a=1,,b=2", "'' in the graft .* is not key=value"),
        ("rsc:a=1,", "is not key=value"),
        (
            "taps:layers=layer3,layer4",
            r"'layer4' in the graft .* is not key=value[\s\S]*layers=\[layer3,layer4\]",
        ),
        ("rsc:a b=1", "is not key=value"),
        ("rsc:a=1,a=2", "gives 'a' twice"),
        ("rsc:a=(1,2", r"leaves a '\(' open"),
        ("rsc:a='x", 'leaves a "\'" open'),
        ("rsc:a=1)", r"closes a '\)' that was never opened"),
        ("rsc:a=(1]", r"closes a '\]' that was never opened"),
    ],
)
def test_refuses(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_patch_spec(text)


def test_nothing_is_evaluated():
    spec = parse_patch_spec("rsc:layer=__import__('os').getcwd()")
    assert spec.options == {"layer": "__import__('os').getcwd()"}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("rsc", ["rsc"]),
        ("rsc + selfnorm", ["rsc", "selfnorm"]),
        ("rsc:a=1,b=[x, y]  +  m:c='d + e'", ["rsc:a=1,b=[x, y]", "m:c='d + e'"]),
        ("rsc:a=1e+3 + m:a=[1 + 2]", ["rsc:a=1e+3", "m:a=[1 + 2]"]),
        ("rsc +", ["rsc +"]),
    ],
)
def test_several(text: str, parts: list[str]) -> None:
    assert split_grafts(text) == parts


@pytest.mark.parametrize(
    "text", ["rsc + ", " + rsc", "rsc + + m", "rsc + m:a", "rsc:a=[1 + m", "rsc:a=1) + m"]
)
def test_refuses_several(text: str) -> None:
    with pytest.raises(ConfigError, match="Write it as METHOD:key=value"):
        parse_grafts(text)


# --- at random

SIGNS = st.lists(
    st.sampled_from(
        [*"abz019 .,:=+-*[](){}'_#é", '"', "\\", "\n", "\0", "true", " + ", "1e9", "a:b=", ",c="]
    ),
    max_size=20,
).map("".join)
WORDS = st.text(string.ascii_letters + string.digits + " .,:=+-*[](){}'\"\\_éß", max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(WORDS, inner, max_size=2)
    ),
    max_leaves=5,
)
KEYS = st.sampled_from(["layer", "layers", "p", "name", "input_size", "preset", "x_1"])
GRAFTS = st.lists(
    st.tuples(st.sampled_from(["rsc", "self_norm", "a-b"]), st.dictionaries(KEYS, VALUES, max_size=3)),
    min_size=1,
    max_size=3,
)


@given(SIGNS)
def test_any_text_is_read_or_refused_in_words(text: str) -> None:
    try:
        found = parse_grafts(text)
    except ConfigError:
        pass
    else:
        assert all(spec.method and all(key.isidentifier() for key in spec.options) for spec in found)


@example([("rsc", {"layers": {"\"\\'": None}})])
@example([("rsc", {"layers": {"'\"": None}, "scope": "]'"})])
@given(GRAFTS)
def test_what_is_written_is_read_again(grafts: list[tuple[str, dict[str, Any]]]) -> None:
    text = " + ".join(describe(*each) for each in grafts)
    assert [(spec.method, spec.options) for spec in parse_grafts(text)] == grafts
    types = [[type(value) for value in options.values()] for _, options in grafts]
    assert [[type(value) for value in spec.options.values()] for spec in parse_grafts(text)] == types


# --- files


def test_a_file_of_grafts(tmp_path: Path) -> None:
    file = tmp_path / "grafts.yaml"
    file.write_text(
        "- rsc:layer=layer4 + taps:layers=[a, b]\n- {method: selfnorm, layers: [c, d], name: late}\n"
    )
    specs = read_graft_file(file)
    assert [(spec.method, spec.options) for spec in specs] == [
        ("rsc", {"layer": "layer4"}),
        ("taps", {"layers": ["a", "b"]}),
        ("selfnorm", {"layers": ["c", "d"], "name": "late"}),
    ]
    assert [parse_patch_spec(spec.text).options for spec in specs] == [spec.options for spec in specs]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- {rsc: [", "cannot be read: "),
        ("", "isn't a list of grafts"),
        ("rsc", "isn't a list of grafts"),
        ("[]", "isn't a list of grafts"),
        ("- 3", "^3 in the graft file .* isn't a graft"),
        ("- {layer: layer4}", "isn't a graft"),
        ("- {method: rsc, 3: 4}", "isn't a graft"),
        ("- {method: rsc, dry_run: true}", "isn't a graft"),
        ("- rsc:layer=[a", r"leaves a '\[' open"),
        ("- !!python/object/apply:os.getcwd []", "cannot be read: could not determine a constructor"),
        ("\0", "cannot be read"),
    ],
)
def test_a_file_of_something_else(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "grafts.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_graft_file(file)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read: No such file.*\nWrite one graft a line"):
        read_graft_file(tmp_path / "grafts.yaml")


# --- in Python


def test_one_text_is_the_call_with_options() -> None:
    model, twin = net(), net()
    assert fxgraft.patch(model, "rsc:layer=stage2,start=0.25,name=late", input_size=SIZE) is model
    fxgraft.patch(twin, "rsc", layer="stage2", start=0.25, name="late", input_size=SIZE)
    assert [(g.name, g.patch, g.input_size) for g in fxgraft.grafts(model)] == [
        (g.name, g.patch, g.input_size) for g in fxgraft.grafts(twin)
    ]


def test_several_in_one_text() -> None:
    model = fxgraft.patch(net(), "rsc:layer=stage2 + selfnorm:name=norms + crossnorm", input_size=SIZE)
    assert [(g.name, g.input_size) for g in fxgraft.grafts(model)] == [
        ("rsc", SIZE), ("norms", SIZE), ("crossnorm", SIZE)
    ]  # fmt: skip
    fxgraft.unpatch(model, "norms")
    assert [g.name for g in fxgraft.grafts(model)] == ["rsc", "crossnorm"]
    plan = fxgraft.patch(model, "selfnorm:layer=stage1", dry_run=True, input_size=SIZE)
    assert plan.name == "selfnorm"


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("selfnorm + rsc:layer=nowhere", {}, "no site 'nowhere'"),
        ("selfnorm + rcs", {}, "no method 'rcs'"),
        ("selfnorm + rsc:laier=stage2", {}, "no option 'laier'"),
        ("selfnorm + selfnorm", {}, "on the model already with these settings"),
        ("rsc:layer=stage1 + rsc:layer=stage2", {}, "a graft named 'rsc' on the model already"),
        ("selfnorm + rsc:layer=[stage1", {}, r"leaves a '\[' open"),
        ("rsc:layer=stage1)", {}, r"closes a '\)' that was never opened"),
        ("selfnorm + rsc", {"layer": "stage1"}, r"and layer as well\.\n.*which one is meant"),
        ("selfnorm + rsc", {"name": "a"}, "and name as well"),
        ("selfnorm + rsc", {"preset": "pacs"}, "and preset as well"),
        ("rsc:layer=stage1", {"layer": "stage2"}, "and layer as well"),
        ("selfnorm + rsc", {"dry_run": True}, r"plans one graft.*has 2"),
    ],
)
def test_what_fails_changes_nothing(text: str, options: dict[str, Any], message: str) -> None:
    model = fxgraft.patch(net(), "taps", layers="stage1", input_size=SIZE)
    before = state_of_everything(model)
    with pytest.raises(fxgraft.FxgraftError, match=message):
        fxgraft.patch(model, text, input_size=SIZE, **options)
    assert_same(before, state_of_everything(model))
    assert [g.name for g in fxgraft.grafts(model)] == ["taps"]


@pytest.mark.parametrize("method", fxgraft.methods())
def test_methods_as_dictionaries(method: str) -> None:
    cls = fxgraft.methods()[method]
    patch = cls(**cls.example)
    assert cls.from_dict(patch.to_dict()) == patch
    assert patch.to_dict()["method"] == method
    assert parse_patch_spec(describe(method, {"a": 1})).options == {"a": 1}


def test_dictionaries_of_something_else() -> None:
    assert fxgraft.RSC.from_dict({"layers": ["a", "b"]}).to_dict() == {"method": "rsc", "layers": ["a", "b"]}
    assert fxgraft.RSC.from_dict({"preset": "pacs", "epochs": 9}) == fxgraft.RSC.preset("pacs", epochs=9)
    for cls, data, message in (
        (fxgraft.RSC, {"method": "mixmo"}, r"got options of 'mixmo'\.\n"),
        (fxgraft.RSC, {"laier": 1}, "no option 'laier'"),
        (fxgraft.Patch, {"method": "rsc"}, "got options of 'rsc'"),
    ):
        with pytest.raises(ConfigError, match=message):
            cls.from_dict(data)
