"""How fast a setting trains, learnt from published results: the parts of a step's time, corrected by regression.

What the parts leave is explained by a few properties of the setting, and by the results that are most alike.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from isthmus.forecast.published import Measured, shipped_training
from isthmus.forecast.regression import dot, fit, residuals
from isthmus.forecast.setting import Setting
from isthmus.forecast.times import step_times


@dataclass(frozen=True)
class Known:
    """What published results tell of a setting: whether some are of its model, its device, its family of devices, and
    whether some of its device are at its precision."""

    model: bool
    device: bool
    family: bool
    precision: bool

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
    "nothing": 0.22,
    "model": 0.22,
    "chip": 0.22,
    "model and chip": 0.24,
    "family": 0.31,
    "precision": 0.32,
}


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

    def log_tokens_per_s(self, setting: Setting) -> float:
        """Logarithm of the expected tokens per second and device."""
        explained = _expected(setting) + dot(_row(setting), self._weights)
        weights = [_likeness(setting, one.setting) for one in self.results]
        total = math.fsum(weights)
        return explained + math.fsum(w * r for w, r in zip(weights, self._left, strict=True)) / (ALONE + total)

    def speed(self, setting: Setting) -> Speed:
        """Tokens per second and device, with an interval as wide as what is new asks for."""
        middle = math.exp(self.log_tokens_per_s(setting))
        missing = self.known(setting).missing
        reach = math.exp(WIDTHS[missing])
        return Speed(middle, middle / reach, middle * reach, missing)

    def known(self, setting: Setting) -> Known:
        """What the results tell of a setting."""
        others = [one.setting for one in self.results]
        kin = [one for one in others if one.device.family == setting.device.family]
        return Known(
            model=any(one.model.name == setting.model.name for one in others),
            device=any(one.device.name == setting.device.name for one in kin),
            family=bool(kin),
            precision=any(one.precision == setting.precision for one in kin),
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
    "mixture": (1.5, lambda s: float(s.model.is_mixture)),
    "narrow, dense": (0.7, lambda s: _narrow(s) * (not s.model.is_mixture)),
    "narrow, mixture": (1.0, lambda s: _narrow(s) * s.model.is_mixture),
    "bandwidth per FLOP/s": (0.05, lambda s: math.log(_of(s.device.mem_bw_gbs) / 5.0 / _of(s.device.bf16_tflops))),
    "power per FLOP/s": (1.0, lambda s: math.log(_of(s.device.power_w) / _of(s.device.bf16_tflops) / 0.55)),
    "active parameters": (0.14, lambda s: math.log(s.model.active / 20e9)),
    "hidden size": (0.02, lambda s: math.log(s.model.hidden / 5000.0)),
    "software": (0.1, lambda s: _years(s) - 25.5),
    "software, dense": (0.02, lambda s: (_years(s) - 25.5) * (not s.model.is_mixture)),
    "tensor": (0.06, lambda s: math.log(s.tensor or 1.0)),
    "context": (0.03, lambda s: math.log(s.context or 1.0)),
    "pipeline": (0.03, lambda s: math.log(s.pipeline or 1.0)),
    "microbatch": (0.8, lambda s: math.log(s.microbatch or 1.0)),
    "row length": (0.4, lambda s: math.log(s.length / 4096.0)),
    "large domain": (0.04, lambda s: float(s.device.domain > 8 and s.model.is_mixture)),
    "checkpointing": (0.2, lambda s: float(s.checkpointing)),
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
_MODEL, _DEVICE, _FAMILY, _PRECISION, _RECIPE = 0.08, 0.9, 0.14, 0.6, 0.5
_SOURCE, _LAYOUT, _KIND, _YEAR, _MICROBATCH = 1.8, 0.02, 0.5, 20.0, 1.9
ALONE = 0.06
"""Likeness that an average of no results weighs with."""
_OUTLYING = 0.35


def _likeness(one: Setting, other: Setting) -> float:
    distance = (
        _MODEL * (one.model.name != other.model.name)
        + _DEVICE * (one.device.name != other.device.name)
        + _FAMILY * (one.device.family != other.device.family)
        + _PRECISION * (one.precision != other.precision)
        + _RECIPE * (one.recipe != other.recipe)
        + _SOURCE * (one.source != other.source)
        + _LAYOUT * (one.layout != other.layout)
        + _KIND * (one.model.is_mixture != other.model.is_mixture)
        + _YEAR * abs(_years(one) - _years(other))
        + _MICROBATCH * abs(math.log((one.microbatch or 1.0) / (other.microbatch or 1.0)))
    )
    return math.exp(-distance)


def _tamed(residual: float) -> float:
    """A residual whose weight falls when it is an outlier's."""
    return residual / (1.0 + (residual / _OUTLYING) ** 2)
