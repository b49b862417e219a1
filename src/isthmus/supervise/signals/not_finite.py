"""A loss or a gradient that is no number."""

from __future__ import annotations

import math

from isthmus.supervise.signals import Signal


def look(update: int, loss: float, norm: float) -> Signal | None:
    bad = [
        f"the {name} is {value}"
        for name, value in (("loss", loss), ("norm of the gradient", norm))
        if not math.isfinite(value)
    ]
    return Signal("not finite", f"{' and '.join(bad)} at update {update}", update) if bad else None
