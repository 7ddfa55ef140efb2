"""The list of living models that were patched."""

import threading

from torch import nn

from fxgraft.graph.runtime.living import note_patched, noted_models
from system.faults.lines import Lines


def test_an_interruption_at_any_line_leaves_the_list_unlocked() -> None:
    model = nn.Linear(1, 1)  # one alone, so that every call runs the same lines
    note_patched(model)
    at, interrupted = 0, True
    while interrupted:
        try:
            with Lines(at, KeyboardInterrupt()) as lines:
                note_patched(model)
            interrupted = False
        except KeyboardInterrupt:
            at += 1
        other = threading.Thread(target=note_patched, args=(model,), daemon=True)
        other.start()
        other.join(5)
        assert not other.is_alive(), f"interrupted at {lines.places[-1]}"
    assert at > 6
    assert any(noted is model for noted in noted_models())
