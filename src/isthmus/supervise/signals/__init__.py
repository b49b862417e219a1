"""What can be seen of a step that goes wrong: a file for each kind of signal.

Each is told what it needs and says None, or a Signal. None of them reads a clock or a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SignalKind = Literal[
    "ended",
    "no beat",
    "not finite",
    "spike",
    "slow",
    "no progress",
    "drift",
    "mismatch",
    "save failed",
    "repeat differs",
    "asked to stop",
]


@dataclass(frozen=True)
class Signal:
    """Something that went wrong. `update` counts from 1, 0: before the first. `culprits` are ranks, where known."""

    kind: SignalKind
    detail: str
    update: int = 0
    culprits: tuple[int, ...] = ()
