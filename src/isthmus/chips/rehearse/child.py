"""A rehearsal inside a program of somebody else's: it begins when the program has imported torch, and ends with it.

What the rehearsal is to be stands in the environment; what it found is written to a file, now and then and at the end.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from isthmus.chips import device_for, get_chip
from isthmus.chips.rehearse import profile_of
from isthmus.chips.rehearse.device import ChipMemory, DeviceNames, DeviceRehearsal, follow_backward
from isthmus.chips.rehearse.faults import parse_fault
from isthmus.chips.rehearse.group import rehearse_backend
from isthmus.chips.rehearse.inject import Injector
from isthmus.chips.rehearse.settings import Settings
from isthmus.chips.rehearse.shims import install
from isthmus.chips.rehearse.tables import Emulation, RehearsalRefused
from isthmus.run import write_atomic

EVERY_S = 1.0
_HERE = Path(__file__).parent
_State = Literal["running", "ended"]


@dataclass
class Steps:
    """Steps of the optimisers of this process, with the calls of each operator until the first and the last."""

    counts: Counter[int] = field(default_factory=Counter)
    first: Counter[str] | None = None
    last: Counter[str] = field(default_factory=Counter)

    @property
    def done(self) -> int:
        return max(self.counts.values(), default=0)

    def per_step(self) -> dict[str, float]:
        """Calls of each operator in a step: between the first and the last, if there are two."""
        if self.first is None:
            return {}
        if self.done == 1:
            return {name: float(calls) for name, calls in self.first.items()}
        between = {name: calls - self.first[name] for name, calls in self.last.items()}
        return {name: calls / (self.done - 1) for name, calls in between.items() if calls}


class Collectives:
    """Counts collectives as they begin. `before` is called each time: a rank may wait for ever in one."""

    def __init__(self, before: Callable[[], None]) -> None:
        self.begun, self._before = 0, before

    def begin_collective(self) -> None:
        self.begun += 1
        self._before()


class Reporter:
    """Writes what a process found."""

    def __init__(self, settings: Settings, rehearsal: DeviceRehearsal, injector: Injector):
        self.settings, self.rehearsal, self.injector = settings, rehearsal, injector
        self.steps, self.collectives = Steps(), Collectives(self.now_and_then)
        self._pid, self._written = os.getpid(), 0.0
        injector.last_words = lambda: self.write("running")

    def after_step(self, optimiser: torch.optim.Optimizer, *_: Any) -> None:
        """An optimiser made a step; faults that are planted at a step happen here."""
        self.steps.counts[id(optimiser)] += 1
        if self.steps.counts[id(optimiser)] < self.steps.done:
            return
        self.steps.last = Counter(self.rehearsal.tally.by_operator)
        if self.steps.done == 1:
            self.steps.first = self.steps.last
        self.now_and_then()
        self.injector.step(self.steps.done)

    def now_and_then(self) -> None:
        """Write what there is so far, unless that was done a moment ago."""
        if time.monotonic() - self._written > EVERY_S:
            self._written = time.monotonic()
            self.write("running")

    def end(self) -> None:
        if os.getpid() == self._pid:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C comes from the terminal and from the rehearsal.
            self.write("ended")

    def write(self, state: _State) -> None:
        path = Path(self.settings.folder) / f"{os.getpid()}.json"
        with torch._C.DisableTorchFunction():
            write_atomic(path, json.dumps(self.found(state)).encode())

    def found(self, state: _State) -> dict[str, Any]:
        """The report of this process, as JSON."""
        tally, memory = self.rehearsal.tally, self.rehearsal.memory
        return {
            "pid": os.getpid(),
            "rank": int(os.environ.get("RANK", "0")),
            "state": state,
            "steps": self.steps.done,
            "operators": {
                name: {"status": status, "calls": tally.by_operator[name]} for name, status in tally.operators.items()
            },
            "per_step": self.steps.per_step(),
            "substitutions": dict(tally.substitutions),
            "filled": dict(tally.filled),
            "varied": dict(tally.varied),
            "untested": dict(tally.untested),
            "cautions": dict(tally.cautions),
            "host_calls": tally.host,
            "refusals": self.rehearsal.refusals,
            "collectives": self.collectives.begun,
            "collectives_by_name": dict(tally.collectives),
            "faults": list(self.injector.fired),
            "peak_bytes": memory.peak,
        }


def start() -> None:
    """Begin the rehearsal that the environment names, in this thread and in all that it starts."""
    settings = Settings.from_environment()
    chip, profile = get_chip(settings.chip), profile_of(settings.chip)
    device = device_for(settings.chip)
    memory = ChipMemory(device, int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))))
    install(chip, profile, memory, None if device == "cuda" else f"torch_{device}")
    follow_backward(memory)
    emulate = Emulation(noise=settings.noise, seed=settings.seed)
    rehearsal = DeviceRehearsal(profile, memory, strict=settings.strict, emulate=emulate)
    rank = int(os.environ.get("RANK", "0"))
    injector = Injector([parse_fault(text) for text in settings.faults], rank, on_chip=lambda: memory.works)
    reporter = Reporter(settings, rehearsal, injector)
    for backend in chip.capabilities.collectives or ():
        if backend != "gloo":
            rehearse_backend(backend, profile, injector, reporter.collectives)
    register_optimizer_step_post_hook(reporter.after_step)
    atexit.register(reporter.end)
    reporter.write("running")
    injector.install_saves().__enter__()
    _enter(memory, rehearsal, injector)
    sys.excepthook = _explained(sys.excepthook, rehearsal.refusals)
    _follow_threads(lambda: _enter(memory, rehearsal.another(), injector))


def _enter(memory: ChipMemory, rehearsal: DeviceRehearsal, injector: Injector) -> None:
    """Enter the modes of a thread, for as long as it lives."""
    for mode in (DeviceNames(memory), injector.operators(), rehearsal):
        mode.__enter__()


def _follow_threads(enter: Callable[[], None]) -> None:
    """Make threads that are started from now on enter the modes, which torch keeps per thread."""
    start_thread = threading.Thread.start

    def start(self: threading.Thread) -> None:
        run = self.run

        def run_rehearsed() -> None:
            enter()
            run()

        self.run = run_rehearsed
        start_thread(self)

    threading.Thread.start = start  # pyright: ignore[reportAttributeAccessIssue]


def _explained(show: Callable[..., Any], refusals: list[str]) -> Callable[..., None]:
    """Shows a refusal with the lines of the script that led to it, without those of the rehearsal."""

    def explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, RehearsalRefused):
            show(kind, error, trace)
            return
        if str(error) not in refusals:
            refusals.append(str(error))
        frames = [frame for frame in traceback.extract_tb(trace) if not Path(frame.filename).is_relative_to(_HERE)]
        print("Traceback (most recent call last):", *traceback.format_list(frames), sep="\n", file=sys.stderr, end="")
        print(f"isthmus: {error}", file=sys.stderr)

    return explain
