"""Token parity: two models on the same sequences, position by position, with the reference's own text as input.

Shapes: B sequences of a batch, N completion tokens of a batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from isthmus.model.model import Model
from isthmus.model.moe import Trace

TIE_NATS = 0.1
"""A changed first choice is a near-tie if the reference preferred its own by less than this many nats (10%)."""
BATCH = 32
RESAMPLES = 2000


@dataclass(frozen=True)
class GoldenSequence:
    """A prompt and the tokens that the reference wrote after it."""

    prompt: list[int]
    completion: list[int]


@dataclass(frozen=True)
class TokenParity:
    """KL(reference || candidate) in nats per completion token, mean with its interval over sequences, and the largest.

    The KL is infinite if the candidate's output is no number, and NaN if there is nothing to compare. `kl_interval` is
    None for fewer than two sequences.
    `near_ties` and `flips` are the positions where the first choices differ: between choices that the reference holds
    nearly equal, and others. `mean_abs_dlogp` is the mean change of the log-probability of the tokens in the sequences.
    Of `router_choices`, one per token and layer with experts, `router_flips` have another set of experts. `distinct`
    counts the sequences without those that are the same as another: they say nothing new. `logprobs` [2, N] are those
    that reference and candidate give the completion tokens, in the order of the sequences, in float64.
    """

    sequences: int
    tokens: int
    mean_kl: float
    kl_interval: tuple[float, float] | None
    max_kl: float
    top1_agreement: float
    near_ties: int
    flips: int
    mean_abs_dlogp: float
    router_choices: int
    router_flips: int
    distinct: int
    logprobs: Tensor = field(repr=False, compare=False)


@dataclass(frozen=True)
class _Positions:
    """Per completion token of a batch, [N] each, `logprobs` [2, N]; `sequence` counts from 0 within the comparison.

    `router_flips` [R] marks, for each token of the batch and each layer with experts, whether the experts differ.
    """

    kl: Tensor
    agrees: Tensor
    near_tie: Tensor
    logprobs: Tensor
    sequence: Tensor
    router_flips: Tensor


@dataclass(frozen=True)
class Pass:
    """One pass of a model over a batch, on the CPU: `logits` [N, V] of the completion tokens of all sequences.

    `experts` [R, K], sorted in each row, are those that each layer chose for each token, padding left out.
    """

    logits: Tensor
    experts: Tensor


def compare_tokens(
    reference: Model,
    candidate: Model,
    sequences: list[GoldenSequence],
    *,
    confidence: float = 0.95,
    candidate_context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> TokenParity:
    """Feed the same sequences to both models and compare the distributions of every completion token.

    The candidate runs inside `candidate_context()`, on whatever device it is on; its logits are compared outside, on
    the CPU and in float64.
    """
    if not sequences:
        return TokenParity(0, 0, math.nan, None, math.nan, math.nan, 0, 0, math.nan, 0, 0, 0, torch.empty(2, 0))
    order = sorted(range(len(sequences)), key=lambda one: len(sequences[one].prompt) + len(sequences[one].completion))
    given, sequences = sequences, [sequences[one] for one in order]
    batches = [
        _compare_batch(reference, candidate, batch, start, candidate_context) for start, batch in _batches(sequences)
    ]
    kl = torch.cat([batch.kl for batch in batches])
    agrees = torch.cat([batch.agrees for batch in batches])
    near_tie = torch.cat([batch.near_tie for batch in batches])
    router_flips = torch.cat([batch.router_flips for batch in batches])
    of_sequence = torch.cat([batch.sequence for batch in batches])
    logprobs = torch.cat([batch.logprobs for batch in batches], -1)
    return TokenParity(
        sequences=len(sequences),
        tokens=len(kl),
        mean_kl=kl.mean().item(),
        kl_interval=interval_of_mean(kl, of_sequence, len(sequences), confidence),
        max_kl=kl.max().item(),
        top1_agreement=agrees.double().mean().item(),
        near_ties=int(near_tie.sum()),
        flips=int((~agrees & ~near_tie).sum()),
        mean_abs_dlogp=(logprobs[0] - logprobs[1]).abs().mean().item(),
        router_choices=len(router_flips),
        router_flips=int(router_flips.sum()),
        distinct=count_distinct(sequences),
        logprobs=_in_given_order(logprobs, order, given),
    )


def _in_given_order(values: Tensor, order: list[int], given: list[GoldenSequence]) -> Tensor:
    """Values [..., N] of the completion tokens, the sequences put back where they stood before they were sorted."""
    parts = dict(zip(order, values.split([len(given[one].completion) for one in order], -1), strict=True))
    return torch.cat([parts[one] for one in range(len(given))], -1)


def count_distinct(sequences: list[GoldenSequence]) -> int:
    """The sequences that have a completion, each once."""
    return len({(*one.prompt, None, *one.completion) for one in sequences if one.completion})


def run_batch(model: Model, sequences: list[GoldenSequence]) -> Pass:
    """All sequences, one after the other, in one batch."""
    lengths = [len(sequence.prompt) + len(sequence.completion) for sequence in sequences]
    width = max(lengths)
    rows = [[*one.prompt, *one.completion, *[0] * (width - size)] for one, size in zip(sequences, lengths, strict=True)]
    predicting = [
        torch.arange(row * width + len(one.prompt) - 1, row * width + size - 1)
        for row, (one, size) in enumerate(zip(sequences, lengths, strict=True))
    ]
    device, trace = model.model.embed_tokens.weight.device, Trace()
    real = torch.arange(width) < torch.tensor(lengths)[:, None]
    with torch.inference_mode():
        hidden = model.hidden(torch.tensor(rows, device=device), trace=trace).flatten(0, 1)
        logits = model.logits(hidden.index_select(0, torch.cat(predicting).to(device))).cpu()
        chosen = [routing.experts.cpu()[real.flatten()].sort(-1).values for routing in trace.routings]
    return Pass(logits, torch.cat(chosen) if chosen else torch.empty(0, 1, dtype=torch.long))


def completion_log_probabilities(model: Model, sequences: list[GoldenSequence], temperature: float) -> Tensor:
    """Log-probabilities [N], in float64, that the model gives the completion tokens at a temperature."""
    parts = []
    for _, batch in _batches(sequences):
        distribution = (run_batch(model, batch).logits.double() / temperature).log_softmax(-1)
        parts.append(distribution.gather(-1, _completion_tokens(batch)[:, None]).squeeze(-1))
    return torch.cat(parts)


def _compare_batch(
    reference: Model,
    candidate: Model,
    batch: list[GoldenSequence],
    start: int,
    candidate_context: Callable[[], AbstractContextManager[object]],
) -> _Positions:
    wanted = run_batch(reference, batch)
    with candidate_context():
        given = run_batch(candidate, batch)
    expected, found = (one.logits.double().log_softmax(-1) for one in (wanted, given))
    first, other = expected.argmax(-1, keepdim=True), found.argmax(-1, keepdim=True)
    agrees = (first == other).squeeze(-1)
    preference = (expected.gather(-1, first) - expected.gather(-1, other)).squeeze(-1)
    taken = _completion_tokens(batch)[:, None]
    lengths = torch.tensor([len(sequence.completion) for sequence in batch])
    kl = (expected.exp() * (expected - found)).sum(-1)
    return _Positions(
        kl=kl.where(kl.isfinite(), math.inf),
        agrees=agrees,
        near_tie=~agrees & (preference < TIE_NATS),
        logprobs=torch.stack([one.gather(-1, taken).squeeze(-1) for one in (expected, found)]),
        sequence=torch.arange(start, start + len(batch)).repeat_interleave(lengths),
        router_flips=_router_flips(wanted.experts, given.experts),
    )


def _router_flips(wanted: Tensor, given: Tensor) -> Tensor:
    """Which choices differ; all of them if the candidate's routers choose another number of experts."""
    if wanted.shape != given.shape:
        return torch.ones(wanted.shape[:-1], dtype=torch.bool)
    return (wanted != given).any(-1)


def _completion_tokens(batch: list[GoldenSequence]) -> Tensor:
    return torch.tensor([token for sequence in batch for token in sequence.completion])


def _batches(sequences: list[GoldenSequence]) -> Iterator[tuple[int, list[GoldenSequence]]]:
    assert all(sequence.prompt and sequence.completion for sequence in sequences), "nothing to compare in a sequence"
    for start in range(0, len(sequences), BATCH):
        yield start, sequences[start : start + BATCH]


def interval_of_mean(values: Tensor, sequence: Tensor, count: int, confidence: float) -> tuple[float, float] | None:
    """Percentile interval of the mean (Efron and Tibshirani 1993, 13.3), whole sequences resampled, always alike.

    `values` and the number of the sequence that each belongs to are [N]. None for fewer than two sequences.
    """
    if count < 2:
        return None
    sums = torch.zeros(count, dtype=torch.float64).index_add(0, sequence, values)
    lengths = torch.bincount(sequence, minlength=count).double()
    drawn = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(0))
    means = sums[drawn].sum(-1) / lengths[drawn].sum(-1)
    tail = (1 - confidence) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
