"""Parity of an engine: what it says of tokens, against the exact emulator of its format and against the trained model.

Engine and emulator know the same stored weights: what lies between them is the chip's and the engine's own share, and
weights that did not arrive. How large that share may be depends on model, format and tokens, so it is measured on
healthy twins (parity/twins.py). An API shows tokens and log-probabilities, and no module: it can refuse, and cannot say
where the fault is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from isthmus.formats.files.golden import TokenScore
from isthmus.model.model import Model
from isthmus.parity.gate import at_most, finite, reach
from isthmus.parity.target import DTYPES, make_twin
from isthmus.parity.tokens import GoldenSequence, distinct, lengths_of, of_sequences
from isthmus.parity.twins import (
    ALPHA,
    GRANTED,
    POWER,
    RESOLUTION,
    Beyond,
    Calibration,
    Flips,
    Loss,
    score_tokens,
)
from isthmus.records import Check, Layer, Outcome
from isthmus.run import Figure

SPOT_TWINS = 16
SPOT_CONFIDENCE = 1 - 2 * ALPHA
"""Two-sided, so that one end of an interval is passed once in 1 / ALPHA times."""
DISTANCE = "distance to the emulator, engine against healthy twins"
FIRST_CHOICES = "first choices that differ from the emulator's, engine against healthy twins"
LOSS = "distance to the trained model, engine minus emulator"
TIMES = "times that of healthy twins"
BITS = "log-probabilities that are not, bit for bit, those of this host"

Score = Callable[[list[list[int]]], list[list[TokenScore]]]
"""Asks an engine what it says of every token but the first of each sequence."""
Exact = Callable[[list[GoldenSequence]], Tensor]
"""What a healthy engine says of the completion tokens [N] to the last bit, where that can be known."""


@dataclass(frozen=True)
class EngineParity:
    """What was found on the completion tokens of golden sequences, each counted once.

    `arithmetic` is that of the twins. Without first choices of the engine there are no `flips`, without a trained model
    to compare with, as of a slice, no `loss`. `other_bits` counts the tokens whose log-probabilities are not, bit for
    bit, those that a healthy engine gives, where these are known.
    """

    beyond: Beyond
    loss: Loss | None
    flips: Flips | None
    arithmetic: str
    confidence: float
    other_bits: int | None = None


def compare_engine(
    score: Score,
    build: Callable[[], Model],
    arithmetic: str,
    sequences: list[GoldenSequence],
    trained: Tensor | None,
    *,
    confidence: float = 0.95,
    alpha: float = ALPHA,
    exact: Exact | None = None,
) -> EngineParity:
    """Let the engine score the sequences, and compare what it says of each completion token.

    `build` makes the format's model, `arithmetic` names the dtype in which the engine is said to compute, and `trained`
    [N] are the trained model's log-probabilities of the completion tokens of all sequences. `alpha` is the size of each
    test against twins. With `exact` the limit is zero, whatever twins do.
    """
    kept = distinct(sequences)
    trained = None if trained is None else of_sequences(trained, sequences, kept)
    sequences = [sequences[place] for place in kept]
    scores = score([[*one.prompt, *one.completion] for one in sequences])
    found = [value for one, given in zip(sequences, scores, strict=True) for value in given[len(one.prompt) - 1 :]]
    said = torch.tensor([one.logprob for one in found], dtype=torch.float64)
    calibration = Calibration.of(
        build, arithmetic, sequences, chosen=torch.tensor([one.best for one in found], dtype=torch.long)
    )
    found = compare_logprobs(said, trained, calibration, confidence, alpha)
    return found if exact is None else replace(found, other_bits=_differing(said, exact(sequences)))


def compare_logprobs(
    said: Tensor, trained: Tensor | None, calibration: Calibration, confidence: float, alpha: float = ALPHA
) -> EngineParity:
    """Judge an engine's log-probabilities [N] of the tokens on which emulator and twins were calibrated."""
    loss = None if trained is None else calibration.loss(said, trained, confidence)
    beyond, flips = calibration.beyond(said, alpha), calibration.flips(alpha)
    return EngineParity(beyond, loss, flips, calibration.arithmetic, confidence)


