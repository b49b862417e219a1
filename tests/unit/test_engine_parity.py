"""Parity by an API's scores: a faithful engine passes, and what another engine would say is refused."""

from __future__ import annotations

import math
import random

import pytest
import torch

from isthmus.formats.files.golden import TokenScore
from isthmus.model.model import Model
from isthmus.parity.engine import check_engine, compare_engine
from isthmus.parity.tokens import TIE_NATS, GoldenSequence
from tests.support.small import tiny_architecture

ARCHITECTURE = tiny_architecture(vocab_size=31, initializer_range=0.3)


def model(seed: int) -> Model:
    return Model(ARCHITECTURE).initialise(seed).eval().requires_grad_(False)


def sequences(count: int) -> list[GoldenSequence]:
    chance = random.Random(0)
    lengths = [(chance.randint(1, 9), chance.randint(1, 12)) for _ in range(count)]
    return [GoldenSequence(*(chance.choices(range(31), k=size) for size in pair)) for pair in lengths]


def scorer(model: Model, *, shift: float = 0.0):
    def score(asked: list[list[int]]) -> list[list[TokenScore]]:
        found = []
        for tokens in asked:
            rows = torch.log_softmax(model(torch.tensor([tokens]))[0].double(), -1)[:-1].tolist()
            best = [row.index(max(row)) for row in rows]
            found.append(
                [
                    TokenScore(row[token] + shift, top, row[top])
                    for token, row, top in zip(tokens[1:], rows, best, strict=True)
                ]
            )
        return found

    return score


def test_a_faithful_engine_passes():
    found = compare_engine(scorer(model(0)), model(0), sequences(20))
    assert found.gap.tokens == sum(len(one.completion) for one in sequences(20))
    assert found.gap.largest < 1e-4 and found.flips == found.near_ties == 0
    assert [check.outcome for check in check_engine(found, "a server")] == ["pass", "pass"]


def test_a_shift_is_measured_as_it_is():
    found = compare_engine(scorer(model(0), shift=0.03), model(0), sequences(20))
    assert found.gap.mean == pytest.approx(0.03, abs=1e-4)
    assert [check.outcome for check in check_engine(found, "a server")] == ["pass", "pass"]
    found = compare_engine(scorer(model(0), shift=0.07), model(0), sequences(20))
    assert [check.outcome for check in check_engine(found, "a server")] == ["fail", "pass"]


def test_an_engine_with_other_weights_is_refused_on_both_counts():
    found = compare_engine(scorer(model(1)), model(0), sequences(20))
    assert [check.outcome for check in check_engine(found, "a server")] == ["fail", "fail"]
    assert found.flips > 0.5 * found.gap.tokens


def test_near_ties_are_told_from_flips():
    near, golden = model(0), sequences(40)
    generator = torch.Generator().manual_seed(3)
    near.lm_head.weight += 0.02 * torch.randn(near.lm_head.weight.shape, generator=generator)
    found = compare_engine(scorer(near), model(0), golden)
    expected = 0
    for one in golden:
        both = [torch.log_softmax(m(torch.tensor([one.prompt + one.completion]))[0], -1) for m in (model(0), near)]
        for place in range(len(one.prompt) - 1, len(one.prompt) + len(one.completion) - 1):
            first, other = both[0][place].argmax(), both[1][place].argmax()
            expected += bool(first != other and both[0][place][first] - both[0][place][other] < TIE_NATS)
    assert found.near_ties == expected > 0


def test_what_is_no_number_is_refused_and_shown():
    found = compare_engine(scorer(model(0), shift=math.nan), model(0), sequences(3))
    first, _ = check_engine(found, "a server")
    assert first.outcome == "fail" and first.figure is None and "not numbers" in first.detail
