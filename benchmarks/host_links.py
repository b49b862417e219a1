"""What a link of this host is: gloo between ranks over the loopback interface, latency and bandwidth.

    python -m benchmarks.host_links

Ranks of a crew exchange messages in pairs, back and forth: one pair alone, and two pairs at once. Latency is half of a
round with 8 bytes, bandwidth comes from half of a round with 8 MiB. `chips/rehearse/links.py` takes the medians of two
pairs at once, rounded, for what a rehearsal delivers where nothing is planted: in a collective all links are in use.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.conditions import store
from isthmus.launch.crew import Crew

SIZES = (8, 8 * 2**20)
ROUNDS = {8: 200, 8 * 2**20: 30}


def rounds(rank: Any, size: int, count: int) -> list[float]:
    """Seconds one way of a message of `size` bytes between this rank and the other of its pair, `count` times."""
    value = torch.zeros(size, dtype=torch.uint8)
    taken = []
    for _ in range(count):
        dist.barrier()
        began = time.perf_counter()
        if rank.rank % 2 == 0:
            dist.send(value, rank.rank + 1)
            dist.recv(value, rank.rank + 1)
        else:
            dist.recv(value, rank.rank - 1)
            dist.send(value, rank.rank - 1)
        taken.append((time.perf_counter() - began) / 2)
    return taken


def main() -> None:
    result = {f"{ranks // 2} pairs": measured(ranks) for ranks in (2, 4)}
    for pairs, found in result.items():
        print(f"{pairs}: latency {found['latency_us']:.0f} us, bandwidth {found['bandwidth_gbs']:.2f} GB/s")
    store("host_links", result)


def measured(ranks: int) -> dict[str, Any]:
    """The figures of a link, and the seconds that they come from, by size."""
    found: dict[str, list[float]] = {}
    with Crew(ranks) as crew:
        for size in SIZES:
            called = crew.call("benchmarks.host_links:rounds", {"size": size, "count": ROUNDS[size]}, deadline_s=120)
            found[str(size)] = [seconds for values in called.values for seconds in values]
    small, large = (statistics.median(found[str(size)]) for size in SIZES)
    return {"latency_us": small * 1e6, "bandwidth_gbs": SIZES[1] / (large - small) / 1e9, "seconds": found}


if __name__ == "__main__":
    main()