def _differing(said: Tensor, exact: Tensor) -> int:
    """How many log-probabilities [N] are not those of fp32, bit for bit; one that is no number is none."""
    return int((said.float() != exact.float()).sum())


@dataclass(frozen=True)
class Spot:
    """A version of the weights, by a few greedy answers of an engine: |Δlogp| to the emulator, `mean` and `largest`.

    `beyond` is None where engine and emulator agree to RESOLUTION: no twin has to be asked then. `lost` says that the
    engine is further from the trained model than the emulator by more than the budget, with its whole interval.
    `other_bits` counts the tokens that differ where the engine's bits are known, None elsewhere.
    """

    tokens: int
    mean: float
    largest: float
    beyond: Beyond | None
    lost: bool
    other_bits: int | None = None

    @property
    def is_over(self) -> bool:
        """Whether it was shown that the engine computes something else. Where its bits are not known, so few tokens
        never show that it does not."""
        if self.tokens and self.other_bits is not None:
            return self.other_bits > 0
        return not self.tokens or self.lost or (self.beyond is not None and judge_distance(self.beyond) == "fail")

    @property
    def limit(self) -> float | None:
        """The mean |Δlogp| that a healthy engine would not pass on these tokens, where bits or twins told one."""
        if self.other_bits is not None:
            return 0.0
        if self.beyond is None or not math.isfinite(self.beyond.limit):
            return None
        return self.beyond.twins * self.beyond.limit


def spot_check(
    build: Callable[[], Model],
    arithmetic: str,
    trained: Model,
    answers: list[tuple[GoldenSequence, list[float]]],
    budget: float,
    seed: int,
    exact: Exact | None = None,
) -> Spot:
    """Hold greedy answers, with the log-probabilities that the engine gave their tokens, against the format's model.

    With `exact` they must be the same bits, and no twin is asked. Elsewhere twins are calibrated anew, on these very
    weights and tokens: SPOT_TWINS of them pass side by side.
    """
    sequences = [sequence for sequence, _ in answers]
    said = torch.tensor([value for _, logprobs in answers for value in logprobs], dtype=torch.float64)
    if exact is not None:
        wanted = exact(sequences)
        return Spot(len(said), *_gaps(said, wanted), None, lost=False, other_bits=_differing(said, wanted))
    emulator = score_tokens(build(), sequences)
    mean, largest = _gaps(said, emulator.logprobs[0])
    if not largest > RESOLUTION:
        return Spot(len(said), mean, largest, None, lost=False)
    twins = score_tokens(make_twin(build(), DTYPES[arithmetic], seed, GRANTED), sequences, copies=SPOT_TWINS)
    calibration = Calibration(emulator, twins, lengths_of(sequences), arithmetic)
    loss = calibration.loss(said, score_tokens(trained, sequences).logprobs[0], SPOT_CONFIDENCE)
    reached = reach(loss.difference, loss.interval, loss.sequences, SPOT_CONFIDENCE)
    lost = reached is not None and reached[0] > budget
    return Spot(len(said), mean, largest, calibration.beyond(said), lost)


def _gaps(said: Tensor, expected: Tensor) -> tuple[float, float]:
    """Mean and largest |Δlogp| of tokens [N]; NaN of none."""
    gaps = (said - expected).abs()
    gaps = gaps.where(gaps.isfinite(), math.inf)
    return (float(gaps.mean()), float(gaps.max())) if len(gaps) else (math.nan, math.nan)


def check_engine(
    found: EngineParity, server: str, budget: Figure | None, how: str, *, rehearsed: bool = False
) -> list[Check]:
    """The findings, each against its limit. `budget` is what the engine may be further from the trained model than the
    emulator, in nats per token; `how` says whose tokens these are."""
    source = f"{found.beyond.sequences} {how} {server}, {found.beyond.tokens} tokens"
    checks = [check_distance(DISTANCE, found.beyond, found.arithmetic, source, "engine", "engine", rehearsed=rehearsed)]
    if found.other_bits is not None:
        checks.append(_check_bits(found.other_bits, found.beyond, source, rehearsed=rehearsed))
    if found.flips is not None:
        checks.append(_check_flips(found, found.flips, source, rehearsed=rehearsed))
    if found.loss is None or budget is None:
        return checks
    return [
        *checks,
        check_loss(LOSS, found.loss, budget, source, found.confidence, layer="engine", rehearsed=rehearsed),
    ]


