"""What failures cost: a belief about their rate, the best interval between checkpoints, the useful share of time."""

from __future__ import annotations

import functools
import math
import random
import statistics
from dataclasses import dataclass

from isthmus.chips import failure_rates

SAVE_S, RESTART_S = 60.0, 600.0
"""Seconds of a checkpoint and of a restart, where nothing was measured: planning values, not measurements."""
REPAIR_H, NODE = 24.0, 8
"""Hours until a failed node is back, and chips that fail with it. Assumed."""
WIDER = 2.0
"""How much wider, in the logarithm, the belief about a chip is of which no fleet published a rate. Assumed."""
HOUR = 3600.0


@dataclass(frozen=True)
class FailureRate:
    """A belief about interruptions per chip-hour: a gamma distribution with `shape` and `hours`, its inverse scale.

    It is conjugate to counts: k interruptions in T chip-hours add k to the shape and T to the hours.
    """

    shape: float
    hours: float
    source: str

    @property
    def mean(self) -> float:
        return self.shape / self.hours

    def after(self, interruptions: float, chip_hours: float, seen: str) -> FailureRate:
        """The belief after what a soak or a run saw."""
        return FailureRate(self.shape + interruptions, self.hours + chip_hours, f"{self.source}; {seen}")

    def draw(self, chance: random.Random) -> float:
        return chance.gammavariate(self.shape, 1.0 / self.hours)

    def scaled(self, factor: float) -> FailureRate:
        """The belief that interruptions are `factor` times as frequent."""
        return FailureRate(self.shape, self.hours / factor, self.source)


@functools.cache
def prior(chip: str) -> FailureRate:
    """From published fleets: around those of this chip, as wide as fleets differ; around all of them, and wider, else.

    The logarithm of a gamma variable has mean digamma(shape) - ln(hours) and variance trigamma(shape).
    """
    fleets = [fleet for fleet in failure_rates() if fleet.in_prior]
    own = [fleet for fleet in fleets if fleet.is_of(chip)]
    logs = [math.log(fleet.rate) for fleet in fleets]
    middle = [math.log(fleet.rate) for fleet in own] or logs
    variance = statistics.variance(logs) * (1.0 + 1.0 / len(middle)) * (1.0 if own else WIDER**2)
    shape = _shape_of_variance(variance)
    named = ", ".join(fleet.fleet for fleet in own or fleets)
    source = f"fleets of this chip: {named}" if own else f"no fleet of {chip} published one: wide, around {named}"
    return FailureRate(shape, math.exp(digamma(shape) - statistics.fmean(middle)), source)


@dataclass(frozen=True)
class Goodput:
    """The useful share of the time, the mean hours between interruptions, and the seconds between checkpoints."""

    share: float
    mtbf_h: float
    interval_s: float


def goodput(rate: float, chips: int, save_s: float = SAVE_S, restart_s: float = RESTART_S, spares: int = 0) -> Goodput:
    """Of `chips` chips that are interrupted `rate` times per chip-hour.

    Between checkpoints pass sqrt(2 save MTBF) seconds (Young, CACM 17, 1974). Lost are the saves, half an interval and
    a restart for each interruption, and, where no spare node takes its place, the share of a node under repair.
    """
    if rate <= 0.0:
        return Goodput(1.0, math.inf, math.inf)
    mtbf_s = HOUR / (rate * chips)
    interval = math.sqrt(2.0 * save_s * mtbf_s)
    lost = save_s / interval + (interval / 2.0 + restart_s) / mtbf_s
    broken = rate * chips * REPAIR_H
    unreplaced = max(0.0, broken - spares / NODE) * NODE / chips
    return Goodput(max(0.02, (1.0 - lost) * (1.0 - min(0.9, unreplaced))), mtbf_s / HOUR, interval)


def digamma(x: float) -> float:
    """Derivative of the logarithm of the gamma function, for x > 0, to 1e-10: recurrence, then asymptotic series."""
    shift = 0.0
    while x < 10.0:
        shift -= 1.0 / x
        x += 1.0
    inverse = 1.0 / x**2
    series = inverse * (1.0 / 12.0 - inverse * (1.0 / 120.0 - inverse * (1.0 / 252.0 - inverse / 240.0)))
    return shift + math.log(x) - 0.5 / x - series


def trigamma(x: float) -> float:
    """Derivative of `digamma`, for x > 0."""
    shift = 0.0
    while x < 10.0:
        shift += 1.0 / x**2
        x += 1.0
    inverse = 1.0 / x**2
    series = inverse * (1.0 / 6.0 - inverse * (1.0 / 30.0 - inverse * (1.0 / 42.0 - inverse / 30.0)))
    return shift + 1.0 / x + inverse / 2.0 + series / x


def _shape_of_variance(variance: float) -> float:
    """The shape whose trigamma is `variance`, by bisection."""
    low, high = 1e-3, 1e6
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if trigamma(middle) > variance else (low, middle)
    return math.sqrt(low * high)
