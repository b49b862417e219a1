"""Runs a step that trains in processes of its own, watches them, and carries out what the ladder decides.

It computes nothing itself and does not load torch for a step of one rank, so it outlives what happens to the step.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from isthmus.errors import (
    Diverged,
    EnginesLost,
    GateRefused,
    IsthmusError,
    RanksFailed,
    SaveFailed,
    TooSlow,
    Unrepeatable,
)
from isthmus.launch.alone import Options
from isthmus.launch.beats import FOLDER, Beat, left_beats
from isthmus.launch.pool_ranks import run_on
from isthmus.pools import get_pool
from isthmus.progress import Watch
from isthmus.records import IncidentRecord, RevertVerdict, TrainPlace, incidents, step_is_done, step_record
from isthmus.run import RunFolder, explain_io_errors
from isthmus.supervise import gate
from isthmus.supervise.incidents import conclude, question, why_asked, write
from isthmus.supervise.ladder import Decision, Situation, decide
from isthmus.supervise.signals import Signal, SignalKind, ended, no_beat, save_failed
from isthmus.supervise.situation import place_of, situation

LOOK_S = 0.5
MOVES = ("leave out a rank", "shrink", "revert")
ASKED = ("revert", "move rollouts")
"""What a person may want to be asked before."""
LEFT_OUT = "ISTHMUS_WITHOUT"
"""As `isthmus.trainer.mesh` reads it, which loads torch."""
_KINDS: dict[type[IsthmusError], SignalKind] = {
    Diverged: "not finite",
    Unrepeatable: "repeat differs",
    TooSlow: "slow",
    EnginesLost: "ended",
}


class Start(Protocol):
    """Executes a step in `place.ranks` processes and returns when its part is done, or raises what ended it."""

    def __call__(self, step: str, place: TrainPlace) -> None: ...


@dataclass
class Supervisor:
    """Of one step. `start` and `examine` are what costs time: the processes of the step, and the gate of a revert.

    `agreed`: a person said that the step may move.
    """

    run: RunFolder
    step: str
    watch: Watch
    start: Start
    examine: Callable[[TrainPlace, TrainPlace], RevertVerdict]
    agreed: bool = False
    sleep: Callable[[float], None] = time.sleep

    def train(self) -> None:
        """Until the step has its record.

        Raises what ended it if the ladder has no more rungs, GateRefused if a person has to decide, KeyboardInterrupt
        if it was asked to stop.
        """
        self._take_up()
        while True:
            failure = self._attempt()
            if failure is None:
                return
            found, error = failure
            self._answer(found, error)

    def _attempt(self) -> tuple[Signal, IsthmusError] | None:
        """The signal that ended a try, and the error that came with it; None if the step is done."""
        place = place_of(self.run, self.step)
        watching = Watching.of(self.run, self.step, place)
        try:
            with watching.looking():
                self.start(self.step, place)
            return None
        except RanksFailed as error:
            if watching.silent is not None:
                return watching.silent, error
            culprits = () if error.rank is None or place.ranks == 1 else (error.rank,)
            return ended.look(str(error).splitlines()[0], watching.update, culprits), error
        except SaveFailed as error:
            return save_failed.look(watching.update, str(error)), error
        except (Diverged, Unrepeatable, TooSlow, EnginesLost) as error:
            return Signal(_KINDS[type(error)], str(error), watching.update), error

    def _answer(self, found: Signal, error: IsthmusError) -> None:
        """Decide, write it down, and carry it out. Raises the error if nothing more can be done."""
        place = place_of(self.run, self.step)
        now = situation(self.run, self.step, place)
        decision = decide(found, now)
        record = self._written(found, decision, place, now, error)
        self.watch.say(f"  [yellow]{found.kind}[/]: {found.detail}")
        self.watch.say(f"  [yellow]{decision.rung}[/]: {decision.why}")
        if decision.rung == "stop":
            conclude(self.run, record, "done")
            raise error
        self._carry_out(record, place)

    def _written(
        self, found: Signal, decision: Decision, place: TrainPlace, now: Situation, error: IsthmusError
    ) -> IncidentRecord:
        try:
            record = write(self.run, self.step, found, decision, place, now.checkpoint)
        except IsthmusError as unwritten:
            raise type(error)(f"{error}\nThe incident could not be written either: {unwritten}") from error
        self.run.event(self.step, "incident", number=record.number, signal=record.signal, rung=record.rung)
        return record

    def _carry_out(self, record: IncidentRecord, place: TrainPlace) -> None:
        why = why_asked(self.run, record)
        if why is not None and not self.agreed:
            conclude(self.run, record, "asked")
            raise GateRefused(question(self.run, record, why))
        if record.wait_s:
            self.watch.say(
                f"  waits {record.wait_s:,.0f} s for [bold]{place.pool}[/], and starts again; Ctrl-C ends it"
            )
            self.sleep(record.wait_s)
        if record.rung != "revert":
            conclude(self.run, record, "done")
            return
        self._revert(record, place)

    def _revert(self, record: IncidentRecord, place: TrainPlace) -> None:
        """Let the gate look, and go on from the checkpoint that it trusts; a refused move is one rung that failed."""
        assert record.to_pool is not None
        to = place_of_pool(self.run, record.to_pool)
        self.watch.say(f"  the gate of a move from [bold]{place.pool}[/] to [bold]{to.pool}[/]")
        verdict = self.examine(place, to)
        if verdict.verdict == "go":
            gate.set_aside(self.run, self.step, verdict)
        conclude(self.run, record, "done" if verdict.verdict == "go" else "failed", verdict)
        self.run.event(
            self.step,
            "revert",
            from_pool=place.pool,
            to_pool=to.pool,
            verdict=verdict.verdict,
            checkpoint=verdict.checkpoint_step,
        )
        self.watch.say(f"  [bold]{verdict.verdict}[/]: {verdict.reason}")
        if verdict.verdict == "refuse":
            self._answer(
                Signal("no progress", f"the move to {to.pool} was refused: {verdict.reason}", record.update),
                GateRefused(f"step {self.step} cannot go on: the move to pool {to.pool} was refused: {verdict.reason}"),
            )

    def _take_up(self) -> None:
        """What a supervisor that ended left undone: a move that waits for a person, or one that was decided."""
        past = incidents(self.run, self.step)
        last = past[-1] if past else None
        if last is None or last.rung not in ASKED or last.outcome not in ("asked", "decided"):
            if last is not None and last.outcome == "decided":
                conclude(self.run, last, "done" if last.rung in MOVES else "failed")
            return
        if self.agreed or last.outcome == "decided":
            self._carry_out(last, place_of(self.run, self.step))
        else:
            self.watch.say(f"  staying on [bold]{last.pool}[/]: nobody agreed to the move to {last.to_pool}")


def place_of_pool(run: RunFolder, name: str) -> TrainPlace:
    """All ranks of a pool."""
    section = run.recipe.pools[name]
    return TrainPlace(name, section.ranks or section.count)


def supervise(run: RunFolder, step: str, watch: Watch, *, profile: bool = False, agreed: bool = False) -> None:
    """Train a step of a run to its end in processes of its own. Raises as `Supervisor.train`."""

    def start(step: str, place: TrainPlace) -> None:
        logs = run.step_folder(step) / "ranks"
        options: Options = {"name": step, "profile": profile, "agreed": agreed}
        if place.ranks == 1 or step_record(run, step) is None:
            run_on(get_pool(run.recipe, place.pool), "steps", run.path, options, place.ranks, logs)

    def examine(old: TrainPlace, new: TrainPlace) -> RevertVerdict:
        return gate.examine(run, step, old, new)

    Supervisor(run, step, watch, start, examine, agreed).train()
    if not step_is_done(run, step):
        pool = get_pool(run.recipe, place_of(run, step).pool)
        run_on(pool, "steps", run.path, {"name": step}, 1, run.step_folder(step) / "ranks")


@dataclass
class Watching:
    """What the ranks were seen to do. `silent` is set when they were ended because one gave no sign of life."""

    folder: Path
    beat_s: float
    start_s: float
    ranks: int
    update: int = 0
    silent: Signal | None = None
    without: tuple[int, ...] = ()
    over: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def of(cls, run: RunFolder, step: str, place: TrainPlace) -> Watching:
        section, folder = run.recipe.supervise, run.step_folder(step) / "beats"
        return cls(folder, section.beat_s, section.start_s, place.ranks, without=place.without)

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Ranks that are started within this leave their beats, and are ended if one gives none for too long."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with explain_io_errors(self.folder):
            self.folder.mkdir(parents=True)
        looking = threading.Thread(target=self.keep_looking, daemon=True)
        with variables({FOLDER: str(self.folder), LEFT_OUT: ",".join(map(str, self.without))}):
            looking.start()
            try:
                yield
            finally:
                self.over.set()
                looking.join()
                self.look(time.monotonic(), time.monotonic())
                shutil.rmtree(self.folder, ignore_errors=True)

    def look(self, now: float, started: float) -> Signal | None:
        """The beats, as of `now`."""
        left = left_beats(self.folder)
        self.update = max([self.update, *(beat.step for _, beat in left.values())])
        beats = {rank: left[rank][1] if rank in left else Beat(0.0, 0, 0, 0, "") for rank in range(self.ranks)}
        return no_beat.look(beats, now, started, self.beat_s, self.start_s)

    def keep_looking(self) -> None:
        started = time.monotonic()
        while not self.over.wait(LOOK_S):
            self.silent = self.look(time.monotonic(), started)
            if self.silent is not None:
                for process, _ in left_beats(self.folder).values():
                    if _is_child(process):
                        os.kill(process, signal.SIGKILL)
                return


@contextmanager
def variables(values: dict[str, str]) -> Iterator[None]:
    """Variables that processes find which are started within this."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _is_child(process: int) -> bool:
    """Whether a process is one that this one started; where nothing tells it, what a beat says is believed."""
    stat = Path(f"/proc/{process}/stat")
    if not Path("/proc/self/stat").is_file():
        return True
    return stat.is_file() and int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid()
