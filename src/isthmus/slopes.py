"""How fast a series rises per step: by pairs of values, which noise does not move far, and by least squares."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations


def pairwise_slopes(values: Sequence[float]) -> list[float]:
    """The slopes between all pairs, in ascending order. Their median is Sen's (JASA 63, 1968, 1379-1389)."""
    pairs = combinations(enumerate(values), 2)
    return sorted((later - earlier) / (j - i) for (i, earlier), (j, later) in pairs)


def least_squares_slope(values: Sequence[float]) -> float | None:
    """The slope of the straight line through all values; None for fewer than three."""
    count = len(values)
    if count < 3:
        return None
    mean_x, mean_y = (count - 1) / 2, sum(values) / count
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in enumerate(values))
    return covariance / sum((x - mean_x) ** 2 for x in range(count))
