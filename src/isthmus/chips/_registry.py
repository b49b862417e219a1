"""Which chips there are: every file of this folder without a leading underscore is one vendor."""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from types import MappingProxyType

from isthmus.chips._facts import Chip, Vendor
from isthmus.errors import IsthmusError


@functools.cache
def vendors() -> MappingProxyType[str, Vendor]:
    """Every vendor's file of this folder, by file name."""
    names = [module.name for module in pkgutil.iter_modules(importlib.import_module(__package__).__path__) if not module.ispkg]
    files = sorted(name for name in names if not name.startswith("_"))
    return MappingProxyType({name: importlib.import_module(f"{__package__}.{name}").VENDOR for name in files})


@functools.cache
def load_chips() -> MappingProxyType[str, Chip]:
    """Every known chip by slug, vendor by vendor."""
    return MappingProxyType({chip.slug: chip for vendor in vendors().values() for chip in vendor.chips()})


def get_chip(slug: str) -> Chip:
    """The facts of one chip. Raises IsthmusError with the nearest name for one that is not known."""
    chips = load_chips()
    if slug not in chips:
        close = difflib.get_close_matches(slug.lower(), chips, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise IsthmusError(f"unknown chip {slug!r}; {hint}`isthmus chips` lists all {len(chips)}")
    return chips[slug]


def vendor_of(slug: str) -> Vendor:
    """The vendor's file that describes a chip. Raises IsthmusError for an unknown chip."""
    get_chip(slug)
    return next(vendor for vendor in vendors().values() if any(chip.slug == slug for chip in vendor.chips()))
