"""The trend over crossings: against counting all orders, published series, and simulation."""

from __future__ import annotations

import itertools
import random

import pytest

from isthmus.parity.trend import BLOCK, FEWEST_BLOCKS, Trend, trend


def blocks_of(values: list[float]) -> list[float]:
    return [value for value in values for _ in range(BLOCK)]


@pytest.mark.parametrize("size", [5, 6])
def test_the_probability_is_the_share_of_all_orders_that_rise_as_much(size):
    def rising(order: tuple[int, ...]) -> int:
        return sum((b > a) - (b < a) for a, b in itertools.combinations(order, 2))

    orders = list(itertools.permutations(range(size)))
    counts = sorted(map(rising, orders))
    for order in random.Random(0).sample(orders, 20):
        found = trend(blocks_of([float(value) for value in order]))
        share = sum(count >= rising(order) for count in counts) / len(counts)
        assert found is not None and found.p_value == pytest.approx(share)


def test_the_slope_is_per_crossing_and_one_wild_value_does_not_move_it():
    line = [0.01 + 0.001 * step for step in range(40)]
    found = trend(line)
    assert found is not None and found.slope == pytest.approx(0.001) and found.rises
    wild = trend([*line[:17], 5.0, *line[18:]])
    assert wild is not None and wild.slope == pytest.approx(0.001, rel=0.1)
    assert found.crossings_until(0.1475) == pytest.approx(99, abs=1)


def test_published_series_of_three_formats():
    """Means per block of 8 steps between the ends that github.com/verl-project/verl/pull/7519 gives, with its noise."""
    chance = random.Random(1)

    def series(first: float, last: float) -> list[float]:
        return [first + (last - first) * step / 63 + chance.gauss(0, 0.001) for step in range(64)]

    climbing, flat = trend(series(0.010, 0.031)), trend(series(0.0095, 0.0087))
    assert climbing is not None and climbing.alarms(budget=0.05, horizon=64)
    assert not climbing.alarms(budget=0.5, horizon=64), "rising, but far from the budget"
    assert flat is not None and not flat.rises and not flat.alarms(budget=0.05, horizon=64)


def test_noise_that_hangs_together_seldom_raises_an_alarm():
    chance, alarms = random.Random(2), 0
    for _ in range(400):
        noise, gaps = 0.0, []
        for _ in range(100):
            noise = 0.3 * noise + chance.gauss(0, 0.002)
            gaps.append(0.02 + noise)
        found = trend(gaps)
        assert found is not None
        alarms += found.alarms(budget=0.05, horizon=100)
    assert alarms / 400 < 0.02


def test_too_few_crossings_and_what_is_no_number_give_no_trend():
    assert trend([0.1] * (FEWEST_BLOCKS * BLOCK - 1)) is None
    assert trend([*[0.1] * 40, float("nan")]) is None
    flat = trend([0.1] * 40)
    assert flat is not None and not flat.rises and flat.crossings_until(0.2) is None
    assert flat.crossings_until(0.05) == 0.0


def test_a_gap_above_the_budget_that_does_not_rise_is_no_trend():
    assert not Trend(40, level=0.2, slope=0.0, p_value=0.5).alarms(budget=0.1, horizon=10)
