"""What measured points teach of a pool: a factor on forecasts, and a fixed time per update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.forecast.efficiency import Z80

ONE_POINT, TWO_POINTS = 0.24 / Z80, 0.16 / Z80
"""Spread that is left after one point, and after two or more: 80 % of the errors that
`isthmus forecast validate` finds with two points on a pool by one program."""
APART = 1.2
"""Ratio of two forecasts from which on their points tell a fixed time from a factor."""


@dataclass(frozen=True)
class Calibration:
    """What measured points taught of a pool: update = overhead_s + factor x forecast, within `spread` (a logarithm)."""

    factor: float = 1.0
    overhead_s: float = 0.0
    spread: float | None = None
    points: int = 0


def fit_points(expected: Sequence[float], seconds: Sequence[float]) -> Calibration:
    """Factor and fixed time that make forecasts of updates what was measured.

    A fixed time is told only by points whose forecasts differ by `APART`, and is never below 0.
    """
    low, high = min(expected), max(expected)
    overhead = 0.0
    if high / low >= APART:
        mean_e, mean_s = sum(expected) / len(expected), sum(seconds) / len(seconds)
        above = sum((e - mean_e) * (s - mean_s) for e, s in zip(expected, seconds, strict=True))
        slope = above / sum((e - mean_e) ** 2 for e in expected)
        overhead = min(max(0.0, mean_s - slope * mean_e), 0.9 * min(seconds))
    ratios = [math.log((s - overhead) / e) for e, s in zip(expected, seconds, strict=True)]
    factor = math.exp(sum(ratios) / len(ratios))
    return Calibration(factor, overhead, TWO_POINTS if len(seconds) > 1 else ONE_POINT, len(seconds))
