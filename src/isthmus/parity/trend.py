"""Drift over successive crossings: a gap that grows is found before it passes the budget.

A gap at one crossing says little: it is noisy, and what ends a run is that it climbs (0.006 to 0.009 in bf16 and 0.010
to 0.031 in fp8, block by block of 8 steps: github.com/verl-project/verl/pull/7519). The crossings are averaged in
blocks, Kendall's S over the blocks says whether they rise, and Sen's median of the pairwise slopes says how fast
(Sen, JASA 63, 1968, 1379-1389). Neither is moved far by one wild value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from statistics import mean, median

from isthmus.slopes import pairwise_slopes

BLOCK = 4
WINDOW = 32 * BLOCK
"""Only the last crossings count: what rose long ago and is flat now is no trend."""
FEWEST_BLOCKS = 5
"""Of fewer blocks, even a series that always rises is no surprise at 1% (1 / 4! = 4.2%)."""
SIGNIFICANCE = 0.01


@dataclass(frozen=True)
class Trend:
    """Of a gap over crossings. `level` is that of the last block, `slope` per crossing, both in the gap's unit.

    `p_value` is the probability that a series without trend rises as steadily or more.
    """

    crossings: int
    level: float
    slope: float
    p_value: float

    @property
    def rises(self) -> bool:
        return self.slope > 0 and self.p_value < SIGNIFICANCE

    def crossings_until(self, budget: float) -> float | None:
        """How many crossings are left until the gap passes the budget, at this slope; None if it does not rise."""
        if self.level >= budget:
            return 0.0
        return (budget - self.level) / self.slope if self.rises else None

    def alarms(self, budget: float, horizon: int) -> bool:
        """Whether the gap rises and will pass the budget within so many crossings."""
        left = self.crossings_until(budget)
        return self.rises and left is not None and left <= horizon


def trend(gaps: Sequence[float]) -> Trend | None:
    """The trend of a gap, crossing by crossing; None while there are too few of them (20), or one is no number."""
    recent = list(gaps)[-WINDOW:]
    blocks = [mean(recent[start : start + BLOCK]) for start in range(len(recent) % BLOCK, len(recent), BLOCK)]
    if len(blocks) < FEWEST_BLOCKS or not all(map(math.isfinite, blocks)):
        return None
    slope = median(pairwise_slopes(blocks)) / BLOCK
    rising = sum((later > earlier) - (later < earlier) for earlier, later in combinations(blocks, 2))
    return Trend(len(gaps), blocks[-1], slope, _probability_of_rising(len(blocks), rising))


def _probability_of_rising(blocks: int, at_least: int) -> float:
    """P(S >= at_least) of Kendall's S over so many values in random order, exactly (Kendall, Biometrika 30, 1938)."""
    inversions = _inversions(blocks)
    most = (blocks * (blocks - 1) // 2 - at_least) // 2
    return sum(inversions[: most + 1]) / math.factorial(blocks)


@cache
def _inversions(size: int) -> tuple[int, ...]:
    """How many orders of `size` values have 0, 1, 2, ... pairs the wrong way round."""
    if size == 1:
        return (1,)
    shorter = _inversions(size - 1)
    longest = len(shorter) + size - 1
    return tuple(sum(shorter[max(0, n - size + 1) : n + 1]) for n in range(longest))
