"""The end of a process that had more to do."""

from __future__ import annotations

from isthmus.supervise.signals import Signal


def look(manner: str, update: int, culprits: tuple[int, ...]) -> Signal:
    """`manner` says how it ended, such as: rank 1 stopped: killed by signal 9 (SIGKILL)."""
    return Signal("ended", manner, update, culprits)
