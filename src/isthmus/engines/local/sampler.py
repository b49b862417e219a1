"""Drawing tokens. One uniform per row from a counter-based hash, then the inverse of the distribution function.

A draw depends on (seed, choice, position) and the row's logits alone, never on what else is in the batch.
The chip computes logits; drawing happens on the host, where float64 is at hand.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class Draw(NamedTuple):
    """`tokens` [B]; `logprobs` [B] of these tokens; `distribution` [B, V], the log-probabilities that were sampled."""

    tokens: Tensor
    logprobs: Tensor
    distribution: Tensor


def stream_key(seed: int, choice: int) -> int:
    """The 64-bit key of one sample's uniforms."""
    words = np.array([[seed & _WORD], [choice & _WORD]], dtype=np.uint64) * np.uint64(_GOLDEN)
    return int(_mix(_mix(words[0] + np.uint64(_GOLDEN)) + words[1])[0])


def uniforms(keys: NDArray[np.uint64], counters: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number in [0, 1) per (key, counter), on a grid of 2^-52 so that u * total never rounds up to total."""
    mixed = _mix(keys + (counters.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN))
    return (mixed >> np.uint64(12)).astype(np.float64) * 2.0**-52


def draw(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Draw:
    """Sample each row of logits [B, V] with its temperature and top_p (both [B]) and its uniform [B].

    A token of zero probability is never drawn. At temperature 0 the likeliest token is taken, and the distribution
    given back is the model's own (temperature 1).
    """
    greedy = temperature == 0
    scaled = logits.float() / torch.where(greedy, 1.0, temperature).unsqueeze(1)
    distribution = torch.log_softmax(scaled, dim=-1)
    truncated = (top_p < 1) & ~greedy
    if truncated.any():
        distribution = torch.where(truncated.unsqueeze(1), _nucleus(distribution, top_p), distribution)
    tokens = distribution.argmax(-1) if greedy.any() else torch.zeros(len(logits), dtype=torch.long)
    if not greedy.all():
        tokens = torch.where(greedy, tokens, _invert(distribution, uniform))
    return Draw(tokens, distribution.gather(-1, tokens.unsqueeze(1)).squeeze(1), distribution)


def _invert(distribution: Tensor, uniform: Tensor) -> Tensor:
    """The first token whose cumulated probability exceeds uniform * total; its own probability is then not zero."""
    cumulated = distribution.exp().cumsum(-1, dtype=torch.float64)
    target = uniform.double().unsqueeze(1) * cumulated[:, -1:]
    # Only a row that is not a number finds no place at all.
    return torch.searchsorted(cumulated, target, right=True).squeeze(1).clamp_(max=distribution.shape[-1] - 1)


def _nucleus(distribution: Tensor, top_p: Tensor) -> Tensor:
    """Keep the fewest likeliest tokens whose probability reaches top_p (arXiv 1904.09751), and renormalise."""
    ordered, order = distribution.sort(dim=-1, descending=True, stable=True)
    before = ordered.exp().cumsum(-1, dtype=torch.float64) - ordered.exp()
    dropped = before >= top_p.double().unsqueeze(1)
    dropped[:, 0] = False
    kept = ordered.masked_fill(dropped, float("-inf"))
    return torch.log_softmax(torch.empty_like(kept).scatter_(-1, order, kept), dim=-1)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
