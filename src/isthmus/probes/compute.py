"""Rates of one device: matrix multiplication and memory. Each is timed alone, after a warm-up, repeat by repeat."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

WARM_UP = 2


def matmul_tflops(device: torch.device, size: int, repeats: int, dtype: torch.dtype = torch.float32) -> list[float]:
    """TFLOPS of a [size, size] x [size, size] product, counted as 2 size^3 operations, one value per repeat."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    out = torch.empty_like(left)
    seconds = time_each(lambda: torch.mm(left, right, out=out), device, repeats)
    return [2.0 * size**3 / one / 1e12 for one in seconds]


def memory_gbs(device: torch.device, mebibytes: int, repeats: int) -> list[float]:
    """GB/s of a copy, counting what is read and what is written, one value per repeat."""
    source = torch.ones(mebibytes * 2**18, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    seconds = time_each(lambda: target.copy_(source), device, repeats)
    return [2.0 * source.numel() * source.element_size() / one / 1e9 for one in seconds]


def host_device_gbs(device: torch.device, mebibytes: int, repeats: int) -> list[float]:
    """GB/s of a copy from pinned memory of the host to the device, one value per repeat."""
    source = torch.ones(mebibytes * 2**18, dtype=torch.float32).pin_memory()
    target = torch.empty_like(source, device=device)
    seconds = time_each(lambda: target.copy_(source, non_blocking=True), device, repeats)
    return [source.numel() * source.element_size() / one / 1e9 for one in seconds]


def time_each(
    work: Callable[[], object],
    device: torch.device,
    repeats: int,
    warm_up: int = WARM_UP,
    most_s: float = math.inf,
) -> list[float]:
    """Seconds of each of `repeats` runs of `work`, finished work on the device included; of fewer, and at least of one,
    if they took `most_s` together."""
    seconds: list[float] = []
    for index in range(warm_up + repeats):
        if sum(seconds) >= most_s:
            break
        began = time.perf_counter()
        work()
        finish(device)
        if index >= warm_up:
            seconds.append(time.perf_counter() - began)
    return seconds


def finish(device: torch.device) -> None:
    """Wait until the device has done all work that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def compute_threads(threads: int) -> Iterator[None]:
    """Compute with this many threads on the CPU, and go back to the number before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
