"""Ranks that are asked to do one thing after another, and watched: who answered, who crashed, who hangs.

A rank is a process of its own, on this machine or where torchrun put it. Its supervisor lives in the process of the
caller, which itself computes nothing and so survives what happens to the ranks. Work is named `module:function` and
called as `function(rank, **arguments)`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any, Literal, Self

import torch.distributed as dist

from isthmus.chips.rehearse.faults import Fault, check_fault, of_collectives
from isthmus.errors import IsthmusError
from isthmus.launch.beats import Beat
from isthmus.launch.crew_rank import RankSetup
from isthmus.launch.outside import from_outside
from isthmus.launch.places import Answer, LocalPlace, Place

State = Literal["done", "raised", "crashed", "hung", "stopped"]
LOOK_S = 0.05
GRACE_S = 2.0
"""What ranks get to notice that another one is gone."""
START_DEADLINE_S = 120.0


@dataclass(frozen=True)
class Reply:
    """How a call ended on one rank. `stopped`: it was well, and was ended because another rank failed.

    `log` is the end of what its process printed, if the call failed.
    """

    rank: int
    state: State
    value: Any = None
    error: str = ""
    seconds: float = 0.0
    beat: Beat | None = None
    log: str = ""


@dataclass(frozen=True)
class Called:
    """The replies of all ranks, by rank, and how long the call took."""

    replies: list[Reply]
    seconds: float

    @property
    def ok(self) -> bool:
        return all(reply.state == "done" for reply in self.replies)

    @property
    def values(self) -> list[Any]:
        """What each rank returned. Only for a call that is `ok`."""
        assert self.ok, self.describe()
        return [reply.value for reply in self.replies]

    @property
    def disturbance(self) -> str | None:
        """What ended a rank that says nothing about its chip; None if nothing did."""
        bad = [one for one in self.replies if one.state in ("crashed", "raised")]
        return next((f"rank {one.rank}: {what}" for one in bad if (what := from_outside(one.error))), None)

    @property
    def raised_alike(self) -> bool:
        """Whether every rank raised, and with the same words."""
        return all(reply.state == "raised" for reply in self.replies) and len({one.error for one in self.replies}) == 1

    def culprits(self) -> list[int]:
        """The ranks at fault: those that crashed, else the first that raised, else those that hang and lag.

        If all ranks raised the same, it is what they were asked for, and all of them are returned.
        The one that lags has begun the fewest collectives, and then the fewest beats.
        """
        if crashed := [reply.rank for reply in self.replies if reply.state == "crashed"]:
            return crashed
        if self.raised_alike:
            return [reply.rank for reply in self.replies]
        if raised := [reply for reply in self.replies if reply.state == "raised"]:
            return [min(raised, key=lambda reply: reply.seconds).rank]
        hung = [reply for reply in self.replies if reply.state == "hung"]
        ahead = {reply.rank: (reply.beat.collectives, reply.beat.beats) if reply.beat else (0, 0) for reply in hung}
        return [rank for rank, done in ahead.items() if done == min(ahead.values())]

    def describe(self) -> str:
        """In one line what went wrong."""
        if self.raised_alike and len(self.replies) > 1:
            return f"all {len(self.replies)} ranks raised: {self.replies[0].error}"
        bad = [reply for reply in self.replies if reply.state not in ("done", "stopped")]
        return "; ".join(
            f"rank {reply.rank} {reply.state}"
            + (f": {reply.error}" if reply.error else "")
            + (f" in {reply.beat}" if reply.beat and reply.state != "raised" else "")
            for reply in bad
        )


@dataclass
class Crew:
    """A number of rank processes. Use it as a context; it starts the ranks at the first call, again after a failure.

    `disturbances` collects what ended ranks and says nothing about the chip.

    `device` is a torch device type. `chip` names a rehearsed chip whose rules are in force in every call, and `faults`
    what goes wrong: those of ranks that it does not have stay away. `starts` collects, for each start, the seconds
    until each rank had its communicator; `failed_calls` counts calls in which a rank crashed or hung. `places` are
    where the ranks live, children of this process if absent; ranks on other machines reach `host`, which is this one.
    `preload` names modules that the work needs: on the CPU they are loaded once, for the ranks of all crews, if this is
    the first crew of the process.
    Raises IsthmusError for a fault that cannot be made to happen.
    """

    world: int
    device: str = "cpu"
    threads: int = 1
    chip: str | None = None
    faults: Sequence[Fault] = ()
    connect_timeout_s: float = 120.0
    preload: Sequence[str] = ()
    starts: list[list[float]] = field(default_factory=list)
    failed_calls: int = 0
    disturbances: list[str] = field(default_factory=list)
    places: Sequence[Place] = ()
    host: str = "127.0.0.1"
    _store: Any = None

    def __post_init__(self) -> None:
        self.places = self.places or [LocalPlace() for _ in range(self.world)]
        for fault in self.faults:
            check_fault(fault)
            if self.device != "cpu" and of_collectives(fault):
                raise IsthmusError(f"{fault} can be planted among ranks on the CPU, and not on {self.device}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> Called:
        """Start the ranks and set up their communicator, unless they are there. The replies say who could not."""
        if self._store is not None:
            return Called([Reply(rank, "done") for rank in range(self.world)], 0.0)
        self._store = dist.TCPStore(self.host, 0, is_master=True, wait_for_workers=False)  # pyright: ignore
        for rank, place in enumerate(self.places):
            place.start(
                RankSetup(
                    rank=rank,
                    world=self.world,
                    device=self.device,
                    threads=self.threads,
                    chip=self.chip,
                    faults=tuple(self.faults),
                    connect_timeout_s=self.connect_timeout_s,
                    host=self.host,
                    port=self._store.port,
                    preload=tuple(self.preload),
                )
            )
        called = self._collect(max(START_DEADLINE_S, self.connect_timeout_s + GRACE_S), None, None)
        if called.ok:
            self.starts.append([reply.value for reply in called.replies])
        return called

    def call(
        self,
        function: str,
        arguments: dict[str, Any] | None = None,
        *,
        deadline_s: float,
        stall_s: float | None = None,
        watch: Callable[[list[Beat]], None] | None = None,
    ) -> Called:
        """Run `module:function` on every rank with the same arguments.

        After `deadline_s`, or `stall_s` without any beat of any rank, ranks that have not answered count as hung; while
        a rank waits for a processor that others use, it does not stall. After a failure all ranks are ended, and the
        next call starts new ones. `watch` is shown the beats now and then.
        """
        started = self.start()
        if not started.ok:
            return started
        for place in self.places:
            place.ask(function, arguments or {})
        return self._collect(deadline_s, stall_s, watch)

    def stop(self) -> None:
        """End the ranks, by force if they do not go."""
        self._end(politely=True)

    def _end(self, *, politely: bool) -> None:
        if self._store is not None:
            for place in self.places if politely else ():
                place.release()
            for place in self.places:
                place.end(politely=politely)
            self._store = None

    def _collect(self, deadline_s: float, stall_s: float | None, watch: Callable[[list[Beat]], None] | None) -> Called:
        began = time.monotonic()
        replies: dict[int, Reply] = {}
        patience = _Patience(deadline_s, stall_s)
        while len(replies) < self.world and not patience.is_over:
            waiting = [rank for rank in range(self.world) if rank not in replies]
            self._sleep_until_one_answers(waiting)
            for rank in waiting:
                if (answer := self.places[rank].answer()) is not None:
                    replies[rank] = self._reply(rank, answer)
                    patience.saw(replies[rank])
            beats = self._beats()
            patience.look(beats, max(place.starved_s() for place in self.places))
            if watch is not None:
                watch(beats)
        failed = any(reply.state != "done" for reply in replies.values())
        for rank, beat in enumerate(self._beats()):
            if rank not in replies:
                replies[rank] = Reply(rank, "stopped" if failed else "hung", seconds=patience.waited, beat=beat)
        ordered = [replies[rank] for rank in range(self.world)]
        if any(reply.state != "done" for reply in ordered):
            ordered = [dataclasses.replace(reply, log=self.places[reply.rank].log()) for reply in ordered]
            self.failed_calls += any(reply.state in ("crashed", "hung") for reply in ordered)
            self._end(politely=False)
        called = Called(ordered, time.monotonic() - began)
        self.disturbances += [called.disturbance] if called.disturbance else []
        return called

    def _sleep_until_one_answers(self, ranks: Sequence[int]) -> None:
        connections = [self.places[rank].connection for rank in ranks]
        readable = [connection for connection in connections if connection is not None]
        if len(readable) == len(connections):
            wait(readable, timeout=LOOK_S)
        else:
            time.sleep(LOOK_S)

    def _reply(self, rank: int, answer: Answer) -> Reply:
        beat = self.places[rank].beat()
        if answer.kind == "done":
            return Reply(rank, "done", value=answer.content, seconds=answer.seconds, beat=beat)
        return Reply(rank, answer.kind, error=answer.content, seconds=answer.seconds, beat=beat)

    def _beats(self) -> list[Beat]:
        return [place.beat() for place in self.places]


class _Patience:
    """When to stop waiting: at the deadline, after a stall, or a moment after a rank failed.

    The time in which a rank waits for a processor that others use is no part of a stall.
    """

    def __init__(self, deadline_s: float, stall_s: float | None):
        self._began = self._moved = time.monotonic()
        self._deadline, self._stall = deadline_s, stall_s
        self._failed: float | None = None
        self._last: list[tuple[int, int]] = []
        self._starved_s = self._starved_before = 0.0

    def saw(self, reply: Reply) -> None:
        self._move()
        if reply.state != "done" and self._failed is None:
            self._failed = time.monotonic()

    def look(self, beats: list[Beat], starved_s: float) -> None:
        self._starved_s = starved_s
        now = [(beat.beats, beat.collectives) for beat in beats]
        if now != self._last:
            self._last = now
            self._move()

    def _move(self) -> None:
        self._moved, self._starved_before = time.monotonic(), self._starved_s

    @property
    def waited(self) -> float:
        return time.monotonic() - self._began

    @property
    def is_over(self) -> bool:
        now = time.monotonic()
        if self._failed is not None and now - self._failed > GRACE_S:
            return True
        idle = now - self._moved - max(0.0, self._starved_s - self._starved_before)
        if self._stall is not None and idle > self._stall:
            return True
        return now - self._began > self._deadline
