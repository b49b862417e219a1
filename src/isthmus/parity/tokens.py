"""Token parity: two models on the same sequences, position by position, with the reference's own text as input.

Shapes: B sequences of a batch, N completion tokens of a batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from isthmus.model.model import Model
from isthmus.model.moe import Trace

TIE_NATS = 0.1
"""A changed first choice is a near-tie if the reference preferred its own by less than this many nats (10%)."""
BATCH, BATCH_TOKENS = 32, 4096
"""Sequences, and tokens with padding, that pass through a model at once; of one sequence more, if it is longer."""
LOGITS_BYTES, POSITIONS_BYTES = 128 << 20, 16 << 20
"""Bytes in fp32 of the logits that are in memory at once of each model, and of those that are compared at once."""
RESAMPLES = 2000


@dataclass(frozen=True)
class GoldenSequence:
    """A prompt and the tokens that the reference wrote after it."""

    prompt: list[int]
    completion: list[int]

    @classmethod
    def halved(cls, tokens: list[int]) -> GoldenSequence:
        """Of a text that nobody divided, the first half is the prompt."""
        return cls(tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :])


@dataclass(frozen=True)
class TokenParity:
    """KL(reference || candidate) in nats per completion token, mean with its interval over sequences, and the largest.

    The KL is infinite if the candidate's output is no number, and NaN if there is nothing to compare. `kl_interval` is
    None for fewer than two sequences.
    `near_ties` and `flips` are the positions where the first choices differ: between choices that the reference holds
    nearly equal, and others. `mean_abs_dlogp` is the mean change of the log-probability of the tokens in the sequences.
    Of `router_choices`, one per token and layer with experts, `router_flips` have another set of experts. `distinct`
    counts the sequences without those that are the same as another: they say nothing new. `logprobs` [2, N] are those
    that reference and candidate give the completion tokens, in the order of the sequences, in float64, and `first`
    [2, N] their first choices there.
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
    first: Tensor = field(repr=False, compare=False)


@dataclass(frozen=True)
class _Positions:
    """Per completion token of a batch, [N] each, `logprobs` and `first` [2, N]."""

    kl: Tensor
    agrees: Tensor
    near_tie: Tensor
    logprobs: Tensor
    first: Tensor


@dataclass(frozen=True)
class _Compared:
    """Of one batch: what was found of its completion tokens, piece by piece, and of its routers.

    `sequence` [N] is the sequence of each token, counted from 0 within the comparison. `router_flips` [R] marks, for
    each token of the batch and each layer with experts, whether the experts differ.
    """

    positions: list[_Positions]
    sequence: Tensor
    router_flips: Tensor


@dataclass(frozen=True)
class Candidate:
    """A model that is compared; it runs inside `context()`, on whatever device it is on."""

    model: Model
    context: Callable[[], AbstractContextManager[object]] = nullcontext


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
        nothing = (torch.empty(2, 0), torch.empty(2, 0, dtype=torch.long))
        return TokenParity(0, 0, math.nan, None, math.nan, math.nan, 0, 0, math.nan, 0, 0, 0, *nothing)
    order, ordered = _by_length(sequences)
    asked = Candidate(candidate, candidate_context)
    batches = [_compare_batch(reference, asked, batch, start) for start, batch in _batches(ordered)]
    return _summary(batches, sequences, order, confidence)


@dataclass(frozen=True)
class Told:
    """What a model says of completion tokens: `logprobs` in float64, and its `first` choices. [N] each, or [K, N] of K
    copies of the sequences."""

    logprobs: Tensor
    first: Tensor

    def of(self, sequences: Sequence[GoldenSequence], places: list[int]) -> Told:
        """Of the completion tokens of these sequences, those of the sequences at these places."""
        return Told(*(of_sequences(part, sequences, places) for part in (self.logprobs, self.first)))


NOTHING = Told(torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.long))


