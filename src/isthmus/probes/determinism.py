"""Whether a device gives the same answer twice, and the right one where it is known.

A fault that changes a result silently shows as an inequality here. No failure in n trials does not prove a device
sound: it bounds the probability of a failure per trial, and the bound is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Trials:
    """How many comparisons were made and how many failed."""

    samples: int
    failures: int


def known_answer(device: torch.device, size: int, products: int, times: int) -> Trials:
    """Products of integer matrices [size, size] whose exact value is known by construction, compared exactly.

    Each of `products` pairs of matrices is multiplied `times` times.
    """
    failures = 0
    for seed in range(products):
        left, right, product = (matrix.to(device) for matrix in known_product(size, seed))
        failures += sum(not torch.equal(left @ right, product) for _ in range(times))
    return Trials(products * times, failures)


def known_product(size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Dense integer matrices A = U V and B = W Z in fp32, and A B = U (V W) Z, which needs no product of that size.

    The factors are [size, 2] and [2, size] with integers up to 2 in magnitude, so that entries stay within 8 and every
    partial sum within 64 size: exact in fp32, in any order of summation, up to size 2^18.
    """
    assert size <= 2**18
    generator = torch.Generator().manual_seed(seed)
    u, w = (torch.randint(-2, 3, (size, 2), generator=generator) for _ in range(2))
    v, z = (torch.randint(-2, 3, (2, size), generator=generator) for _ in range(2))
    core = (v.unsqueeze(1) * w.T.unsqueeze(0)).sum(-1)
    return _outer_sum(u, v).float(), _outer_sum(w, z).float(), _outer_sum(_outer_sum(u, core), z).float()


def _outer_sum(left: Tensor, right: Tensor) -> Tensor:
    """left [n, 2] times right [2, m], by elementwise integer arithmetic."""
    return left[:, :1] * right[:1] + left[:, 1:] * right[1:]


def same_twice(work: Callable[[], Sequence[Tensor]], samples: int) -> Trials:
    """Run `work` again `samples` times and compare every tensor that it returns, bit for bit, with the first run's."""
    first = [tensor.detach().clone() for tensor in work()]
    failures = sum(not _all_equal(first, work()) for _ in range(samples))
    return Trials(samples, failures)


def _all_equal(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> bool:
    return len(expected) == len(actual) and all(
        torch.equal(one.view(torch.uint8), other.detach().contiguous().view(torch.uint8))
        for one, other in zip(expected, actual, strict=True)
    )
