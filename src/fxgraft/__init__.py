"""fxgraft: graft published training methods onto timm and torchvision backbones, and take them off again."""

import importlib as _importlib
from importlib.metadata import PackageNotFoundError as _NotFound
from importlib.metadata import version as _version
from importlib.util import find_spec as _find_spec
from typing import Any as _Any

try:
    __version__ = _version("fxgraft")
except _NotFound:  # a source tree that was never installed
    __version__ = "0.0.0"


_ELSEWHERE = {"compare": "fxgraft.comparison.experiment"}
"""Public names that most programs do without: each is imported when it is asked for itself."""


def __getattr__(name: str) -> _Any:
    """Import what a name stands for when it is first asked for: the command line does without most of it."""
    if name.startswith("_") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _ELSEWHERE:
        globals()[name] = getattr(_importlib.import_module(_ELSEWHERE[name]), name)
        return globals()[name]
    if name != "__all__" and _find_spec(f"{__name__}.{name}") is not None:
        return _importlib.import_module(f"{__name__}.{name}")
    public = _importlib.import_module(f"{__name__}.public")
    known = {each: getattr(public, each) for each in public.__all__}
    globals().update(known, __all__=sorted([*known, *_ELSEWHERE, "__version__"]))
    if name not in globals():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]


def __dir__() -> list[str]:
    """List the public names."""
    return __getattr__("__all__")
