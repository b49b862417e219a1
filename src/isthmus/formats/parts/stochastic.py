"""Rounding fp32 to bf16 at random, so that what is smaller than a step of bf16 survives on average.

A number between two neighbours becomes the farther one from zero with the probability of its distance from the nearer
one (Gupta et al., Deep learning with limited numerical precision, ICML 2015): its expectation is the number itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

_DROPPED = 0xFFFF
"""The bits of fp32 that bf16 does not have."""


def round_stochastically(tensor: Tensor, seed: int, name: str) -> Tensor:
    """`tensor` in bf16. The random numbers depend on `seed` and `name` alone; infinities and NaN stay what they are."""
    wide = tensor.detach().float().contiguous()
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    noise = torch.randint(_DROPPED + 1, wide.shape, dtype=torch.int32, generator=generator)
    rounded = ((wide.view(torch.int32) + noise) & ~_DROPPED).view(torch.float32)
    return torch.where(wide.isfinite(), rounded, wide).bfloat16()


class StochasticState(Mapping[str, Tensor]):
    """A state whose tensors are rounded when they are asked for; the same each time."""

    def __init__(self, state: Mapping[str, Tensor], seed: int):
        self._state, self._seed = state, seed

    def __getitem__(self, name: str) -> Tensor:
        return round_stochastically(self._state[name], self._seed, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)
