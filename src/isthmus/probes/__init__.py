"""Probes: what can be found out about a pool in seconds. Each returns what it saw; a stage draws the conclusion."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from isthmus.probes.contract import Probe

LIVE: tuple[str, ...] = ("software", "links", "stability")
"""The modules of live probes, in the order in which they run."""
PRELOAD = tuple(
    f"isthmus.probes.{name}"
    for name in ("soak_rank", "portable.collectives", "portable.known_answers", "portable.operators", "portable.traps")
)
"""What their ranks load."""


def live_probes() -> list[Probe]:
    """Every live probe, in order."""
    return [probe for name in LIVE for probe in importlib.import_module(f"isthmus.probes.{name}").PROBES]
