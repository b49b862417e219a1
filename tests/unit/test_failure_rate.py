"""Bounds, beliefs and trends against other implementations, numerical integration and published tables."""

from __future__ import annotations

import math
import random
import statistics

import mpmath
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.chips import failure_rates, load_chips, stability_rule
from isthmus.probes.judge.failure_rate import figures_of_soak, prior_of, target_rate
from isthmus.probes.judge.rates import (
    GammaRate,
    checkpoint_interval,
    exposure_to_show,
    fit_gamma,
    poisson_bounds,
    theil_sen,
)
from isthmus.run import Figure


@settings(deadline=None, max_examples=60)
@given(st.floats(0.1, 200.0), st.floats(1e-3, 0.999))
def test_quantiles_of_a_belief_are_those_that_mpmath_inverts(shape: float, probability: float):
    x = GammaRate(shape, 10.0).quantile(probability) * 10.0
    with mpmath.workdps(40):
        assert float(mpmath.gammainc(shape, 0, x, regularized=True)) == pytest.approx(probability, rel=1e-12)


@pytest.mark.parametrize(
    ("chips", "hours", "bound"), [(8, 24, 1.6e-2), (64, 24, 1.95e-3), (512, 24, 2.4e-4), (1024, 72, 4.1e-5)]
)
def test_what_a_soak_without_a_failure_excludes(chips: int, hours: int, bound: float):
    low, high = poisson_bounds(0, chips * hours, 0.95)
    assert low == 0.0 and high == pytest.approx(bound, rel=0.03)
    assert high == pytest.approx(-math.log(0.05) / (chips * hours), rel=1e-9)


@pytest.mark.parametrize(("failures", "low", "high"), [(1, 0.0253, 5.572), (3, 0.6187, 8.767), (10, 4.795, 18.39)])
def test_exact_intervals_are_those_of_garwoods_table(failures: int, low: float, high: float):
    assert poisson_bounds(failures, 1.0, 0.95) == pytest.approx((low, high), rel=1e-3)


def test_at_the_bounds_so_few_and_so_many_failures_are_just_improbable():
    def at_most(failures: int, mean: float) -> float:
        return sum(math.exp(-mean) * mean**k / math.factorial(k) for k in range(failures + 1))

    for failures in range(1, 6):
        low, high = poisson_bounds(failures, 100.0, 0.8)
        assert at_most(failures, 100.0 * high) == pytest.approx(0.1, rel=1e-9)
        assert at_most(failures - 1, 100.0 * low) == pytest.approx(0.9, rel=1e-9)


def test_the_rate_of_the_largest_published_run_takes_152000_chip_hours_to_show():
    assert exposure_to_show(1.97e-5, 0.95) == pytest.approx(152_000, rel=1e-3)
    assert target_rate().value == pytest.approx(419 / (54 * 24 * 16_384), rel=1e-3)


def integral(function, low: float, high: float, parts: int = 20_000) -> float:
    width = (high - low) / parts
    return width * sum(function(low + (index + 0.5) * width) for index in range(parts))


def test_the_posterior_is_prior_times_likelihood_integrated():
    prior, failures, hours = GammaRate(1.3, 40.0), 2, 25.0

    def weight(rate: float) -> float:
        return rate ** (prior.shape - 1.0) * math.exp(-prior.hours * rate) * rate**failures * math.exp(-rate * hours)

    total = integral(weight, 0.0, 1.0)
    posterior = prior.after(failures, hours)
    assert posterior.mean == pytest.approx(integral(lambda rate: rate * weight(rate), 0.0, 1.0) / total, rel=1e-6)
    low, high = posterior.interval(0.9)
    assert integral(weight, low, high) / total == pytest.approx(0.9, rel=1e-6)


def test_a_fitted_prior_has_the_logarithmic_mean_and_spread_of_the_rates():
    rates, spread = [1e-5, 3e-5, 2e-4, 5e-5], 1.5
    prior = fit_gamma(rates, spread=spread)
    logs = [math.log(rate) for rate in rates]
    front = prior.shape * math.log(prior.hours) - math.lgamma(prior.shape)

    def density(log_rate: float) -> float:
        return math.exp(front + prior.shape * log_rate - prior.hours * math.exp(log_rate))

    mean = integral(lambda y: y * density(y), -60.0, 0.0)
    variance = integral(lambda y: (y - mean) ** 2 * density(y), -60.0, 0.0)
    assert mean == pytest.approx(statistics.mean(logs), abs=1e-4)
    assert variance == pytest.approx(statistics.variance(logs) * (1 + 1 / 4) * spread**2, rel=1e-3)


