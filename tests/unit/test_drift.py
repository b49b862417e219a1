"""RL says once when the mismatch climbs towards its budget, and again only after it has come to rest."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from isthmus.progress import Watch
from isthmus.stages.rl import loop as rl


@pytest.fixture
def told():
    return []


def session_of(told: list, steps: int = 200, budget: float = 0.05) -> SimpleNamespace:
    section = SimpleNamespace(drift_budget=budget, steps=steps)
    run = SimpleNamespace(recipe=SimpleNamespace(rl=section), event=lambda stage, name, **found: told.append(found))
    return SimpleNamespace(run=run, mismatches=[], step=0, drifts=False)


def play(session: SimpleNamespace, gaps: list[float]) -> str:
    text = io.StringIO()
    with Watch(Console(file=text, width=200)).count("RL", session.run.recipe.rl.steps) as counter:
        for gap in gaps:
            session.step += 1
            session.mismatches.append(gap)
            rl._watch_drift(session, counter)
    return text.getvalue()


def test_a_climb_is_told_once(told):
    shown = play(session_of(told), [0.010 + 0.0003 * step for step in range(40)])
    assert [found["what"] for found in told] == ["the mismatch climbs"]
    assert told[0]["step"] == 20 and "the budget of 0.05 in 116 steps" in told[0]["why"]
    assert shown.count("the mismatch climbs") == 1


def test_a_climb_that_ends_before_the_budget_is_no_alarm(told):
    session = session_of(told, steps=40)
    play(session, [0.010 + 0.0003 * step for step in range(40)])
    assert told == []


def test_a_second_climb_is_told_again(told):
    session = session_of(told, steps=2000)
    play(session, [0.010 + 0.0003 * step for step in range(40)])
    play(session, [0.01] * 200)
    play(session, [0.010 + 0.0003 * step for step in range(60)])
    assert len(told) == 2
