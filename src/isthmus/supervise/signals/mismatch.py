"""An engine that does not compute what was sent to it."""

from __future__ import annotations

from isthmus.supervise.signals import Signal


def look(found: str, strikes: int, most: int, update: int) -> Signal | None:
    """`strikes` checks in a row found the engine wrong, the last one as `found` says; `most` are as many as it may
    have."""
    return Signal("mismatch", f"{found}, {strikes} times", update) if strikes >= most else None
