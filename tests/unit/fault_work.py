"""What ranks are asked to do in tests of planted faults and of the rehearsed process group."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

SIZE = 12
DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def steps(rank: Any, count: int) -> list[str]:
    """Steps with a product of matrices, a sum over ranks, and a barrier. Returns what went wrong by plan."""
    for step in range(count):
        rank.beat("steps", step)
        product = torch.ones(4, 4) @ torch.ones(4, 4)
        dist.all_reduce(product)
        dist.barrier()
    return rank.injector.fired


def sums(rank: Any, count: int) -> list[list[float]]:
    """What an all-reduce of [1, 2, 3, 4] gives this rank at each step."""
    results = []
    for step in range(count):
        rank.beat("sums", step)
        value = torch.tensor([1.0, 2.0, 3.0, 4.0])
        dist.all_reduce(value)
        results.append(value.tolist())
    return results


def messages(rank: Any, left: int, right: int, megabytes: float, repeats: int) -> float:
    """Seconds of one way of a message between two ranks: the least of some."""
    value = torch.ones(max(1, int(megabytes * 2**18)))
    if rank.rank not in (left, right):
        return 0.0
    other = right if rank.rank == left else left
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        if rank.rank == left:
            dist.send(value, other)
            dist.recv(value, other)
        else:
            dist.recv(value, other)
            dist.send(value, other)
        taken.append(time.perf_counter() - began)
    return min(taken) / 2


def timed(rank: Any, what: str, ranks: list[int] | None = None, elements: int = 1) -> float:
    """Seconds of one collective, after a barrier."""
    import torch.distributed._functional_collectives as functional

    group = dist.new_group(ranks)
    dist.barrier()
    began = time.perf_counter()
    if ranks is None or rank.rank in ranks:
        size = dist.get_world_size(group)
        value, parts = torch.ones(elements * size), torch.ones(elements * size * size)
        {
            "all_reduce": lambda: dist.all_reduce(value, group=group),
            "all_gather": lambda: dist.all_gather_into_tensor(parts, value, group=group),
            "reduce_scatter": lambda: dist.reduce_scatter_tensor(value, parts, group=group),
            "all_to_all": lambda: dist.all_to_all_single(torch.empty_like(value), value, group=group),
            "broadcast": lambda: dist.broadcast(value, dist.get_global_rank(group, 0), group=group),
            "barrier": lambda: dist.barrier(group=group),
            "functional": lambda: functional.wait_tensor(functional.all_reduce(value, "sum", group)),
            "asynchronous": lambda: dist.all_reduce(value, group=group, async_op=True).wait(),
            "object": lambda: dist.all_gather_object([None] * size, rank.rank, group=group),
        }[what]()
    return time.perf_counter() - began
