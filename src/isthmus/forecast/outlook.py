"""The forecast of a whole recipe: which step runs where and how long, when it ends, what it costs."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from isthmus.forecast.goodput import HOUR, RESTART_S, SAVE_S, Goodput, goodput
from isthmus.forecast.pace import PLAIN, Knobs, Pace, Pool, PoolFacts, make_pool, step_pace
from isthmus.forecast.work import StepWork, Work

DRAWS = 300
LENGTH_SPREAD = 0.55
"""Spread of the growth of completions during RL, in the logarithm: P10 is no growth, P90 three times. Assumed."""


@dataclass(frozen=True)
class Span:
    """P10, P50 and P90."""

    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class Option:
    """A step on a pool. Hours are on the clock, failures included; None where it cannot run, and `why`.

    `chip_hours` and what follows from them are of both pools where a step has two. `kwh` is None where the power of a
    chip in its data centre is not known, `cost` where a price is not given.
    """

    step: str
    pool: str
    generator: str | None
    chips: int
    hours: Span | None
    why: str
    basis: str
    update_s: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    tokens_per_s: float | None = None
    memory_gb: float | None = None
    goodput: Goodput | None = None
    chip_hours: Span | None = None
    cost: Span | None = None
    kwh: float | None = None
    revert_h: float | None = None
    chosen: bool = False
    kind: str = "sft"


@dataclass(frozen=True)
class Outlook:
    """All options, those that the orders of preference choose, and the end of each chosen step in hours from now."""

    options: list[Option]
    ends: dict[str, Span]
    total: Span | None
    cost: Span | None
    chip_hours: Span | None
    kwh: float | None

    def chosen(self) -> list[Option]:
        return [option for option in self.options if option.chosen]


class Outlooks:
    """Makes outlooks of one recipe, as often as questions ask for one."""

    def __init__(self, work: Work, facts: Mapping[str, PoolFacts]) -> None:
        self.work = work
        self.pools = {name: make_pool(pool, facts.get(name, PoolFacts())) for name, pool in work.pools.items()}

    def outlook(self, knobs: Knobs = PLAIN) -> Outlook:
        """Every step on every pool of its order, and the whole calendar of the first that can run each."""
        options: list[Option] = []
        paced: list[tuple[StepWork, Pool, Pool | None, Pace]] = []
        for step in self.work.steps:
            found = [
                (learner, generator, step_pace(self.work, step, learner, generator, knobs))
                for learner, generator in self._pairs(step)
            ]
            best = next((index for index, (_, _, pace) in enumerate(found) if pace.seconds is not None), None)
            for index, (learner, generator, pace) in enumerate(found):
                options.append(self._option(step, learner, generator, pace, knobs, index == best, found))
                if index == best:
                    paced.append((step, learner, generator, pace))
        ends, total = self._calendar(paced, knobs)
        chosen = [option for option in options if option.chosen]
        complete = len(paced) == len(self.work.steps)
        return Outlook(
            options,
            ends,
            total if complete else None,
            added([option.cost for option in chosen]) if complete else None,
            added([option.chip_hours for option in chosen]) if complete else None,
            _plain_sum([option.kwh for option in chosen]) if complete else None,
        )

    def hours(self, step: StepWork, learner: Pool, generator: Pool | None, knobs: Knobs) -> float | None:
        """Hours of a step at P50, failures included."""
        pace = step_pace(self.work, step, learner, generator, knobs)
        if pace.seconds is None:
            return None
        share = self._goodput(learner, generator, knobs).share
        return (step.updates * pace.seconds / share + pace.fixed_s) / HOUR

    def step(self, name: str) -> StepWork:
        return next(step for step in self.work.steps if step.name == name)

    def _pairs(self, step: StepWork) -> list[tuple[Pool, Pool | None]]:
        learners = self.work.rollout if step.kind == "sample" else self.work.train
        if step.kind != "rl":
            return [(self.pools[name], None) for name in learners]
        return [(self.pools[one], self.pools[other]) for other in self.work.rollout for one in learners]

    def _goodput(self, learner: Pool, generator: Pool | None, knobs: Knobs, rate: float | None = None) -> Goodput:
        """Of both pools together: an interruption of either stops the step."""
        pools = [learner] if generator is None or generator.name == learner.name else [learner, generator]
        rates = [pool.belief().mean * knobs.on(pool.name).failures for pool in pools]
        chips = sum(pool.work.count for pool in pools)
        mean = sum(one * pool.work.count for one, pool in zip(rates, pools, strict=True)) / chips
        save = learner.facts.figures.get("save_s", SAVE_S) * knobs.save
        return goodput(
            mean if rate is None else mean * rate,
            chips,
            save,
            RESTART_S * knobs.restart,
            sum(pool.facts.spares for pool in pools),
        )

    def _option(
        self,
        step: StepWork,
        learner: Pool,
        generator: Pool | None,
        pace: Pace,
        knobs: Knobs,
        chosen: bool,
        others: Sequence[tuple[Pool, Pool | None, Pace]],
    ) -> Option:
        pools = [learner] if generator is None or generator.name == learner.name else [learner, generator]
        chips = sum(pool.work.count for pool in pools)
        common = (step.name, learner.name, generator.name if generator is not None else None, chips)
        if pace.seconds is None:
            return Option(*common, None, pace.why, pace.basis, memory_gb=pace.memory_gb, kind=step.kind)
        hours = self._drawn([(step, learner, generator, pace)], knobs)[0]
        return Option(
            *common,
            hours,
            "",
            pace.basis,
            update_s=pace.seconds,
            parts=pace.parts,
            tokens_per_s=pace.tokens_per_s,
            memory_gb=pace.memory_gb,
            goodput=self._goodput(learner, generator, knobs),
            chip_hours=_scaled(hours, chips),
            cost=_cost(hours, pools),
            kwh=_kwh(hours.middle, pools),
            revert_h=_revert(hours.middle, learner, others, step, self._goodput(learner, generator, knobs)),
            chosen=chosen,
            kind=step.kind,
        )

    def _calendar(
        self, paced: Sequence[tuple[StepWork, Pool, Pool | None, Pace]], knobs: Knobs
    ) -> tuple[dict[str, Span], Span | None]:
        spans = self._drawn(paced, knobs, cumulative=True)
        ends = {step.name: span for (step, *_), span in zip(paced, spans, strict=True)}
        return ends, spans[-1] if spans else None

    def _drawn(
        self, paced: Sequence[tuple[StepWork, Pool, Pool | None, Pace]], knobs: Knobs, cumulative: bool = False
    ) -> list[Span]:
        """Hours of each step, or of all up to it. What is not known of a pool is the same in all its steps."""
        chance = random.Random(17)
        drawn: list[list[float]] = [[] for _ in paced]
        slopes = [self._length_slope(entry, knobs) for entry in paced]
        for _ in range(DRAWS):
            normal = {name: chance.gauss(0.0, 1.0) for name in self.pools}
            rates = {name: pool.belief().draw(chance) / pool.belief().mean for name, pool in self.pools.items()}
            growth, passed = chance.gauss(0.0, LENGTH_SPREAD), 0.0
            for index, (step, learner, generator, pace) in enumerate(paced):
                assert pace.seconds is not None
                exponent = pace.spread * normal[learner.name] + slopes[index] * growth
                useful = step.updates * pace.seconds * math.exp(exponent)
                share = self._goodput(learner, generator, knobs, rates[learner.name]).share
                passed = (passed if cumulative else 0.0) + (useful / share + pace.fixed_s) / HOUR
                drawn[index].append(passed)
        return [_quantiles(values) for values in drawn]

    def _length_slope(self, entry: tuple[StepWork, Pool, Pool | None, Pace], knobs: Knobs) -> float:
        """By how much a step's time grows with its completions, relatively; from shorter ones if longer do not fit."""
        step, learner, generator, pace = entry
        if step.kind != "rl" or pace.seconds is None:
            return 0.0
        for factor in (1.5, 0.75):
            changed = replace(knobs, lengths=knobs.lengths * factor)
            other = step_pace(self.work, step, learner, generator, changed).seconds
            if other is not None:
                return (other / pace.seconds - 1.0) / (factor - 1.0)
        return 0.0


