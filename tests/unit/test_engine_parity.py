"""Parity by an API's scores: healthy engines pass, whatever rounding does; what another engine says is refused."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch

from isthmus.formats import get_format
from isthmus.formats.files.golden import TokenScore
from isthmus.model.model import Model
from isthmus.parity.engine import EngineParity, check_engine, compare_engine, judge_distance, spot_check
from isthmus.parity.gate import declared
from isthmus.parity.target import DTYPES, make_twin
from isthmus.parity.tokens import TIE_NATS, GoldenSequence
from isthmus.parity.twins import Beyond, score_tokens
from tests.support.small import tiny_architecture

ARCHITECTURE = tiny_architecture(vocab_size=31, initializer_range=0.3)
BUDGET = declared(0.01, "nats/token", "a test")


def build(name: str = "w8a8", seed: int = 0) -> Model:
    state = Model(ARCHITECTURE).initialise(seed).state_dict()
    return get_format(name).build(ARCHITECTURE, get_format(name).export(state, ARCHITECTURE))


def twin(seed: int, arithmetic: str = "fp32", name: str = "w8a8") -> Model:
    return make_twin(build(name), DTYPES[arithmetic], seed)


def sequences(count: int, longest: int = 24) -> list[GoldenSequence]:
    chance = random.Random(0)
    lengths = [(chance.randint(1, 9), chance.randint(12, longest)) for _ in range(count)]
    return [GoldenSequence(*(chance.choices(range(31), k=size) for size in pair)) for pair in lengths]


def scorer(model: Model, *, shift: float = 0.0):
    @torch.no_grad()
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


def compared(engine: Model, golden: list[GoldenSequence], arithmetic: str = "fp32", **options) -> EngineParity:
    trained = score_tokens(build("fp32"), golden).logprobs[0]
    name = options.pop("name", "w8a8")
    return compare_engine(scorer(engine, **options), lambda: build(name), arithmetic, golden, trained)


def outcomes(found: EngineParity) -> list[str]:
    return [check.outcome for check in check_engine(found, "a server", BUDGET, "golden sequences scored by")]


def test_an_engine_that_is_the_emulator_passes():
    golden = sequences(20)
    found = compared(build(), golden)
    assert found.beyond.tokens == sum(len(one.completion) for one in golden) and found.beyond.sequences == 20
    assert found.beyond.engine < 1e-4 and found.flips is not None and found.flips.engine == 0
    assert abs(found.loss.difference) < 1e-4 and outcomes(found) == ["pass"] * 3


@pytest.mark.parametrize(
    ("name", "arithmetic"), [("w8a8", "fp32"), ("w8a8", "bf16"), ("bf16", "bf16"), ("fp32", "fp32")]
)
def test_healthy_engines_pass_however_far_rounding_puts_them(name, arithmetic):
    """Twins of other seeds, with the noise of a chip; the largest gap of them would have failed a constant."""
    golden, gaps = sequences(12), []
    for seed in range(8):
        found = compared(twin(100 + seed, arithmetic, name), golden, arithmetic, name=name)
        first, second, third = outcomes(found)
        assert first == second == "pass" and third in ("pass", "unknown")
        gaps.append(found.beyond.engine)
    assert max(gaps) < {"fp32": 0.02, "bf16": 0.2}[arithmetic] if name != "fp32" else max(gaps) < 1e-4


def test_a_shift_is_refused_where_the_arithmetic_does_not_explain_it():
    golden = sequences(20)
    found = compared(build("bf16"), golden, "fp32", name="bf16", shift=0.003)
    assert found.beyond.engine == pytest.approx(0.003, rel=0.01)
    assert outcomes(found) == ["fail", "pass", "pass"]
    assert outcomes(compared(build("bf16"), golden, "bf16", name="bf16", shift=0.003)) == ["pass", "pass", "pass"]


def test_an_engine_that_only_loses_quality_is_refused_by_the_trained_model():
    """Its distance to the emulator is a twin's in bf16; but every token lost by what the budget does not grant."""
    golden = sequences(20)
    found = compared(build("fp32"), golden, "bf16", name="fp32", shift=-0.05)
    tight = declared(1e-4, "nats/token", "a test")
    loss = check_engine(found, "a server", tight, "golden sequences scored by")[-1]
    assert found.loss.difference == pytest.approx(0.05**2 / 2, rel=0.05) and loss.outcome == "fail"


def test_an_engine_with_other_weights_is_refused_on_all_counts():
    found = compared(build(seed=1), sequences(20))
    assert outcomes(found) == ["fail"] * 3
    assert found.flips is not None and found.flips.engine > 0.5 * found.beyond.tokens


