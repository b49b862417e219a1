"""Which probes a budget buys: those that tell most for their price, by what kinds of faults are met in the field."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.chips import fault_weights
from isthmus.errors import IsthmusError
from isthmus.probes.contract import Probe, Setting
from isthmus.records import Skipped

AGAIN = 1e-3
"""What it is worth to look once more for a kind of fault that another probe looks for, as a share of the first look."""
_UNITS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "": 1.0}


@dataclass(frozen=True)
class Choice:
    """The probes that are run, cheapest first, with their prices in seconds; and those that are not."""

    chosen: list[tuple[Probe, float]]
    skipped: list[Skipped]

    @property
    def seconds(self) -> float:
        return sum(price for _, price in self.chosen)


def choose(probes: Sequence[Probe], setting: Setting, budget_s: float | None) -> Choice:
    """Without a budget all probes; with one, greedily the probe that adds most per second, while it lasts.

    They run cheapest first: what is broken shows soonest in what is cheap.

    A probe is worth the share of the faults of its aspect that it can see and that no chosen one sees yet.
    """
    able = [probe for probe in probes if setting.pool.ranks >= probe.min_ranks]
    prices = {probe.name: max(probe.price(setting), 1e-3) for probe in able}
    able.sort(key=lambda probe: prices[probe.name])
    if budget_s is None:
        return Choice([(probe, prices[probe.name]) for probe in able], [])
    taken: list[Probe] = []
    left, open_ones = budget_s, list(able)
    while affordable := [probe for probe in open_ones if prices[probe.name] <= left]:
        seen = {(probe.aspect, kind) for probe in taken for kind in probe.finds}
        best = max(affordable, key=lambda probe: _worth(probe, seen) / prices[probe.name])
        taken.append(best)
        open_ones.remove(best)
        left -= prices[best.name]
    seen = {(probe.aspect, kind) for probe in taken for kind in probe.finds}
    skipped = [_skipped(probe, prices[probe.name], seen, budget_s) for probe in open_ones]
    return Choice([(probe, prices[probe.name]) for probe in able if probe in taken], skipped)


def _worth(probe: Probe, seen: set[tuple[str, str]]) -> float:
    weights = fault_weights().get(probe.aspect, {})
    return sum(weights.get(kind, 0.0) * (AGAIN if (probe.aspect, kind) in seen else 1.0) for kind in probe.finds)


def _skipped(probe: Probe, price: float, seen: set[tuple[str, str]], budget_s: float) -> Skipped:
    unseen = [kind for kind in probe.finds if (probe.aspect, kind) not in seen]
    spent = f"the budget of {budget_s:g} s was spent on probes that tell more"
    why = spent if seen else f"the budget of {budget_s:g} s buys no probe"
    return Skipped(probe=probe.name, aspect=probe.aspect, price_s=price, why=why, unseen=unseen)


def parse_seconds(text: str) -> float:
    """Seconds of a duration such as `30s`, `2min` or `1.5h`. Raises IsthmusError for another text."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text)
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise IsthmusError(f"{text!r} is not a duration; write for example 30s, 2min or 1.5h")
    return float(match[1]) * _UNITS[match[2]]
