"""Portable functions that really fail, for tests of packing and shrinking. They need torch and nothing else."""

from __future__ import annotations

import os
import random
import signal
import time
from typing import Any

import torch
import torch.distributed as dist


def count_in_bf16(rank: Any, elements: int, repeats: int, dtypes: list[str], seed: int = 0) -> dict[str, Any]:
    """The number of all elements on all ranks, summed in each dtype one by one. bf16 holds no odd integer above 256."""
    rank.beat("counting")
    wrong = []
    for name in dtypes:
        for _ in range(repeats):
            total = torch.zeros((), dtype=getattr(torch, name), device=rank.device)
            for _ in range(elements):
                total += 1
            dist.all_reduce(total)
            if total.item() != elements * rank.world:
                wrong.append(f"{name}: {total.item():g} instead of {elements * rank.world}")
    return {"failed": bool(wrong), "detail": wrong[:1]}


def products(rank: Any, calls: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Sums of products whose inner size has to be a multiple of 16; wrong by design from an inner size of 48 on."""
    wrong = []
    for call in calls:
        (m, k), (k2, n) = call["shapes"]
        if k != k2 or k % 16:
            raise ValueError(f"the inner sizes {k} and {k2} do not fit")
        generator = torch.Generator().manual_seed(seed)
        left, right = (torch.randint(1, 3, shape, generator=generator).float() for shape in call["shapes"])
        product = left @ right + (call["operator"] == "bad" and k >= 48 and n >= 3)
        if not torch.equal(product, (left.double() @ right.double()).float()):
            wrong.append([call["operator"], m, k, n])
    return {"failed": bool(wrong), "detail": wrong}


def sometimes(rank: Any, size: int, share: float) -> dict[str, Any]:
    """Wrong in a share of the calls, and a tenth of that below a size of 8."""
    draw = random.random()
    return {"failed": draw < (share if size >= 8 else share / 10), "detail": draw}


def end(rank: Any, how: str, who: int, steps: int) -> dict[str, Any]:
    """A rank that crashes, raises or hangs in the fourth step."""
    for step in range(steps):
        rank.beat("steps", step)
        if rank.rank == who and step == 3:
            if how == "crash":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "raise":
                raise RuntimeError(f"cannot go on after {step} steps")
            time.sleep(1000)
        dist.barrier()
    return {"failed": False}


def measured(rank: Any, size: int) -> dict[str, Any]:
    """A figure that does not judge itself."""
    return {"seconds": size / 1000}


def under_the_rules(rank: Any, steps: int) -> dict[str, Any]:
    """Sums that are right, unless something is done to them."""
    wrong = 0
    for step in range(steps):
        rank.beat("steps", step)
        total = torch.full((4,), float(rank.rank + 1))
        dist.all_reduce(total)
        wrong += int((total != rank.world * (rank.world + 1) / 2).sum())
    return {"failed": wrong > 0, "detail": wrong}


def replayed(rank: Any, inputs: str, times: int) -> dict[str, Any]:
    """Sums a stored tensor, whose sum in fp32 one by one is not its exact sum."""
    stored = torch.load(inputs, weights_only=True)["x"]
    total = torch.zeros(())
    for _ in range(times):
        total = torch.zeros(())
        for value in stored:
            total = total + value
    return {"failed": total.item() != stored.double().sum().item(), "detail": total.item()}
