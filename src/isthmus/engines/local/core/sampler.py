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
from torch.nn import functional as F

from isthmus.engines.kept import KeptSet

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15

COLDEST = 1e-30
"""Lower temperatures would make infinities of logits, and leave the likeliest token alone just as this one does."""

WIDE, BLOCK = 2048, 256
"""From `WIDE` tokens on, a token is found by the sums of blocks of `BLOCK`, and then within its block."""


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


def draw(
    logits: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    uniform: Tensor,
    top_k: Tensor | None = None,
    min_p: Tensor | None = None,
) -> Draw:
    """Sample each row of logits [B, V] with its temperature, top_p, top_k and min_p (all [B]) and its uniform [B].

    The order is that of vLLM: temperature, min_p, then top_k, then top_p of what is left. `top_k` 0 and `min_p` 0 keep
    all. A token of zero probability is never drawn. At temperature 0 the likeliest token is taken, and the distribution
    given back is the model's own (temperature 1).
    """
    greedy = temperature == 0
    if greedy.all():
        distribution = torch.log_softmax(logits.float(), dim=-1)
        best = distribution.max(-1)
        return Draw(best.indices, best.values, distribution)
    scaled = logits.float() / torch.where(greedy, 1.0, temperature.clamp(min=COLDEST)).unsqueeze(1)
    distribution = torch.log_softmax(scaled, dim=-1)
    cut = torch.zeros_like(greedy)
    for keep, bound, off in ((_likely_enough, min_p, 0.0), (_first_ranks, top_k, 0), (_nucleus, top_p, 1.0)):
        if bound is not None and (chosen := (bound != off) & ~greedy).any():
            distribution = torch.where(chosen.unsqueeze(1), keep(distribution, bound), distribution)
            cut |= chosen
    if cut.any():
        # Normalised once, of the logits: a learner that leaves out the same tokens has the same bits.
        once = torch.log_softmax(scaled.masked_fill(distribution == float("-inf"), float("-inf")), dim=-1)
        distribution = torch.where(cut.unsqueeze(1), once, distribution)
    tokens = _invert(distribution, uniform)
    if greedy.any():
        tokens = torch.where(greedy, distribution.argmax(-1), tokens)
    return Draw(tokens, distribution.gather(-1, tokens.unsqueeze(1)).squeeze(1), distribution)


def kept_sets(distribution: Tensor) -> list[KeptSet]:
    """What could be drawn from each row of distribution [B, V], log-probabilities."""
    return [KeptSet.of(row) for row in (distribution > float("-inf")).numpy()]


class Adjustment(NamedTuple):
    """What changes the logits of one row before they are drawn from; `Request` explains the numbers.

    `forbidden` tokens cannot be drawn; of `allowed` [V] only these can, if it is given.
    """

    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: dict[int, float]
    forbidden: list[int]
    allowed: NDArray[np.bool_] | None


def adjust(logits: Tensor, change: Adjustment, prompt: NDArray[np.integer], generated: NDArray[np.integer]) -> None:
    """Change the logits [V] of one row in place, in the order of vLLM: mask, bias, penalties.

    OpenAI's penalties count the generated tokens: c frequency_penalty + presence_penalty for a token that occurs c > 0
    times. CTRL's divides positive logits, and multiplies negative ones, of all tokens that occur (arXiv 1909.05858).
    """
    if change.allowed is not None:
        allowed = torch.from_numpy(change.allowed).to(logits.device)
        logits.masked_fill_(~allowed, float("-inf"))
    if change.forbidden:
        logits[change.forbidden] = float("-inf")
    if change.logit_bias:
        logits[list(change.logit_bias)] += torch.tensor(list(change.logit_bias.values()), device=logits.device)
    if change.repetition_penalty != 1.0:
        seen = torch.from_numpy(np.unique(np.concatenate((prompt, generated))).astype(np.int64)).to(logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / change.repetition_penalty, values * change.repetition_penalty)
    if (change.presence_penalty or change.frequency_penalty) and len(generated):
        tokens, counts = np.unique(generated, return_counts=True)
        penalty = change.frequency_penalty * counts + change.presence_penalty
        place = torch.from_numpy(tokens.astype(np.int64)).to(logits.device)
        logits[place] -= torch.from_numpy(penalty.astype(np.float32)).to(logits.device)


def _invert(distribution: Tensor, uniform: Tensor) -> Tensor:
    """The first token whose cumulated probability exceeds uniform * total; its own probability is then not zero."""
    probabilities = distribution.exp()
    if distribution.shape[-1] < WIDE:
        cumulated = probabilities.cumsum(-1, dtype=torch.float64)
        return _first_beyond(cumulated, uniform.double().unsqueeze(1) * cumulated[:, -1:])
    rows = torch.arange(len(distribution))
    blocks = F.pad(probabilities, (0, -distribution.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    by_block = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = uniform.double().unsqueeze(1) * by_block[:, -1:]
    block = _first_beyond(by_block, target)
    before = by_block[rows, block - 1].masked_fill(block == 0, 0.0).unsqueeze(1)
    own = blocks[rows, block]
    inside = own.cumsum(-1, dtype=torch.float64) + before
    # Both sums round on their own: what lies beyond the last possible token of its block is that token.
    last_possible = BLOCK - 1 - (own.flip(-1) > 0).int().argmax(-1)
    token = block * BLOCK + torch.minimum(_first_beyond(inside, target), last_possible)
    return token.clamp_(max=distribution.shape[-1] - 1)


def _first_beyond(cumulated: Tensor, target: Tensor) -> Tensor:
    """The first place [B] at which cumulated [B, N] exceeds target [B, 1]; only rows of no numbers have none."""
    return torch.searchsorted(cumulated, target, right=True).squeeze(1).clamp_(max=cumulated.shape[-1] - 1)


def _nucleus(distribution: Tensor, top_p: Tensor) -> Tensor:
    """Keep the fewest likeliest tokens whose probability reaches top_p (arXiv 1904.09751), and renormalise."""
    ordered, order = distribution.sort(dim=-1, descending=True, stable=True)
    before = ordered.exp().cumsum(-1, dtype=torch.float64) - ordered.exp()
    dropped = before >= top_p.double().unsqueeze(1)
    dropped[:, 0] = False
    kept = ordered.masked_fill(dropped, float("-inf"))
    return torch.log_softmax(torch.empty_like(kept).scatter_(-1, order, kept), dim=-1)


def _likely_enough(distribution: Tensor, min_p: Tensor) -> Tensor:
    """Drop what is less likely than min_p times the likeliest (arXiv 2407.01082), and renormalise."""
    bound = distribution.amax(-1, keepdim=True) + min_p.log().unsqueeze(1)
    return torch.log_softmax(distribution.masked_fill(distribution < bound, float("-inf")), dim=-1)


def _first_ranks(distribution: Tensor, top_k: Tensor) -> Tensor:
    """Keep the top_k likeliest tokens, those of lower number among equals, and renormalise."""
    ordered, order = distribution.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(distribution.shape[-1], device=distribution.device)
    kept = ordered.masked_fill(ranks >= torch.where(top_k > 0, top_k, len(ranks)).unsqueeze(1), float("-inf"))
    return torch.log_softmax(torch.empty_like(kept).scatter_(-1, order, kept), dim=-1)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
