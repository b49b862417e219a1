"""RL says once when the mismatch climbs towards its budget, and again only after it has come to rest."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from isthmus.progress import Watch
from isthmus.stages.steps.rl.crossing import DriftAlarm


@pytest.fixture
def told():
    return []


def alarm(told: list, steps: int = 200, budget: float = 0.05) -> DriftAlarm:
    return DriftAlarm(budget, steps, lambda name, **found: told.append({"event": name, **found}))


def play(drift: DriftAlarm, gaps: list[float]) -> str:
    """The text that a person sees while these mismatches are met, step by step."""
    text = io.StringIO()
    with Watch(Console(file=text, width=200)).count("RL", drift.steps) as counter:
        for step in range(1, len(gaps) + 1):
            drift.look(step, gaps[:step], counter.say)
    return text.getvalue()


def test_a_climb_is_told_once(told):
    shown = play(alarm(told), [0.010 + 0.0003 * step for step in range(40)])
    assert [(found["event"], found["what"]) for found in told] == [("alarm", "the mismatch climbs")]
    assert told[0]["step"] == 20 and "the budget of 0.05 in 116 steps" in told[0]["why"]
    assert shown.count("the mismatch climbs") == 1


def test_a_climb_that_ends_before_the_budget_is_no_alarm(told):
    play(alarm(told, steps=40), [0.010 + 0.0003 * step for step in range(40)])
    assert told == []


def test_a_second_climb_is_told_again(told):
    climb = [0.010 + 0.0003 * step for step in range(60)]
    play(alarm(told, steps=2000), [*climb[:40], *[0.01] * 200, *climb])
    assert len(told) == 2
