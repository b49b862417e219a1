"""Chips: their declared facts, what they can run, and which of them are here.

Every file in this folder without a leading underscore is one vendor: it defines `VENDOR`. Loading this package does not
load torch; looking for devices may.
"""

from __future__ import annotations

from collections.abc import Collection

from rich.console import RenderableType

from isthmus.chips._facts import FIGURES, TEXTS, Capabilities, Chip, Found, Presence, Vendor
from isthmus.chips._failures import FailureRate, failure_rates
from isthmus.chips._published import published_rows
from isthmus.chips._registry import get_chip, load_chips, vendor_of, vendors
from isthmus.chips._rules import Rule, rules_for
from isthmus.chips._servers import Reading, read_by, servers
from isthmus.chips._show import describe_chip, describe_chips
from isthmus.chips._stability import StabilityRule, stability_rule
from isthmus.chips._weights import fault_weights, looked_for
from isthmus.chips.rehearse import can_rehearse
from isthmus.chips.rehearse.faults import parse_fault
from isthmus.errors import IsthmusError
from isthmus.pools import Pool, get_pool, placed_pools
from isthmus.recipe.schema import Recipe

__all__ = [
    "FIGURES",
    "TEXTS",
    "Capabilities",
    "Chip",
    "FailureRate",
    "Found",
    "Presence",
    "Reading",
    "Rule",
    "StabilityRule",
    "Vendor",
    "can_rehearse",
    "check_available",
    "check_names",
    "check_tables",
    "describe",
    "describe_all",
    "device_for",
    "device_of",
    "environment_of",
    "failure_rates",
    "fault_weights",
    "get_chip",
    "is_here",
    "load_chips",
    "looked_for",
    "present",
    "published_rows",
    "read_by",
    "resources_of",
    "rules_for",
    "servers",
    "stability_rule",
    "vendor_of",
    "vendors",
]


def device_for(slug: str) -> str:
    """The torch device type of a chip, such as "cpu"."""
    return vendor_of(slug).device


def device_of(pool: Pool) -> str:
    """The torch device type on which a pool's work runs here: that of its chip, or the CPU if it is not here."""
    return "cpu" if pool.rehearsed or pool.elsewhere else device_for(pool.chip)


def resources_of(pool: Pool) -> dict[str, float]:
    """What each process of a pool on nodes takes of its node, by Ray's names: as the recipe says, else one chip.

    Raises IsthmusError if the recipe does not say it and Ray has no name of its own for the chip.
    """
    assert pool.nodes is not None
    if pool.nodes.resources is not None:
        return pool.nodes.resources
    name = vendor_of(pool.chip).ray_resource
    if name is None:
        raise IsthmusError(
            f"Ray finds no {pool.chip} by itself: start its nodes with --resources, and write what a process takes, "
            f"as in pools.{pool.name}.ray.resources = {{ NAME = 1 }}"
        )
    return {name: 1.0}


def environment_of(device: str) -> dict[str, str]:
    """Variables to set before a process starts that uses devices of a torch device type."""
    found: dict[str, str] = {}
    for vendor in vendors().values():
        if vendor.device == device:
            found |= vendor.environment
    return found


def present() -> Presence:
    """Every device of this machine, and what seems to be here but cannot be used. Loads torch."""
    looks = [vendor.detect() for vendor in vendors().values()]
    return Presence(
        tuple(found for look in looks for found in look.found),
        tuple(problem for look in looks for problem in look.problems),
    )


def is_here(pool: Pool) -> bool:
    """Whether all chips of a pool are on this machine."""
    found = vendor_of(pool.chip).detect().found
    return sum(one.chip == pool.chip for one in found) >= pool.count


def check_names(recipe: Recipe) -> None:
    """Raise IsthmusError if a pool names a chip or a fault that is not known, or rehearses a chip without tables."""
    for name in recipe.pools:
        pool = get_pool(recipe, name)
        get_chip(pool.chip)
        for fault in recipe.pools[name].faults:
            parse_fault(fault)
        if pool.rehearsed:
            check_tables(pool.chip, f"the pool {name!r} rehearses {pool.chip}, but ")


def check_tables(slug: str, why: str = "") -> None:
    """Raise IsthmusError, with the chips that have them, for a chip without tables of what its software supports."""
    get_chip(slug)
    if not can_rehearse(slug):
        able = ", ".join(one for one in load_chips() if can_rehearse(one))
        raise IsthmusError(
            f"{why}there are no tables of what the software of {slug} supports. Chips that can be rehearsed: {able}. "
            "docs/adding-a-chip.md says how to add tables."
        )


def check_available(recipe: Recipe, pools: Collection[str] | None = None) -> None:
    """Raise IsthmusError, with what is here instead, unless every pool that the recipe places is here, elsewhere, on
    nodes of a cluster or rehearsed.

    `pools` are the names of those that are wanted here; all of them if it is None.
    """
    check_names(recipe)
    for pool in placed_pools(recipe):
        if pools is not None and pool.name not in pools:
            continue
        if not pool.rehearsed and not pool.elsewhere and pool.nodes is None and not is_here(pool):
            raise IsthmusError(_not_here(pool))


def _not_here(pool: Pool) -> str:
    look = present()
    here = ", ".join(f"{one.chip or 'an unlisted ' + one.vendor + ' chip'} ({one.name})" for one in look.found)
    lines = [
        f"the pool {pool.name!r} wants {pool.count} x {pool.chip}, which this machine does not have.",
        f"Here: {here}.",
    ]
    lines += [f"Note: {problem}." for problem in look.problems]
    if can_rehearse(pool.chip):
        lines.append(f"To rehearse it on the CPU, write `rehearsed = true` under [pools.{pool.name}].")
    lines.append(
        "Or run this stage on the machine that has the chip, with a copy of the run folder, and bring back what"
    )
    lines.append("it left: isthmus collect FOLDER (docs/apart.md).")
    return "\n".join(lines)


def describe_all() -> RenderableType:
    """A table of every known chip, for `isthmus chips`."""
    return describe_chips(list(load_chips().values()))


def describe(slug: str) -> RenderableType:
    """Every fact of one chip with its source, for `isthmus chips NAME`."""
    return describe_chip(get_chip(slug), device_for(slug), can_rehearse(slug))
