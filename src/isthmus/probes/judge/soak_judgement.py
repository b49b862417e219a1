"""What the ranks of a soak saw, judged: numbers, repeats, saves, and trends. Nothing here computes on a device."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from isthmus.chips import stability_rule
from isthmus.probes.judge.rates import Slope, theil_sen
from isthmus.probes.portable.training import ratios_to_peers

SPIKE_AFTER = 3
"""Steps whose norms make the running mean before another is compared with it."""
LEAST_ROUNDS = 12
LEAST_SAMPLES = 24
MOST_SAMPLES = 240
TREND_CONFIDENCE = 0.999
HORIZON = 10.0
"""A trend is followed for at most so many times the steps in which it was seen."""
MATERIAL = 0.25
"""Growth within the horizon, as a share of the median, that matters."""
STEADY = 0.75


@dataclass(frozen=True)
class Problem:
    """What is wrong, and the ranks at fault where they are known.

    `step` is there where a recipe may do it on any chip: the last step at which it shows.
    """

    what: str
    ranks: tuple[int, ...] = ()
    step: int | None = None


@dataclass(frozen=True)
class Trend:
    """A slope per step on one rank. `level` is the median value; `matters` whether it is significant and material."""

    rank: int
    slope: Slope
    level: float
    matters: bool


def problems_of(seen: Sequence[dict[str, Any]]) -> list[Problem]:
    """What the ranks' reports, in the form of `soak_rank.Seen`, show to be wrong. Trends are judged by `trends_of`."""
    return [*_numbers(seen), *_repeats(seen), *_saves(seen), *_stragglers(seen)]


def _numbers(seen: Sequence[dict[str, Any]]) -> list[Problem]:
    found = []
    if any(one["stopped"] is not None for one in seen):
        step = next(one["stopped"] for one in seen if one["stopped"] is not None)
        ranks = _some((rank for rank, one in enumerate(seen) if one["bad_here"]), len(seen))
        where = f", first in the activations of rank {_joined(ranks)}" if ranks else ""
        found.append(Problem(f"a loss or a gradient is not finite at step {step}{where}", ranks, step))
    if (spike := _spikes(seen[0]["norms"])) is not None:
        found.append(spike)
    wrong = {rank: one["wrong"] for rank, one in enumerate(seen) if one["wrong"]}
    if wrong:
        first = next(iter(wrong.values()))[0]
        found.append(Problem(f"known answers on rank {_joined(tuple(wrong))} are wrong: {first}", tuple(wrong)))
    return found


def _some(ranks: Iterable[int], world: int) -> tuple[int, ...]:
    """Ranks, or none of several if it is all of them: then it spread before it was seen, and says nothing."""
    found = tuple(ranks)
    return () if 1 < world == len(found) else found


def spikes_of(norms: Sequence[float]) -> dict[int, float]:
    """The steps at which the square of a gradient's norm is too far above the mean of those before, and how far."""
    limit, total = stability_rule("gradient-spike").value, 0.0
    found = {}
    for step, norm in enumerate(norms):
        mean = total / step if step else 0.0
        total += norm**2
        if step >= SPIKE_AFTER and norm**2 > limit * mean:
            found[step] = norm**2 / mean if mean else math.inf
    return found


def _spikes(norms: Sequence[float]) -> Problem | None:
    rule, found = stability_rule("gradient-spike"), spikes_of(norms)
    if not found:
        return None
    first, more = next(iter(found)), len(found) - 1
    others = f", and in {more} steps after it" if more else ""
    what = f"the squared norm of the gradient at step {first} is {found[first]:.3g} {rule.unit}{others} ({rule.source})"
    return Problem(what, step=max(found))


def _repeats(seen: Sequence[dict[str, Any]]) -> list[Problem]:
    differing = max(one["differing"] for one in seen)
    if not differing:
        return []
    ranks = _some((rank for rank, one in enumerate(seen) if one["differing_here"]), len(seen))
    where = f", first in the activations of rank {_joined(ranks)}" if ranks else ""
    what = f"{differing} of {seen[0]['repeats']} steps gave two results, bit by bit, when they were repeated{where}"
    named = {one["operator"] for one in seen if one["operator"]}
    what += f"; {', '.join(sorted(named))} did so for equal inputs" if named else ""
    return [Problem(what, ranks)]


def _saves(seen: Sequence[dict[str, Any]]) -> list[Problem]:
    damaged = [message for one in seen for message in one["damaged"]]
    if not damaged:
        return []
    ranks = tuple(sorted({rank for one in seen for rank in one["damaged_by"]}))
    where = f" on rank {_joined(ranks)}" if ranks else ""
    return [Problem(f"a save is damaged{where}: {damaged[0]}", ranks)]


def _stragglers(seen: Sequence[dict[str, Any]]) -> list[Problem]:
    """Ranks that in the last third of the rounds were never nearly as fast as their peers."""
    rule, rounds = stability_rule("straggler-in-soak"), len(seen[0]["pace"])
    if len(seen) < 2 or rounds < LEAST_ROUNDS:
        return []
    best = [min(one["pace"][-(rounds // 3) :]) for one in seen]
    ratios = ratios_to_peers(best)
    slow = tuple(rank for rank, ratio in enumerate(ratios) if ratio > rule.value)
    if not slow:
        return []
    what = f"rank {_joined(slow)} became {max(ratios):.3g} times as slow as its peers; {rule.value:g} is the limit"
    return [Problem(f"{what} ({rule.source})", slow)]


def trends_of(values: Sequence[Sequence[float]]) -> list[Trend]:
    """The trend on each rank of what it measured at each step, without the first third: a start is not a trend.

    It matters if it is significant as a whole and in each half, does not settle (in the second half it is `STEADY` of
    what it was in the first), and if at the low end of its interval it grows by more than `MATERIAL` of the median
    within `HORIZON` times the steps that were seen. Ranks with less than `LEAST_SAMPLES` values have none.
    """
    found = []
    for rank, all_values in enumerate(values):
        settled = list(all_values[len(all_values) // 3 :])
        if len(settled) < LEAST_SAMPLES:
            continue
        thinned, each = _thinned(settled)
        slope, level = theil_sen(thinned, TREND_CONFIDENCE), statistics.median(thinned)
        half = len(thinned) // 2
        first, second = (theil_sen(part, TREND_CONFIDENCE) for part in (thinned[:half], thinned[half:]))
        lasts = first.grows() and second.grows() and second.value > STEADY * first.value
        growth = slope.low * len(thinned) * HORIZON
        matters = slope.grows() and lasts and growth > MATERIAL * level
        found.append(Trend(rank, _per_step(slope, each), level, matters))
    return found


def _thinned(values: Sequence[float]) -> tuple[list[float], int]:
    """At most `MOST_SAMPLES` medians of equal blocks, and the values in a block."""
    each = -(-len(values) // MOST_SAMPLES)
    blocks = [values[start : start + each] for start in range(0, len(values) - each + 1, each)]
    return [statistics.median(block) for block in blocks], each


def _per_step(slope: Slope, each: int) -> Slope:
    return Slope(slope.value / each, slope.low / each, slope.high / each, slope.confidence, slope.samples)


def _joined(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
