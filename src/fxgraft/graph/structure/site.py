"""One site, and a list of them that prints as a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from rich.table import Table


@dataclass(frozen=True)
class Site:
    """One value in a model's forward pass.

    Attributes:
        name: what to pass to ``layer=``.
        owner: qualified name of the smallest module whose forward contains the value ('' is the model).
        node: name of the value's node in the owner's graph; '' when it is known as a module's output only.
        path: qualified name of the module whose output it is, or '' for the value of a function.
        calls: how often that module is called in one pass.
        checkpointed: whether the call runs under activation checkpointing.
        numbered: whether it was asked for by a stage number, which leaves some choice of place.
        op: the module's class, or the function.
        shape: (batch of 2, ...) at the listing's input size, None when it is no tensor.
        dtype: of the value, without the ``torch.`` prefix.
        layout: which dimension holds the channels; see `Layout`.
    """

    name: str
    owner: str
    node: str
    path: str = ""
    calls: int = 1
    checkpointed: bool = False
    numbered: bool = False
    op: str = ""
    shape: tuple[int, ...] | None = None
    dtype: str = ""
    layout: str = ""

    @property
    def on_module(self) -> bool:
        """Whether a unit can sit on the module itself: one call, not recomputed in backward."""
        return bool(self.path) and self.calls == 1 and not self.checkpointed


class Sites(Sequence[Site]):
    """The result of `fxgraft.sites`: a sequence of `Site` that prints as a table."""

    def __init__(self, sites: Iterable[Site], title: str = "") -> None:
        self._sites = tuple(sites)
        self.title = title

    @overload
    def __getitem__(self, index: int) -> Site: ...
    @overload
    def __getitem__(self, index: slice) -> Sites: ...
    def __getitem__(self, index: int | slice) -> Site | Sites:
        if isinstance(index, slice):
            return Sites(self._sites[index], self.title)
        return self._sites[index]

    def __len__(self) -> int:
        return len(self._sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    @property
    def names(self) -> list[str]:
        """What to pass to ``layer=``, one name per site."""
        return [site.name for site in self._sites]

    def _rows(self) -> list[tuple[str, str, str, str, str]]:
        return [
            (
                s.name or "(the model)",
                s.op,
                "×".join(map(str, s.shape)) if s.shape else "–",
                s.dtype,
                s.layout,
            )
            for s in self._sites
        ]

    def __rich__(self) -> Table:
        table = Table(title=self.title or None)
        for column in ("site", "op", "shape", "dtype", "layout"):
            table.add_column(column)
        for row in self._rows():
            table.add_row(*row)
        return table

    def __repr__(self) -> str:
        rows = [("site", "op", "shape", "dtype", "layout"), *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        return "\n".join(([self.title] if self.title else []) + lines)
