"""The time line of a step counts what was made again, and says when and from where it moved."""

from __future__ import annotations

from isthmus.records import IncidentRecord, RevertVerdict
from isthmus.report_page.timeline import timeline

GO = RevertVerdict(verdict="go", reason="", checkpoint_step=2, repeated_steps=[], checks=[])


def met(number: int, at: float, update: int, rung: str, **fields) -> IncidentRecord:
    given = {
        "recipe_sha256": "0", "started": at, "ended": at + 1, "step": "s", "number": number, "signal": "ended",
        "detail": "", "pool": "away", "ranks": 1, "update": update, "checkpoint": 2, "rung": rung, "why": "",
        "outcome": "done", **fields,
    }  # fmt: skip
    return IncidentRecord(**given)


def attempt(at: float, pool: str, first: int, last: int) -> list[dict]:
    events = [{"event": "start", "time": at, "pool": pool}]
    events += [{"event": "resume", "time": at + 0.5, "from_step": first - 1}] if first > 1 else []
    return events + [{"event": "step", "time": at + number, "step": number} for number in range(first, last + 1)]


def test_what_is_made_again_is_counted_and_the_move_has_its_checkpoint():
    """Three tries: updates 1 to 5, then 3 to 4 after a checkpoint at 2, then 3 to 8 on the other pool."""
    events = [*attempt(100, "away", 1, 5), *attempt(120, "away", 3, 4), *attempt(140, "home", 3, 8)]
    found = timeline("s", events, [met(1, 110, 5, "restart"), met(2, 130, 4, "revert", to_pool="home", gate=GO)])
    assert found is not None
    assert (found.begun, found.lost) == (5 + 2 + 6, 3 + 2) and found.begun - found.lost == 8
    assert found.moves == [(31, "home", 2)] and found.seconds == 48
    assert found.chart.count("home") and "revert" in found.chart


def test_a_step_that_met_nothing_has_none():
    assert timeline("s", attempt(0, "home", 1, 3), []) is None
