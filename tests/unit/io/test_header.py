"""The entries that open a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxgraft.errors import RecipeError
from fxgraft.io.header import Header

HEADER = Header("parts", 2, what="list of parts", instead="Name a list.", upgrade="Upgrade.")


@pytest.mark.parametrize("other", [[], None, {}, {"format": "wholes", "version": 2}])
def test_a_file_of_another_kind_is_refused(other) -> None:
    with pytest.raises(RecipeError, match=r"'here' isn't a list of parts\.\nName a list\."):
        HEADER.check(other, Path("here"))


def test_a_file_of_another_version_is_refused() -> None:
    HEADER.check({**HEADER.entries(), "more": 1}, Path("here"))
    with pytest.raises(RecipeError, match=r"'here' is of version 3; this fxgraft reads version 2.*\n.*\nUp"):
        HEADER.check({"format": "parts", "version": 3}, Path("here"))
