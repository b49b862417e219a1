"""What a few repetitions prove: an interval for a median, a bound on a failure rate."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Median:
    """A median with an interval that covers it with at least `confidence`, whatever the distribution."""

    value: float
    low: float
    high: float
    confidence: float
    samples: int


def median_of(samples: Sequence[float], confidence: float) -> Median:
    """The sample median between two order statistics, the innermost pair that covers with `confidence`.

    The pair (k, n + 1 - k) covers with probability 1 - 2 P(Binomial(n, 1/2) < k) (David and Nagaraja, Order Statistics,
    7.1). Too few samples for the asked confidence give the outermost pair and the confidence that it has.
    """
    ordered = sorted(samples)
    n = len(ordered)
    inner = [k for k in range(1, (n + 1) // 2 + 1) if _coverage(n, k) >= confidence]
    k = max(inner, default=1)
    return Median(statistics.median(ordered), ordered[k - 1], ordered[n - k], _coverage(n, k), n)


def _coverage(n: int, k: int) -> float:
    return 1.0 - 2.0 * sum(math.comb(n, j) for j in range(k)) / 2.0**n if n > 1 else 0.0


def zero_failure_bound(samples: int, confidence: float) -> float:
    """Upper bound on the failure probability of a trial after n = `samples` without a failure: 1 - (1 - c)^(1/n)."""
    return 1.0 - (1.0 - confidence) ** (1.0 / samples)
