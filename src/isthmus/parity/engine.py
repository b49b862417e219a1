"""Parity of an engine: what it says of tokens, against the exact emulator of its format.

Both know the same stored weights, so quantisation plays no part: what remains is the chip's and the engine's own share,
and weights that did not arrive. An API shows tokens and log-probabilities, and no module: it can refuse, and cannot say
where the fault is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.formats.files.golden import TokenScore
from isthmus.model.model import Model
from isthmus.parity.gate import at_least, at_most, declared, finite
from isthmus.parity.tokens import TIE_NATS, GoldenSequence, count_distinct, run_batch
from isthmus.records import Check

LIMIT = 0.05
LIMIT_SOURCE = (
    "between what rollouts showed with a healthy engine (0.011 to 0.025) and with wrongly mapped weights "
    "(0.075 to 0.178): github.com/vllm-project/vime/pull/275"
)
TOP1_LIMIT = 0.95

Score = Callable[[list[list[int]]], list[list[TokenScore]]]
"""Asks an engine what it says of every token but the first of each sequence."""


@dataclass(frozen=True)
class Gap:
    """|log-probability that the engine gave - that of the emulator| over the tokens of sequences, in nats.

    Infinite where one is no number; the mean of no token is NaN.
    """

    tokens: int
    mean: float
    largest: float

    @property
    def is_over(self) -> bool:
        """Whether the mean is not within LIMIT."""
        return at_most(LIMIT, self.mean) != "pass"


@dataclass(frozen=True)
class EngineParity:
    """Over the completion tokens of so many distinct sequences. `near_ties` and `flips` are the first choices that
    differ: where the emulator held both nearly equal, and others."""

    sequences: int
    gap: Gap
    near_ties: int
    flips: int

    def share(self, differing: int) -> float:
        """The share of tokens without those that differ; NaN of no token."""
        return (self.gap.tokens - differing) / self.gap.tokens if self.gap.tokens else math.nan


def measure_gap(said: Tensor, expected: Tensor) -> Gap:
    """The gap of an engine's log-probabilities [N] to the emulator's [N], both in float64."""
    gaps = (said - expected).abs()
    gaps = gaps.where(gaps.isfinite(), math.inf)
    return Gap(len(gaps), gaps.mean().item(), gaps.max().item() if len(gaps) else math.nan)


@torch.inference_mode()
def spot_gap(model: Model, prompts: list[list[int]], answers: list[tuple[list[int], list[float]]]) -> Gap:
    """Compare the greedy answer to each prompt (tokens, their log-probabilities) with what the model gives them."""
    said, expected = [], []
    for prompt, (tokens, logprobs) in zip(prompts, answers, strict=True):
        logits = model(torch.tensor([[*prompt, *tokens]]))[0, len(prompt) - 1 : -1].double()
        expected.append(torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens)[:, None])[:, 0])
        said += logprobs
    return measure_gap(torch.tensor(said, dtype=torch.float64), torch.cat(expected))


def compare_engine(score: Score, emulator: Model, sequences: list[GoldenSequence]) -> EngineParity:
    """Let the engine score the sequences, and compare what it says of each completion token."""
    answers = score([[*one.prompt, *one.completion] for one in sequences])
    said, expected, near_ties, flips = [], [], 0, 0
    for sequence, scores in zip(sequences, answers, strict=True):
        rows = run_batch(emulator, [sequence]).logits.double().log_softmax(-1)
        for token, row, found in zip(sequence.completion, rows, scores[len(sequence.prompt) - 1 :], strict=True):
            said.append(found.logprob)
            expected.append(row[token].item())
            first = int(row.argmax())
            is_near = (row[first] - row[found.best]).item() < TIE_NATS
            near_ties += found.best != first and is_near
            flips += found.best != first and not is_near
    gap = measure_gap(*(torch.tensor(values, dtype=torch.float64) for values in (said, expected)))
    return EngineParity(count_distinct(sequences), gap, near_ties, flips)


def check_gap(name: str, gap: Gap, sequences: int, source: str, detail: str, *, rehearsed: bool) -> Check:
    """Whether the mean gap over that many sequences is within LIMIT."""
    return Check(
        layer="engine",
        name=name,
        outcome=at_most(LIMIT, gap.mean, samples=sequences),
        figure=finite(gap.mean, "nats/token", source, rehearsed=rehearsed),
        limit=declared(LIMIT, "nats/token", LIMIT_SOURCE),
        detail=detail,
    )


NAME = "mean |Δlogp|, engine against emulator"


def check_engine(found: EngineParity, server: str, *, rehearsed: bool = False) -> list[Check]:
    """The findings on golden sequences, each against its limit."""
    tokens, largest = found.gap.tokens, found.gap.largest
    source = f"{found.sequences} golden sequences scored by {server}, {tokens} tokens"
    said = f"largest {largest:.3g}" if math.isfinite(largest) else "some are not numbers"
    detail = f"log-probabilities of the golden tokens; {said}"
    agreed, agreeing = found.share(found.flips + found.near_ties), found.share(found.flips)
    return [
        check_gap(NAME, found.gap, found.sequences, source, detail, rehearsed=rehearsed),
        Check(
            layer="engine",
            name="first choices that agree or nearly tie, engine against emulator",
            outcome=at_least(TOP1_LIMIT, agreeing, samples=found.sequences),
            figure=finite(100 * agreeing, "%", source, rehearsed=rehearsed),
            limit=declared(100 * TOP1_LIMIT, "%", "isthmus.parity.engine.TOP1_LIMIT"),
            detail=f"{100 * agreed:.4g} % agree; of the others {found.near_ties} are near-ties of the emulator, "
            f"{found.flips} are not",
        ),
    ]
