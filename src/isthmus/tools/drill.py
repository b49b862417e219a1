"""What other policies would have made of a drill: each is played, on the same pools with the same faults."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from isthmus.progress import Watch
from isthmus.recipe.drill import DrillSection, Policy
from isthmus.recipe.schema import Recipe
from isthmus.recipe.steps import RlSection, TextSection
from isthmus.records import DrillRecord, PlayedPolicy, QualifyRecord, incidents
from isthmus.report_page.timeline import timeline, timelines
from isthmus.run import Figure, RunFolder, explain_io_errors

SETTINGS: dict[Policy, dict[str, int]] = {
    "persist": {"reverts": 0, "restarts": 1_000_000},
    "at-once": {"restarts": 0, "shrinks": 0},
}
"""What each policy is in [supervise], beside what the drill has there."""
LONGER = 1.2
"""A policy may take so many times what the steps of the drill took; what has not ended then is told as that."""
LEAVE_S = 60.0
"""What a drill gets to save and leave."""


def replay(run: RunFolder, watch: Watch) -> None:
    """Play the policies that the recipe of a finished drill names, and write them beside it into `drill.json`."""
    assert run.recipe.drill is not None
    if not run.recipe.drill.replay or run.read_record("drill", DrillRecord) is not None:
        return
    started = time.time()
    policies = [_as_it_went(run), *_without_a_move(run)]
    most = LONGER * sum(one.seconds for one in timelines(run)) or None
    for policy in run.recipe.drill.replay:
        watch.say(f"  [bold]{policy}[/] is played now" + (f", for {most:.0f} s at most" if most else ""))
        policies.append(_played(run, policy, most))
        watch.say(f"  {in_words(policies[-1])}")
    record = DrillRecord(recipe_sha256=run.recipe.digest(), started=started, ended=time.time(), policies=policies)
    run.write_record("drill", record)


def in_words(one: PlayedPolicy) -> str:
    """What became of a policy, in a line."""
    came = "ended" if one.ended else f"had {one.updates} of {one.wanted} updates, and {one.why}"
    moved = f", moved to {one.moved_to}" if one.moved_to else ""
    return f"{one.policy}: {came} after {one.seconds.value:,.0f} s{moved}; {one.lost} of {one.begun} updates were lost"


def _played(run: RunFolder, policy: Policy, most: float | None) -> PlayedPolicy:
    folder = run.path / "replays" / policy
    other = _prepared(run, folder, policy)
    why = play(folder, most)
    return _told(other, policy, why)


def _prepared(run: RunFolder, folder: Path, policy: Policy) -> RunFolder:
    """A drill of the same recipe with the policy in [supervise]; what qualification found does not depend on that."""
    other = RunFolder.create(folder, with_policy(run.recipe, policy))
    for pool in run.recipe.pools:
        record = run.require_record(f"qualify/{pool}", QualifyRecord, "qualify")
        other.write_record(f"qualify/{pool}", record.model_copy(update={"recipe_sha256": other.recipe.digest()}))
    return other


def with_policy(recipe: Recipe, policy: Policy) -> Recipe:
    assert recipe.drill is not None
    drill = DrillSection(**{**recipe.drill.model_dump(), "replay": []})
    supervise = recipe.supervise.model_copy(update=SETTINGS[policy])
    return recipe.model_copy(update={"drill": drill, "supervise": supervise})


def play(folder: Path, most: float | None) -> str:
    """Play the drill of a folder in a process of its own; why it did not come to its end, empty if it did."""
    log = folder / "replay.log"
    with explain_io_errors(log), log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "isthmus", "drill", str(folder)], stdout=out, stderr=out, stdin=subprocess.DEVNULL
        )
        try:
            code = process.wait(most)
        except subprocess.TimeoutExpired:
            return f"did not end within {most:.0f} s"
        finally:
            _end(process)
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    return "" if code == 0 else f"stopped: {' '.join(last)}"


def _end(process: subprocess.Popen[Any]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(LEAVE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _as_it_went(run: RunFolder) -> PlayedPolicy:
    return _told(run, "as it went", "")


def _told(run: RunFolder, policy: str, why: str) -> PlayedPolicy:
    lines, made = timelines(run), 0
    for step in _updating(run.recipe):
        made += max((event["step"] for event in run.events(step.name, "step")), default=0)
    moves = [pool for line in lines for _, pool, _ in line.moves]
    quiet = [step.name for step in run.recipe.step if step.name not in {line.step for line in lines}]
    complete = made >= wanted(run.recipe)
    seconds = sum(line.seconds for line in lines) + sum(_spent(run, name) for name in quiet)
    return PlayedPolicy(
        policy=policy,
        updates=made,
        wanted=wanted(run.recipe),
        begun=sum(line.begun for line in lines) + sum(len(run.events(name, "step")) for name in quiet),
        lost=sum(line.lost for line in lines),
        seconds=Figure.measured(seconds, "s", f"events of {run.path.name}", rehearsed=True),
        moved_to=moves[-1] if moves else None,
        ended=complete or not why,
        why="" if complete else why,
    )


def _spent(run: RunFolder, step: str) -> float:
    times = [event["time"] for event in run.events(step)]
    return max(times) - min(times) if times else 0.0


def wanted(recipe: Recipe) -> int:
    """Updates of all steps."""
    return sum(step.steps for step in _updating(recipe))


def _updating(recipe: Recipe) -> list[TextSection | RlSection]:
    """The steps that change weights; others have no updates."""
    return [step for step in recipe.step if isinstance(step, TextSection | RlSection)]


def _without_a_move(run: RunFolder) -> list[PlayedPolicy]:
    """Restarting as the drill did and then stopping is the drill itself until it moves. Told of a drill of one step."""
    step, *others = run.recipe.step
    met = incidents(run, step.name)
    move = next((one for one in met if one.rung == "revert" and one.outcome == "done"), None)
    if others or move is None or move.gate is None:
        return []
    events = [event for event in run.events(step.name, repeated=True) if event["time"] <= move.started]
    before = timeline(step.name, events, [one for one in met if one.started <= move.started])
    if before is None:
        return []
    left = move.gate.checkpoint_step or 0
    seconds = move.started - events[0]["time"]
    return [
        PlayedPolicy(
            policy="restart, then stop",
            updates=left,
            wanted=wanted(run.recipe),
            begun=before.begun,
            lost=before.begun - left,
            seconds=Figure.measured(seconds, "s", "events of the drill until its move", rehearsed=True),
            moved_to=None,
            ended=False,
            why=f"stopped where the drill moved to {move.to_pool}",
        )
    ]
