"""Where a rank of a crew lives: in a child of this process, or in one of a process that torchrun started somewhere."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, Protocol

from isthmus.chips import environment_of
from isthmus.chips.rehearse.faults import parse_fault
from isthmus.launch.beats import Beat, create_beat, read_beat
from isthmus.launch.crew_rank import RankSetup, serve

LOOK_S = 0.02
BEAT_EVERY_S = 0.2
GRACE_S = 2.0
GONE_S = 30.0
LAST_LINES = 40


@dataclass(frozen=True)
class Answer:
    """How a rank ended what it was asked, and the seconds since it was asked."""

    kind: Literal["done", "raised", "crashed"]
    content: Any
    seconds: float


class Place(Protocol):
    """One rank as its supervisor sees it. `connection` becomes readable when there is an answer, if there is one."""

    connection: Connection | None

    def start(self, setup: RankSetup) -> None: ...

    def ask(self, function: str, arguments: dict[str, Any]) -> None: ...

    def answer(self) -> Answer | None:
        """What the rank answered since it was started or asked; None if it has not yet."""
        ...

    def beat(self) -> Beat: ...

    def starved_s(self) -> float:
        """Seconds that it was ready to run so far and had no processor; 0 where nothing tells it."""
        ...

    def log(self) -> str:
        """The end of what its process printed."""
        ...

    def release(self) -> None:
        """Tell the rank to go. All of them have to be told before one is waited for."""
        ...

    def end(self, *, politely: bool) -> None:
        """Wait a moment for a released rank if `politely`, then end it by force."""
        ...


class LocalPlace:
    """A rank in a child of this process."""

    def __init__(self) -> None:
        self.connection: Connection | None = None
        self._process: BaseProcess | None = None
        self._folder: Path | None = None
        self._asked = 0.0

    def start(self, setup: RankSetup) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="isthmus-rank-"))
        create_beat(self._folder / "beat")
        context = _context(setup.device, setup.preload)
        self.connection, theirs = context.Pipe()
        here = replace(setup, beat=str(self._folder / "beat"), log=str(self._folder / "log"))
        process: BaseProcess = context.Process(target=serve, args=(here, theirs), daemon=True)
        with variables_set(environment_of(setup.device)):
            process.start()
        self._process = process
        theirs.close()
        self._asked = time.monotonic()

    def ask(self, function: str, arguments: dict[str, Any]) -> None:
        assert self.connection is not None
        self._asked = time.monotonic()
        with contextlib.suppress(OSError):  # a rank that is gone shows when its answer is read
            self.connection.send((function, arguments))

    def answer(self) -> Answer | None:
        assert self.connection is not None and self._process is not None
        if not self.connection.poll():
            return None
        try:
            kind, content, at = self.connection.recv()
        except (EOFError, OSError):
            self._process.join(timeout=GRACE_S)
            code = self._process.exitcode
            manner = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            return Answer("crashed", manner, time.monotonic() - self._asked)
        return Answer(kind, content, at - self._asked)

    def beat(self) -> Beat:
        assert self._folder is not None
        return read_beat(self._folder / "beat")

    def starved_s(self) -> float:
        """Of the thread that waited longest, by Linux' /proc (Documentation/scheduler/sched-stats.rst)."""
        if self._process is None:
            return 0.0
        waits = [0.0]
        for path in Path(f"/proc/{self._process.pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError, IndexError, ValueError):  # a thread that has just ended
                waits.append(int(path.read_text().split()[1]) / 1e9)
        return max(waits)

    def log(self) -> str:
        path = self._folder and self._folder / "log"
        text = path.read_text(encoding="utf-8", errors="replace") if path and path.exists() else ""
        return "\n".join(text.splitlines()[-LAST_LINES:])

    def release(self) -> None:
        if self.connection is not None:
            with contextlib.suppress(OSError):
                self.connection.send(None)

    def end(self, *, politely: bool) -> None:
        if self._process is None or self.connection is None or self._folder is None:
            return
        if politely:
            self._process.join(timeout=GRACE_S)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self.connection.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        self.connection = self._process = self._folder = None


@contextlib.contextmanager
def variables_set(variables: dict[str, str]) -> Iterator[None]:
    """Variables that a process that is started within this context finds set; those that are set already stay."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _context(device: str, preload: tuple[str, ...]) -> Any:
    """CPU ranks are forked from a process that has loaded torch and `preload`; an accelerator's start anew."""
    if device != "cpu":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["isthmus.launch.crew_rank", *preload])
    return context


