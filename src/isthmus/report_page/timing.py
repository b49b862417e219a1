"""Where a run's time went, read from its events: attempts of each stage, and what the RL steps spent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

UNTIMED_STAGES = frozenset({"serve", "report"})
STAGES = {"qualify": ("Qualify", "p-desk"), "plan": ("Plan", "p-desk"), "handoff": ("Hand-off", "p-handoff")}
KINDS = {"pretrain": "p-pretrain", "sft": "p-sft", "rl": "p-other", "sample": "p-rollout"}
SUPERVISED = frozenset({"incident", "revert"})
"""Events that the supervisor writes last before it starts a step again."""
Part = tuple[str, float, str]
"""What took how many seconds, and the class of its colour."""


@dataclass(frozen=True)
class Attempt:
    """One try of a stage or a step, from its start event to its end event, or to its last event if it was cut off.

    A try that the supervisor ended holds its pool until the next one begins.
    """

    stage: str
    pool: str | None
    seconds: float
    finished: bool


def attempts(events: Sequence[dict[str, Any]]) -> list[Attempt]:
    """The tries of all stages in the order of their first event."""
    return [_attempt(one) for one in _tries(events) if one[0]["stage"] not in UNTIMED_STAGES]


def _tries(events: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The events of each try of a stage; the start of the next one ends one that the supervisor ended."""
    tries: list[list[dict[str, Any]]] = []
    running: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        stage = event["stage"]
        if event["event"] == "start":
            if stage in running and running[stage][-1]["event"] in SUPERVISED:
                running[stage].append({**event, "event": "next"})
            running[stage] = []
            tries.append(running[stage])
        if stage in running:
            running[stage].append(event)
    return tries


def spent(events: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Seconds of wall-clock time of each stage, its cut-off attempts included."""
    totals: dict[str, float] = {}
    for attempt in attempts(events):
        totals[attempt.stage] = totals.get(attempt.stage, 0.0) + attempt.seconds
    return totals


def held(events: Sequence[dict[str, Any]], step: str) -> dict[str, tuple[float, list[dict[str, Any]]]]:
    """Seconds for which a step held each pool that it trained on, and the events of the updates it made there."""
    own = [event for event in events if event["stage"] == step]
    found: dict[str, tuple[float, list[dict[str, Any]]]] = {}
    for attempt in attempts(own):
        if attempt.pool is not None:
            seconds, made = found.get(attempt.pool, (0.0, []))
            found[attempt.pool] = (seconds + attempt.seconds, made)
    pool = None
    for event in own:
        pool = event.get("pool") if event["event"] == "start" else pool
        if event["event"] == "step" and pool is not None:
            found[pool][1].append(event)
    return found


def held_rollouts(events: Sequence[dict[str, Any]], step: str) -> dict[str, tuple[float, list[dict[str, Any]]]]:
    """Seconds for which a step held each pool that generated for it, and the events of the updates that learnt from
    what was written there."""
    own = [event for event in events if event["stage"] == step]
    found: dict[str, tuple[float, list[dict[str, Any]]]] = {}

    def add(pool: str | None, seconds: float) -> None:
        if pool is not None:
            before, made = found.get(pool, (0.0, []))
            found[pool] = (before + max(0.0, seconds), made)

    for one in _tries(own):
        pool, since = one[0].get("rollout_pool"), one[0]["time"]
        for move in one:
            if move["event"] == "revert" and move.get("side") == "rollout":
                add(pool, move["time"] - since)
                pool, since = move["to_pool"], move["time"]
        add(pool, one[-1]["time"] - since)
    for event in own:
        if event["event"] == "step" and event.get("rollout_pool") in found:
            found[event["rollout_pool"]][1].append(event)
    return found


def finished_stages(events: Sequence[dict[str, Any]]) -> set[str]:
    return {attempt.stage for attempt in attempts(events) if attempt.finished}


def breakdown(events: Sequence[dict[str, Any]], kinds: Mapping[str, str]) -> list[Part]:
    """Where the time went, in the order of the run. `kinds` are those of the steps by name; one of RL is split by what
    its events say, and the rest of it is named as such."""
    parts: list[Part] = []
    for act, seconds in spent(events).items():
        kind = kinds.get(act)
        if kind == "rl":
            parts += _rl_parts([event for event in events if event["stage"] == act], act, seconds)
        elif kind is not None:
            parts.append((act, seconds, KINDS[kind]))
        else:
            title, colour = STAGES.get(act, (act.capitalize(), "p-other"))
            parts.append((title, seconds, colour))
    return [part for part in parts if part[1] > 0]


def rollouts_beside_training(events: Sequence[dict[str, Any]]) -> float:
    """Seconds of rollouts that ran while the trainer learned (samples a version old); 0 when they took turns."""
    steps = [event for event in events if event["event"] == "step" and event.get("staleness")]
    return _total(steps, "rollout_s")


def _rl_parts(events: Sequence[dict[str, Any]], name: str, whole: float) -> list[Part]:
    steps = [event for event in events if event["event"] == "step"]
    evaluations = [event for event in events if event["event"] == "evaluate"]
    parts = [(f"{name}: rollouts", _total(steps, "rollout_s"), "p-rollout")]
    if _overlapped(steps):
        parts = [(f"{name}: waiting for rollouts", _total(steps, "wait_s"), "p-rollout")]
    parts += [(f"{name}: training", _total(steps, "train_s"), "p-train")]
    parts += [(f"{name}: weight crossings", _total(steps, "sync_s"), "p-sync")]
    timed_evaluation = _total(evaluations, "seconds")
    rest = max(0.0, whole - sum(seconds for _, seconds, _ in parts) - timed_evaluation)
    if timed_evaluation:
        parts += [(f"{name}: evaluation", timed_evaluation, "p-evaluation"), (f"{name}: the rest", rest, "p-other")]
        return parts
    return [*parts, (f"{name}: evaluation and the rest", rest, "p-other")]


def _overlapped(steps: Sequence[dict[str, Any]]) -> bool:
    return any(step.get("staleness") for step in steps)


def _attempt(events: Sequence[dict[str, Any]]) -> Attempt:
    first, last = events[0], events[-1]
    ends = [event for event in events if event["event"] == "end"]
    seconds = ends[-1].get("seconds") if ends else None
    elapsed = last["time"] - first["time"] if seconds is None else seconds
    return Attempt(first["stage"], first.get("pool"), float(max(0.0, elapsed)), bool(ends))


def _total(events: Sequence[dict[str, Any]], key: str) -> float:
    values = (event.get(key) for event in events)
    return math.fsum(value for value in values if isinstance(value, int | float))
