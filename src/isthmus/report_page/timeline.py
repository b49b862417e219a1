"""The time line of a step that went wrong: updates over seconds, by pool, with what was lost and when it moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from isthmus.records import IncidentRecord, incidents
from isthmus.report_page.charts import Mark, Series, line_chart
from isthmus.run import RunFolder

TONES = ("away", "home", "ink")


@dataclass(frozen=True)
class Timeline:
    """Of one step. `begun` updates are known to have begun, `lost` of them were made again; seconds are from its first
    start. `moves` are (seconds, pool, update that it went on from)."""

    step: str
    chart: Markup
    begun: int
    lost: int
    seconds: float
    moves: list[tuple[float, str, int]]


def timelines(run: RunFolder) -> list[Timeline]:
    """Of the steps that met something, in the order of the recipe."""
    names = [step.name for step in run.recipe.step]
    drawn = [timeline(name, run.events(name, repeated=True), incidents(run, name)) for name in names]
    return [one for one in drawn if one is not None]


def timeline(step: str, events: Sequence[dict[str, Any]], met: Sequence[IncidentRecord]) -> Timeline | None:
    """Of all events of a step in order and what it met; None for one that met nothing.

    An incident tells how far a try came, also where its last updates left no event.
    """
    starts = [event for event in events if event["event"] == "start"]
    if not met or not starts:
        return None
    zero, tones = starts[0]["time"], dict[str, str]()
    drawn, marks, lost, begun = list[Series](), list[Mark](), 0, 0
    ends = [*(event["time"] for event in starts[1:]), float("inf")]
    for number, (start, until) in enumerate(zip(starts, ends, strict=True)):
        tone = tones.setdefault(start["pool"], TONES[min(len(tones), len(TONES) - 1)])
        within = [one for one in events if start["time"] <= one["time"] < until]
        origin = next((one["from_step"] for one in within if one["event"] == "resume"), 0)
        own = [one for one in met if start["time"] <= one.started < until]
        points = [(start["time"] - zero, float(origin))]
        points += [(one["time"] - zero, float(one["step"])) for one in within if one["event"] == "step"]
        points += [(one.started - zero, float(one.update)) for one in own if one.update >= points[-1][1]]
        marks += [Mark(one.rung, one.started - zero, max(origin, float(one.update)), tone="ink") for one in own]
        reached = int(points[-1][1])
        following = starts[number + 1 :]
        went_on = _from(events, following[0]["time"], ends[number + 1]) if following else reached
        begun += reached - origin
        lost += max(0, reached - went_on)
        drawn.append(Series(start["pool"], points, tone))
    moves = [
        (one.ended - zero, one.to_pool, one.gate.checkpoint_step or 0)
        for one in met
        if one.rung == "revert" and one.outcome == "done" and one.to_pool is not None and one.gate is not None
    ]
    last = max(event["time"] for event in events) - zero
    return Timeline(step, line_chart(drawn, marks=marks), begun, lost, last, moves)


def _from(events: Sequence[dict[str, Any]], start: float, until: float) -> int:
    return next((one["from_step"] for one in events if one["event"] == "resume" and start <= one["time"] < until), 0)
