"""The methods: a file or a folder each, found by looking into this package."""

import importlib as _importlib
import pkgutil as _pkgutil

for _each in _pkgutil.iter_modules(__path__):
    _importlib.import_module(f"{__name__}.{_each.name}")