def ask_tokens(candidate: Candidate, sequences: list[GoldenSequence], copies: int | None = None) -> Told:
    """What a model says of the completion tokens, in one pass and in the batches of `compare_tokens`.

    With `copies` each sequence passes so many times side by side: a model with noise draws it anew for each.
    """
    order, ordered = _by_length(sequences)
    repeated = [one for one in ordered for _ in range(copies or 1)]
    parts = [_ask_batch(candidate, batch) for _, batch in _batches(repeated)] if repeated else [NOTHING]
    found = Told(torch.cat([one.logprobs for one in parts]), torch.cat([one.first for one in parts]))
    rank = torch.tensor(order).argsort().tolist()
    rows = [found.of(repeated, [(copies or 1) * place + copy for place in rank]) for copy in range(copies or 1)]
    if copies is None:
        return rows[0]
    return Told(torch.stack([one.logprobs for one in rows]), torch.stack([one.first for one in rows]))


def _by_length(sequences: list[GoldenSequence]) -> tuple[list[int], list[GoldenSequence]]:
    """The places of sequences from the shortest to the longest, and the sequences in that order."""
    order = sorted(range(len(sequences)), key=lambda one: len(sequences[one].prompt) + len(sequences[one].completion))
    return order, [sequences[one] for one in order]


def _ask_batch(candidate: Candidate, batch: list[GoldenSequence]) -> Told:
    taken, logprobs, first = _completion_tokens(batch)[:, None], [], []
    with candidate.context():
        given = _run_states(candidate.model, batch)
    for rows in _chunks(len(taken), candidate.model, LOGITS_BYTES):
        with candidate.context():
            logits = given.logits(rows)
        for some in _chunks(len(rows), candidate.model, POSITIONS_BYTES):
            here = slice(some.start, some.stop)
            found = logits[here].double().log_softmax(-1)
            first.append(found.argmax(-1))
            logprobs.append(found.gather(-1, taken[rows.start : rows.stop][here]).squeeze(-1))
    return Told(torch.cat(logprobs), torch.cat(first))


def _summary(
    batches: list[_Compared], sequences: list[GoldenSequence], order: list[int], confidence: float
) -> TokenParity:
    positions = [one for batch in batches for one in batch.positions]
    kl = torch.cat([one.kl for one in positions])
    agrees = torch.cat([one.agrees for one in positions])
    near_tie = torch.cat([one.near_tie for one in positions])
    logprobs = torch.cat([one.logprobs for one in positions], -1)
    first = torch.cat([one.first for one in positions], -1)
    ordered, places = [sequences[one] for one in order], torch.tensor(order).argsort().tolist()
    router_flips = torch.cat([batch.router_flips for batch in batches])
    of_sequence = torch.cat([batch.sequence for batch in batches])
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
        distinct=len(distinct(sequences)),
        logprobs=of_sequences(logprobs, ordered, places),
        first=of_sequences(first, ordered, places),
    )


def lengths_of(sequences: Sequence[GoldenSequence]) -> Tensor:
    """The completion tokens [S] of each."""
    return torch.tensor([len(one.completion) for one in sequences], dtype=torch.long)


def numbered(lengths: Tensor) -> Tensor:
    """The number [N] of each token's sequence."""
    return torch.arange(len(lengths)).repeat_interleave(lengths)


def of_sequences(values: Tensor, sequences: Sequence[GoldenSequence], places: list[int]) -> Tensor:
    """Of values [..., N] of the completion tokens of sequences, those of the sequences at these places, as listed."""
    parts = values.split(lengths_of(sequences).tolist(), dim=-1)
    return torch.cat([parts[place] for place in places], -1) if places else values[..., :0]


def distinct(sequences: Sequence[GoldenSequence]) -> list[int]:
    """The places of the sequences that have a prompt and a completion, each sequence once: a repeated one says nothing
    new."""
    first: dict[tuple[int | None, ...], int] = {}
    for place, one in enumerate(sequences):
        if one.prompt and one.completion:
            first.setdefault((*one.prompt, None, *one.completion), place)
    return sorted(first.values())


@dataclass(frozen=True)
class _States:
    """What a model makes of a batch: `states` [N, D] of the completion tokens, before the final norm, and `experts`."""

    model: Model
    states: Tensor
    experts: Tensor

    @torch.inference_mode()
    def logits(self, rows: range) -> Tensor:
        """Logits [M, V] of some of the completion tokens, on the CPU."""
        return self.model.logits(self.states[rows.start : rows.stop]).cpu()


