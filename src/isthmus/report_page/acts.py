"""What a run did or will do, act by act: the one place that knows how a recipe's steps and their records look.

An act holds a pool for as long as it runs; reinforcement learning holds two. What is done has the seconds that it took,
what is not has the plan's estimate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from isthmus.recipe.schema import PlacedStage
from isthmus.recipe.steps import RlSection, SampleSection
from isthmus.records import ForecastOption, ForecastRecord, Part, PlanRecord
from isthmus.report_page import timing
from isthmus.run import Figure, RunFolder

ActKind = Literal["pretrain", "sft", "learn", "rollout", "sample", "handoff", "serve"]
TRAINING: tuple[ActKind, ...] = ("pretrain", "sft", "learn")


class Act(Part):
    """One thing that a pool is wanted for. `placed` is the place of the recipe that decides where.

    `seconds` are those that it held its pool for, or the plan's estimate; None where neither is known. `tokens` are
    learnt by training and sampled by rollouts; None where nothing was counted. A step that moved is an act on each of
    its pools, and each is not `whole`.
    """

    name: str
    kind: ActKind
    placed: PlacedStage
    pool: str
    seconds: Figure | None
    tokens: Figure | None
    whole: bool = True


def acts_of(run: RunFolder, plan: PlanRecord) -> list[Act]:
    """The acts of a run in its order, on the pools that the plan chose or that they moved to."""
    events, recipe = run.events(), run.recipe
    done, spent = timing.finished_stages(events), timing.spent(events)

    def act(name: str, kind: ActKind, placed: PlacedStage, stage: str, tokens: Figure | None) -> Act:
        pool = plan.pool_of(placed)
        rehearsed = _is_rehearsed(run, pool)
        seconds = (
            Figure.measured(spent[stage], "s", f"events.jsonl: {stage}", rehearsed=rehearsed)
            if stage in done
            else plan.estimate.get(stage)
        )
        return Act(name=name, kind=kind, placed=placed, pool=pool, seconds=seconds, tokens=tokens)

    def trained(name: str, kind: ActKind, key: str) -> list[Act]:
        held = timing.held(events, name) if name in done else {}
        if len(held) < 2:
            return [act(name, kind, "train", name, counted(name, "step", key, "train"))]
        return [_share(run, name, kind, pool, seconds, steps, key) for pool, (seconds, steps) in held.items()]

    def generated(name: str) -> list[Act]:
        title, held = f"{name}-rollouts", timing.held_rollouts(events, name) if name in done else {}
        if len(held) < 2:
            whole = act(title, "rollout", "rollout", name, counted(name, "step", "tokens", "rollout"))
            return [whole.model_copy(update={"pool": pool}) for pool in held] or [whole]
        shares = [
            _share(run, name, "rollout", pool, seconds, steps, "tokens") for pool, (seconds, steps) in held.items()
        ]
        return [one.model_copy(update={"name": title, "placed": "rollout"}) for one in shares]

    def counted(stage: str, event: str, key: str, placed: PlacedStage) -> Figure | None:
        rehearsed = _is_rehearsed(run, plan.pool_of(placed))
        return _sum_of([e for e in events if e["stage"] == stage and e["event"] == event], key, rehearsed)

    found = []
    for step in recipe.step:
        if isinstance(step, RlSection):
            found += trained(step.name, "learn", "trained_tokens")
            learnt = {one.pool for one in found if one.name == step.name}
            for one in generated(step.name):
                same = learnt == {one.pool}
                found.append(one.model_copy(update={"seconds": _with_learning(step.name)}) if same else one)
        elif isinstance(step, SampleSection):
            sampled = counted(step.name, "step", "tokens", "rollout")
            found.append(act(step.name, "sample", "rollout", step.name, sampled))
        else:
            found += trained(step.name, step.kind, "tokens")
    found.append(act("handoff", "handoff", "serve", "handoff", None))
    pool = plan.pool_of("serve")
    return [*found, Act(name="serve", kind="serve", placed="serve", pool=pool, seconds=None, tokens=None)]


def _is_rehearsed(run: RunFolder, pool: str) -> bool:
    return run.recipe.pools[pool].rehearsed or run.recipe.drill is not None


def _share(
    run: RunFolder, name: str, kind: ActKind, pool: str, seconds: float, steps: Sequence[dict[str, Any]], key: str
) -> Act:
    """What one pool had of a step that moved."""
    rehearsed = _is_rehearsed(run, pool)
    held = Figure.measured(seconds, "s", f"events.jsonl: {name} on {pool}", rehearsed=rehearsed)
    tokens = _sum_of(steps, key, rehearsed)
    return Act(name=name, kind=kind, placed="train", pool=pool, seconds=held, tokens=tokens, whole=False)


def _with_learning(step: str) -> Figure:
    """Seconds of rollouts on the pool that also learns: it is held once."""
    return Figure(value=0.0, unit="s", kind="declared", source=f"counted with {step}, whose pool also generates")


def _sum_of(events: Sequence[dict[str, Any]], key: str, rehearsed: bool) -> Figure | None:
    values = [event[key] for event in events if isinstance(event.get(key), int | float)]
    if not values:
        return None
    source = f"events.jsonl: sum of {key} over {len(values)} steps"
    return Figure.measured(math.fsum(values), "tokens", source, rehearsed=rehearsed)


def alternatives(run: RunFolder) -> dict[tuple[str, str], ForecastOption]:
    """What each act would take on each pool by `forecast.json`, by the names of both; nothing if there is none.

    Raises DamagedFile for a file of another form, or one that was touched.
    """
    record = run.read_record("forecast", ForecastRecord)
    return {(act.name, one.pool): one for act in record.steps for one in act.pools} if record else {}
