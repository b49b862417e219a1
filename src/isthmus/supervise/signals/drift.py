"""The gap between trainer and engine that climbs towards its budget."""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.supervise.signals import Signal


def look(update: int, mismatches: Sequence[float], slope: float | None, steps: int, budget: float) -> Signal | None:
    """Of the mismatch of every update so far, nats per token, with its slope per update; says when its trend passes
    the budget before the last of `steps` updates."""
    if slope is None or slope <= 0 or not mismatches:
        return None
    ahead = mismatches[-1] + slope * (steps - update)
    if ahead <= budget:
        return None
    return Signal("drift", f"the mismatch climbs to {ahead:.4g} nats per token, above {budget:g}", update)