def judge_distance(found: Beyond) -> Outcome:
    """`fail` beyond what healthy twins do, `unknown` where nothing says how far that is."""
    if found.ratio > found.limit or math.isinf(found.ratio):
        return "fail"
    return "pass" if found.ratio <= found.limit else "unknown"


def check_distance(
    name: str, beyond: Beyond, arithmetic: str, source: str, layer: Layer, who: str, *, rehearsed: bool
) -> Check:
    """Whether an engine, or a target, is no further from the emulator than healthy twins are."""
    far = (
        f"{beyond.engine:.3g} nats/token" if math.isfinite(beyond.engine) else "some log-probabilities are not numbers"
    )
    return Check(
        layer=layer,
        name=name,
        outcome=judge_distance(beyond),
        figure=finite(beyond.ratio, TIMES, source, rehearsed=rehearsed),
        limit=finite(beyond.limit, TIMES, of_twins(beyond, arithmetic), rehearsed=False),
        detail=f"mean |Δlogp| of the {who}: {far}; {told(beyond)}",
    )


def of_twins(found: Beyond, arithmetic: str) -> str:
    """Where the limit of a distance comes from."""
    return (
        f"{found.count} healthy twins in {arithmetic} with {GRANTED:g} times its noise, on the same tokens: Student's "
        f"t at {100 * found.alpha:.2g} % over sequences (parity/twins.py)"
    )


def told(found: Beyond) -> str:
    """What the comparison rests on, and what it can see."""
    if not math.isfinite(found.detectable):
        return f"of the twins: {found.twins:.3g}; so few sequences tell nothing"
    return (
        f"of the twins: {found.twins:.3g}; {found.detectable:.3g} times would have shown with {POWER:.0%}. What moves "
        "tokens less than rounding does is not seen"
    )


def _check_bits(other: int, beyond: Beyond, source: str, *, rehearsed: bool) -> Check:
    limit = "engine and this host compute each token in one order of sums, with the same kernels on the same processor"
    return Check(
        layer="engine",
        name=BITS,
        outcome=at_most(0, other),
        figure=finite(other, "tokens", source, rehearsed=rehearsed),
        limit=finite(0, "tokens", limit, rehearsed=False),
        detail=f"of {beyond.tokens}: the engine is batch-invariant and its bits are known",
    )


def _check_flips(found: EngineParity, flips: Flips, source: str, *, rehearsed: bool) -> Check:
    def share(count: float) -> float:
        return 100 * count / flips.tokens if flips.tokens else math.nan

    size = f"{100 * found.beyond.alpha:.2g} %"
    limit = f"{flips.count} healthy twins in {found.arithmetic} have {flips.twins} together: binomial at {size}"
    usual = share(flips.twins / flips.count)
    return Check(
        layer="engine",
        name=FIRST_CHOICES,
        outcome=at_most(flips.allowed, flips.engine, samples=found.beyond.sequences),
        figure=finite(share(flips.engine), "%", source, rehearsed=rehearsed),
        limit=finite(share(flips.allowed), "%", limit, rehearsed=False),
        detail=f"without {flips.near_ties} near-ties of the emulator; of the twins {usual:.3g} %",
    )


def check_loss(
    name: str, loss: Loss, budget: Figure, source: str, confidence: float, *, layer: Layer, rehearsed: bool
) -> Check:
    """Whether an engine is further from the trained model than the emulator by no more than the budget."""
    assert budget.value is not None
    reached = reach(loss.difference, loss.interval, loss.sequences, confidence)
    outcome = at_most(budget.value, loss.difference, reached, samples=loss.sequences)
    wanted = loss.tokens_for(budget.value, reached[1]) if reached and outcome == "unknown" else None
    more = f"; about {wanted} golden tokens like these would tell" if wanted else ""
    return Check(
        layer=layer,
        name=name,
        outcome=outcome,
        figure=finite(loss.difference, "nats/token", source, rehearsed=rehearsed, interval=loss.interval),
        limit=budget,
        detail=f"mean (Δlogp)²/2 to the trained model, which estimates KL: {loss.engine:.3g}, of the emulator "
        f"{loss.emulator:.3g}{more}; interval at {confidence:.0%} over sequences",
    )
