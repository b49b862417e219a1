"""The health check of a node as DLRover does it (dlrover/trainer/torch/node_check/utils.py), on a rank of a crew.

A matrix product and an all-gather are timed on each rank; results are not looked at. NaN in a training step is looked
for as training frameworks do, in the loss of one step.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

ROUNDS = 6


def check(rank: Any, size: int, numel: int) -> dict[str, float | bool]:
    """Seconds of the products and of the all-gathers of this rank, and whether a loss was NaN."""
    for step in range(1, 4):
        rank.beat("node check", step)
    generator = torch.Generator().manual_seed(rank.rank)
    left = torch.randn(size, size, generator=generator)
    began = time.perf_counter()
    for _ in range(ROUNDS):
        left @ left
    matmul = time.perf_counter() - began
    whole = [torch.empty(numel) for _ in range(rank.world)]
    dist.barrier()
    began = time.perf_counter()
    for _ in range(ROUNDS):
        dist.all_gather(whole, torch.ones(numel))
    gather = time.perf_counter() - began
    weight = torch.randn(size, size, generator=generator, requires_grad=True)
    loss = (left @ weight).square().mean()
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return {"matmul": matmul, "gather": gather, "nan": bool(torch.isnan(total)) or bool(torch.isnan(weight.grad).any())}
