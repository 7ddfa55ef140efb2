"""One thread per test process, since the suite runs in two; the same seed for every test; two more methods; the hooks
that write the matrix of what works."""

import gc
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import works_with
from models.toys import register_toys
from sweeping import thin
from third_party_package import install
from works_with import pytest_addoption, pytest_configure

__all__ = ["pytest_addoption", "pytest_configure"]  # hooks

torch.set_num_threads(1)
# For the processes that the tests run in, which start after this: glibc gives large buffers back to the system as soon
# as they are free, and zeroing fresh pages for the next pass took a sixth of the suite's time.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**25))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**30))

# Before anything asks for the methods: whatever sweeps over the registry sweeps over these two as well.
_folder = tempfile.TemporaryDirectory()
sys.path.insert(0, str(install(Path(_folder.name))))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Before -m is looked at: what is left to the sweep, and what writes the matrix."""
    thin(items)
    works_with.pytest_collection_modifyitems(items)


def pytest_collection_finish() -> None:
    """Keep the collector from what is imported by now: many tests collect, and would look through all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    # Where compiled code raises, the "eager" backend leaves gradients off if it raises inside of no_grad, and these
    # hooks off inside of a gradient of torch.func.
    torch.set_grad_enabled(True)
    torch._C._autograd._saved_tensors_hooks_enable()


@pytest.fixture
def toy_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the toys for the time of a test."""
    register_toys(monkeypatch)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Compile as a new process would: what other tests have compiled is gone, and so is what this one does."""
    torch.compiler.reset()
    with warnings.catch_warnings():
        # Raised inside torch's own compiler, not by what is compiled.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\..*")
        yield
    torch.compiler.reset()
