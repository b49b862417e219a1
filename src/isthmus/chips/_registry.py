"""Which chips there are: every file of this folder without a leading underscore is one vendor."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from types import MappingProxyType

from isthmus.chips._facts import Chip, Vendor
from isthmus.errors import IsthmusError, suggestion

PACKAGE = "isthmus.chips"


@functools.cache
def vendors() -> MappingProxyType[str, Vendor]:
    """Every vendor's file of this folder, by file name."""
    modules = pkgutil.iter_modules(importlib.import_module(PACKAGE).__path__)
    files = sorted(one.name for one in modules if not one.ispkg and not one.name.startswith("_"))
    return MappingProxyType({name: importlib.import_module(f"{PACKAGE}.{name}").VENDOR for name in files})


@functools.cache
def load_chips() -> MappingProxyType[str, Chip]:
    """Every known chip by slug, vendor by vendor."""
    return MappingProxyType({chip.slug: chip for vendor in vendors().values() for chip in vendor.chips()})


def get_chip(slug: str) -> Chip:
    """The facts of one chip. Raises IsthmusError with the nearest name for one that is not known."""
    chips = load_chips()
    if slug not in chips:
        listed = f"`isthmus chips` lists all {len(chips)}"
        raise IsthmusError(f"unknown chip {slug!r}{suggestion(slug, chips, listed)}")
    return chips[slug]


def vendor_of(slug: str) -> Vendor:
    """The vendor's file that describes a chip. Raises IsthmusError for an unknown chip."""
    get_chip(slug)
    return next(vendor for vendor in vendors().values() if any(chip.slug == slug for chip in vendor.chips()))
