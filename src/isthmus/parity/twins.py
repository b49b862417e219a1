"""What rounding can do to log-probabilities: healthy twins of an engine on the same tokens, and two tests against them.

Int8 activations amplify the last bit: on a trained model of 30 layers in W8A8, two right implementations are as far
apart as two draws of the quantisation error (benchmarks/black_box.py), while in bf16 they agree to a few bits. So no
constant tells a healthy engine from a wrong one. Where tokens alone can be seen, an engine answers two questions:

1. Is it further from the exact emulator than healthy twins are, on the very same tokens? A twin is the emulator with
   the dtype of the engine's arithmetic and GRANTED times the noise of its sums (parity/target.py), which is what module
   replay grants too. Per sequence D is the mean |difference of log-probabilities|, of the engine and of each of K
   twins, and log(D + m) is looked at, where m is the twins' mean D: so no sequence counts for much more than others,
   neither a hard one nor one on which, as short ones do, most twins agree with the emulator to the last bit. That is a
   two-way layout whose rows, the sequences, differ in difficulty and whose columns do not differ if the engine is
   healthy. The contrast of the engine's column with the mean of the twins' is held against Student's t with (S - 1) K
   degrees of freedom (Scheffe, The Analysis of Variance, 1959, 4.1), one-sided at ALPHA. It is told as a factor on the
   twins' distances. This finds what makes an engine another model; it cannot see what moves tokens by less than
   rounding does, and says which factor it would have found with probability POWER.

2. Is it further from the *trained* model than the emulator is, by more than the budget? That is what a user loses. With
   d the difference of two models' log-probabilities of a token, d**2 / 2 estimates their KL divergence with an error of
   third order in d, whatever text of about the model's own distribution the tokens are from (it is the f-divergence
   with f(u) = (log u)**2 / 2, and all f-divergences agree to second order; Schulman, Approximating KL Divergence,
   2020, calls it k2). The unbiased estimators, d and exp(-d) - 1 + d, need tokens that the trained model sampled.
   Golden texts may be any text: a model that became less sure gives some of it a higher probability, so that d has no
   sign that counts, and exp(-d) no bound. d**2 / 2 is a distance on any text, zero only where the models agree. It
   passes if the paired difference of engine and emulator is at or below the budget with its whole interval.

Shapes: S sequences, N completion tokens in all, K twins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import brentq
from scipy.special import bdtrc, stdtrit
from torch import Tensor

from isthmus.model.model import Model
from isthmus.parity.gate import FEWEST_SAMPLES
from isthmus.parity.target import DTYPES, make_twin
from isthmus.parity.tokens import (
    TIE_NATS,
    Candidate,
    GoldenSequence,
    Told,
    ask_tokens,
    distinct,
    interval_of_mean,
    lengths_of,
    numbered,
    of_sequences,
)

ALPHA = 1e-3
"""How often a healthy engine is refused by one of the tests against its twins."""
POWER = 0.8
TWINS, ENOUGH = 4, 16
"""Passes of a twin, each with noise of its own. From ENOUGH sequences on, one whole model is its own control: the
degrees of freedom come from the sequences."""
GRANTED = 3.0
"""Times the noise of a healthy chip's sums that twins have: as parity.replay.LIMIT grants to modules."""
SEED = 1
"""Of the noise of twins that pass over golden sequences."""
RESOLUTION = 2e-5
"""Nats, added to every distance: log-softmax in fp32 of logits up to 64 is no better than 2**-18 for each of a few
roundings, and what is below is no one's loss."""
LOGITS_AT_ONCE = 256
LARGEST_POWER = 60.0
"""Factors are sought within exp(+-60)."""


@dataclass(frozen=True)
class Scored:
    """What a model says of the completion tokens, in `copies` passes: `logprobs` and first choices `best`, both
    [copies, N], and by how many nats the first choice leads each of M `others`: `leads` [M, N], of the first pass."""

    logprobs: Tensor
    best: Tensor
    leads: Tensor


