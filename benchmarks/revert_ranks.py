"""Incidents of real processes, one rank and two, for benchmarks/revert.py: killed with -9, or silent."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.processes import ended, kill, members, rank_of, said, start
from benchmarks.revert_steps import STEP, UPDATES, digests, end_of, new_run
from isthmus.records import incidents
from isthmus.run import RunFolder

SILENT = {"beat_s": 6.0, "start_s": 90.0}
GIVEN_UP = {"restarts": 0, "shrinks": 0}


@dataclass(frozen=True)
class OfRanks:
    """`same`: the end has the twin's bits; a move to a pool with fewer ranks has others."""

    signal: str
    rungs: tuple[str, ...]
    ranks: int
    sent: signal.Signals
    supervise: dict[str, Any]
    same: bool = True


INCIDENTS = {
    "a rank of two is killed": OfRanks("ended", ("restart",), 2, signal.SIGKILL, {}),
    "a rank of two falls silent": OfRanks("no beat", ("restart",), 2, signal.SIGSTOP, SILENT),
    "a rank of a given-up pool of two is killed": OfRanks(
        "ended", ("revert",), 2, signal.SIGKILL, GIVEN_UP, same=False
    ),
    "the one process is killed": OfRanks("ended", ("restart",), 1, signal.SIGKILL, {}),
    "the one process falls silent": OfRanks("no beat", ("restart",), 1, signal.SIGSTOP, SILENT),
}


def undisturbed(ranks: int, folder: Path, shared: Path) -> RunFolder:
    run = new_run(folder, "sft", shared, ranks=ranks)
    result = said(start("run", run.path, "--only", STEP))
    assert result.code == 0, result.errors
    return run


def one_of_ranks(name: str, folder: Path, shared: Path, twin: RunFolder, chance: random.Random) -> dict[str, Any]:
    one, update = INCIDENTS[name], chance.randint(2, UPDATES - 3)
    run = new_run(folder, "sft", shared, ranks=one.ranks, **one.supervise)
    process, began = start("run", run.path, "--only", STEP), time.perf_counter()
    with ended(process):
        rank = _strike(run, process.pid, one, update, chance)
        result = said(process)
    met = incidents(run, STEP)
    rungs = tuple(record.rung for record in met)
    found = {
        "kind": name,
        "step": "sft",
        "ranks": one.ranks,
        "rank": rank,
        "update": update,
        "found": bool(met) and met[0].signal == one.signal,
        "rungs": list(rungs),
        "right": rungs == one.rungs,
        "ended": None if result.code == 0 else result.errors[-300:],
        "same": result.code == 0 and (end_of(run) == end_of(twin)) == one.same,
        "batches": result.code == 0 and digests(run) == digests(twin),
        "lost": len(run.events(STEP, "step", repeated=True)) - len(run.events(STEP, "step")),
        "seconds": round(time.perf_counter() - began, 2),
    }
    shutil.rmtree(folder)
    return found


def _strike(run: RunFolder, session: int, one: OfRanks, update: int, chance: random.Random) -> int:
    """Wait for an update, and send the signal to a rank of that step: which."""
    while max((event["step"] for event in run.events(STEP, "step")), default=0) < update:
        assert members(session), "the command ended before the incident"
        time.sleep(0.02)
    ranks = {rank_of(pid) or 0: pid for pid, words in members(session).items() if "isthmus.launch" in words}
    trainers = {rank: pid for rank, pid in ranks.items() if rank < one.ranks}
    rank = chance.choice(sorted(trainers))
    if one.sent == signal.SIGKILL:
        kill(trainers[rank])
    else:
        os.kill(trainers[rank], one.sent)
    return rank
