"""One engine of a fleet, and one act on several of them at once: whoever falls silent in it is not waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic

from isthmus.engines import EngineError
from isthmus.engines.remote import HttpEngine

HEALTH_S = 5.0
"""What an engine gets to say that it is alive."""
LOOK_S = 2.0
"""Seconds between two looks at those that take long."""
PAUSE_S, LONGEST_PAUSE_S = 10.0, 600.0
"""Seconds until one that was lost twice in a row is asked again; they double each time, up to the longest."""

Act = Callable[[HttpEngine], None]


@dataclass
class Member:
    """One engine of a fleet. `versions` are those that it was given, in order; `has` is how it names the last one.

    `why` says why it is left out; None if it is not. One that is `doubted` was found to compute something else. One
    that is `returning` answers again and has no weights of ours yet, so it does not serve. `abandoned` is the thread of
    an act that was not waited for.
    """

    engine: HttpEngine
    versions: list[int] = field(default_factory=list)
    has: str | None = None
    switches: bool = False
    why: str | None = None
    doubted: bool = False
    returning: bool = False
    lost_for_good: bool = False
    abandoned: threading.Thread | None = None
    pause_s: float = 0.0
    rests_until: float = 0.0

    @property
    def url(self) -> str:
        return self.engine.url

    @property
    def serves(self) -> bool:
        return self.why is None and not self.returning

    @property
    def busy(self) -> bool:
        """Whether an act that was not waited for still goes on: nothing else may be asked of the engine meanwhile."""
        return self.abandoned is not None and self.abandoned.is_alive()

    @property
    def may_come_back(self) -> bool:
        out = self.why is not None and not self.lost_for_good
        return out and not self.busy and monotonic() >= self.rests_until

    def rest(self) -> None:
        """It is not asked again for a while, which grows each time."""
        self.rests_until = monotonic() + self.pause_s
        self.pause_s = min(max(PAUSE_S, 2 * self.pause_s), LONGEST_PAUSE_S)

    def answers(self) -> bool:
        return self.engine.answers(HEALTH_S)


@dataclass(frozen=True)
class Patience:
    """How long an act is waited for: until so many looks in a row found the engine silent, so many seconds after the
    first engine was done, or so many in all. None: without end."""

    looks: int | None = None
    behind_s: float | None = None
    limit_s: float | None = None


ENDLESS = Patience()


class _Work:
    """An act on one member, in a thread of its own."""

    def __init__(self, member: Member, act: Act, changed: threading.Condition):
        self.member, self.over, self.silent = member, False, 0
        self.error: BaseException | None = None
        self._act, self._changed = act, changed
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._act(self.member.engine)
        except EngineError as error:
            self._end(error)
        except BaseException as error:
            self._end(error)
            raise
        else:
            self._end(None)

    def _end(self, error: BaseException | None) -> None:
        with self._changed:
            if not self.over:
                self.over, self.error = True, error
            self._changed.notify_all()

    def give_up(self, why: str) -> None:
        with self._changed:
            if not self.over:
                self.over, self.error, self.member.abandoned = True, EngineError(why), self.thread


def each(
    members: Sequence[Member], act: Act, patience: Patience = ENDLESS
) -> tuple[list[Member], list[tuple[Member, EngineError]]]:
    """(those that did it, those that failed with their errors), all at once. Other errors are raised.

    Whoever tries the patience has failed; its act is `abandoned` and may still end.
    """
    changed = threading.Condition()
    works = [_Work(member, act, changed) for member in members]
    try:
        _await(works, patience, changed)
    finally:
        for work in works:
            if work.thread is not work.member.abandoned:
                work.thread.join()
    for work in works:
        if work.error is not None and not isinstance(work.error, EngineError):
            raise work.error
    failed = [(work.member, work.error) for work in works if isinstance(work.error, EngineError)]
    return [work.member for work in works if work.error is None], failed


def _await(works: Sequence[_Work], patience: Patience, changed: threading.Condition) -> None:
    began = looked = monotonic()
    first_s: float | None = None
    while True:
        with changed:
            if all(work.over for work in works):
                return
            changed.wait(LOOK_S)
            waiting = [work for work in works if not work.over]
        now = monotonic()
        if first_s is None and len(waiting) < len(works):
            first_s = now - began
        for work in waiting:
            if why := _too_late(now - began, first_s, patience):
                work.give_up(why)
        if patience.looks is not None and now - looked >= LOOK_S:
            _look(waiting, patience.looks)
            looked = monotonic()


def _too_late(seconds: float, first_s: float | None, patience: Patience) -> str | None:
    if patience.limit_s is not None and seconds > patience.limit_s:
        return f"it was not done within {patience.limit_s:.0f} s"
    if patience.behind_s is not None and first_s is not None and seconds > first_s + patience.behind_s:
        return f"it was not done {patience.behind_s:.0f} s after the first engine"
    return None


def _look(waiting: Sequence[_Work], looks: int) -> None:
    for work in waiting:
        work.silent = 0 if work.over or work.member.answers() else work.silent + 1
        if work.silent >= looks:
            work.give_up(f"it does not say any more that it is healthy, {looks} times in a row")
