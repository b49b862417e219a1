"""What ranks of a crew are asked to do in tests."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
import torch.distributed as dist


def add_up(rank: Any, start: float) -> float:
    value = torch.tensor(start + rank.rank)
    dist.all_reduce(value)
    return value.item()


def die(rank: Any, who: int) -> None:
    if rank.rank == who:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def complain(rank: Any, who: int) -> None:
    if rank.rank == who:
        raise ValueError("this cannot be")
    dist.barrier()


def refuse(rank: Any) -> None:
    raise ValueError("nobody can do this")


def lag(rank: Any, who: int) -> None:
    for step in range(3):
        rank.beat("steps", step)
        if rank.rank == who and step == 1:
            time.sleep(1000)
        dist.barrier()


def stay_on(rank: Any, processors: list[int]) -> None:
    """Each rank keeps to a processor of its own."""
    os.sched_setaffinity(0, {processors[rank.rank]})
