"""Slopes of a series, against numpy and scipy."""

from __future__ import annotations

import random
import statistics

import numpy as np
import pytest
from scipy.stats import theilslopes

from isthmus.slopes import least_squares_slope, pairwise_slopes


@pytest.mark.parametrize("count", [3, 4, 17])
def test_both_slopes_are_those_of_the_libraries(count):
    values = [random.Random(count).gauss(step / 10, 1.0) for step in range(count)]
    assert least_squares_slope(values) == pytest.approx(np.polyfit(range(count), values, 1)[0])
    slopes = pairwise_slopes(values)
    assert slopes == sorted(slopes) and len(slopes) == count * (count - 1) // 2
    assert statistics.median(slopes) == pytest.approx(theilslopes(values, range(count)).slope)


def test_two_values_make_no_line():
    assert least_squares_slope([1.0, 2.0]) is None
