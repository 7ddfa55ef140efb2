"""Patches as written on the command line."""

import pytest

from fxgraft.errors import ConfigError
from fxgraft.spec import parse_patch_spec


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
        ("rsc:layer", "'layer' in the patch .* is not key=value"),
        ("rsc:layer=", "is not key=value"),
        ("rsc:=3", "is not key=value"),
        ("rsc:a=1,,b=2", "'' in the patch .* is not key=value"),
        ("rsc:a=1,", "is not key=value"),
        (
            "taps:layers=layer3,layer4",
            r"'layer4' in the patch .* is not key=value[\s\S]*layers=\[layer3,layer4\]",
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
