"""What the ladder is told of a step: its place, its checkpoints, where it may go, and how quick both sides would be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from isthmus.forecast.duration import WIDTH
from isthmus.forecast.goodput import HOUR, RESTART_S, FailureRate, prior
from isthmus.pools import Pool, get_pool
from isthmus.recipe.schema import Recipe, layout_problem
from isthmus.recipe.steps import PretrainSection, RlSection, SftSection
from isthmus.records import IncidentRecord, PlanRecord, QualifyRecord, TrainPlace, incidents, train_place
from isthmus.run import RunFolder
from isthmus.supervise import balance
from isthmus.supervise.ladder import Situation

LATELY = 16
"""Updates that the pace is the middle of."""
FAILURES = ("ended", "no beat", "not finite", "repeat differs")


def place_of(run: RunFolder, step: str) -> TrainPlace:
    """Where a step trains now."""
    return train_place(run, step, lambda name: get_pool(run.recipe, name).ranks)


def checkpoints(run: RunFolder, step: str) -> list[int]:
    """The updates of which there are checkpoints, whether whole or not."""
    folder = run.step_folder(step) / "checkpoints"
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def situation(run: RunFolder, step: str, place: TrainPlace, *, in_update: bool = False) -> Situation:
    """All that a decision rests on, read from the run folder."""
    saved, plan = checkpoints(run, step), run.require_record("plan", PlanRecord, "plan")
    past = incidents(run, step)
    pools = [name for name in plan.next_pools("train") if name != place.pool]
    checkpoint = saved[-1] if saved else 0
    return Situation(
        section=run.recipe.supervise,
        pool=place.pool,
        ranks=place.ranks,
        checkpoint=checkpoint,
        past=past,
        next_pools=pools,
        smaller=_smaller(run.recipe, step, place.ranks),
        balance=_balance(run, step, place, pools, past, checkpoint) if pools else None,
        in_update=in_update,
    )


def rollout_situation(run: RunFolder, step: str, pool: Pool, others: Sequence[str], checkpoint: int) -> Situation:
    """Of the engine of a step; `others` are pools of place.rollout that the plan found acceptable."""
    return Situation(
        section=run.recipe.supervise,
        pool=pool.name,
        ranks=1,
        checkpoint=checkpoint,
        past=incidents(run, step),
        next_pools=[name for name in others if name != pool.name],
        side="rollout",
        ours_to_start=not pool.elsewhere,
    )


def _smaller(recipe: Recipe, step: str, ranks: int) -> int | None:
    model = recipe.architecture_of(recipe.named(step))
    fitting = [one for one in range(ranks - 1, 0, -1) if layout_problem(model, recipe.train, one) is None]
    return fitting[0] if fitting else None


def _balance(
    run: RunFolder, step: str, place: TrainPlace, pools: list[str], past: list[IncidentRecord], checkpoint: int
) -> balance.Balance | None:
    """None where the pace of one side is not known."""
    section, there = run.recipe.named(step), get_pool(run.recipe, pools[0])
    assert isinstance(section, PretrainSection | SftSection | RlSection)
    events = run.events(step)
    pace = pace_s(events)
    other = _ratio(run, isinstance(section, RlSection), place.pool, there.name)
    if pace is None or other is None:
        return None
    here = get_pool(run.recipe, place.pool)
    done = max((event["step"] for event in events if event["event"] == "step"), default=0)
    restart = _restart_s(events)
    sides = (
        balance.Pool(here.name, balance.Pace.known(pace), belief(here, place, past, events), place.ranks, restart),
        balance.Pool(there.name, other.scaled(pace), prior(there.chip), there.ranks, restart),
    )
    left = section.steps - done
    return balance.weigh(*sides, left, done - checkpoint, section.checkpoint_every, restart)


def pace_s(events: list[dict[str, Any]]) -> float | None:
    """Seconds between two updates lately; None before there are two."""
    times = [event["time"] for event in events if event["event"] == "step"][-LATELY - 1 :]
    gaps = [later - earlier for earlier, later in pairwise(times) if later > earlier]
    return median(gaps) if gaps else None


def _ratio(run: RunFolder, learns: bool, here: str, there: str) -> balance.Pace | None:
    """Seconds of an update there for each second here, from the pilots of both pools."""
    name = "learn_token_s" if learns else "sft_step_s"
    values = []
    for pool in (here, there):
        record = run.read_record(f"qualify/{pool}", QualifyRecord)
        figure = record.figures.get(name) if record else None
        values.append(figure.value if figure else None)
    ours, theirs = values
    if not ours or not theirs:
        return None
    return balance.Pace(theirs / ours / WIDTH, theirs / ours, theirs / ours * WIDTH)


def _restart_s(events: list[dict[str, Any]]) -> float:
    """From the start of a process to its first update, as this step's own were; a planning value before the first."""
    taken, began = [], None
    for event in sorted(events, key=lambda one: one["time"]):
        if event["event"] == "start":
            began = event["time"]
        elif event["event"] == "step" and began is not None:
            taken.append(event["time"] - began)
            began = None
    return median(taken) if taken else RESTART_S


def belief(pool: Pool, place: TrainPlace, past: list[IncidentRecord], events: list[dict[str, Any]]) -> FailureRate:
    """Published fleets, and what this step met on this pool."""
    own = [one for one in past if one.side == "train" and one.pool == place.pool and one.signal in FAILURES]
    times = [event["time"] for event in events]
    hours = (max(times) - min(times)) / HOUR * place.ranks if times else 0.0
    return prior(pool.chip).after(
        len(own) + 1, hours, f"{len(own) + 1} incidents in {hours:.3g} chip-hours of this step"
    )
