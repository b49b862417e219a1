"""Parity of an engine behind an API: what it says of given sequences, against the exact emulator of its format.

An API shows tokens and log-probabilities, and no module: it can refuse, and cannot say where the fault is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from isthmus.formats.files.golden import TokenScore
from isthmus.model.model import Model
from isthmus.parity.spot import LIMIT as MEAN_LIMIT
from isthmus.parity.spot import LIMIT_SOURCE as MEAN_LIMIT_SOURCE
from isthmus.parity.tokens import TIE_NATS, GoldenSequence, run_batch
from isthmus.records import Check, Outcome
from isthmus.run import Figure

TOP1_LIMIT = 0.95

Score = Callable[[list[list[int]]], list[list[TokenScore]]]
"""Asks an engine what it says of every token but the first of each sequence."""


@dataclass(frozen=True)
class EngineParity:
    """Over completion tokens. `mean_abs_dlogp` and `max_abs_dlogp` in nats; infinite if a number is none.

    `near_ties` and `flips` are the first choices that differ: where the emulator held both nearly equal, and others.
    """

    sequences: int
    tokens: int
    mean_abs_dlogp: float
    max_abs_dlogp: float
    top1_agreement: float
    near_ties: int
    flips: int


def compare_engine(score: Score, emulator: Model, sequences: list[GoldenSequence]) -> EngineParity:
    """Let the engine score the sequences, and compare what it says of each completion token."""
    said = score([[*one.prompt, *one.completion] for one in sequences])
    gaps, agreed, near_ties = [], 0, 0
    for sequence, scores in zip(sequences, said, strict=True):
        rows = run_batch(emulator, [sequence]).logits.double().log_softmax(-1)
        for token, row, found in zip(sequence.completion, rows, scores[len(sequence.prompt) - 1 :], strict=True):
            gap = abs(found.logprob - row[token].item())
            gaps.append(gap if math.isfinite(gap) else math.inf)
            first = int(row.argmax())
            agreed += found.best == first
            near_ties += found.best != first and (row[first] - row[found.best]).item() < TIE_NATS
    count = len(gaps)
    return EngineParity(
        sequences=len(sequences),
        tokens=count,
        mean_abs_dlogp=sum(gaps) / count,
        max_abs_dlogp=max(gaps),
        top1_agreement=agreed / count,
        near_ties=near_ties,
        flips=count - agreed - near_ties,
    )


def check_engine(found: EngineParity, server: str, *, rehearsed: bool = False) -> list[Check]:
    """The findings, each against its limit."""
    source = f"{found.sequences} golden sequences scored by {server}, {found.tokens} tokens"

    def check(name: str, passes: bool, value: float, unit: str, limit: Figure, detail: str) -> Check:
        outcome: Outcome = "pass" if passes else "fail"
        figure = Figure.measured(value, unit, source, rehearsed=rehearsed) if math.isfinite(value) else None
        return Check(layer="engine", name=name, outcome=outcome, figure=figure, limit=limit, detail=detail)

    mean_limit = Figure(value=MEAN_LIMIT, unit="nats/token", kind="declared", source=MEAN_LIMIT_SOURCE)
    top1_limit = Figure(value=100 * TOP1_LIMIT, unit="%", kind="declared", source="isthmus.parity.engine.TOP1_LIMIT")
    agreeing = (found.tokens - found.flips) / found.tokens
    largest = f"largest {found.max_abs_dlogp:.3g}" if math.isfinite(found.max_abs_dlogp) else "some are not numbers"
    return [
        check(
            "mean |Δlogp|, engine against emulator",
            found.mean_abs_dlogp <= MEAN_LIMIT,
            found.mean_abs_dlogp,
            "nats/token",
            mean_limit,
            f"log-probabilities of the golden tokens; {largest}",
        ),
        check(
            "first choices that agree or nearly tie, engine against emulator",
            agreeing >= TOP1_LIMIT,
            100 * agreeing,
            "%",
            top1_limit,
            f"{100 * found.top1_agreement:.4g} % agree; of the others {found.near_ties} are near-ties of the emulator, "
            f"{found.flips} are not",
        ),
    ]
