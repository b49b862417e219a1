"""A checkpoint that could not be written."""

from __future__ import annotations

from isthmus.supervise.signals import Signal


def look(update: int, error: str) -> Signal:
    return Signal("save failed", error, update)
