"""Incidents that are planted in tiny steps, for benchmarks/revert.py: what strikes, and what the ladder has to do."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.revert_steps import (
    EVERY,
    STEP,
    UPDATES,
    Compute,
    Plant,
    carry_out,
    digests,
    end_of,
    expect_pace,
    new_run,
    replaced,
)
from isthmus.errors import IsthmusError, RanksFailed
from isthmus.records import IncidentRecord, incidents
from isthmus.run import RunFolder
from isthmus.supervise.guard import Computed, Guard
from isthmus.supervise.situation import checkpoints
from isthmus.trainer import checkpoint

NAN = math.nan
MOVED, ANY = "revert", "any"
REPEATED = [number for number in range(1, UPDATES) if number % EVERY == 0]
EARLY_SPIKES = {"spike_history": 5, "spike_sigma": 50.0}
"""A spike can be told after 5 updates: the published rule wants 64 of them. Healthy steps are looked at by that one."""


@dataclass(frozen=True)
class Struck:
    """The plant of one incident, and what a step with it needs beside."""

    plant: Plant
    prepare: Callable[[RunFolder], None] = lambda run: None
    around: tuple[tuple[Any, str, Any], ...] = ()


@dataclass(frozen=True)
class Incident:
    """`signals` of which the first has to be one, the `rungs` in their order, whether somebody has to start the step
    again, and where it may strike. ANY stands for whatever comes before a move."""

    signals: tuple[str, ...]
    rungs: tuple[str, ...]
    strike: Callable[[int, random.Random], Struck]
    updates: Sequence[int] = tuple(range(2, UPDATES))
    wanted: int = UPDATES
    supervise: dict[str, Any] = field(default_factory=dict)
    started_again: bool = False
    only: tuple[str, ...] = ("sft", "pretrain", "rl")


def bad(found: Computed[Any]) -> Computed[Any]:
    return dataclasses.replace(found, loss=NAN, norm=NAN)


def scaled(found: Computed[Any], factor: float) -> Computed[Any]:
    return dataclasses.replace(found, norm=found.norm * factor)


def _changed(when: Callable[[Plant, Guard, int, int], bool], change: Callable[[Computed[Any]], Computed[Any]]) -> Plant:
    """`when` gets plant, guard, the number of the update and how often it was computed."""

    def disturb(plant: Plant, guard: Guard, number: int, compute: Compute) -> Compute:
        def computed() -> Computed[Any]:
            time_and_again = plant.again(number)
            found = compute()
            return change(found) if when(plant, guard, number, time_and_again) else found

        return computed

    return Plant(disturb)


def no_number(update: int, _chance: random.Random, *, once: bool) -> Struck:
    return Struck(_changed(lambda _plant, _guard, number, call: number == update and (call == 1 or not once), bad))


def pool_without_numbers(update: int, _chance: random.Random) -> Struck:
    return Struck(_changed(lambda _plant, guard, number, _call: number >= update and guard.place.pool == "home", bad))


def wrong_once(update: int, chance: random.Random) -> Struck:
    """One of the two computations that are compared."""
    by, which = 1 + 10 ** chance.uniform(-6, -1), chance.choice([1, 2])
    return Struck(
        _changed(lambda _plant, _guard, number, call: (number, call) == (update, which), lambda one: scaled(one, by))
    )


def never_the_same(update: int, chance: random.Random, *, ever: bool) -> Struck:
    def when(plant: Plant, guard: Guard, number: int, _call: int) -> bool:
        return number == update and (guard.place.pool == "home" if ever else plant.attempt == 1)

    return Struck(_changed(when, lambda one: scaled(one, 1 + 10 ** chance.uniform(-6, -1))))


def spike(update: int, chance: random.Random, *, once: bool) -> Struck:
    by = 10 ** chance.uniform(3, 6)
    return Struck(
        _changed(
            lambda _plant, _guard, number, call: number == update and (call == 1 or not once),
            lambda one: scaled(one, by),
        )
    )


def process_ends(update: int, chance: random.Random, *, ever: bool, damaging: bool = False) -> Struck:
    """As the supervisor is told of it; `damaging` flips a bit in the newest checkpoint before."""

    def disturb(plant: Plant, guard: Guard, number: int, compute: Compute) -> Compute:
        if number == update and (guard.place.pool == "home" if ever else plant.attempt == 1):
            if damaging:
                flip_a_bit(guard.run, chance)
            raise RanksFailed("the process of the step stopped: killed by signal 9 (SIGKILL).", 0)
        return compute

    return Struck(Plant(disturb))


def flip_a_bit(run: RunFolder, chance: random.Random) -> None:
    wait_for_saves(run)
    folder = run.step_folder(STEP) / "checkpoints" / f"step-{checkpoints(run, STEP)[-1]:06d}"
    path = chance.choice(sorted(folder.glob("*.safetensors")))
    content = bytearray(path.read_bytes())
    content[-1 - chance.randrange(len(content) // 2)] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def wait_for_saves(run: RunFolder) -> None:
    """Until no checkpoint is being written in the background."""
    deadline = time.monotonic() + 60
    while list((run.step_folder(STEP) / "checkpoints").glob(".step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)


def save_fails(update: int, _chance: random.Random) -> Struck:
    plant, sound = Plant(), checkpoint.write_manifest

    def write(folder: Path, manifest: Any) -> Any:
        if manifest.step == update and plant.attempt == 1:
            raise IsthmusError(f"{folder} cannot be written: no space left on the device")
        return sound(folder, manifest)

    return Struck(plant, around=((checkpoint, "write_manifest", write),))


def asked_to_stop(update: int, _chance: random.Random) -> Struck:
    def disturb(plant: Plant, _guard: Guard, number: int, compute: Compute) -> Compute:
        if number == update and plant.attempt == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute

    return Struck(Plant(disturb))


def slow(_update: int, _chance: random.Random, *, ratio: float | None) -> Struck:
    """Slower than the plan thought likely, which no pool keeps to here; `ratio`: as pilots know the other one."""

    def disturb(_plant: Plant, guard: Guard, _number: int, compute: Compute) -> Compute:
        if guard.place.pool == "home":
            time.sleep(0.15 if ratio is not None else 0.0)
        return compute

    return Struck(Plant(disturb), prepare=partial(expect_pace, slowest_s=1e-6, ratio=ratio))


NUMBERS = ("not finite", "repeat differs")
"""Where an update is computed twice, a number that is none shows as a difference."""
RESTARTS = ("restart", "restart", "restart")
INCIDENTS: dict[str, Incident] = {
    "no number once": Incident(NUMBERS, ("retry",), partial(no_number, once=True)),
    "no number ever": Incident(("not finite",), ("retry", "skip batch"), partial(no_number, once=False)),
    "a pool without numbers": Incident(("not finite",), (ANY, MOVED), pool_without_numbers, range(2, UPDATES - 2)),
    "wrong once": Incident(("repeat differs",), ("retry",), wrong_once, REPEATED),
    "wrong in one start": Incident(
        ("repeat differs",), ("retry", "restart"), partial(never_the_same, ever=False), REPEATED
    ),
    "wrong on the pool": Incident(
        ("repeat differs",), ("retry", *RESTARTS, MOVED), partial(never_the_same, ever=True), REPEATED
    ),
    "spike once": Incident(("spike",), ("retry",), partial(spike, once=True), [7, 8], supervise=EARLY_SPIKES),
    "spike of a batch": Incident(
        ("spike",), ("retry", "skip batch"), partial(spike, once=False), [7, 8], supervise=EARLY_SPIKES
    ),
    "process ends": Incident(("ended",), ("restart",), partial(process_ends, ever=False)),
    "process ends each time": Incident(("ended",), (*RESTARTS, MOVED), partial(process_ends, ever=True)),
    "process ends, save damaged": Incident(
        ("ended",), ("restart",), partial(process_ends, ever=False, damaging=True), [7, 8]
    ),
    "save fails": Incident(("save failed",), ("stop",), save_fails, REPEATED, started_again=True),
    "asked to stop": Incident((), ("leave",), asked_to_stop, started_again=True),
    "slow, nothing quicker": Incident(("slow",), ("go on",), partial(slow, ratio=None), wanted=20, only=("sft",)),
    "slow, another is quicker": Incident(
        ("slow",), (MOVED, "go on"), partial(slow, ratio=0.1), wanted=60, only=("sft",)
    ),
}
RARE = {"slow, nothing quicker": 2, "slow, another is quicker": 2}
"""Of those that take long so many at most in a hundred incidents."""


@dataclass
class Twins:
    """Undisturbed steps by kind, number of updates and updates that are left out; each is trained when it is asked
    for, in `folder`."""

    folder: Path
    known: dict[tuple[str, int, frozenset[int]], RunFolder] = field(default_factory=dict)

    def of(self, kind: str, wanted: int = UPDATES, left_out: frozenset[int] = frozenset()) -> RunFolder:
        key = (kind, wanted, left_out)
        if key not in self.known:
            run = new_run(self.folder / f"twin-{len(self.known)}", kind, self.folder, updates=wanted)
            ended = carry_out(run, Plant(left_out=left_out))
            assert ended is None, ended
            self.known[key] = run
        return self.known[key]

    def alarms(self) -> int:
        """Incidents of undisturbed steps."""
        return sum(len(incidents(run, STEP)) for run in self.known.values())


def one_incident(name: str, kind: str, twins: Twins, chance: random.Random) -> dict[str, Any]:
    """Plant an incident in a step of a kind, let it be carried out to its end, and compare it with its twin."""
    one, folder = INCIDENTS[name], twins.folder / "incident"
    update = chance.choice(one.updates)
    run = new_run(folder, kind, twins.folder, updates=one.wanted, **one.supervise)
    struck, began = one.strike(update, chance), time.perf_counter()
    struck.prepare(run)
    with replaced(*struck.around):
        ended = carry_out(run, struck.plant)
        left = isinstance(ended, KeyboardInterrupt)
        saved = checkpoints(run, STEP)
        if one.started_again and ended is not None:
            ended = carry_out(run, struck.plant)
    met = incidents(run, STEP)
    rungs = ("leave",) if left and not met else tuple(record.rung for record in met)
    found = {
        "kind": name,
        "step": kind,
        "update": update,
        "found": left and update in saved if not one.signals else bool(met) and met[0].signal in one.signals,
        "rungs": list(rungs),
        "right": _climbed(one, rungs, met),
        "seconds": round(time.perf_counter() - began, 2),
        **(_end(run, kind, one, twins) if ended is None else _none(ended)),
        **_costs(run, met),
    }
    shutil.rmtree(folder)
    return found


def _climbed(one: Incident, rungs: tuple[str, ...], met: list[IncidentRecord]) -> bool:
    """The rungs that are expected, and a move is made. A restart counts towards one only if no newer checkpoint came
    after it."""
    moves = [record for record in met if record.rung == MOVED]
    if MOVED not in one.rungs:
        return rungs == one.rungs
    if len(moves) != 1 or moves[0].outcome != "done":
        return False
    last = moves[0].checkpoint
    counted = tuple(record.rung for record in met if record.rung != "restart" or record.checkpoint >= last)
    return counted[-1:] == (MOVED,) if one.rungs[0] == ANY else counted == one.rungs


def _end(run: RunFolder, kind: str, one: Incident, twins: Twins) -> dict[str, Any]:
    """Against the twin that left out the same batches."""
    updates = run.events(STEP, "step")
    left_out = frozenset(one["step"] for one in updates if one.get("left_out") or one.get("updates_left_out"))
    twin = twins.of(kind, one.wanted, left_out)
    return {
        "left_out": sorted(left_out),
        "ended": None,
        "same": end_of(run) == end_of(twin),
        "batches": digests(run) == digests(twin),
    }


def _none(ended: BaseException) -> dict[str, Any]:
    return {"left_out": [], "ended": f"{type(ended).__name__}: {ended}", "same": False, "batches": False}


def _costs(run: RunFolder, met: list[IncidentRecord]) -> dict[str, Any]:
    """Updates that were made more than once, and the seconds from the first incident to the next new update."""
    made = run.events(STEP, "step", repeated=True)
    if not met:
        return {"lost": len(made) - len(run.events(STEP, "step")), "to_go_on_s": None}
    before = max((event["step"] for event in made if event["time"] <= met[0].started), default=0)
    after = [event["time"] for event in made if event["time"] > met[-1].started and event["step"] > before]
    seconds = round(min(after) - met[0].started, 3) if after else None
    return {"lost": len(made) - len(run.events(STEP, "step")), "to_go_on_s": seconds}
