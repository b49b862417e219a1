"""What repetitions prove: an interval for a median or a trend, a bound on a failure rate, a belief about it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy.special import digamma, gammaincinv, polygamma

from isthmus.slopes import pairwise_slopes


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


def poisson_bounds(failures: int, exposure: float, confidence: float) -> tuple[float, float]:
    """Exact two-sided interval of a rate, after `failures` in `exposure` (Garwood, Biometrika 28, 1936).

    Without a failure the lower end is 0 and the upper one is one-sided: -ln(1 - c) / exposure.
    """
    if failures == 0:
        return 0.0, -math.log1p(-confidence) / exposure
    tail = (1.0 - confidence) / 2.0
    low, high = gammaincinv(failures, tail), gammaincinv(failures + 1, 1.0 - tail)
    return float(low) / exposure, float(high) / exposure


def exposure_to_show(rate: float, confidence: float) -> float:
    """Exposure without a failure after which a rate above `rate` is excluded with `confidence`: -ln(1 - c) / rate."""
    return -math.log1p(-confidence) / rate


@dataclass(frozen=True)
class GammaRate:
    """What is believed about a rate per hour: a gamma distribution with `shape` and `hours` (the inverse scale).

    It is the conjugate of Poisson counts: seeing k failures in T hours adds k to the shape and T to the hours.
    """

    shape: float
    hours: float

    @property
    def mean(self) -> float:
        return self.shape / self.hours

    def quantile(self, probability: float) -> float:
        return float(gammaincinv(self.shape, probability)) / self.hours

    def interval(self, confidence: float) -> tuple[float, float]:
        """The central credible interval."""
        tail = (1.0 - confidence) / 2.0
        return self.quantile(tail), self.quantile(1.0 - tail)

    def after(self, failures: float, hours: float) -> GammaRate:
        """The posterior after `failures` in `hours` more."""
        return GammaRate(self.shape + failures, self.hours + hours)


def fit_gamma(rates: Sequence[float], centre: Sequence[float] | None = None, spread: float = 1.0) -> GammaRate:
    """A prior for a fleet not seen yet, from the rates of at least two others.

    Its logarithm has the mean of those of `centre`, all of them if not given, and the variance (n - 1) of all times
    1 + 1/n, for a mean of n is itself unsure, and times the square of `spread`. Of a gamma distribution these are
    digamma(shape) - ln(hours) and trigamma(shape).
    """
    logs = [math.log(rate) for rate in rates]
    middle = [math.log(rate) for rate in centre] if centre else logs
    variance = statistics.variance(logs) * (1.0 + 1.0 / len(middle)) * spread**2
    shape = _bisect(lambda shape: -float(polygamma(1, shape)), -variance, 1e-3, 1e6)
    return GammaRate(shape, math.exp(float(digamma(shape)) - statistics.mean(middle)))


def checkpoint_interval(save_s: float, mtbf_s: float) -> float:
    """Seconds of work between checkpoints that waste least: J. T. Daly, Future Generation Computer Systems 22, 2006.

    sqrt(2 s M) (1 + sqrt(s / 2M) / 3 + s / 18M) - s for a save of `save_s` below twice the mean time between failures,
    of which Young's sqrt(2 s M) (CACM 17, 1974) is the first order; else M.
    """
    if save_s >= 2.0 * mtbf_s:
        return mtbf_s
    part = save_s / (2.0 * mtbf_s)
    return math.sqrt(2.0 * save_s * mtbf_s) * (1.0 + math.sqrt(part) / 3.0 + part / 9.0) - save_s


@dataclass(frozen=True)
class Slope:
    """A trend per step with an interval of at least `confidence`."""

    value: float
    low: float
    high: float
    confidence: float
    samples: int

    def grows(self) -> bool:
        """Whether a growth is significant."""
        return self.low > 0.0


def theil_sen(values: Sequence[float], confidence: float) -> Slope:
    """The median of the slopes between all pairs of values, with Sen's interval from Kendall's statistic.

    Values are one per step. Robust: 29 % of them may be anything. P. K. Sen, JASA 63, 1968: of N pairs, the order
    statistics (N -+ z sqrt(n (n - 1)(2n + 5) / 18)) / 2. Needs at least three values.
    """
    n = len(values)
    slopes = pairwise_slopes(values)
    reach = statistics.NormalDist().inv_cdf((1.0 + confidence) / 2.0) * math.sqrt(n * (n - 1) * (2 * n + 5) / 18.0)
    first = max(0, math.floor((len(slopes) - reach) / 2.0))
    last = min(len(slopes) - 1, math.ceil((len(slopes) + reach) / 2.0))
    return Slope(statistics.median(slopes), slopes[first], slopes[last], confidence, n)


def _bisect(function: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """Where an increasing function has the value `wanted`."""
    for _ in range(200):
        middle = (low + high) / 2.0
        if function(middle) < wanted:
            low = middle
        else:
            high = middle
    return (low + high) / 2.0