@torch.inference_mode()
def _run_states(model: Model, sequences: list[GoldenSequence]) -> _States:
    lengths = [len(sequence.prompt) + len(sequence.completion) for sequence in sequences]
    width = max(lengths)
    rows = [[*one.prompt, *one.completion, *[0] * (width - size)] for one, size in zip(sequences, lengths, strict=True)]
    predicting = [
        torch.arange(row * width + len(one.prompt) - 1, row * width + size - 1)
        for row, (one, size) in enumerate(zip(sequences, lengths, strict=True))
    ]
    device, trace = model.model.norm.weight.device, Trace()
    real = torch.arange(width) < torch.tensor(lengths)[:, None]
    hidden = model.hidden(torch.tensor(rows, device=device), trace=trace).flatten(0, 1)
    states = hidden.index_select(0, torch.cat(predicting).to(device))
    chosen = [routing.experts.cpu()[real.flatten()].sort(-1).values for routing in trace.routings]
    return _States(model, states, torch.cat(chosen) if chosen else torch.empty(0, 1, dtype=torch.long))


def _compare_batch(reference: Model, candidate: Candidate, batch: list[GoldenSequence], start: int) -> _Compared:
    wanted, taken = _run_states(reference, batch), _completion_tokens(batch)[:, None]
    with candidate.context():
        given = _run_states(candidate.model, batch)
    positions = []
    for rows in _chunks(len(taken), reference, LOGITS_BYTES):
        expected = wanted.logits(rows)
        with candidate.context():
            found = given.logits(rows)
        positions += _positions(expected, found, taken[rows.start : rows.stop], reference)
    sequence = start + numbered(lengths_of(batch))
    return _Compared(positions, sequence, _router_flips(wanted.experts, given.experts))


def _positions(wanted: Tensor, given: Tensor, taken: Tensor, reference: Model) -> list[_Positions]:
    """The comparison of logits [M, V] with logits [M, V], where the tokens `taken` [M, 1] followed, piece by piece."""
    positions = []
    for rows in _chunks(len(taken), reference, POSITIONS_BYTES):
        here = slice(rows.start, rows.stop)
        expected, found = (one[here].double().log_softmax(-1) for one in (wanted, given))
        first, other = expected.argmax(-1, keepdim=True), found.argmax(-1, keepdim=True)
        agrees = (first == other).squeeze(-1)
        preference = (expected.gather(-1, first) - expected.gather(-1, other)).squeeze(-1)
        kl = (expected.exp() * (expected - found)).sum(-1)
        positions.append(
            _Positions(
                kl=kl.where(kl.isfinite(), math.inf),
                agrees=agrees,
                near_tie=~agrees & (preference < TIE_NATS),
                logprobs=torch.stack([one.gather(-1, taken[here]).squeeze(-1) for one in (expected, found)]),
                first=torch.stack((first, other)).squeeze(-1),
            )
        )
    return positions


def _chunks(count: int, model: Model, most: int) -> list[range]:
    """So many tokens in pieces whose logits take at most so many bytes in fp32."""
    step = max(1, most // (4 * model.architecture.vocab_size))
    return [range(start, min(start + step, count)) for start in range(0, count, step)]


def _router_flips(wanted: Tensor, given: Tensor) -> Tensor:
    """Which choices differ; all of them if the candidate's routers choose another number of experts."""
    if wanted.shape != given.shape:
        return torch.ones(wanted.shape[:-1], dtype=torch.bool)
    return (wanted != given).any(-1)


def _completion_tokens(batch: list[GoldenSequence]) -> Tensor:
    return torch.tensor([token for sequence in batch for token in sequence.completion])


def _batches(sequences: list[GoldenSequence]) -> Iterator[tuple[int, list[GoldenSequence]]]:
    assert all(sequence.prompt and sequence.completion for sequence in sequences), "nothing to compare in a sequence"
    start, batch, width = 0, [], 0
    for sequence in sequences:
        longest = max(width, len(sequence.prompt) + len(sequence.completion))
        if batch and (len(batch) == BATCH or longest * (len(batch) + 1) > BATCH_TOKENS):
            yield start, batch
            start, batch = start + len(batch), []
            longest = len(sequence.prompt) + len(sequence.completion)
        batch, width = [*batch, sequence], longest
    yield start, batch


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