@torch.inference_mode()
def score_tokens(
    model: Model,
    sequences: Sequence[GoldenSequence],
    *,
    temperature: float = 1.0,
    copies: int = 1,
    others: Tensor | None = None,
) -> Scored:
    """Score each sequence in a pass of its own, so that no row is longer than it is; `copies` of it side by side.

    `others` [M, N] are tokens to compare with the first choices. Log-probabilities are in float64.
    """
    lengths = [len(one.completion) for one in sequences]
    others = torch.zeros(0, sum(lengths), dtype=torch.long) if others is None else others
    logprobs, leads = ([torch.zeros(rows, 0, dtype=torch.float64)] for rows in (copies, len(others)))
    best, compared = [torch.zeros(copies, 0, dtype=torch.long)], others.split(lengths, dim=1)
    device = model.model.norm.weight.device
    for sequence, alternatives in zip(sequences, compared, strict=True):
        rows = torch.tensor([[*sequence.prompt, *sequence.completion]] * copies, device=device)
        hidden = model.hidden(rows)[:, len(sequence.prompt) - 1 : -1]
        taken = torch.tensor(sequence.completion)
        for start in range(0, len(taken), LOGITS_AT_ONCE):
            part = slice(start, start + LOGITS_AT_ONCE)
            logits = model.logits(hidden[:, part]).float().cpu().double() / temperature
            row = logits.log_softmax(-1)
            first = row.max(-1)
            logprobs.append(row.gather(-1, taken[part].expand(copies, -1)[..., None]).squeeze(-1))
            best.append(first.indices)
            leads.append(first.values[:1] - row[0].gather(-1, alternatives[:, part].T).T)
    return Scored(torch.cat(logprobs, 1), torch.cat(best, 1), torch.cat(leads, 1))


@dataclass(frozen=True)
class Healthy:
    """What the emulator says of completion tokens [N], and the log-probabilities [K, N] of healthy twins of it."""

    emulator: Told
    twins: Tensor

    def of(self, sequences: Sequence[GoldenSequence], places: list[int]) -> Healthy:
        """Of these sequences, those at these places."""
        return Healthy(self.emulator.of(sequences, places), of_sequences(self.twins, sequences, places))


def ask_twins(twin: Model, sequences: list[GoldenSequence]) -> Tensor:
    """A twin's log-probabilities [K, N] of the completion tokens: of ENOUGH sequences in one pass, of fewer in TWINS
    copies that pass side by side."""
    copies = 1 if len(distinct(sequences)) >= ENOUGH else TWINS
    return ask_tokens(Candidate(twin), sequences, copies).logprobs


@dataclass(frozen=True)
class Beyond:
    """Test 1. `engine` and `twins` are mean distances to the emulator, in nats per token, over `tokens` of `sequences`.

    `ratio` is by what factor the twins' distances would have to grow to make the engine's contrast. A healthy engine's
    is above `limit` once in 1 / `alpha` times; a `detectable` one is above it with probability POWER. NaN, where there
    are not two sequences.
    """

    engine: float
    twins: float
    ratio: float
    limit: float
    detectable: float
    tokens: int
    sequences: int
    count: int
    alpha: float = ALPHA


