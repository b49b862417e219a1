"""An update that is computed twice and comes out differently."""

from __future__ import annotations

import math

from isthmus.supervise.signals import Signal


def is_due(update: int, every: int | None) -> bool:
    """Whether an update, counted from 1, is computed twice."""
    return every is not None and update % every == 0


def look(update: int, first: tuple[float, float], second: tuple[float, float], band: float) -> Signal | None:
    """(loss, norm of the gradient) of the same batch with the same weights. `band` is relative; 0: the same bits."""
    for name, one, other in zip(("loss", "norm of the gradient"), first, second, strict=True):
        if one == other or (math.isnan(one) and math.isnan(other)):
            continue
        gap = abs(one - other) / max(abs(one), abs(other))
        if not gap <= band:
            return Signal(
                "repeat differs", f"the {name} of update {update} is {one:.9g}, and {other:.9g} again", update
            )
    return None
