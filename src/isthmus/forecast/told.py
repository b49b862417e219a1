"""The forecast as a run keeps it: each act on each pool of its place, with figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from isthmus.forecast.goodput import HOUR
from isthmus.forecast.outlook import Option, Outlook, Span
from isthmus.forecast.work import Work
from isthmus.records import ForecastAct, ForecastOption
from isthmus.run import Figure, Kind


def acts(work: Work, outlook: Outlook, train: str, rollout: str, prices: dict[str, float], currency: str):
    """What each act would take on each pool of its place, the other pool that it holds being the chosen one."""
    found: list[ForecastAct] = []
    for step in work.steps:
        options = [option for option in outlook.options if option.step == step.name]
        learners = [one for one in options if step.kind != "rl" or one.generator == rollout]
        found.append(_act(step.name, learners, False, work, prices, currency))
        if step.kind == "rl":
            generators = [one for one in options if one.pool == train]
            found.append(_act(f"{step.name}-rollouts", generators, True, work, prices, currency))
    return found


def _act(
    name: str, options: list[Option], generates: bool, work: Work, prices: dict[str, float], currency: str
) -> ForecastAct:
    pools = []
    for option in options:
        pool, beside = (option.generator, option.pool) if generates else (option.pool, option.generator)
        assert pool is not None
        pools.append(_told(option, pool, None if beside == pool else beside, work, prices.get(pool), currency))
    return ForecastAct(name=name, pools=pools)


def _told(
    option: Option, pool: str, beside: str | None, work: Work, price: float | None, currency: str
) -> ForecastOption:
    """Chip-hours and money are of the act's own pool; the act beside it has those of the other."""
    if option.hours is None:
        return ForecastOption(pool=pool, beside=beside, why=option.why)
    held = [work.pools[name] for name in (pool, beside) if name is not None]
    kind: Kind = "rehearsed" if any(one.rehearsed for one in held) else "forecast"
    chips, source = work.pools[pool].count, f"forecast: {option.basis}; P50, with P10 and P90"

    def figure(factor: float, unit: str, more: str = "") -> Figure:
        assert option.hours is not None
        return figure_of(option.hours, unit, source + more, kind, factor)

    return ForecastOption(
        pool=pool,
        beside=beside,
        seconds=figure(HOUR, "s"),
        chip_hours=figure(chips, "chip-hours"),
        money=None if price is None else figure(chips * price, currency, f"; {price:g} {currency} per chip-hour"),
    )


def figure_of(span: Span | None, unit: str, source: str, kind: Kind = "forecast", factor: float = 1.0) -> Figure:
    """P50 as the value, P10 and P90 as its ends; unknown if there is none."""
    if span is None:
        return Figure(value=None, unit=unit, kind=kind, source=source)
    low, middle, high = (factor * end for end in (span.low, span.middle, span.high))
    return Figure(value=middle, unit=unit, kind=kind, source=source, low=low, high=high)