def _revert(
    hours: float,
    learner: Pool,
    others: Sequence[tuple[Pool, Pool | None, Pace]],
    step: StepWork,
    lost: Goodput,
) -> float | None:
    """Hours that the step takes in all if its pool fails half way and the next pool that can takes over."""
    other = next((pace for pool, _, pace in others if pool.name != learner.name and pace.seconds is not None), None)
    if other is None or other.seconds is None:
        return None
    behind = min(lost.interval_s, hours * HOUR) / 2.0
    return hours / 2.0 + (0.5 * step.updates * other.seconds + behind + RESTART_S) / HOUR


def _cost(hours: Span, pools: Sequence[Pool]) -> Span | None:
    rate = 0.0
    for pool in pools:
        if pool.facts.price is None:
            return None
        rate += pool.facts.price * pool.work.count
    return _scaled(hours, rate)


def _kwh(hours: float, pools: Sequence[Pool]) -> float | None:
    power = 0.0
    for pool in pools:
        if pool.device.all_in_kw is None:
            return None
        power += pool.device.all_in_kw * pool.work.count
    return hours * power


def _scaled(span: Span, factor: float) -> Span:
    return Span(span.low * factor, span.middle * factor, span.high * factor)


def _quantiles(values: Sequence[float]) -> Span:
    ordered = sorted(values)
    last = len(ordered) - 1
    return Span(*(ordered[round(share * last)] for share in (0.1, 0.5, 0.9)))


def added(spans: Sequence[Span | None]) -> Span | None:
    """Spans added as if all were slow together; None if one is not known."""
    known = [span for span in spans if span is not None]
    if len(known) < len(spans) or not known:
        return None
    return Span(sum(s.low for s in known), sum(s.middle for s in known), sum(s.high for s in known))


def _plain_sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) and known else None
