"""A choice among the options of a forecast by what the recipe's owner aims at, and what lost, with its numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from isthmus.errors import IsthmusError
from isthmus.forecast.outlook import Option, Outlook

Aim = Literal["order", "time", "cost"]
Objection = Callable[[Option], str | None]


@dataclass(frozen=True)
class Choice:
    """The option that a step gets, None if it has none, and of each other one why not."""

    option: Option | None
    lost: list[str]


def choose(outlook: Outlook, aim: Aim, objection: Objection = lambda option: None) -> dict[str, Choice]:
    """The best option of each step at P50: the first of the order, the soonest, or the cheapest.

    `objection` says why an option may not be taken: a verdict, a rule, a budget. What the forecast knows no hours of is
    never taken, and so no rehearsal is. Raises IsthmusError for "cost" where an option that could be taken has none.
    """
    return {
        step: _best([option for option in outlook.options if option.step == step], aim, objection)
        for step in dict.fromkeys(option.step for option in outlook.options)
    }


def _best(options: list[Option], aim: Aim, objection: Objection) -> Choice:
    why = {id(option): option.why if option.hours is None else objection(option) for option in options}
    able = [option for option in options if why[id(option)] is None]
    best = able[0] if aim == "order" and able else min(able, key=lambda option: _price_of(option, aim), default=None)
    lost = [f"{_name(option)}: {why[id(option)] or _told(option, aim)}" for option in options if option is not best]
    return Choice(best, lost)


def _price_of(option: Option, aim: Aim) -> float:
    """What is to be small, at P50."""
    assert option.hours is not None
    if aim == "time":
        return option.hours.middle
    if option.cost is None:
        raise IsthmusError(f"to choose by cost, {_name(option)} needs a price: give --price POOL=NUMBER for each pool")
    return option.cost.middle


def _told(option: Option, aim: Aim) -> str:
    assert option.hours is not None
    cost = "" if option.cost is None else f", cost {option.cost.middle:,.0f}"
    better = {"order": "comes later in the order", "time": "takes longer", "cost": "costs more"}[aim]
    return f"{better}: {option.hours.middle:,.3g} h [{option.hours.low:,.3g}, {option.hours.high:,.3g}]{cost}"


def _name(option: Option) -> str:
    return option.pool if option.generator in (None, option.pool) else f"{option.pool} with {option.generator}"
