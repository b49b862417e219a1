"""Ranks that are asked to do one thing after another, and watched: who answered, who crashed, who hangs.

A rank is a process of its own. Its supervisor lives in the process of the caller, which itself computes nothing and so
survives what happens to the ranks. Work is named `module:function` and called as `function(rank, **arguments)`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, Self

import torch.distributed as dist

from isthmus.chips import environment_of
from isthmus.chips.rehearse.faults import Fault, check_fault, of_collectives
from isthmus.errors import IsthmusError
from isthmus.launch.beats import Beat, create_beats, read_beats
from isthmus.launch.crew_rank import RankSetup, serve

State = Literal["done", "raised", "crashed", "hung", "stopped"]
LOOK_S = 0.05
LAST_LINES = 40
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

    def culprits(self) -> list[int]:
        """The ranks at fault: those that crashed, else the first that raised, else those of the hanging that lag.

        The one that lags has begun the fewest collectives, and then the fewest beats.
        """
        if crashed := [reply.rank for reply in self.replies if reply.state == "crashed"]:
            return crashed
        if raised := [reply for reply in self.replies if reply.state == "raised"]:
            return [min(raised, key=lambda reply: reply.seconds).rank]
        hung = [reply for reply in self.replies if reply.state == "hung"]
        ahead = {reply.rank: (reply.beat.collectives, reply.beat.beats) if reply.beat else (0, 0) for reply in hung}
        return [rank for rank, done in ahead.items() if done == min(ahead.values())]

    def describe(self) -> str:
        """In one line what went wrong."""
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

    `device` is a torch device type. `chip` names a rehearsed chip whose rules are in force in every call, and `faults`
    what goes wrong: those of ranks that it does not have stay away. `starts` collects, for each start, the seconds
    until each rank had its communicator. `preload` names modules that the work needs: on the CPU they are loaded once,
    for the ranks of all crews, if this is the first crew of the process. Raises IsthmusError for a fault that cannot
    be made to happen.
    """

    world: int
    device: str = "cpu"
    threads: int = 1
    chip: str | None = None
    faults: Sequence[Fault] = ()
    connect_timeout_s: float = 120.0
    preload: Sequence[str] = ()
    starts: list[list[float]] = field(default_factory=list)
    _processes: list[BaseProcess] = field(default_factory=list)
    _pipes: list[Connection] = field(default_factory=list)
    _folder: Path | None = None
    _store: Any = None

    def __post_init__(self) -> None:
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
        if self._processes:
            return Called([Reply(rank, "done") for rank in range(self.world)], 0.0)
        self._folder = Path(tempfile.mkdtemp(prefix="isthmus-crew-"))
        create_beats(self._folder / "beats", self.world)
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # pyright: ignore
        context = _context(self.device, self.preload)
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            setup = RankSetup(
                rank=rank,
                world=self.world,
                device=self.device,
                threads=self.threads,
                chip=self.chip,
                faults=tuple(self.faults),
                connect_timeout_s=self.connect_timeout_s,
                port=self._store.port,
                beats=self._folder / "beats",
                log=self._folder / f"{rank}.log",
            )
            process = context.Process(target=serve, args=(setup, theirs), daemon=True)
            with _environment(environment_of(self.device)):
                process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
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

        After `deadline_s`, or `stall_s` without any beat of any rank, ranks that have not answered count as hung. After
        a failure all ranks are ended, and the next call starts new ones. `watch` is shown the beats now and then.
        """
        started = self.start()
        if not started.ok:
            return started
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send((function, arguments or {}))
        return self._collect(deadline_s, stall_s, watch)

    def stop(self) -> None:
        """End the ranks, by force if they do not go."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self._processes:
            process.join(timeout=GRACE_S if process.is_alive() else 0)
        self._kill()

    def _kill(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes, self._store = [], [], None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _collect(self, deadline_s: float, stall_s: float | None, watch: Callable[[list[Beat]], None] | None) -> Called:
        began = time.monotonic()
        replies: dict[int, Reply] = {}
        patience = _Patience(deadline_s, stall_s)
        while len(replies) < self.world and not patience.is_over:
            pending = {self._pipes[rank]: rank for rank in range(self.world) if rank not in replies}
            for pipe in wait(list(pending), timeout=LOOK_S):
                reply = self._receive(pending[pipe], began)  # pyright: ignore[reportArgumentType]
                replies[reply.rank] = reply
                patience.saw(reply)
            beats = self._beats()
            patience.look(beats)
            if watch is not None:
                watch(beats)
        failed = any(reply.state != "done" for reply in replies.values())
        for rank, beat in enumerate(self._beats()):
            if rank not in replies:
                replies[rank] = Reply(rank, "stopped" if failed else "hung", seconds=patience.waited, beat=beat)
        ordered = [replies[rank] for rank in range(self.world)]
        if any(reply.state != "done" for reply in ordered):
            ordered = [dataclasses.replace(reply, log=self._log(reply.rank)) for reply in ordered]
            self._kill()
        return Called(ordered, time.monotonic() - began)

    def _log(self, rank: int) -> str:
        assert self._folder is not None
        path = self._folder / f"{rank}.log"
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        return "\n".join(text.splitlines()[-LAST_LINES:])

    def _receive(self, rank: int, began: float) -> Reply:
        beat = self._beats()[rank]
        try:
            kind, content, at = self._pipes[rank].recv()
        except (EOFError, OSError):
            self._processes[rank].join(timeout=GRACE_S)
            code = self._processes[rank].exitcode
            manner = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            return Reply(rank, "crashed", error=manner, seconds=time.monotonic() - began, beat=beat)
        if kind == "done":
            return Reply(rank, "done", value=content, seconds=at - began, beat=beat)
        return Reply(rank, "raised", error=content, seconds=at - began, beat=beat)

    def _beats(self) -> list[Beat]:
        assert self._folder is not None
        return read_beats(self._folder / "beats", self.world)


class _Patience:
    """When to stop waiting: at the deadline, after a stall, or a moment after a rank failed."""

    def __init__(self, deadline_s: float, stall_s: float | None):
        self._began = self._moved = time.monotonic()
        self._deadline, self._stall = deadline_s, stall_s
        self._failed: float | None = None
        self._last: list[tuple[int, int]] = []

    def saw(self, reply: Reply) -> None:
        self._moved = time.monotonic()
        if reply.state != "done" and self._failed is None:
            self._failed = time.monotonic()

    def look(self, beats: list[Beat]) -> None:
        now = [(beat.beats, beat.collectives) for beat in beats]
        if now != self._last:
            self._last, self._moved = now, time.monotonic()

    @property
    def waited(self) -> float:
        return time.monotonic() - self._began

    @property
    def is_over(self) -> bool:
        now = time.monotonic()
        if self._failed is not None and now - self._failed > GRACE_S:
            return True
        if self._stall is not None and now - self._moved > self._stall:
            return True
        return now - self._began > self._deadline


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Variables that a process that is started within this context finds set; those that are set already stay."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _context(device: str, preload: Sequence[str]) -> Any:
    """CPU ranks are forked from a process that has loaded torch and `preload`; an accelerator's start anew."""
    if device != "cpu":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["isthmus.launch.crew_rank", *preload])
    return context
