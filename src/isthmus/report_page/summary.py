"""The first screen of the dossier: what was decided, what it took, what is at risk and what was lost, in sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from isthmus.errors import DamagedFile
from isthmus.lines import read_json_object
from isthmus.records import HandoffRecord, PlanRecord, QualifyRecord
from isthmus.report_page import numbers
from isthmus.report_page.acts import acts_of
from isthmus.report_page.timing import Attempt
from isthmus.rules import warning
from isthmus.run import Figure, Kind, RunFolder

TASK = "accuracy, target minus reference"
UNSEEN, SOAKED = "unseen_rate_per_chip_hour", "soaked_chip_hours"


class Told(NamedTuple):
    """A question of a board, and its answer in a sentence or two."""

    asked: str
    answer: str


def summary(
    run: RunFolder,
    qualified: Mapping[str, QualifyRecord | None],
    plan: PlanRecord | None,
    handoff: HandoffRecord | None,
    attempts: Sequence[Attempt],
) -> list[Told]:
    """What a board asks first. What no record knows is said to be unknown."""
    drill = run.recipe.drill is not None
    done = {attempt.stage for attempt in attempts if attempt.finished}
    finished = handoff is not None or (drill and done.issuperset(step.name for step in run.recipe.step))
    told = [
        Told("Decision", _decision(plan)),
        Told("Time", _time(plan, attempts, finished=finished, kind="rehearsed" if drill else "measured")),
        Told("Cost", _cost(run, plan)),
        Told("Risk", _risk(qualified, plan)),
        Told("Lost in the crossing", "" if drill else lost(handoff)),
        Told("Allowed", _allowed(plan)),
        Told("Who says so", "Nobody: a drill is never sealed." if drill else _signed(run, handoff)),
    ]
    return [one for one in told if one.answer]


def lost(handoff: HandoffRecord | None) -> str:
    """What the crossing cost on the task, in words: a loss beyond chance, or how large one may hide in the interval."""
    if handoff is None:
        return "Not known: the model has not crossed."
    figures = [check.figure for check in handoff.checks if check.name.endswith(TASK) and check.figure is not None]
    figure = figures[-1] if figures else None
    if figure is None or figure.value is None:
        return "Not known: the task was not answered on both sides."
    value = f"{_points(figure, figure.value)} points of accuracy on the task ({figure.kind})"
    if figure.low is None or figure.high is None:
        return f"{value}."
    interval = f"{_points(figure, figure.low)} to {_points(figure, figure.high)}"
    if figure.high < 0:
        return f"{value} (95 % interval {interval}): a loss beyond chance, within the limit that the recipe allows."
    if figure.low >= 0:
        return f"Nothing: {value} (95 % interval {interval})."
    most = _points(figure, -figure.low).lstrip("+")
    return f"{value} (95 % interval {interval}): no loss beyond chance, and one of {most} points is not excluded."


def gate_in_words(handoff: HandoffRecord) -> str:
    """How many checks held, and by name those that did not."""
    other = [check for check in handoff.checks if check.outcome != "pass"]
    held = f"{len(handoff.checks) - len(other)} of {len(handoff.checks)} checks held"
    if not other:
        return f"{held}."
    words = {"caution": "a known risk that was not measured", "unknown": "not told", "fail": "failed"}
    named = "; ".join(dict.fromkeys(f"{numbers.phrase(one.name)}: {words[one.outcome]}" for one in other))
    return f"{held}. The others: {named}."


def _decision(plan: PlanRecord | None) -> str:
    if plan is None:
        return "None yet: there is no plan."
    stages = {"train": "training", "rollout": "rollouts", "serve": "serving"}
    placed = ", ".join(f"{stages.get(one.stage, one.stage)} on {one.pool}" for one in plan.placements)
    refused = [one for one in plan.rejected if one.stage == "train"]
    why = "".join(f" No training on {one.pool}: {one.reason}." for one in refused)
    return f"{numbers.capital(placed)}.{why}"


def _time(plan: PlanRecord | None, attempts: Sequence[Attempt], finished: bool, kind: Kind) -> str:
    spent = math.fsum(attempt.seconds for attempt in attempts)
    took = f"{'It took' if finished else 'So far'} {numbers.duration(spent)} ({kind})"
    expected = plan.estimate.get("total") if plan else None
    if expected is None or expected.value is None:
        return f"{took}; the plan had no estimate of the whole."
    interval = f", between {numbers.interval(expected).replace(' to ', ' and ')}" if numbers.interval(expected) else ""
    return f"{took}; the plan expected {numbers.quantity(expected)}{interval} ({expected.kind})."


def _cost(run: RunFolder, plan: PlanRecord | None) -> str:
    hours: dict[str, float] = {}
    for act in acts_of(run, plan) if plan else ():
        if act.seconds is not None and act.seconds.value is not None and act.seconds.kind != "forecast":
            held = act.seconds.value * run.recipe.pools[act.pool].count / 3600
            hours[act.pool] = hours.get(act.pool, 0.0) + held
    if not hours:
        return "No chip has been held yet."
    drill = run.recipe.drill is not None
    kinds = {pool: "rehearsed" if one.rehearsed or drill else "measured" for pool, one in run.recipe.pools.items()}
    said = ", ".join(f"{numbers.plain(spent)} chip-hours on {pool} ({kinds[pool]})" for pool, spent in hours.items())
    return f"{said}, waiting included. No price was given, so money is not counted."


def _risk(qualified: Mapping[str, QualifyRecord | None], plan: PlanRecord | None) -> str:
    used = dict.fromkeys(placement.pool for placement in plan.placements) if plan else dict.fromkeys(qualified)
    said = []
    for pool in used:
        record = qualified.get(pool)
        if record is None:
            said.append(f"{pool} is not qualified.")
        elif record.rehearsed:
            said.append(f"{pool} is rehearsed: whether the real chips are stable and fast is not known.")
        else:
            said.append(_stability(pool, record))
    return " ".join(said)


def _stability(pool: str, record: QualifyRecord) -> str:
    figures: dict[str, Figure] = dict(record.figures)
    for finding in record.evidence:
        figures |= finding.figures
    soaked, unseen = figures.get(SOAKED), figures.get(UNSEEN)
    if soaked is None or soaked.value is None:
        return f"{pool} was not soaked: how often it fails is not known."
    hours = numbers.plain(soaked.value)
    if unseen is None or unseen.value is None or not numbers.is_bound(unseen):
        return f"{pool} failed within {hours} chip-hours of soak ({soaked.kind})."
    once = numbers.duration(3600 / unseen.value)
    return f"{pool} did not fail in {hours} chip-hours ({soaked.kind}), too few to exclude one failure every {once}."


def _allowed(plan: PlanRecord | None) -> str:
    if plan is None:
        return ""
    if plan.rulings is None:
        return "Not looked at: the recipe does not say who buys and where."
    asked = {pool: warning(ruling) for pool, ruling in plan.rulings.items()}
    said = [f"{pool}: {words}." for pool, words in asked.items() if words]
    return " ".join(said) or "The records ask for nothing, which is no permission."


def _signed(run: RunFolder, handoff: HandoffRecord | None) -> str:
    if handoff is None or handoff.seal_id is None:
        return "Nobody yet: nothing is sealed."
    signer = signer_of(run, handoff)
    if signer is None:
        return f"The seal {handoff.seal_id} is not signed: it shows what was checked, not by whom."
    return f"The seal {handoff.seal_id} names the key {signer}; `isthmus inspect --trust` checks it."


def signer_of(run: RunFolder, handoff: HandoffRecord) -> str | None:
    """The public key that the seal of the bundle names; None if nobody signed it, or the bundle is not here."""
    path = run.path / handoff.bundles.get(handoff.format, "") / "seal.json"
    if handoff.seal_id is None or not path.is_file():
        return None
    return read_json_object(path, DamagedFile).get("signer")


def _points(figure: Figure, end: float) -> str:
    return numbers.fine_points(100 * end if figure.unit in numbers.SHARE_UNITS else end)
