"""The forecast as a run keeps it: each act on each pool of its place, with figures."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from isthmus.forecast.choose import options_of
from isthmus.forecast.goodput import HOUR
from isthmus.forecast.outlook import Option, Outlook, Outlooks, Span
from isthmus.forecast.sensitivity import break_evens, named
from isthmus.records import Flip, ForecastAct, ForecastOption
from isthmus.run import Figure, Kind


@dataclass(frozen=True)
class Teller:
    """What is asked of an outlook: the pools that the plan chose, prices per chip-hour by pool, and their currency."""

    outlooks: Outlooks
    outlook: Outlook
    train: str
    rollout: str
    prices: Mapping[str, float]
    currency: str

    def acts(self) -> list[ForecastAct]:
        """What each act would take on each pool of its place, the other pool that it holds being the chosen one."""
        found: list[ForecastAct] = []
        flips = self._flips()
        for step in self.outlooks.work.steps:
            options = [option for option in self.outlook.options if option.step == step.name]
            learners = [one for one in options if step.kind != "rl" or one.generator == self.rollout]
            found.append(self._act(step.name, learners, False, flips))
            if step.kind == "rl":
                generators = [one for one in options if one.pool == self.train]
                found.append(self._act(f"{step.name}-rollouts", generators, True, flips))
        return found

    def _flips(self) -> dict[tuple[str, str], list[Flip]]:
        """By step and the pair that was not chosen."""
        chosen = {id(option) for option in options_of(self.outlook, self.train, self.rollout)}
        options = [replace(one, chosen=id(one) in chosen and one.hours is not None) for one in self.outlook.options]
        found: dict[tuple[str, str], list[Flip]] = {}
        for even in break_evens(self.outlooks, replace(self.outlook, options=options)):
            sides = {name for pair in (even.chosen, even.other) for name in pair.split("+")}
            # With two pools a ratio of prices is one of averages, and says no price of either.
            if even.value is not None and not (even.of == "price" and len(sides) > 2):
                kind = self._kind(sides)
                at = Figure(value=even.value, unit="", kind=kind, source=f"break-even: {even.meaning}")
                found.setdefault((even.step, even.other), []).append(Flip(what=even.of, at=at))
        return found

    def _act(
        self, name: str, options: Sequence[Option], generates: bool, flips: Mapping[tuple[str, str], list[Flip]]
    ) -> ForecastAct:
        pools = []
        for option in options:
            pool, beside = (option.generator, option.pool) if generates else (option.pool, option.generator)
            assert pool is not None
            told = self._told(option, pool, None if beside == pool else beside, again=generates and beside == pool)
            pools.append(told.model_copy(update={"flips": flips.get((option.step, named(option)), [])}))
        return ForecastAct(name=name, pools=pools)

    def _kind(self, pools: Collection[str]) -> Kind:
        return "rehearsed" if any(self.outlooks.work.pools[name].rehearsed for name in pools) else "forecast"

    def _told(self, option: Option, pool: str, beside: str | None, again: bool) -> ForecastOption:
        """Chip-hours and money are of the act's own pool; the act beside it has those of the other. They are zero for
        rollouts on a pool that learns as well (`again`): the learning has them."""
        if option.hours is None:
            return ForecastOption(pool=pool, beside=beside, why=option.why)
        pools, price = self.outlooks.work.pools, self.prices.get(pool)
        kind = self._kind([name for name in (pool, beside) if name])
        source, chips = f"forecast: {option.basis}; P50, with P10 and P90", 0 if again else pools[pool].count
        asked = f"{source}; {price} {self.currency} per chip-hour"
        return ForecastOption(
            pool=pool,
            beside=beside,
            seconds=figure_of(option.hours, "s", source, kind, HOUR),
            chip_hours=figure_of(option.hours, "chip-hours", source, kind, chips),
            money=None if price is None else figure_of(option.hours, self.currency, asked, kind, chips * price),
        )


def figure_of(span: Span | None, unit: str, source: str, kind: Kind = "forecast", factor: float = 1.0) -> Figure:
    """P50 as the value, P10 and P90 as its ends; unknown if there is none."""
    if span is None:
        return Figure(value=None, unit=unit, kind=kind, source=source)
    low, middle, high = (factor * end for end in (span.low, span.middle, span.high))
    return Figure(value=middle, unit=unit, kind=kind, source=source, low=low, high=high)