def test_a_lost_channel_is_refused():
    wrong = build()
    wrong.model.layers[1].self_attn.o_proj.scale[3] = 0.0
    assert outcomes(compared(wrong, sequences(20)))[0] == "fail"


def test_near_ties_are_told_from_flips():
    near, golden = build("fp32"), sequences(40)
    generator = torch.Generator().manual_seed(3)
    near.lm_head.weight.data += 0.02 * torch.randn(near.lm_head.weight.shape, generator=generator)
    flips = compared(near, golden, name="fp32").flips
    assert flips is not None
    ties = others = 0
    for one in golden:
        with torch.no_grad():
            both = [
                torch.log_softmax(m(torch.tensor([one.prompt + one.completion]))[0], -1) for m in (build("fp32"), near)
            ]
        for place in range(len(one.prompt) - 1, len(one.prompt) + len(one.completion) - 1):
            first, other = both[0][place].argmax(), both[1][place].argmax()
            near_tie = both[0][place][first] - both[0][place][other] < TIE_NATS
            ties += bool(first != other and near_tie)
            others += bool(first != other and not near_tie)
    assert (flips.near_ties, flips.engine) == (ties, others) and ties > 0


def test_what_is_no_number_is_refused_and_shown():
    found = compared(build(), sequences(3), shift=math.nan)
    first, _, third = check_engine(found, "a server", BUDGET, "golden sequences scored by")
    assert first.outcome == third.outcome == "fail" and first.figure is None and "not numbers" in first.detail


def test_one_sequence_shows_nothing_and_a_repeated_one_is_one():
    assert outcomes(compared(build(), sequences(1) * 8)) == ["unknown"] * 3
    assert compared(build(), sequences(1) * 8).beyond.sequences == 1


def test_a_limit_says_where_it_comes_from_and_what_it_would_have_seen():
    first, second, third = check_engine(compared(build(), sequences(12)), "a server", BUDGET, "sequences scored by")
    assert first.limit is not None and "4 healthy twins in fp32" in first.limit.source
    assert "would have shown with 80%" in first.detail and "less than rounding does is not seen" in first.detail
    assert second.limit is not None and "binomial" in second.limit.source
    assert third.limit == BUDGET, "the budget as it was declared"


@pytest.mark.parametrize(
    ("ratio", "limit", "detectable", "outcome"),
    [
        (1.2, 1.2, 1.3, "pass"),
        (math.nextafter(1.2, 2), 1.2, 1.5, "fail"),
        (1.0, math.nan, math.nan, "unknown"),
        (math.inf, math.nan, math.nan, "fail"),
    ],
)
def test_distances_pass_at_the_limit(ratio, limit, detectable, outcome):
    assert judge_distance(Beyond(0.1, 0.1, ratio, limit, detectable, 100, 8, 4)) == outcome


def spotted(engine: Model, *, arithmetic="fp32", name="w8a8", seed=0, shift=0.0):
    prompts = [[1, 2, 3, 4, 5], [9, 8, 7, 6]]
    answers = []
    for prompt in prompts:
        tokens, logprobs = list(prompt), []
        for _ in range(8):
            with torch.no_grad():
                row = engine(torch.tensor([tokens]))[0, -1].log_softmax(-1)
            tokens.append(int(row.argmax()))
            logprobs.append(float(row.max()) + shift)
        answers.append((GoldenSequence(prompt, tokens[len(prompt) :]), logprobs))
    return spot_check(lambda: build(name), arithmetic, build("fp32"), answers, 0.01, seed)


def test_the_spot_check_lets_healthy_rollouts_pass_and_stops_other_weights():
    assert spotted(build()).beyond is None, "what is equal needs no twins"
    for seed in range(6):
        assert not spotted(twin(seed, "bf16"), arithmetic="bf16", seed=seed).is_over
    wrong = spotted(build(seed=1))
    assert wrong.is_over and wrong.limit is not None and wrong.mean > wrong.limit
    assert spotted(build("bf16"), name="bf16", shift=-0.1, arithmetic="bf16").is_over, (
        "wrongly mapped weights: vime 275"
    )


def test_an_answer_that_is_no_number_or_empty_is_no_spot_check_that_passed():
    assert spotted(build(), shift=math.nan).is_over
    assert spot_check(build, "fp32", build("fp32"), [], 0.01, 0).is_over
    assert not dataclasses.replace(spotted(build()), lost=False).is_over
