"""Probes: what can be found out about a pool in seconds. Each returns what it saw; a stage draws the conclusion."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from isthmus.probes.contract import Probe

LIVE: tuple[str, ...] = ("software", "links", "stability")
"""The modules of live probes, in the order in which they run."""
_ON_RANKS = (
    "soak_rank",
    "portable.collectives",
    "portable.known_answers",
    "portable.operators",
    "portable.traps",
    "portable.training",
)
PRELOAD = (*(f"isthmus.probes.{name}" for name in _ON_RANKS), "torch._dynamo")
"""What their ranks load; torch's optimisers load the last one at their first step."""


def live_probes() -> list[Probe]:
    """Every live probe, in order."""
    return [probe for name in LIVE for probe in importlib.import_module(f"isthmus.probes.{name}").PROBES]
