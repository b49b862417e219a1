"""Whose a suspicious step is: what a chip that is trusted repeats is the recipe's own, and no fault of the pool.

A high learning rate without warm-up makes gradients jump, or overflow, on any chip. The steps of the soak up to the
suspicious one are taken again by ranks on this machine's CPU. Where the pool is this CPU too, the numbers must be the
same bit for bit; on any other chip the same steps must be suspicious, of about the same size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from isthmus.launch.crew import Called, Crew
from isthmus.launch.places import LocalPlace
from isthmus.probes import PRELOAD
from isthmus.probes.contract import Setting
from isthmus.probes.judge.soak_judgement import Problem, spikes_of
from isthmus.probes.pilots import too_large

STEPS_AGAIN = "isthmus.probes.soak_rank:steps_again"
SAME_SPIKE = 2.0
"""By which factor the norm of a spike may differ between two arithmetics that do the same. Assumed; the rule for a
spike itself is a factor of 10."""


@dataclass(frozen=True)
class Owners:
    """`problems` are the pool's. `own` says what is the recipe's, `open` what could not be told apart."""

    problems: list[Problem]
    own: list[Problem] = field(default_factory=list)
    open: list[Problem] = field(default_factory=list)
    repeated: int = 0
    exact: bool = True

    def __str__(self) -> str:
        if not self.own:
            return ""
        how = "bit for bit" if self.exact else "in its own arithmetic"
        said = "; ".join(one.what for one in self.own)
        return f"The recipe's own, since this machine's CPU repeats it {how} in {self.repeated} steps: {said}."


def owners_of(
    crew: Crew,
    setting: Setting,
    seen: Sequence[dict[str, Any]],
    problems: Sequence[Problem],
    *,
    deadline_s: float,
    horizon: int | None = None,
) -> Owners:
    """Whose the problems are that a recipe may make by itself; all others are the pool's."""
    suspicious = [one for one in problems if one.step is not None]
    others = [one for one in problems if one.step is None]
    if not suspicious:
        return Owners(others)
    exact = _is_this_cpu(crew)
    if not exact and (why := too_large(setting.recipe, setting.chip, "cpu")) is not None:
        return Owners(others, open=[_open(one, why) for one in suspicious])
    steps = 1 + max(one.step for one in suspicious if one.step is not None)
    arguments = {
        "run": str(setting.root),
        "pool": setting.pool.name,
        "folder": str(setting.folder / "repeated"),
        "steps": steps,
        "horizon": horizon,
    }
    world, threads = (crew.world, crew.threads) if exact else (1, max(1, setting.pool.threads))
    with Crew(world, threads=threads, preload=PRELOAD) as trusted:
        called = trusted.call(STEPS_AGAIN, arguments, deadline_s=deadline_s)
    if not called.ok:
        why = f"the {steps} steps could not be repeated on this machine's CPU: {called.describe()}"
        return Owners(others, open=[_open(one, why) for one in suspicious])
    again, first = called.values[0], seen[0]
    if exact:
        differs = _first_difference(first, again, steps)
        if differs is None:
            return Owners(others, list(suspicious), repeated=steps)
        return Owners([*others, *(_the_pools(one, differs) for one in suspicious)], repeated=steps)
    own = [one for one in suspicious if _shows_it_too(one, first, again)]
    left = [_the_pools(one, "this machine's CPU does not do so") for one in suspicious if one not in own]
    return Owners([*others, *left], own, repeated=steps, exact=False)


def stopped_by_recipe(owners: Owners, seen: Sequence[dict[str, Any]]) -> int | None:
    """The step at which the recipe itself has a number that is not finite, and the soak had to end."""
    stopped = next((one["stopped"] for one in seen if one["stopped"] is not None), None)
    return stopped if stopped is not None and any(one.step == stopped for one in owners.own) else None


def raised_by_recipe(called: Called) -> str | None:
    """What every rank said alike of the recipe, such as an example that is longer than the model's positions."""
    words = called.replies[0].error if called.raised_alike else ""
    return words.removeprefix("IsthmusError: ") if words.startswith("IsthmusError: ") else None


def _is_this_cpu(crew: Crew) -> bool:
    return crew.device == "cpu" and crew.chip is None and all(isinstance(place, LocalPlace) for place in crew.places)


def _first_difference(first: dict[str, Any], again: dict[str, Any], steps: int) -> str | None:
    """Where two soaks part, bit for bit; None if they do not."""
    for step in range(steps):
        for name, what in (("losses", "loss"), ("norms", "norm of the gradient")):
            one, other = (seen[name][step] if step < len(seen[name]) else None for seen in (first, again))
            if one != other:
                return f"this machine's CPU has another {what} from step {step} on: {other} instead of {one}"
    return None


def _shows_it_too(problem: Problem, first: dict[str, Any], again: dict[str, Any]) -> bool:
    """Whether another arithmetic does what a problem says, at the same steps or, where it overflows, before."""
    if problem.step == first["stopped"]:
        return again["stopped"] is not None and again["stopped"] <= first["stopped"]
    spikes = spikes_of(first["norms"])
    known = spikes_of(again["norms"])
    return bool(spikes) and all(
        step in known and 1 / SAME_SPIKE <= again["norms"][step] / first["norms"][step] <= SAME_SPIKE for step in spikes
    )


def _open(problem: Problem, why: str) -> Problem:
    return Problem(f"{problem.what}; whether that is the recipe's own is not known: {why}", problem.ranks, problem.step)


def _the_pools(problem: Problem, why: str) -> Problem:
    return Problem(f"{problem.what}; {why}", problem.ranks, problem.step)
