"""How fast a setting trains, learnt from published results: the parts of a step's time, corrected by regression.

What the parts leave is explained by a few properties of the setting, and by the results that are most alike.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import mul, ne

from isthmus.forecast.published import Measured, shipped_training
from isthmus.forecast.regression import dot, fit, residuals
from isthmus.forecast.setting import Setting
from isthmus.forecast.times import step_times


@dataclass(frozen=True)
class Known:
    """What published results tell of a setting: whether some are of its model, its device, its family of devices, of
    its family at its precision, and of its training program."""

    model: bool
    device: bool
    family: bool
    precision: bool
    program: bool

    @property
    def width(self) -> float:
        """Half width of the 80 % interval in the logarithm."""
        width = WIDTHS[self.missing]
        return width if self.program else math.hypot(width, FEW_WIDTH)

    @property
    def missing(self) -> str:
        """What is new: "nothing", "model", "chip", "family", "precision" or "model and chip"."""
        if not self.family:
            return "family"
        if not self.precision:
            return "precision"
        if not self.device:
            return "chip" if self.model else "model and chip"
        return "nothing" if self.model else "model"


# Half widths of the 80 % interval in the logarithm, by what is new: the 80th percentiles of the errors of
# `isthmus forecast validate`, whose test holds them.
WIDTHS = {
    "nothing": 0.195,
    "model": 0.195,
    "chip": 0.195,
    "model and chip": 0.21,
    "family": 0.25,
    "precision": 0.25,
}
MANY, FEW_WIDTH = 50, 0.32
"""Results of a training program from which on it is known, and what fewer of them add to the width in quadrature: the
results of programs with few miss by 0.35 to 0.47, where those of the others miss by 0.16 to 0.31."""
SMALLEST = 100e6
"""Active parameters of the smallest published model; below it an interval grows by `BELOW` per factor e."""
BELOW = 0.3


@dataclass(frozen=True)
class Speed:
    """Tokens per second and device: the middle, and the ends of the central 80 % interval."""

    middle: float
    low: float
    high: float
    missing: str

    @property
    def spread(self) -> float:
        """Standard deviation of the logarithm, as of a log-normal with this interval."""
        return math.log(self.high / self.low) / (2.0 * Z80)


Z80 = 1.2815515655446004
"""Standard deviations from the middle to the end of a normal's central 80 %."""


class Efficiency:
    """Predicts from the results that it is given."""

    def __init__(self, results: Sequence[Measured]) -> None:
        self.results = list(results)
        self._rows = [_row(one.setting) for one in self.results]
        values = [math.log(one.tokens_per_s) - _expected(one.setting) for one in self.results]
        self._weights = fit(self._rows, values, _SPREADS)
        self._left = [_tamed(one) for one in residuals(self._rows, values, self._weights)]
        self._traits = [_traits(one.setting) for one in self.results]
        self._means: dict[Traits, float] = {}

    def log_tokens_per_s(self, setting: Setting) -> float:
        """Logarithm of the expected tokens per second and device."""
        return _expected(setting) + dot(_row(setting), self._weights) + self._of_the_alike(setting)

    def _of_the_alike(self, setting: Setting) -> float:
        """What the results that are most alike leave unexplained, as a mean."""
        key = _traits(setting)
        if key not in self._means:
            weights = [_likeness(key, other) for other in self._traits]
            left = math.fsum(map(mul, weights, self._left))
            self._means[key] = left / (ALONE + math.fsum(weights))
        return self._means[key]

    def speed(self, setting: Setting) -> Speed:
        """Tokens per second and device, with an interval as wide as what is new asks for."""
        middle = math.exp(self.log_tokens_per_s(setting))
        known = self.known(setting)
        reach = math.exp(known.width + BELOW * max(0.0, math.log(SMALLEST / setting.model.active)))
        return Speed(middle, middle / reach, middle * reach, known.missing)

    def known(self, setting: Setting) -> Known:
        """What the results tell of a setting."""
        others = [one.setting for one in self.results]
        kin = [one for one in others if one.device.family == setting.device.family]
        return Known(
            model=any(one.model.name == setting.model.name for one in others),
            device=any(one.device.name == setting.device.name for one in kin),
            family=bool(kin),
            precision=any(one.precision == setting.precision for one in kin),
            program=sum(one.source == setting.source for one in others) >= MANY,
        )


