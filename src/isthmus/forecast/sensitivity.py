"""What matters, and where a decision flips: a tornado of the total, and break-even values between two pools."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from isthmus.forecast.outlook import Option, Outlook, Outlooks
from isthmus.forecast.pace import PLAIN, Knobs, Pool
from isthmus.records import FlipOf

# Low and high factor on each assumption: about P10 and P90 of what it may be.
RANGES: dict[str, tuple[float, float]] = {
    "efficiency": (0.7, 1.43),
    "lengths": (0.67, 2.0),
    "failures": (0.2, 5.0),
    "links": (0.5, 2.0),
    "memory": (0.8, 1.25),
    "crossing": (0.25, 4.0),
    "save": (0.33, 3.0),
    "restart": (0.33, 3.0),
    "count": (0.75, 1.25),
}


@dataclass(frozen=True)
class Bar:
    """Hours of the whole recipe at P50 with one assumption low and high."""

    assumption: str
    low_factor: float
    high_factor: float
    at_low_h: float
    at_high_h: float

    @property
    def reach(self) -> float:
        return abs(self.at_high_h - self.at_low_h)


@dataclass(frozen=True)
class BreakEven:
    """Where a step's choice flips: what would have to be `value` times as large on the chosen pool for both to be even.

    Of "price" it is the chosen pool's price per chip-hour over the other's. None: nothing within reach flips it.
    """

    step: str
    chosen: str
    other: str
    of: FlipOf
    value: float | None
    meaning: str


def tornado(outlooks: Outlooks, outlook: Outlook) -> list[Bar]:
    """The assumptions by how much the end of the recipe moves with them, those first that move it most.

    On the pools that the recipe chooses as it stands. Empty if a step cannot run anywhere.
    """
    chosen = outlook.chosen()
    if len(chosen) < len(outlooks.work.steps):
        return []
    bars = [
        Bar(name, low, high, _total(outlooks, chosen, _turn(name, low)), _total(outlooks, chosen, _turn(name, high)))
        for name, (low, high) in RANGES.items()
    ]
    return sorted(bars, key=lambda bar: bar.reach, reverse=True)


def break_evens(outlooks: Outlooks, outlook: Outlook) -> list[BreakEven]:
    """For each step and each other pool that can run it: efficiency, failures, links, price at which both are even."""
    options = outlook.options
    found: list[BreakEven] = []
    for chosen in (option for option in options if option.chosen):
        for other in options:
            if other.step == chosen.step and not other.chosen and other.hours is not None:
                found += _between(outlooks, chosen, other)
    return found


def _between(outlooks: Outlooks, chosen: Option, other: Option) -> list[BreakEven]:
    step = outlooks.step(chosen.step)
    pair = _pair(outlooks, chosen)
    aim = outlooks.hours(step, *_pair(outlooks, other), PLAIN)
    assert aim is not None and chosen.chip_hours is not None and other.chip_hours is not None
    # Where only the pool that generates differs, it is the one to ask about.
    turned = chosen.pool if chosen.pool != other.pool else chosen.generator
    names = (chosen.step, named(chosen), named(other))

    def hours(name: str, factor: float) -> float:
        found = outlooks.hours(step, *pair, replace(Knobs(of=turned), **{name: factor}))
        return float("inf") if found is None else found

    price = other.chip_hours.middle / chosen.chip_hours.middle
    return [
        BreakEven(
            *names,
            "efficiency",
            _crossing(lambda f: hours("efficiency", f), aim, 0.01, 100.0),
            f"times the forecast efficiency of {turned}",
        ),
        BreakEven(
            *names,
            "failures",
            _crossing(lambda f: hours("failures", f), aim, 0.01, 1000.0),
            f"times the expected failures of {turned}",
        ),
        BreakEven(
            *names,
            "links",
            _crossing(lambda f: hours("links", f), aim, 0.01, 100.0),
            f"times the link speed of {turned}",
        ),
        BreakEven(*names, "price", price, f"price of a chip-hour of {named(chosen)} over that of {named(other)}"),
    ]


def named(option: Option) -> str:
    """The pools of an option."""
    return option.pool if option.generator in (None, option.pool) else f"{option.pool}+{option.generator}"


def _pair(outlooks: Outlooks, option: Option) -> tuple[Pool, Pool | None]:
    return outlooks.pools[option.pool], outlooks.pools[option.generator] if option.generator is not None else None


def _crossing(hours: Callable[[float], float], aim: float, low: float, high: float) -> float | None:
    """The factor between `low` and `high` at which monotonous hours are `aim`, by bisection; None if they never are."""
    at_low, at_high = hours(low) - aim, hours(high) - aim
    if at_low * at_high > 0.0:
        return None
    for _ in range(20):
        middle = (low * high) ** 0.5
        if (hours(middle) - aim) * at_low > 0.0:
            low = middle
        else:
            high = middle
    return (low * high) ** 0.5


def _turn(name: str, factor: float) -> Knobs:
    return replace(PLAIN, **{name: factor})


def _total(outlooks: Outlooks, chosen: list[Option], knobs: Knobs) -> float:
    hours = [outlooks.hours(outlooks.step(option.step), *_pair(outlooks, option), knobs) for option in chosen]
    return sum(one if one is not None else float("inf") for one in hours)
