"""What generates for a step, and outlives its pool: an engine that fails is started again, then another pool's takes
its place.

Whoever asks notices nothing but the time. A new engine gets all weights of the version in use before it generates, and
what was asked of the old one is asked again, so that no sample is lost and none is told twice.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from isthmus.engines import CannotFollow, Completion, Engine, EngineError, OtherBase, Sampling
from isthmus.engines.account import Account
from isthmus.engines.elsewhere import check_telling
from isthmus.engines.fleet import Fleet
from isthmus.engines.local import LocalEngine
from isthmus.engines.member import HEALTH_S, LOOK_S
from isthmus.engines.remote.transport import Refused
from isthmus.errors import GateRefused, IsthmusError
from isthmus.pools import Pool, get_pool
from isthmus.progress import Watch
from isthmus.recipe.schema import EngineOptions
from isthmus.recipe.steps import RlSection
from isthmus.records import IncidentRecord, TrainPlace, rollout_pool
from isthmus.stages.steps.generate import engine_on
from isthmus.stages.steps.step import StepRun
from isthmus.supervise import incidents
from isthmus.supervise.ladder import decide
from isthmus.supervise.signals import Signal, ended
from isthmus.supervise.situation import rollout_situation

T = TypeVar("T")
HANGS = 12
"""Looks in a row at which an engine of ours has to say nothing before it is ended: about a minute, for on a busy host a
healthy one may be late."""


class Placed(Protocol):
    """What a plan says of pools, as PlanRecord has it."""

    def pool_of(self, stage: str) -> str: ...

    def next_pools(self, stage: str) -> list[str]: ...


class NotFinite(EngineError):
    """An engine told a log-probability that is no number."""


@dataclass
class Engines:
    """Keeps the contract of an engine. `bring` gives a new engine the weights in use. `progress` tells the update that
    is under way and that of the newest checkpoint, 0 if there is none. `engine` is the one that generates now.

    All of its methods raise what ended the last engine if no rung of the ladder is left, GateRefused if a person has to
    decide.
    """

    work: StepRun[RlSection]
    plan: Placed
    bundle: Path
    options: EngineOptions
    watch: Watch
    progress: Callable[[], tuple[int, int]]
    bring: Callable[[Engine], None] = lambda _engine: None
    engine: Engine | None = None
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _open: ExitStack = field(default_factory=ExitStack)
    _number: int = 0
    _ended_by: IsthmusError | None = None

    @contextmanager
    def opened(self) -> Iterator[Engines]:
        """With an engine, that of the pool on which the step generates now."""
        try:
            try:
                self._start(self.pool)
            except EngineError as error:
                self._replace(self._signal_of(error), error, self._number)
            yield self
        finally:
            self.stop()

    @property
    def pool(self) -> Pool:
        """Where the plan put the rollouts, or an incident moved them since."""
        name = rollout_pool(self.work.run, self.work.name, self.plan.pool_of("rollout"))
        return get_pool(self.work.recipe, name)

    def start(self, bundle_folder: Path) -> None:
        """Nothing to do: `opened` has started one."""

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seeds: list[int] | None = None
    ) -> list[list[Completion]]:
        """As every engine's; if the engine fails all of it is asked of the next one."""
        return self._lasting(lambda engine: _finite(engine.generate(prompts, sampling, seeds)))

    def update(self, payload: bytes, version: int, sha256: str) -> None:
        self._lasting(lambda engine: engine.update(payload, version, sha256))

    def update_delta(self, parts: Sequence[bytes], base_version: int, version: int, sha256: str) -> float:
        """As every engine's. Raises OtherBase if another engine took the place of the one that had the base."""
        first = self._number

        def change(engine: Engine) -> float:
            if self._number != first:
                raise OtherBase("another engine has taken the place of the one that had the weights before")
            return engine.update_delta(parts, base_version, version, sha256)

        return self._lasting(change)

    def accounts(self) -> list[tuple[str, Account]]:
        return self._lasting(lambda engine: engine.accounts())

    def probe(self, prompts: list[list[int]], sampling: Sampling) -> list[tuple[str, list[list[Completion]]]]:
        return self._lasting(lambda engine: [(url, _finite(found)) for url, found in engine.probe(prompts, sampling)])

    def leave_out(self, url: str, why: str) -> None:
        """Let go of one of several engines that are the pool's."""
        engine = self._current()[0]
        assert isinstance(engine, Fleet), "one engine alone is given up"
        engine.leave_out(url, why)

    def give_up(self, found: Signal, error: IsthmusError) -> None:
        """Let go of the engine for what was found about it; another one takes its place. Raises the error if none
        can."""
        self._replace(found, error, self._number)

    def stop(self) -> None:
        with self._lock:
            self._open.close()
            self.engine = None

    @property
    def takes_deltas(self) -> bool:
        return self._current()[0].takes_deltas

    @property
    def arithmetic(self) -> str | None:
        return self._current()[0].arithmetic

    @property
    def bits(self) -> str | None:
        return self._current()[0].bits

    @property
    def cannot_tell_kept(self) -> list[str]:
        return self._current()[0].cannot_tell_kept

    @property
    def cannot_tell_routes(self) -> list[str]:
        return self._current()[0].cannot_tell_routes

    def _current(self) -> tuple[Engine, int]:
        with self._lock:
            if self._ended_by is not None:
                raise self._ended_by
            assert self.engine is not None, "it is open"
            return self.engine, self._number

    def _lasting(self, act: Callable[[Engine], T]) -> T:
        """An act on the engine, or on those that take its place."""
        while True:
            engine, number = self._current()
            hangs: list[str] = []
            try:
                with _looked_after(engine, hangs):
                    return act(engine)
            except OtherBase:
                raise
            except EngineError as error:
                if isinstance(error, Refused) and error.status < 500:
                    raise
                self._replace(self._signal_of(error, hangs), error, number)

    def _signal_of(self, error: EngineError, hangs: Sequence[str] = ()) -> Signal:
        said = str(error).splitlines()[0]
        update, name = self.progress()[0], self.pool.name
        if hangs:
            return Signal("no beat", f"the engine on {name}: {hangs[0]}", update)
        if isinstance(error, NotFinite):
            return Signal("not finite", f"the engine on {name}: {said}", update)
        if isinstance(error, CannotFollow):
            return Signal("mismatch", said, update)
        return ended.look(f"the engine on {name}: {said}", update, ())

    def _replace(self, found: Signal, error: IsthmusError, number: int) -> None:
        """Climb the ladder until there is an engine again, unless another thread did so already."""
        with self._lock:
            if self._ended_by is not None:
                raise self._ended_by
            if number != self._number:
                return
            self.stop()
            try:
                while True:
                    record = self._decided(found, error)
                    again = self._carried_out(record)
                    if again is None:
                        return
                    found, error = self._signal_of(again), again
            except IsthmusError as last:
                self._ended_by = last
                raise

    def _decided(self, found: Signal, error: IsthmusError) -> IncidentRecord:
        """The decision, on the disk and told. Raises the error if it is to stop."""
        run, step, pool = self.work.run, self.work.name, self.pool
        now = rollout_situation(run, step, pool, self.plan.next_pools("rollout"), self.progress()[1])
        decision = decide(found, now)
        record = incidents.write(run, step, found, decision, TrainPlace(pool.name, 1), now.checkpoint, "rollout")
        self.work.event("incident", number=record.number, signal=record.signal, rung=record.rung)
        self.watch.say(f"  [yellow]{found.kind}[/]: {found.detail}")
        self.watch.say(f"  [yellow]{decision.rung}[/]: {decision.why}")
        if decision.rung == "stop":
            incidents.conclude(run, record, "done")
            raise error
        return record

    def _carried_out(self, record: IncidentRecord) -> EngineError | None:
        """Do what was decided; the error of an engine that does not come up. Raises GateRefused to ask a person."""
        run = self.work.run
        moves = record.to_pool is not None
        why = incidents.why_asked(run, record)
        if why is not None and not self.work.agreed:
            incidents.conclude(run, record, "asked")
            raise GateRefused(incidents.question(run, record, why))
        try:
            self._start(get_pool(run.recipe, record.to_pool) if record.to_pool else self.pool)
        except IsthmusError as error:
            self.stop()
            incidents.conclude(run, record, "failed")
            if not isinstance(error, EngineError):
                raise
            return error
        incidents.conclude(run, record, "done")
        if moves:
            self.work.event("revert", side="rollout", from_pool=record.pool, to_pool=record.to_pool)
            self.watch.say(f"  [bold]{record.to_pool}[/] generates from now on")
        return None

    def _start(self, pool: Pool) -> None:
        section = self.work.section
        threads = pool.shared_threads if section.staleness else pool.threads
        opening = engine_on(self.work, self.bundle, section.rollout_format, pool, threads, self.options)
        engine = self._open.enter_context(opening)
        if self._number:
            check_telling(self.work.name, section.loss, engine)
        self.bring(engine)
        self.engine = engine
        self._number += 1


def _finite(groups: list[list[Completion]]) -> list[list[Completion]]:
    for group in groups:
        for one in group:
            if not all(map(math.isfinite, one.logprobs)):
                raise NotFinite("a log-probability of what it sampled is no number")
    return groups


@contextmanager
def _looked_after(engine: Engine, hangs: list[str]) -> Iterator[None]:
    """While something is asked of an engine that was started here: one that hangs is ended, and `hangs` says so.

    A fleet looks after its own.
    """
    if not isinstance(engine, LocalEngine):
        yield
        return
    over = threading.Event()

    def look() -> None:
        silent = 0
        while not over.wait(LOOK_S):
            silent = 0 if engine.answers(HEALTH_S) else silent + 1
            if silent >= HANGS and not over.is_set():
                hangs.append(f"it did not say that it is healthy, {HANGS} times in a row")
                engine.kill()
                return

    threading.Thread(target=look, daemon=True).start()
    try:
        yield
    finally:
        over.set()