class RemotePlace:
    """A rank of a process that torchrun started, perhaps on another machine, and that attends to a shared store."""

    connection: Connection | None = None

    def __init__(self, store: Any, rank: int):
        """`store` is a torch.distributed store that all processes share."""
        self._store, self._rank = store, rank
        self._orders = self._answers = 0

    def start(self, setup: RankSetup) -> None:
        fields = {**asdict(setup), "faults": [str(fault) for fault in setup.faults], "preload": list(setup.preload)}
        self._order({"do": "start", "setup": fields})

    def ask(self, function: str, arguments: dict[str, Any]) -> None:
        self._order({"do": "ask", "function": function, "arguments": arguments})

    def answer(self) -> Answer | None:
        key = f"answer/{self._rank}/{self._answers}"
        if not self._store.check([key]):
            return None
        self._answers += 1
        return Answer(**json.loads(self._store.get(key)))

    def beat(self) -> Beat:
        key = f"beat/{self._rank}"
        return Beat(**json.loads(self._store.get(key))) if self._store.check([key]) else Beat(0.0, 0, 0, 0, "")

    def starved_s(self) -> float:
        return 0.0

    def log(self) -> str:
        key = f"log/{self._rank}"
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def release(self) -> None:
        self._order({"do": "release"})

    def end(self, *, politely: bool) -> None:
        self._order({"do": "end", "politely": politely})
        self._skip_answers()

    def dismiss(self) -> None:
        """Tell the attending process to go."""
        self._order({"do": "go"})

    def _order(self, order: dict[str, Any]) -> None:
        self._store.set(f"order/{self._rank}/{self._orders}", json.dumps(order))
        self._orders += 1

    def _skip_answers(self) -> None:
        """What a rank answered after nobody waited for it any more is not the answer to the next question."""
        key = f"ended/{self._rank}/{self._orders - 1}"
        with contextlib.suppress(RuntimeError):  # an attendant that is gone has nothing more to say
            self._store.wait([key], timedelta(seconds=GONE_S))
            self._answers = int(self._store.get(key))


class Attendant:
    """What a process that torchrun started does for its rank: it keeps the rank, and passes on orders and answers."""

    def __init__(self, store: Any, rank: int, local_rank: int | None = None):
        self._store, self._rank, self._place = store, rank, LocalPlace()
        self._local_rank = local_rank
        self._waiting = False
        self._answers = 0

    def attend(self) -> None:
        """Until it is told to go; its rank goes with it."""
        try:
            self._attend()
        finally:
            self._place.end(politely=False)

    def _attend(self) -> None:
        number, told = 0, 0.0
        while True:
            key = f"order/{self._rank}/{number}"
            if self._store.check([key]):
                order = json.loads(self._store.get(key))
                if order["do"] == "go":
                    return
                self._obey(order, number)
                number += 1
            self._pass_on()
            if self._waiting and time.monotonic() - told > BEAT_EVERY_S:
                told = time.monotonic()
                self._tell_beat()
            time.sleep(LOOK_S)

    def _obey(self, order: dict[str, Any], number: int) -> None:
        if order["do"] == "end":
            self._store.set(f"log/{self._rank}", self._place.log())
            self._place.end(politely=order["politely"])
            self._waiting = False
            self._store.set(f"ended/{self._rank}/{number}", str(self._answers))
            return
        if order["do"] == "release":
            self._place.release()
            return
        if order["do"] == "start":
            self._place.start(replace(_setup(order["setup"]), local_rank=self._local_rank))
        else:
            self._place.ask(order["function"], order["arguments"])
        self._waiting = True

    def _pass_on(self) -> None:
        answer = self._place.answer() if self._waiting else None
        if answer is None:
            return
        self._waiting = False
        self._tell_beat()
        if answer.kind != "done":
            self._store.set(f"log/{self._rank}", self._place.log())
        self._store.set(f"answer/{self._rank}/{self._answers}", json.dumps(asdict(answer), default=str))
        self._answers += 1

    def _tell_beat(self) -> None:
        self._store.set(f"beat/{self._rank}", json.dumps(asdict(self._place.beat())))


def _setup(fields: dict[str, Any]) -> RankSetup:
    faults, preload = tuple(map(parse_fault, fields["faults"])), tuple(fields["preload"])
    return RankSetup(**{**fields, "faults": faults, "preload": preload})


@contextlib.contextmanager
def remote_places(store: Any, world: int, own_rank: int, local_rank: int | None = None) -> Iterator[list[RemotePlace]]:
    """The places of all ranks, for the first process; it attends to its own rank from a thread beside."""
    own = threading.Thread(target=Attendant(store.clone(), own_rank, local_rank).attend, daemon=True)
    own.start()
    places = [RemotePlace(store, rank) for rank in range(world)]
    try:
        yield places
    finally:
        for place in places:
            place.dismiss()
        own.join(timeout=GRACE_S)
