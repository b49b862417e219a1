"""Incidents on the disk: each is there, as decided, before anything is done about it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Literal

from isthmus.records import IncidentRecord, PlanRecord, RevertVerdict, Side, TrainPlace, rollout_pool, train_place
from isthmus.run import RunFolder, explain_io_errors, write_atomic
from isthmus.supervise.ladder import Decision
from isthmus.supervise.signals import Signal


def write(
    run: RunFolder,
    step: str,
    signal: Signal,
    decision: Decision,
    place: TrainPlace,
    checkpoint: int,
    side: Side = "train",
) -> IncidentRecord:
    """Store a decision under the next free number. Raises IsthmusError if the disk is full or may not be written."""
    folder = run.step_folder(step) / "incidents"
    number = 1 + max((int(path.stem) for path in folder.glob("[0-9]*.json")), default=0)
    while True:
        record = IncidentRecord(
            recipe_sha256=run.recipe.digest(),
            started=time.time(),
            ended=time.time(),
            step=step,
            side=side,
            number=number,
            signal=signal.kind,
            detail=signal.detail,
            pool=place.pool,
            ranks=place.ranks,
            culprits=list(signal.culprits),
            update=signal.update,
            checkpoint=checkpoint,
            rung=decision.rung,
            why=decision.why,
            outcome="decided",
            to_pool=decision.to_pool,
            to_ranks=decision.to_ranks,
            without_ranks=list(decision.without_ranks),
            wait_s=decision.wait_s,
            figures=decision.figures,
        )
        path = folder / f"{number:03d}.json"
        if _take(path, record):
            run.enter(path)
            return record
        number += 1


def _take(path: Path, record: IncidentRecord) -> bool:
    """Store a record under a number that nobody has: a step and its supervisor may write at the same time."""
    own = path.with_name(f".{path.name}.{os.getpid()}")
    write_atomic(own, record.model_dump_json(indent=2).encode() + b"\n")
    with explain_io_errors(path):
        try:
            os.link(own, path)
        except FileExistsError:
            return False
        finally:
            own.unlink()
    return True


def conclude(
    run: RunFolder,
    record: IncidentRecord,
    outcome: Literal["done", "asked", "failed"],
    gate: RevertVerdict | None = None,
) -> IncidentRecord:
    """Say what came of a decision."""
    ended = record.model_copy(update={"outcome": outcome, "ended": time.time(), "gate": gate})
    run.write_record(f"steps/{record.step}/incidents/{record.number:03d}", ended)
    return ended


def why_asked(run: RunFolder, record: IncidentRecord) -> str | None:
    """Why a person has to decide about a move; None if nobody has to."""
    if record.to_pool is None or record.to_pool == record.pool:
        return None
    if run.recipe.supervise.on_revert == "ask":
        return '[supervise] on_revert = "ask" lets a person decide.'
    plan = run.require_record("plan", PlanRecord, "plan")
    train = train_place(run, record.step, lambda _: 1).pool
    rollout = rollout_pool(run, record.step, plan.pool_of("rollout"))
    there = (record.to_pool, rollout) if record.side == "train" else (train, record.to_pool)
    if any((one.train, one.rollout) == there and not one.keeps_aim for one in plan.candidates):
        return f"Training on {there[0]} and rollouts on {there[1]} are not known to keep to [aim], for the whole run."
    return None


def question(run: RunFolder, record: IncidentRecord, why: str) -> str:
    """What a person is asked before a move, and why."""
    said = [f"  {name}: {figure}" for name, figure in record.figures.items()]
    what = f"step {record.step} had better move from pool {record.pool} to {record.to_pool}"
    if record.side == "rollout":
        what = f"step {record.step} had better generate on pool {record.to_pool} instead of {record.pool}"
    lines = [
        f"{what}: {record.why}.",
        *said,
        why,
        f"To move:  isthmus run {run.path} --revert",
        f"To stay:  isthmus run {run.path}",
    ]
    return "\n".join(lines)
