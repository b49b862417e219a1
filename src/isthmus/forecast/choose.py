"""A choice of pools by what the recipe's owner aims at, and what lost, with its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Protocol

from isthmus.errors import GateRefused
from isthmus.forecast.outlook import Option, Outlook, Span, added
from isthmus.forecast.work import Work

Objection = Callable[[str, str], str | None]
"""Why a stage ("train" or "rollout") may not be on a pool; None if it may."""


class Aim(Protocol):
    """What [aim] of a recipe says."""

    @property
    def choose(self) -> str: ...
    @property
    def currency(self) -> str: ...
    @property
    def least(self) -> Mapping[str, float]: ...
    @property
    def max_hours(self) -> float | None: ...
    @property
    def max_cost(self) -> float | None: ...


@dataclass(frozen=True)
class Pair:
    """Pools for all that trains and all that generates. Hours are None, with `why`, where the forecast knows none.

    `why` is otherwise what stands against it, or by what it lost; empty for the one that is chosen. `shares` of the
    chip-hours are by vendor. `keeps_aim`: it is known to break no limit of the aim.
    """

    train: str
    rollout: str
    hours: Span | None = None
    chip_hours: Span | None = None
    cost: Span | None = None
    shares: dict[str, float] = field(default_factory=dict)
    why: str = ""
    chosen: bool = False
    keeps_aim: bool = True


def choose(work: Work, outlook: Outlook, aim: Aim, objection: Objection, vendors: Mapping[str, str]) -> list[Pair]:
    """Every pair of pools in the recipe's order, one of them chosen. `vendors` are those of the pools' chips.

    Where nothing is asked that needs a number and no pair that may has one, the order decides. Raises GateRefused, with
    what stands against each pair, if none may be chosen.
    """
    pairs = [_pair(work, outlook, one, other, vendors) for one, other in product(work.train, work.rollout)]
    objected = [_objected(pair, objection) for pair in pairs]
    broken = [_broken(pair, aim) for pair in pairs]
    pairs = [replace(pair, keeps_aim=why is None) for pair, why in zip(pairs, broken, strict=True)]
    barred = [why or limit for why, limit in zip(objected, broken, strict=True)]
    able = [pair for pair, why in zip(pairs, barred, strict=True) if why is None]
    if not able:
        raise GateRefused(_nowhere(pairs, barred))
    best = _best(able, aim)
    told = [why or _lost(pair, best, aim) for pair, why in zip(pairs, barred, strict=True)]
    return [replace(pair, why=why, chosen=pair is best) for pair, why in zip(pairs, told, strict=True)]


def options_of(outlook: Outlook, train: str, rollout: str) -> list[Option]:
    """The option of each step on a pair of pools."""
    return [option for option in outlook.options if (option.pool, option.generator) in _held(option, train, rollout)]


def _held(option: Option, train: str, rollout: str) -> tuple[tuple[str, str | None], ...]:
    if option.kind == "sample":
        return ((rollout, None),)
    return ((train, rollout),) if option.kind == "rl" else ((train, None),)


def _pair(work: Work, outlook: Outlook, train: str, rollout: str, vendors: Mapping[str, str]) -> Pair:
    options = options_of(outlook, train, rollout)
    for name in {option.pool for option in options} | {option.generator for option in options} - {None}:
        if name is not None and work.pools[name].rehearsed:
            return Pair(train, rollout, why=f"{name} is rehearsed: what it takes says nothing of its chip")
    unknown = next((f"{option.step}: {option.why}" for option in options if option.hours is None), "")
    if unknown:
        return Pair(train, rollout, why=unknown)
    held = _chip_hours(work, options, vendors)
    whole = sum(held.values())
    return Pair(
        train,
        rollout,
        hours=added([option.hours for option in options]),
        chip_hours=added([option.chip_hours for option in options]),
        cost=added([option.cost for option in options]),
        shares={vendor: part / whole for vendor, part in held.items()},
    )


def _chip_hours(work: Work, options: Sequence[Option], vendors: Mapping[str, str]) -> dict[str, float]:
    held: dict[str, float] = {}
    for option in options:
        assert option.hours is not None
        for name in dict.fromkeys((option.pool, option.generator or option.pool)):
            held[vendors[name]] = held.get(vendors[name], 0.0) + option.hours.middle * work.pools[name].count
    return held


def _objected(pair: Pair, objection: Objection) -> str | None:
    found = [(pool, objection(stage, pool)) for stage, pool in (("train", pair.train), ("rollout", pair.rollout))]
    return "; ".join(f"{pool}: {why}" for pool, why in dict.fromkeys(found) if why) or None


def _broken(pair: Pair, aim: Aim) -> str | None:
    """Which limit of the aim a pair breaks: what is not known keeps to none."""
    if (aim.max_hours or aim.max_cost or aim.least) and pair.hours is None:
        return f"whether it keeps to the aim is not known: {pair.why}"
    if aim.max_hours and pair.hours and pair.hours.high > aim.max_hours:
        return f"takes {pair.hours.high:,.3g} h at P90, above aim.max_hours = {aim.max_hours:g}"
    if pair.hours and pair.cost is None and (aim.max_cost or aim.choose == "cost"):
        return "what it costs is not known: give a price of each of its pools in aim.prices"
    if aim.max_cost and pair.cost and pair.cost.high > aim.max_cost:
        return f"costs {pair.cost.high:,.0f} {aim.currency} at P90, above aim.max_cost = {aim.max_cost:,g}"
    for vendor, least in aim.least.items():
        if (share := pair.shares.get(vendor, 0.0)) < least:
            return f"{share:.0%} of the chip-hours are on chips of {vendor}, below aim.least of {least:.0%}"
    return None


def _best(able: Sequence[Pair], aim: Aim) -> Pair:
    known = [pair for pair in able if pair.hours is not None]
    return able[0] if aim.choose == "order" or not known else min(known, key=lambda pair: _weight(pair, aim))


def _weight(pair: Pair, aim: Aim) -> float:
    span = pair.cost if aim.choose == "cost" else pair.hours
    assert span is not None
    return span.middle


def _lost(pair: Pair, best: Pair, aim: Aim) -> str:
    if pair is best or pair.hours is None:
        return pair.why
    if aim.choose == "order":
        return "comes later in the order"
    one, other = _weight(pair, aim), _weight(best, aim)
    unit = aim.currency if aim.choose == "cost" else "h"
    return f"{'costs' if aim.choose == 'cost' else 'takes'} {one:,.4g} {unit} against {other:,.4g}"


def _nowhere(pairs: Sequence[Pair], barred: Sequence[str | None]) -> str:
    lines = ["no pair of pools of place.train and place.rollout may be chosen:"]
    lines += [
        f"  train on {pair.train}, rollouts on {pair.rollout}: {why}" for pair, why in zip(pairs, barred, strict=True)
    ]
    return "\n".join([*lines, "Loosen [aim], add a pool to [place], or mend what stands against one of these."])