def compare_with_twins(engine: Tensor, twins: Tensor, tokens: Tensor, alpha: float = ALPHA) -> Beyond:
    """Hold an engine's mean distances [S] against those of twins [K, S], over so many `tokens` [S] each.

    The variance of a mean over n tokens is taken to be as 1 / n. What is no number is infinitely far.
    """
    count, sequences = twins.shape
    weights = tokens.double() / tokens.sum()
    table = torch.cat((engine[None], twins)).double()
    table = table.where(table.isfinite(), math.inf)
    means = [float((distances * weights).sum()) for distances in (table[0], table[1:].mean(0))]
    levels = (table + RESOLUTION + means[1]).log()
    contrast = float(((levels[0] - levels[1:].mean(0)) * weights).sum()) if math.isfinite(means[0]) else math.inf
    size = power = spread = math.nan
    if sequences >= FEWEST_SAMPLES and bool(levels.isfinite().all()):
        freedom = (sequences - 1) * count
        within = levels - levels.mean(0)
        within = within - (within * weights).sum(1, keepdim=True)
        variance = float((within.square() * tokens).sum()) / freedom
        spread = math.sqrt(variance * (1 + 1 / count) / float(tokens.sum()))
        size, power = (float(stdtrit(freedom, p)) for p in (1 - alpha, POWER))

    def factor(contrast: float) -> float:
        return _factor(contrast, table[1:], means[1], weights)

    # The level of an engine that is f times as far follows its distance by f / (1 + f), not by a half, and scatters so.
    further = factor((size + power) * spread)
    growth = 2.0 if further == math.inf else 2 * further / (1 + further)
    return Beyond(
        *means,
        ratio=factor(contrast),
        limit=factor(size * spread),
        detectable=factor((size + power * growth) * spread),
        tokens=int(tokens.sum()),
        sequences=sequences,
        count=count,
        alpha=alpha,
    )


def compare_with_emulator(
    said: Tensor, emulator: Tensor, twins: Tensor, lengths: Tensor, alpha: float = ALPHA
) -> Beyond:
    """Test 1 on log-probabilities of engine [N], emulator [N] and twins [K, N]; `lengths` [S] are in tokens."""

    def distances(values: Tensor) -> Tensor:
        parts = (values.double() - emulator.double()).abs().split(lengths.tolist(), dim=-1)
        return torch.stack([part.mean(-1) for part in parts], dim=-1)

    return compare_with_twins(distances(said), distances(twins), lengths, alpha)


def _factor(contrast: float, twins: Tensor, usual: float, weights: Tensor) -> float:
    """By what factor the distances of twins [K, S] have to grow for this contrast: 0 if none is small enough."""
    if not math.isfinite(contrast):
        return contrast if math.isnan(contrast) else math.inf
    distances = twins + RESOLUTION

    def excess(power: float) -> float:
        grown = ((distances * math.exp(power) + usual) / (distances + usual)).log().mean(0)
        return float((grown * weights).sum()) - contrast

    if excess(-LARGEST_POWER) > 0:
        return 0.0
    if excess(LARGEST_POWER) < 0:
        return math.inf
    return math.exp(float(brentq(excess, -LARGEST_POWER, LARGEST_POWER)))  # pyright: ignore[reportArgumentType]


def most_flips(of_twins: int, count: int, tokens: int, alpha: float = ALPHA) -> int:
    """How many of an engine's first choices may differ, if `count` twins together differ in `of_twins`.

    Given the sum over engine and twins, the engine's part of it is binomial with 1 / (K + 1); more have a chance below
    `alpha` (Przyborowski and Wilenski, Biometrika 31, 1940, 313-323).
    """
    share = 1 / (count + 1)
    for flips in range(tokens):
        if bdtrc(flips, of_twins + flips + 1, share) < alpha:
            return flips
    return tokens


@dataclass(frozen=True)
class Loss:
    """Test 2. Mean d**2 / 2 of log-probabilities, to the trained model's, in nats per token: `engine`, `emulator`, and
    their paired `difference` with its interval over `sequences`, None for one."""

    engine: float
    emulator: float
    difference: float
    interval: tuple[float, float] | None
    tokens: int
    sequences: int

    def tokens_for(self, budget: float, reached: float) -> int | None:
        """How many tokens of this kind a difference as it was measured would need to be within the budget with its
        interval, which here ends at `reached`; None if no number would do."""
        if not self.difference < budget or not math.isfinite(reached):
            return None
        return math.ceil(self.tokens * ((reached - self.difference) / (budget - self.difference)) ** 2)


