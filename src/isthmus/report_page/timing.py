"""Where a run's time went, read from its events: attempts of each stage, and what the RL steps spent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

UNTIMED_STAGES = frozenset({"serve", "report"})
STAGE_TITLES = {"qualify": "Qualify", "plan": "Plan", "train": "SFT", "handoff": "Hand-off"}


@dataclass(frozen=True)
class Attempt:
    """One try of a stage, from its start event to its end event, or to its last event if it was cut off.

    `pretraining` are the seconds until its last step of pretraining.
    """

    stage: str
    pool: str | None
    seconds: float
    finished: bool
    pretraining: float = 0.0


def attempts(events: Sequence[dict[str, Any]]) -> list[Attempt]:
    """The tries of all stages in the order of their first event."""
    tries: list[list[dict[str, Any]]] = []
    running: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        stage = event["stage"]
        if event["event"] == "start":
            running[stage] = []
            tries.append(running[stage])
        if stage in running:
            running[stage].append(event)
    return [_attempt(one) for one in tries if one[0]["stage"] not in UNTIMED_STAGES]


def spent(events: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Seconds of wall-clock time of each stage, its cut-off attempts included."""
    totals: dict[str, float] = {}
    for attempt in attempts(events):
        totals[attempt.stage] = totals.get(attempt.stage, 0.0) + attempt.seconds
    return totals


def finished_stages(events: Sequence[dict[str, Any]]) -> set[str]:
    return {attempt.stage for attempt in attempts(events) if attempt.finished}


def breakdown(events: Sequence[dict[str, Any]]) -> list[tuple[str, float]]:
    """(what, seconds) in pipeline order; RL is split by its step events, and the rest of it is named as such.

    Training is split where the last step of pretraining ends.
    """
    pretraining = math.fsum(attempt.pretraining for attempt in attempts(events))
    parts: list[tuple[str, float]] = []
    for stage, seconds in spent(events).items():
        if stage == "rl":
            parts += _rl_parts(events, seconds)
        elif stage == "train":
            parts += [("Pretraining", pretraining), (STAGE_TITLES[stage], seconds - pretraining)]
        else:
            parts.append((STAGE_TITLES.get(stage, stage.capitalize()), seconds))
    return [(name, seconds) for name, seconds in parts if seconds > 0]


def rollouts_beside_training(events: Sequence[dict[str, Any]]) -> float:
    """Seconds of rollouts that ran while the trainer learned (samples one version old); 0 when they took turns."""
    steps = _rl_events(events, "step")
    return _total(steps, "rollout_s") if _overlapped(steps) else 0.0


def _rl_parts(events: Sequence[dict[str, Any]], whole: float) -> list[tuple[str, float]]:
    steps, evaluations = _rl_events(events, "step"), _rl_events(events, "evaluate")
    parts = [("RL rollouts", _total(steps, "rollout_s"))]
    if _overlapped(steps):
        parts = [("RL waiting for rollouts", _total(steps, "wait_s"))]
    parts += [("RL training", _total(steps, "train_s")), ("RL weight crossings", _total(steps, "sync_s"))]
    timed_evaluation = _total(evaluations, "seconds")
    rest = max(0.0, whole - sum(seconds for _, seconds in parts) - timed_evaluation)
    if timed_evaluation:
        return [*parts, ("RL evaluation", timed_evaluation), ("RL, the rest", rest)]
    return [*parts, ("RL evaluation and the rest", rest)]


def _overlapped(steps: Sequence[dict[str, Any]]) -> bool:
    return any(step.get("staleness") for step in steps)


def _rl_events(events: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [event for event in events if event["stage"] == "rl" and event["event"] == name]


def _attempt(events: Sequence[dict[str, Any]]) -> Attempt:
    first, last = events[0], events[-1]
    ends = [event for event in events if event["event"] == "end"]
    seconds = ends[-1].get("seconds") if ends else None
    elapsed = last["time"] - first["time"] if seconds is None else seconds
    spent_in_all = float(max(0.0, elapsed))
    pretrained = [event["time"] for event in events if event["stage"] == "train" and event["event"] == "pretrain-step"]
    pretraining = min(spent_in_all, max(pretrained) - first["time"]) if pretrained else 0.0
    return Attempt(first["stage"], first.get("pool"), spent_in_all, bool(ends), pretraining)


def _total(events: Sequence[dict[str, Any]], key: str) -> float:
    values = (event.get(key) for event in events)
    return math.fsum(value for value in values if isinstance(value, int | float))
