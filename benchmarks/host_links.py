"""What a link of this host is: gloo between two ranks over the loopback interface, latency and bandwidth.

    python benchmarks/host_links.py

Two ranks of a crew exchange messages, back and forth. Latency is half of a round with 8 bytes, bandwidth comes from
half of a round with 8 MiB. `chips/rehearse/links.py` takes the medians, rounded, for what a rehearsal delivers where
nothing is planted.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from conditions import store
from isthmus.launch.crew import Crew

SIZES = (8, 8 * 2**20)
ROUNDS = {8: 400, 8 * 2**20: 40}


def rounds(rank: Any, size: int, count: int) -> list[float]:
    """Seconds one way of a message of `size` bytes, `count` times."""
    value = torch.zeros(size, dtype=torch.uint8)
    taken = []
    for _ in range(count):
        dist.barrier()
        began = time.perf_counter()
        if rank.rank == 0:
            dist.send(value, 1)
            dist.recv(value, 1)
        else:
            dist.recv(value, 0)
            dist.send(value, 0)
        taken.append((time.perf_counter() - began) / 2)
    return taken


def main() -> None:
    found: dict[str, list[float]] = {}
    with Crew(2) as crew:
        for size in SIZES:
            called = crew.call("host_links:rounds", {"size": size, "count": ROUNDS[size]}, deadline_s=60)
            found[str(size)] = called.values[0]
    small, large = (statistics.median(found[str(size)]) for size in SIZES)
    result = {"latency_us": small * 1e6, "bandwidth_gbs": SIZES[1] / (large - small) / 1e9, "seconds": found}
    print(f"latency {result['latency_us']:.0f} us, bandwidth {result['bandwidth_gbs']:.2f} GB/s")
    store("host_links", result)


if __name__ == "__main__":
    main()
