"""A loss or a norm of the gradient far above what it was.

The rule is that of OLMo-core's skip_step_optimizer (067267c): more than 6 standard deviations above the mean of the
last 128 values, once there are 64.
"""

from __future__ import annotations

from collections import deque
from statistics import fmean, stdev

from isthmus.supervise.signals import Signal

LEAP = 10.0
"""How many times the largest norm of its window a norm in reinforcement learning must be. Losses cross zero there, and
norms of healthy runs leap: `isthmus run recipes/tiny.toml` has one 9 standard deviations above its mean."""


class Spikes:
    """Remembers healthy updates. A value is remembered when its update is made, and not when it is left out."""

    def __init__(self, sigma: float = 6.0, window: int = 128, history: int = 64):
        self._sigma, self._history = sigma, min(history, window)
        self._seen = {name: deque[float](maxlen=window) for name in ("loss", "norm of the gradient")}

    def look(self, update: int, loss: float, norm: float) -> Signal | None:
        said = []
        for (name, values), value in zip(self._seen.items(), (loss, norm), strict=True):
            if len(values) < self._history:
                continue
            limit = fmean(values) + self._sigma * stdev(values)
            if value > limit:
                said.append(f"the {name} is {value:.6g}, above {limit:.6g}")
        return Signal("spike", f"{' and '.join(said)} at update {update}", update) if said else None

    def remember(self, loss: float, norm: float) -> None:
        for values, value in zip(self._seen.values(), (loss, norm), strict=True):
            values.append(value)


class Leaps:
    """The same for reinforcement learning: a norm of the gradient far above the largest of its window."""

    def __init__(self, window: int = 128, history: int = 64):
        self._history, self._norms = min(history, window), deque[float](maxlen=window)

    def look(self, update: int, loss: float, norm: float) -> Signal | None:
        del loss
        if len(self._norms) < self._history or norm <= LEAP * max(self._norms):
            return None
        limit = LEAP * max(self._norms)
        return Signal("spike", f"the norm of the gradient is {norm:.6g}, above {limit:.6g} at update {update}", update)

    def remember(self, loss: float, norm: float) -> None:
        del loss
        self._norms.append(norm)
