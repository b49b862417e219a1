"""A step that is started again and again and gets no further."""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.supervise.signals import Signal


def restarts_without_progress(checkpoints: Sequence[int], now: int) -> int:
    """How many of the last restarts began at or after the checkpoint `now`. `checkpoints` has that of each restart."""
    count = 0
    for step in reversed(checkpoints):
        if step < now:
            break
        count += 1
    return count


def look(checkpoints: Sequence[int], now: int, most: int) -> Signal | None:
    """None while there were at most `most` restarts since the checkpoint `now` became the newest."""
    count = restarts_without_progress(checkpoints, now)
    if count < most:
        return None
    return Signal("no progress", f"{count} restarts without a checkpoint after update {now}", now)
