"""A rank that gives no sign of life."""

from __future__ import annotations

from collections.abc import Mapping

from isthmus.launch.beats import Beat
from isthmus.supervise.signals import Signal

UPDATE = "update"
"""The section of a rank that is within its updates; in others it gets more time."""
ROLLOUT = "rollout and update"
"""The section of a step that generates between two updates."""
UNLIMITED = "work without beats"
"""Evaluation, what comes after the last update, and a rank that another one of its step leads."""


def look(beats: Mapping[int, Beat], now: float, started: float, beat_s: float, start_s: float) -> Signal | None:
    """`beats` by rank; `now` and `started` are time.monotonic() of the machine of the ranks, seconds.

    If several ranks are silent, those with the fewest updates are to blame: the others wait for them.
    """
    silent = {
        rank: beat
        for rank, beat in beats.items()
        if beat.section != UNLIMITED and now - max(beat.time, started) > (beat_s if beat.section == UPDATE else start_s)
    }
    if not silent:
        return None
    least = min(beat.step for beat in silent.values())
    culprits = tuple(sorted(rank for rank, beat in silent.items() if beat.step == least))
    quiet = max(now - max(silent[rank].time, started) for rank in culprits)
    named = ", ".join(map(str, culprits))
    where = silent[culprits[0]].section or "its start"
    return Signal("no beat", f"rank {named} gave no sign of life for {quiet:.0f} s in {where}", least, culprits)
