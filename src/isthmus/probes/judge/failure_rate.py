"""How often a chip fails: what was published, what a soak adds to it, and what follows for a run.

A soak without a failure cannot prove that a chip is reliable: it bounds the rate of its failures. So a belief about the
rate starts from fleets that published theirs, and the soak updates it.
"""

from __future__ import annotations

from dataclasses import dataclass

from isthmus.chips import failure_rates
from isthmus.probes.judge.rates import GammaRate, checkpoint_interval, exposure_to_show, fit_gamma, poisson_bounds
from isthmus.run import Figure

UNIT = "failures/chip-hour"
WIDER = 2.0
"""How much wider, in the logarithm, the belief about a chip is of which no fleet published a rate. Assumed."""
TARGET = "llama3-405b"
"""The fleet whose rate is the target: the largest run with a published count of its failures."""


@dataclass(frozen=True)
class Prior:
    """A belief before the soak, and in words where it comes from."""

    rate: GammaRate
    source: str


def prior_of(slug: str) -> Prior:
    """The belief about a chip's failures per chip-hour from published rates.

    Around the rates of its own fleets, as wide as fleets differ; around those of all fleets, and `WIDER` times as wide,
    if no fleet of this chip published one.
    """
    fleets = [fleet for fleet in failure_rates() if fleet.in_prior]
    rates = [fleet.rate for fleet in fleets]
    own = [fleet for fleet in fleets if fleet.is_of(slug)]
    if own:
        names = ", ".join(f"{fleet.fleet} ({fleet.source})" for fleet in own)
        return Prior(fit_gamma(rates, [fleet.rate for fleet in own]), f"rates of this chip: {names}")
    names = ", ".join(f"{fleet.fleet} on {fleet.chip_named} {fleet.rate:.3g}" for fleet in fleets)
    source = f"no rate of {slug} was published: a wide prior around {len(fleets)} fleets of other chips ({names})"
    return Prior(fit_gamma(rates, spread=WIDER), source)


def target_rate() -> Figure:
    """The rate that a large published run had."""
    fleet = next(fleet for fleet in failure_rates() if fleet.fleet == TARGET)
    return Figure(value=fleet.rate, unit=UNIT, kind="declared", source=f"{fleet.note}, {fleet.source}")


def figures_of_soak(
    slug: str, soaked: Figure, failures: int, confidence: float, chips: int, save_s: Figure | None
) -> dict[str, Figure]:
    """What `failures` in `soaked` chip-hours say about a chip, and about a run on `chips` of them.

    `failure_rate_per_chip_hour` is the mean of the posterior with its central interval; `unseen_rate_per_chip_hour` the
    exact upper bound that the soak alone gives; `chip_hours_to_show_target` what would have to pass without a failure;
    `mtbf_h` of all chips and `checkpoint_interval_s` by Daly (2006) follow from the posterior's mean.
    """
    assert soaked.value is not None
    prior = prior_of(slug)
    belief = prior.rate.after(failures, soaked.value)
    given = Figure(value=prior.rate.mean, unit=UNIT, kind="declared", source=prior.source)
    low, high = belief.interval(confidence)
    seen = f"{failures} failures in {soaked.value:.3g} chip-hours"
    posterior = Figure.derived(
        belief.mean,
        UNIT,
        f"gamma posterior, interval {confidence:.0%}, after {seen}; prior: {prior.source}",
        soaked,
        given,
        low=low,
        high=high,
    )
    target = target_rate()
    assert target.value is not None
    needed = exposure_to_show(target.value, confidence)
    mtbf_h = 1.0 / (belief.mean * chips)
    figures = {
        "soaked_chip_hours": soaked,
        "failure_rate_per_chip_hour": posterior,
        "chip_hours_to_show_target": Figure.derived(
            needed,
            "chip-hours",
            f"without a failure, to show {target.value:.3g} {UNIT} at {confidence:.0%}: -ln(1 - c) / rate; "
            f"{target.source}",
            target,
        ),
        "mtbf_h": Figure.derived(mtbf_h, "h", f"of {chips} chips, by the mean of the posterior", posterior),
    }
    if soaked.value > 0.0:
        least, bound = poisson_bounds(failures, soaked.value, confidence)
        figures["unseen_rate_per_chip_hour"] = Figure.derived(
            bound,
            UNIT,
            f"exact Poisson upper bound at {confidence:.0%}, {seen}, without any prior",
            soaked,
            low=least,
            high=bound,
        )
    if save_s is not None and save_s.value is not None:
        interval = checkpoint_interval(save_s.value, mtbf_h * 3600.0)
        source = "Daly (2006), from the time of a save and the mean time between failures"
        figures["checkpoint_interval_s"] = Figure.derived(interval, "s", source, posterior, save_s)
    return figures
