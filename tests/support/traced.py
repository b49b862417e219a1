"""Pieces of work as the static tier sees them."""

from __future__ import annotations

from collections.abc import Callable

from isthmus.probes.static.costs import CostRecorder, Costs


def record_costs(work: Callable[[], object], device: str = "meta", *, whole_attention: str | None = None) -> Costs:
    """Run `work` and return what its calls on `device` cost."""
    recorder = CostRecorder(device, whole_attention=whole_attention)
    with recorder.watching():
        work()
    return recorder.total()
