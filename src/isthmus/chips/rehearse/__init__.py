"""Rehearsal: the rules of a chip that is not here, enforced on the CPU.

Each folder with tables is one family of chips: its operators, dtypes, collectives, links, failure rates and numerics,
every row with a source and a standing (documented, read in code, assumed). A rehearsal finds out what would break; it
never speaks for the vendor.
Loading this package does not load torch; what enforces the rules, in dispatch.py, does.
"""

from __future__ import annotations

from isthmus.chips._registry import get_chip, vendor_of
from isthmus.chips.rehearse.tables import Emulation, Profile, RehearsalRefused, Tally, families, load_profile
from isthmus.errors import IsthmusError

__all__ = ["Emulation", "Profile", "RehearsalRefused", "Tally", "can_rehearse", "profile_of"]


def can_rehearse(chip: str) -> bool:
    """Whether there are tables of what this chip's software supports."""
    return vendor_of(chip).rehearsal in families()


def profile_of(chip: str) -> Profile:
    """The tables of a chip. Raises IsthmusError for a chip that has none."""
    family = vendor_of(chip).rehearsal
    if family is None or family not in families():
        raise IsthmusError(f"{chip} cannot be rehearsed: there are no tables of what its software supports")
    return load_profile(chip, family, get_chip(chip).generation)
