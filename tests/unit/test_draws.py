"""Random draws of methods in compiled code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxgraft.extend import draws


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("alpha", [0.1, 2.0])
def test_ratios_are_drawn_for_batches_of_several_sizes(alpha: float) -> None:
    """As for the last batch of an epoch; they are those that eager code draws."""

    def drawn(x: Tensor) -> Tensor:
        return draws.ratios(len(x), alpha, x.device) + x

    compiled = torch.compile(drawn, fullgraph=True, backend="eager")
    for call in (compiled, drawn):
        torch.manual_seed(0)
        sizes = [call(torch.zeros(size)) for size in (8, 3, 5)]
        assert [len(ratios) for ratios in sizes] == [8, 3, 5]
        if call is compiled:
            first = sizes
    for one, other in zip(first, sizes, strict=True):
        torch.testing.assert_close(one, other)