def half_squares(said: Tensor, trained: Tensor) -> Tensor:
    """d**2 / 2 token by token [N], for log-probabilities in nats; infinite where one is no number."""
    squares = (said.double() - trained.double()).square() / 2
    return squares.where(squares.isfinite(), math.inf)


def compare_losses(engine: Tensor, emulator: Tensor, trained: Tensor, sequence: Tensor, confidence: float) -> Loss:
    """Compare log-probabilities [N] by their distance to the trained model's. `sequence` [N] numbers the sequences."""
    count = int(sequence.max()) + 1 if len(sequence) else 0
    ours, theirs = half_squares(engine, trained), half_squares(emulator, trained)
    paired = ours - theirs
    paired = paired.where(~paired.isnan(), math.inf)
    interval = interval_of_mean(paired, sequence, count, confidence) if bool(paired.isfinite().all()) else None
    means = (float(values.mean()) if len(values) else math.nan for values in (ours, theirs, paired))
    return Loss(*means, interval=interval, tokens=len(paired), sequences=count)


@dataclass(frozen=True)
class Flips:
    """First choices that differ from the emulator's, other than between tokens that it held nearly equal: of the
    engine, of all K twins together, and how many an engine may have at size ALPHA. `near_ties` are the engine's."""

    engine: int
    twins: int
    count: int
    allowed: int
    near_ties: int
    tokens: int


@dataclass(frozen=True)
class Calibration:
    """What the emulator and K healthy twins say of the completion tokens of S sequences, at one temperature.

    `lengths` [S] are the tokens of each sequence, `arithmetic` the dtype of the twins by its name. `chosen` [N] are an
    engine's first choices, if it told them; the emulator's `leads` are over these and the twins' first choices.
    """

    emulator: Scored
    twins: Scored
    lengths: Tensor
    arithmetic: str
    chosen: Tensor | None = None

    @classmethod
    def of(
        cls,
        build: Callable[[], Model],
        arithmetic: str,
        sequences: Sequence[GoldenSequence],
        *,
        temperature: float = 1.0,
        count: int = TWINS,
        seed: int = 0,
        chosen: Tensor | None = None,
    ) -> Calibration:
        """`build` makes the format's model in fp32, anew at each call."""
        twin = make_twin(build(), DTYPES[arithmetic], seed, GRANTED)
        twins = score_tokens(twin, sequences, temperature=temperature, copies=count)
        others = None if chosen is None else torch.cat((chosen[None], twins.best))
        emulator = score_tokens(build(), sequences, temperature=temperature, others=others)
        return cls(emulator, twins, lengths_of(sequences), arithmetic, chosen)

    @property
    def logprobs(self) -> Tensor:
        """The emulator's log-probabilities [N]."""
        return self.emulator.logprobs[0]

    def beyond(self, said: Tensor, alpha: float = ALPHA) -> Beyond:
        """Test 1 on what an engine said, [N]."""
        return compare_with_emulator(said, self.logprobs, self.twins.logprobs, self.lengths, alpha)

    def loss(self, said: Tensor, trained: Tensor, confidence: float) -> Loss:
        """Test 2 on what an engine said, and what the trained model says, [N]."""
        return compare_losses(said, self.logprobs, trained, numbered(self.lengths), confidence)

    def flips(self, alpha: float = ALPHA) -> Flips | None:
        """The first choices that the engine told; None if it told none."""
        if self.chosen is None:
            return None
        differs = torch.cat((self.chosen[None], self.twins.best)) != self.emulator.best
        flips = (differs & (self.emulator.leads >= TIE_NATS)).sum(1).tolist()
        near_ties = int((differs & (self.emulator.leads < TIE_NATS))[0].sum())
        count, tokens, of_twins = len(flips) - 1, len(self.chosen), sum(flips[1:])
        return Flips(flips[0], of_twins, count, most_flips(of_twins, count, tokens, alpha), near_ties, tokens)
