"""An engine that does not compute what was sent to it."""

from __future__ import annotations

from isthmus.supervise.signals import Signal


def look(gap: float, strikes: int, most: int, update: int) -> Signal | None:
    """`strikes` checks in a row found the engine beyond the limit, the last one by `gap` nats per token; `most` are as
    many as it may have."""
    if strikes < most:
        return None
    detail = f"log-probabilities {gap:.3g} nats per token from those of the weights that were sent, {strikes} times"
    return Signal("mismatch", detail, update)