@functools.cache
def shipped() -> Efficiency:
    """What all results that come with the package teach."""
    return Efficiency(shipped_training())


def without(left_out: Callable[[Measured], bool], results: Iterable[Measured]) -> Efficiency:
    """What results teach when a group of them is left out."""
    return Efficiency([one for one in results if not left_out(one)])


def _expected(setting: Setting) -> float:
    return -math.log(step_times(setting).total)


# Of the prior on each weight, a standard deviation in the logarithm per unit of the property.
_PROPERTIES: dict[str, tuple[float, Callable[[Setting], float]]] = {
    "all": (1.0, lambda s: 1.0),
    "mixture": (2.0, lambda s: float(s.model.is_mixture)),
    "narrow, dense": (0.2, lambda s: _narrow(s) * (not s.model.is_mixture)),
    "narrow, mixture": (1.7, lambda s: _narrow(s) * s.model.is_mixture),
    "bandwidth per FLOP/s": (0.05, lambda s: math.log(_of(s.device.mem_bw_gbs) / 5.0 / _of(s.device.bf16_tflops))),
    "power per FLOP/s": (1.7, lambda s: math.log(_of(s.device.power_w) / _of(s.device.bf16_tflops) / 0.55)),
    "active parameters": (0.025, lambda s: math.log(s.model.active / 20e9)),
    "hidden size": (0.07, lambda s: math.log(s.model.hidden / 5000.0)),
    "software": (0.2, lambda s: _years(s) - 25.5),
    "software, dense": (0.01, lambda s: (_years(s) - 25.5) * (not s.model.is_mixture)),
    "tensor": (0.12, lambda s: math.log(s.tensor or 1.0)),
    "context": (0.03, lambda s: math.log(s.context or 1.0)),
    "pipeline": (0.01, lambda s: math.log(s.pipeline or 1.0)),
    "microbatch": (0.8, lambda s: math.log(s.microbatch or 1.0)),
    "row length": (0.12, lambda s: math.log(s.length / 4096.0)),
    "large domain": (0.03, lambda s: float(s.device.domain > 8 and s.model.is_mixture)),
    "checkpointing": (0.16, lambda s: float(s.checkpointing)),
    "sharded": (1.0, lambda s: float(s.sharded)),
}
_SPREADS = [spread for spread, _ in _PROPERTIES.values()]
_LATEST = 25.3
"""Release that is assumed where none is stated, in years since 2000."""


def _row(setting: Setting) -> list[float]:
    return [of(setting) for _, of in _PROPERTIES.values()]


def _narrow(setting: Setting) -> float:
    return math.log(setting.peak / (_of(setting.device.bf16_tflops) * 1e12))


def _years(setting: Setting) -> float:
    return _LATEST if setting.software is None else setting.software


def _of(value: float | None) -> float:
    assert value is not None
    return value


# How fast likeness falls with each difference; per year for releases, per factor e for microbatches.
_MODEL, _DEVICE, _FAMILY, _PRECISION, _RECIPE = 0.05, 1.8, 0.28, 0.9, 1.9
_SOURCE, _LAYOUT, _KIND, _YEAR, _MICROBATCH = 1.6, 0.02, 1.7, 30.0, 3.5
ALONE = 0.01
"""Likeness that an average of no results weighs with."""
_OUTLYING, _FAR = 0.35, 12.0


Traits = tuple[str, str, str, str, str, str, str, bool, float, float]


def _traits(s: Setting) -> Traits:
    """What likeness is judged by: eight names, then the release and the logarithm of the microbatch."""
    return (
        s.model.name,
        s.device.name,
        s.device.family,
        s.precision,
        s.recipe,
        s.source,
        s.layout,
        s.model.is_mixture,
        _years(s),
        math.log(s.microbatch or 1.0),
    )


_NAMED = (_MODEL, _DEVICE, _FAMILY, _PRECISION, _RECIPE, _SOURCE, _LAYOUT, _KIND)


def _likeness(one: Traits, other: Traits) -> float:
    distance = _YEAR * abs(one[8] - other[8]) + _MICROBATCH * abs(one[9] - other[9])
    if distance > _FAR:
        return 0.0
    return math.exp(-distance - sum(map(mul, _NAMED, map(ne, one[:8], other[:8]))))


def _tamed(residual: float) -> float:
    """A residual whose weight falls when it is an outlier's."""
    return residual / (1.0 + (residual / _OUTLYING) ** 2)
