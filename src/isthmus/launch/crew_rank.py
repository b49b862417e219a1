"""A rank of a crew: joins its communicator, and does what it is asked until it is told to go."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from isthmus.chips.rehearse import profile_of
from isthmus.chips.rehearse.dispatch import enforce
from isthmus.chips.rehearse.faults import Fault
from isthmus.chips.rehearse.group import rehearse_backend
from isthmus.chips.rehearse.inject import CollectiveCount, Injector
from isthmus.launch.beats import Pulse

LOOK_S = 0.5


@dataclass(frozen=True)
class RankSetup:
    """What a rank needs to know to join. Its place says in which files its beat and what it prints go."""

    rank: int
    world: int
    device: str
    threads: int
    chip: str | None
    faults: tuple[Fault, ...]
    connect_timeout_s: float
    host: str
    port: int
    local_rank: int | None = None
    preload: tuple[str, ...] = ()
    beat: str = ""
    log: str = ""


@dataclass
class Rank:
    """What the work of a rank is given: its place, its device, and how to say that it is alive.

    Collectives of CPU ranks are counted in its pulse as they begin. On an accelerator those are counted that this
    thread and its backward passes issue; and nothing is planted in their collectives.
    """

    rank: int
    world: int
    device: torch.device
    pulse: Pulse
    injector: Injector

    def beat(self, section: str, step: int = 0) -> None:
        """Say what this rank does now. Faults that are planted at a step happen here."""
        self.pulse.beat(section, step)
        self.injector.step(step)


def serve(setup: RankSetup, pipe: Connection) -> None:
    """Set up, answer ("done", seconds of the communicator's set-up), then one answer per request; None ends it."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    _write_into(Path(setup.log))
    torch.set_num_threads(setup.threads)
    injector = Injector(setup.faults, setup.rank, armed=False)
    rank = Rank(setup.rank, setup.world, _device(setup), Pulse(Path(setup.beat)), injector)
    _answer(pipe, lambda: _join(setup, rank))
    while (request := pipe.recv()) is not None:
        _answer(pipe, partial(_work, setup, rank, *request))
    if dist.is_initialized():
        dist.destroy_process_group()


def _write_into(log: Path) -> None:
    """What this process and the libraries in it print goes into a file."""
    sys.stdout.flush()
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _answer(pipe: Connection, work: Callable[[], Any]) -> None:
    """Send what `work` returns, or how it ended: then this rank ends too, for its communicator may be half-way."""
    try:
        value = work()
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        pipe.send(("raised", f"{type(error).__name__}: {error}", time.monotonic()))
        raise
    pipe.send(("done", value, time.monotonic()))


def _device(setup: RankSetup) -> torch.device:
    if setup.device == "cpu":
        return torch.device("cpu")
    index = setup.rank if setup.local_rank is None else setup.local_rank
    count = torch.accelerator.device_count()
    if index >= count:
        raise RuntimeError(f"rank {setup.rank} wants device {index}, and its machine has {count}")
    device = torch.device(setup.device, index)
    torch.accelerator.set_device_index(device)
    return device


def _join(setup: RankSetup, rank: Rank) -> float:
    """Set up the communicator and use it once. Returns the seconds that it took."""
    profile = profile_of(setup.chip) if setup.chip else None
    began = time.perf_counter()
    rank.pulse.beat("communicator")
    store = dist.TCPStore(setup.host, setup.port, is_master=False)  # pyright: ignore[reportPrivateImportUsage]
    backend = "gloo" if setup.device == "cpu" else dist.get_default_backend_for_device(rank.device)
    if setup.device == "cpu":
        rehearse_backend("gloo", profile, rank.injector, rank.pulse)
    dist.init_process_group(
        backend if setup.device == "cpu" else f"cpu:gloo,{setup.device}:{backend}",
        store=store,
        rank=setup.rank,
        world_size=setup.world,
        timeout=timedelta(seconds=setup.connect_timeout_s),
    )
    dist.all_reduce(torch.zeros(1, device=rank.device))
    return time.perf_counter() - began


def _work(setup: RankSetup, rank: Rank, function: str, arguments: dict[str, Any]) -> Any:
    module, _, name = function.partition(":")
    work = getattr(importlib.import_module(module), name)
    with _surroundings(setup, rank):
        return work(rank, **arguments)


@contextlib.contextmanager
def _surroundings(setup: RankSetup, rank: Rank) -> Iterator[None]:
    """The rules of a rehearsed chip, and planted faults: they wait until a rank is asked to do something."""
    rank.injector.begin()
    with contextlib.ExitStack() as stack:
        if setup.device != "cpu":
            stack.enter_context(CollectiveCount(rank.pulse.begin_collective))
        if setup.chip is not None:
            stack.enter_context(enforce(setup.chip))
        stack.enter_context(rank.injector.install_saves())
        stack.enter_context(rank.injector.operators())
        yield


def _end_with(parent: int) -> None:
    """A rank whose supervisor is gone ends, whatever it waits for."""
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os._exit(1)
