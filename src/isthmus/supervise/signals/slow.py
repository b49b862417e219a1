"""Updates that are slower than the plan thought likely."""

from __future__ import annotations

from collections import deque
from statistics import median

from isthmus.supervise.signals import Signal

LEAST = 16
"""Updates before it judges, and that the middle is of: a first update compiles, and one may be disturbed."""


class Slow:
    """Says it once. `longest_s`: seconds of an update at the P10 of the plan's speed, the P90 of its time; None if the
    plan has no forecast of the step, and then nothing is slow."""

    def __init__(self, longest_s: float | None):
        self._longest, self._seconds = longest_s, deque[float](maxlen=LEAST)
        self._said = False

    def look(self, update: int, seconds: float) -> Signal | None:
        self._seconds.append(seconds)
        if self._longest is None or self._said or len(self._seconds) < LEAST:
            return None
        middle = median(self._seconds)
        if middle <= self._longest:
            return None
        self._said = True
        return Signal("slow", f"an update takes {middle:.3g} s, the plan thought at most {self._longest:.3g} s", update)

    @property
    def pace_s(self) -> float | None:
        """Seconds of an update lately; None before the first."""
        return median(self._seconds) if self._seconds else None
