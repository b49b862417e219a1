"""Whether staying on a pool that fails or moving to another one is over sooner: arithmetic with intervals."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from statistics import quantiles

from isthmus.forecast.goodput import HOUR, FailureRate
from isthmus.run import Figure

DRAWS = 400
LEAST_USEFUL = 0.02
"""Share of the time that is useful where failures come faster than they are made up for; as goodput has it."""
Z90 = 1.2816
"""The 90th percentile of the standard normal distribution."""


@dataclass(frozen=True)
class Pace:
    """Seconds of an update at P10, P50 and P90."""

    low: float
    middle: float
    high: float

    @classmethod
    def known(cls, seconds: float) -> Pace:
        return cls(seconds, seconds, seconds)

    def scaled(self, factor: float) -> Pace:
        return Pace(self.low * factor, self.middle * factor, self.high * factor)

    def draw(self, chance: random.Random) -> float:
        """Of a log-normal distribution with this middle, as wide as the interval."""
        width = math.log(self.high / self.low) / (2 * Z90) if self.high > self.low else 0.0
        return self.middle * math.exp(width * chance.gauss(0.0, 1.0))


@dataclass(frozen=True)
class Pool:
    """One side: its pace, what is believed of its failures per chip-hour, its chips, and seconds of a restart there."""

    name: str
    pace: Pace
    failures: FailureRate
    chips: int
    restart_s: float


@dataclass(frozen=True)
class Balance:
    """Seconds to the end on each side at P10, P50 and P90, and how likely moving is quicker, 0 to 1."""

    stay: Figure
    move: Figure
    move_is_quicker: float

    @property
    def figures(self) -> dict[str, Figure]:
        sure = Figure.derived(self.move_is_quicker, "share", "draws of both sides, in pairs", self.stay, self.move)
        return {"stay_s": self.stay, "move_s": self.move, "move_is_quicker": sure}


def weigh(here: Pool, there: Pool, updates: int, lost: int, between_checkpoints: int, move_s: float) -> Balance:
    """`updates` are left to make; a move makes `lost` ones again and takes `move_s` before its first.

    A failure costs a restart and, on average, half of the updates between two checkpoints. The same input gives the
    same answer: the draws are seeded.
    """
    chance = random.Random(0)
    stay, move = [], []
    for _ in range(DRAWS):
        stay.append(_seconds(here, updates, between_checkpoints, chance))
        move.append(move_s + _seconds(there, updates + lost, between_checkpoints, chance))
    quicker = sum(m < s for s, m in zip(stay, move, strict=True)) / DRAWS
    return Balance(_figure(stay, here), _figure(move, there), quicker)


def _seconds(pool: Pool, updates: int, between_checkpoints: int, chance: random.Random) -> float:
    pace = pool.pace.draw(chance)
    a_second = pool.failures.draw(chance) * pool.chips / HOUR
    lost = a_second * (pool.restart_s + pace * between_checkpoints / 2)
    return updates * pace / max(LEAST_USEFUL, 1.0 - lost)


def _figure(seconds: list[float], pool: Pool) -> Figure:
    tenths = quantiles(seconds, n=10)
    source = f"{DRAWS} draws of pace and failures of pool {pool.name} ({pool.failures.source}); P50, with P10 and P90"
    return Figure(value=tenths[4], unit="s", kind="forecast", source=source, low=tenths[0], high=tenths[8])
