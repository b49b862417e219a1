"""How a figure is held against its limit."""

from __future__ import annotations

import math

from isthmus.records import Outcome

FEWEST_SAMPLES = 2
"""Of fewer independent samples, a mean has no interval."""


def at_most(
    limit: float, value: float, interval: tuple[float, float] | None = None, *, samples: int | None = None
) -> Outcome:
    """`pass` only if the value and its whole interval are at or below the limit, `fail` if the value is above it.

    What is between is `unknown`, and so are a value or an interval that is no number, and a mean over fewer than
    FEWEST_SAMPLES. `samples` is None for what is no mean: a maximum, or a difference that leaves nothing to chance.
    """
    if value > limit:
        return "fail"
    enough = samples is None or samples >= FEWEST_SAMPLES
    known = all(map(math.isfinite, (value, *(interval or ()))))
    return "pass" if enough and known and max(value, *(interval or (value,))) <= limit else "unknown"


def at_least(
    limit: float, value: float, interval: tuple[float, float] | None = None, *, samples: int | None = None
) -> Outcome:
    """The same for a lower limit: `pass` only if the whole interval is at or above it, `fail` if the value is below."""
    mirrored = (-interval[1], -interval[0]) if interval else None
    return at_most(-limit, -value, mirrored, samples=samples)
