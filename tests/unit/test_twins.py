"""Tests against healthy twins: their size and power by simulation, their sums written out in Python."""

from __future__ import annotations

import math

import pytest
import torch

from isthmus.model.model import Model
from isthmus.parity.tokens import GoldenSequence, distinct
from isthmus.parity.twins import (
    ALPHA,
    POWER,
    compare_losses,
    compare_with_twins,
    half_squares,
    most_flips,
    score_tokens,
)
from tests.support.small import tiny_architecture
from tests.support.written_out import log_softmax, sequences

ARCHITECTURE = tiny_architecture(vocab_size=31, initializer_range=0.3)


def test_scores_are_those_of_whole_sequences_written_out():
    model = Model(ARCHITECTURE).initialise(0).requires_grad_(False)
    golden = sequences(4)
    total = sum(len(one.completion) for one in golden)
    others = torch.arange(2 * total).view(2, total) % 31
    found = score_tokens(model, golden, temperature=0.5, copies=2, others=others)
    rows = []
    for one in golden:
        logits = model(torch.tensor([one.prompt + one.completion]))[0].tolist()
        rows += [log_softmax([2 * x for x in row]) for row in logits[len(one.prompt) - 1 : -1]]
    tokens = [token for one in golden for token in one.completion]
    for copy in range(2):
        assert found.logprobs[copy].tolist() == pytest.approx(
            [r[t] for r, t in zip(rows, tokens, strict=True)], abs=1e-5
        )
        assert found.best[copy].tolist() == [row.index(max(row)) for row in rows]
    for index in range(2):
        expected = [max(row) - row[other] for row, other in zip(rows, others[index].tolist(), strict=True)]
        assert found.leads[index].tolist() == pytest.approx(expected, abs=1e-5)


def drawn(generator: torch.Generator, lengths: torch.Tensor, ease: torch.Tensor, count: int) -> torch.Tensor:
    """Mean distances [count, S] over so many tokens each, heavy-tailed, of sequences that are more or less easy."""
    longest = int(lengths.max())
    normal = torch.randn(count, len(lengths), longest, generator=generator)
    heavy = normal.abs() * torch.randn(count, len(lengths), longest, generator=generator).exp()
    used = torch.arange(longest) < lengths[:, None]
    return (heavy * used).sum(-1) / lengths * ease


@pytest.mark.parametrize(("size", "count"), [(2, 16), (8, 4), (64, 1)])
def test_a_healthy_engine_is_refused_as_seldom_as_stated_and_a_detectable_one_as_often(size, count):
    generator, trials = torch.Generator().manual_seed(size), 600
    lengths = torch.randint(24, 72, (size,), generator=generator)
    refused = found = 0
    detectable = []
    for _ in range(trials):
        ease = (0.5 * torch.randn(size, generator=generator)).exp()
        engine, *twins = drawn(generator, lengths, ease, count + 1)
        seen = compare_with_twins(engine, torch.stack(twins), lengths)
        refused += seen.ratio > seen.limit
        detectable.append(seen.detectable)
    factor = sorted(detectable)[trials // 2]
    for _ in range(trials):
        ease = (0.5 * torch.randn(size, generator=generator)).exp()
        engine, *twins = drawn(generator, lengths, ease, count + 1)
        seen = compare_with_twins(factor * engine, torch.stack(twins), lengths)
        found += seen.ratio > seen.limit
    assert refused <= 5 * ALPHA * trials
    assert found / trials == pytest.approx(POWER, abs=0.08)


def test_the_ratio_is_the_factor_on_the_twins_distances():
    twins, lengths = torch.tensor([[1.0, 2.0]]), torch.tensor([10, 30])
    for factor in (0.5, 1.0, 3.0, 100.0):
        found = compare_with_twins(factor * twins[0], twins, lengths)
        assert found.ratio == pytest.approx(factor, rel=1e-3)
        assert found.engine == pytest.approx(factor * (10 + 2 * 30) / 40) and found.twins == pytest.approx(1.75)
    assert compare_with_twins(torch.zeros(2), twins, lengths).ratio == pytest.approx(0.0, abs=1e-3)


def test_sequences_on_which_most_twins_are_exact_do_not_hide_an_engine_that_is_not():
    twins = torch.zeros(16, 2)
    twins[3, 0] = twins[9, 1] = 0.2
    seen = compare_with_twins(torch.tensor([0.0, 0.2]), twins, torch.tensor([8, 8]))
    assert seen.ratio <= seen.limit
    seen = compare_with_twins(torch.tensor([2.0, 3.0]), twins, torch.tensor([8, 8]))
    assert seen.ratio > seen.limit


def test_what_is_no_number_is_infinitely_far_and_one_sequence_has_no_limit():
    twins, lengths = torch.ones(4, 2), torch.tensor([8, 8])
    assert compare_with_twins(torch.tensor([1.0, math.nan]), twins, lengths).ratio == math.inf
    assert math.isnan(compare_with_twins(torch.ones(1), twins[:, :1], lengths[:1]).limit)


@pytest.mark.parametrize(("of_twins", "count", "tokens"), [(0, 4, 500), (7, 4, 500), (120, 2, 500), (3, 1, 5)])
def test_flips_are_allowed_as_the_binomial_distribution_says(of_twins, count, tokens):
    def chance(flips: int) -> float:
        total, share = of_twins + flips, 1 / (count + 1)
        return sum(math.comb(total, k) * share**k * (1 - share) ** (total - k) for k in range(flips, total + 1))

    expected = next((flips for flips in range(tokens) if chance(flips + 1) < ALPHA), tokens)
    assert most_flips(of_twins, count, tokens) == expected


def test_half_squares_estimate_the_divergence_of_what_was_sampled():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(400, 50, generator=generator, dtype=torch.float64)
    p = logits.log_softmax(-1)
    q = (logits + 0.2 * torch.randn(400, 50, generator=generator, dtype=torch.float64)).log_softmax(-1)
    tokens = torch.multinomial(p.exp(), 200, replacement=True, generator=generator)
    estimate = half_squares(q.gather(1, tokens), p.gather(1, tokens)).mean()
    assert float(estimate) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=0.03)


def test_losses_are_paired_and_a_better_engine_is_below_zero():
    trained = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    emulator, engine = trained + torch.tensor([0.2, -0.2, 0.2, -0.2]), trained + torch.tensor([0.1, 0.1, 0.1, 0.3])
    found = compare_losses(engine, emulator, trained, torch.tensor([0, 0, 1, 1]), 0.95)
    assert found.emulator == pytest.approx(0.02) and found.engine == pytest.approx(0.015)
    assert found.difference == pytest.approx(-0.005) and found.interval is not None
    assert found.interval[0] == pytest.approx(-0.015, abs=1e-6) and found.interval[1] == pytest.approx(0.005, abs=1e-6)
    assert found.tokens_for(0.0, 0.0049) == 16 and found.tokens_for(-0.01, 0.005) is None
    broken = compare_losses(torch.full((4,), math.nan), emulator, trained, torch.tensor([0, 0, 1, 1]), 0.95)
    assert broken.difference == math.inf and broken.interval is None


def test_a_sequence_that_stands_there_twice_is_one():
    golden = [
        GoldenSequence([1], [2, 3]),
        GoldenSequence([1, 2], [3]),
        GoldenSequence([1], [2, 3]),
        GoldenSequence([1], []),
    ]
    assert distinct(golden) == [0, 1]