def test_published_rates_follow_from_their_own_counts_and_a_disputed_claim_makes_no_prior():
    for fleet in failure_rates():
        assert fleet.source and fleet.standing
        assert fleet.rate == pytest.approx(fleet.failures / (fleet.chips_in_fleet * fleet.hours), rel=1e-3)
    assert not any(fleet.in_prior for fleet in failure_rates() if fleet.standing == "vendor claim")
    patterns_without_a_chip = [
        fleet.fleet for fleet in failure_rates() if fleet.chips and not any(map(fleet.is_of, load_chips()))
    ]
    assert not patterns_without_a_chip


def test_a_chip_without_a_published_rate_gets_a_wide_prior_and_says_so():
    known, unknown = prior_of("h100-sxm"), prior_of("ascend-910b-313t")
    assert "no rate of ascend-910b-313t was published" in unknown.source and "llama3" in known.source
    low, high = known.rate.interval(0.95)
    assert low < 1.973e-5 < high
    widest = unknown.rate.interval(0.95)
    assert widest[0] < low and widest[1] > high and all(widest[0] < fleet.rate < widest[1] for fleet in failure_rates())


def test_a_long_soak_outweighs_the_prior_and_a_short_one_does_not():
    def after(hours: float, failures: int) -> Figure:
        soaked = Figure.measured(hours, "chip-hours", "soak", rehearsed=False)
        return figures_of_soak("h100-sxm", soaked, failures, 0.95, 64, None)["failure_rate_per_chip_hour"]

    prior = prior_of("h100-sxm").rate.mean
    assert after(1.0, 0).value == pytest.approx(prior, rel=1e-3) and after(1.0, 0).kind == "declared"
    assert after(1e8, 5_000).value == pytest.approx(5e-5, rel=0.01)
    assert after(1.0, 1).value > 1.9 * prior


def test_the_figures_of_a_rehearsal_never_count_as_more():
    soaked = Figure.measured(0.0, "chip-hours", "soak", rehearsed=True)
    save = Figure.measured(30.0, "s", "save", rehearsed=True)
    figures = figures_of_soak("ascend-910b-313t", soaked, 0, 0.95, 1024, save)
    assert figures["failure_rate_per_chip_hour"].kind == figures["checkpoint_interval_s"].kind == "rehearsed"
    assert "unseen_rate_per_chip_hour" not in figures


@pytest.mark.parametrize(("save_s", "mtbf_s"), [(10.0, 4e4), (120.0, 11_000.0), (300.0, 3_000.0)])
def test_the_checkpoint_interval_wastes_least(save_s: float, mtbf_s: float):
    def cost(work_s: float) -> float:
        """Expected time per useful time with exponential failures (Daly 2006, equation 20, without the restart)."""
        return mtbf_s * math.expm1((work_s + save_s) / mtbf_s) / work_s

    best = min(cost(1e-3 * mtbf_s * 1.01**k) for k in range(800))
    assert cost(checkpoint_interval(save_s, mtbf_s)) == pytest.approx(best, rel=2e-4)


def test_a_trend_is_found_through_outliers_and_none_where_there_is_none():
    chance = random.Random(1)
    noise = [chance.gauss(0.0, 1.0) for _ in range(80)]
    growing = [0.2 * step + noise[step] + (50.0 if step % 9 == 0 else 0.0) for step in range(80)]
    slope = theil_sen(growing, 0.999)
    assert slope.grows() and slope.low < 0.2 < slope.high and slope.value == pytest.approx(0.2, abs=0.04)
    false = sum(theil_sen([chance.gauss(0.0, 1.0) for _ in range(20)], 0.9).grows() for _ in range(400))
    assert 0 < false <= 40


def test_every_rule_says_where_it_comes_from():
    assert stability_rule("straggler").value == pytest.approx(1 / 0.75, rel=1e-3)
    assert all(stability_rule(name).source for name in ("straggler", "gradient-spike", "loss-difference"))
