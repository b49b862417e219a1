"""What a run folder knows of its pools: pilots of their qualification, soaks, and what watched steps met there."""

from __future__ import annotations

from collections.abc import Mapping

from isthmus.forecast.goodput import HOUR, FailureRate, prior
from isthmus.forecast.pace import PoolFacts
from isthmus.records import QualifyRecord, WeightsRecord, incidents, step_record
from isthmus.run import RunFolder

INTERRUPTING = ("restart", "leave out a rank", "shrink", "wait", "revert", "stop")
"""Rungs that an interruption leads to: the step ended and began again, or ended."""


def pool_facts(run: RunFolder) -> dict[str, PoolFacts]:
    """The facts of each qualified pool by name; a rehearsed pool says nothing of its chip's failures."""
    found = {}
    for name, section in run.recipe.pools.items():
        record = run.read_record(f"qualify/{name}", QualifyRecord)
        if record is None:
            continue
        values = {key: float(one.value) for key, one in record.figures.items() if one.value is not None}
        belief = None if record.rehearsed else after_run(run, name, soaked(section.chip, values))
        found[name] = PoolFacts(figures=values, failures=belief)
    return found


def soaked(chip: str, values: Mapping[str, float]) -> FailureRate:
    """The prior, with the soak that the posterior's mean and its hours tell of."""
    mean, hours, before = values.get("failure_rate_per_chip_hour"), values.get("soaked_chip_hours"), prior(chip)
    if mean is None or hours is None:
        return before
    failures = max(0.0, mean * (before.hours + hours) - before.shape)
    return before.after(failures, hours, f"{failures:.0f} failures in {hours:.3g} chip-hours of a soak")


def after_run(run: RunFolder, pool: str, belief: FailureRate) -> FailureRate:
    """The belief after the interruptions that finished steps met on a pool, and the chip-hours that they trained."""
    met, hours = 0, 0.0
    for step in run.recipe.step:
        record = step_record(run, step.name) if step.kind != "sample" else None
        found = incidents(run, step.name)
        if not isinstance(record, WeightsRecord) or {record.pool, *(one.pool for one in found)} != {pool}:
            continue
        met += sum(one.rung in INTERRUPTING for one in found)
        hours += _trained_s(run, step.name) * run.recipe.pools[pool].count / HOUR
    return belief.after(met, hours, f"{met} interruptions in {hours:.3g} chip-hours of this run") if hours else belief


def _trained_s(run: RunFolder, step: str) -> float:
    """Seconds of all tries of a step, each from its start to its last event."""
    seconds, start = 0.0, 0.0
    events = sorted(run.events(step), key=lambda event: event["time"])
    for event, following in zip(events, [*events[1:], None], strict=True):
        start = event["time"] if event["event"] == "start" else start
        if following is None or following["event"] == "start":
            seconds += event["time"] - start
    return seconds
