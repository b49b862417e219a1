"""Token parity against sums written out in Python; the paired interval against published examples and simulation."""

from __future__ import annotations

import contextlib
import math
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from isthmus.formats import get_format
from isthmus.model.model import Model
from isthmus.parity.paired import compare_answers, newcombe_interval, paired_difference, wilson_interval
from isthmus.parity.tokens import TIE_NATS, compare_tokens
from tests.support.small import tiny_architecture
from tests.support.written_out import log_softmax, sequences

ARCHITECTURE = tiny_architecture(vocab_size=31, initializer_range=0.3)


def models() -> tuple[Model, Model]:
    state = Model(ARCHITECTURE).initialise(0).state_dict()
    return tuple(get_format(n).build(ARCHITECTURE, get_format(n).export(state, ARCHITECTURE)) for n in ("fp32", "w8a8"))


def test_token_parity_equals_sums_written_out():
    reference, candidate = models()
    golden = sequences(37)
    found = compare_tokens(reference, candidate, golden)
    kls, agreements, ties, gaps = [], [], [], []
    for one in golden:
        tokens = torch.tensor([one.prompt + one.completion])
        both = [model(tokens)[0].tolist() for model in (reference, candidate)]
        for place, taken in enumerate(one.completion, start=len(one.prompt) - 1):
            p, q = (log_softmax(rows[place]) for rows in both)
            kls.append(math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
            first, other = p.index(max(p)), q.index(max(q))
            agreements.append(first == other)
            ties.append(first != other and p[first] - p[other] < TIE_NATS)
            gaps.append(abs(p[taken] - q[taken]))
    # Rows of one batch are padded, and fp32 sums of other shapes round differently, now and then across an int8 step.
    assert found.tokens == len(kls) and found.sequences == 37
    assert found.mean_kl == pytest.approx(sum(kls) / len(kls), rel=0.02)
    assert found.max_kl == pytest.approx(max(kls), rel=0.1)
    assert found.top1_agreement == pytest.approx(sum(agreements) / len(kls), abs=0.01)
    assert found.near_ties == pytest.approx(sum(ties), abs=2)
    assert found.near_ties + found.flips == round(len(kls) * (1 - found.top1_agreement)) > 0
    assert found.mean_abs_dlogp == pytest.approx(sum(gaps) / len(gaps), rel=0.02)
    assert found.kl_interval and 0 < found.kl_interval[0] < found.mean_kl < found.kl_interval[1]


def chosen_experts(model: Model, tokens: list[int]) -> list[list[set[int]]]:
    """Layer by layer and token by token, read off the routers themselves."""
    seen = []
    routers = model.routers()[: ARCHITECTURE.num_hidden_layers - ARCHITECTURE.first_k_dense_replace]
    hooks = [gate.register_forward_hook(lambda _m, _i, routing: seen.append(routing.experts)) for gate in routers]
    model.hidden(torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    return [[set(row) for row in experts.tolist()] for experts in seen]


def test_router_flips_are_tokens_and_layers_with_other_experts():
    reference, candidate = models()
    golden = sequences(20)
    pairs = [
        pair
        for one in golden
        for layers in zip(
            *(chosen_experts(model, one.prompt + one.completion) for model in (reference, candidate)), strict=True
        )
        for pair in zip(*layers, strict=True)
    ]
    found = compare_tokens(reference, candidate, golden)
    assert found.router_choices == len(pairs) > 100
    assert found.router_flips == pytest.approx(sum(a != b for a, b in pairs), abs=2) and found.router_flips > 2
    favoured = torch.tensor([10.0, 0.0, 0.0, 0.0])
    reference.routers()[0].e_score_correction_bias = favoured
    assert compare_tokens(reference, candidate, golden).router_flips > 0.4 * len(pairs)


def test_a_model_agrees_with_itself():
    reference, _ = models()
    found = compare_tokens(reference, reference, sequences(5))
    assert found.mean_kl == found.max_kl == found.mean_abs_dlogp == 0 and found.top1_agreement == 1
    assert found.near_ties == found.flips == found.router_flips == 0


def test_a_wrong_layer_is_seen():
    reference, candidate = models()
    healthy = compare_tokens(reference, candidate, sequences(20))
    candidate.model.layers[0].self_attn.o_proj.scale.mul_(1.5)
    assert compare_tokens(reference, candidate, sequences(20)).mean_kl > 3 * healthy.mean_kl


def test_the_candidate_and_nothing_else_runs_in_its_context():
    class NoFloat64(TorchDispatchMode):
        active = False

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            assert not (isinstance(result, torch.Tensor) and result.dtype == torch.float64)
            return result

    reference, candidate = models()
    watched, seen = NoFloat64(), []

    @contextlib.contextmanager
    def context():
        watched.active = True
        with watched:
            yield
        watched.active = False

    reference.lm_head.register_forward_pre_hook(lambda *_: seen.append(("reference", watched.active)))
    candidate.lm_head.register_forward_pre_hook(lambda *_: seen.append(("candidate", watched.active)))
    compare_tokens(reference, candidate, sequences(40), candidate_context=context)
    assert seen == [("reference", False), ("candidate", True)] * 2


def test_the_interval_equals_published_examples():
    # Altman, Machin, Bryant, Gardner, Statistics with Confidence (2000), table 6.2: 0.122, 95% interval 0.011 to 0.226.
    assert newcombe_interval(14, 5, 0, 22, confidence=0.95) == pytest.approx((0.122, 0.011, 0.226), abs=6e-4)
    # Fagerland, Lydersen, Laake, Statistics in Medicine 33 (2014) 2850: airway data, -0.507 to -0.026.
    assert newcombe_interval(1, 1, 7, 12, confidence=0.95) == pytest.approx((-0.286, -0.507, -0.026), abs=6e-4)


def test_wilson_solves_its_own_equation():
    low, high = wilson_interval(0.3, 40, 0.9)
    for bound in (low, high):
        assert abs(bound - 0.3) == pytest.approx(1.6448536 * math.sqrt(bound * (1 - bound) / 40), rel=1e-6)


def test_no_difference_still_has_an_interval():
    difference, low, high = paired_difference([True] * 30 + [False] * 20, [True] * 30 + [False] * 20, 0.95)
    assert difference == 0 and -0.1 < low < -0.01 and 0.01 < high < 0.1
    assert paired_difference([False] * 10, [True] * 10, 0.95)[0] == 1.0


def test_the_verdict_needs_evidence():
    worse, better = [[True]] * 200 + [[False]] * 200, [[False]] * 40 + [[True]] * 360
    assert compare_answers(worse, worse, 0.95).verdict(0.05) == "pass"
    assert compare_answers(better, worse, 0.95).verdict(0.05) == "fail"
    assert compare_answers([[True], [False]], [[True], [False]], 0.95).verdict(0.05) == "unknown"


def simulate(chance: random.Random, problems: int, answers: int) -> tuple[list[list[bool]], list[list[bool]]]:
    """Problems that are harder for one model or the other, so that answers to one problem hang together."""
    reference, candidate = [], []
    for _ in range(problems):
        ability, shift = chance.random(), chance.choice([-0.5, 0.0, 0.0, 0.4])
        draws = [chance.random() for _ in range(answers)]
        reference.append([draw < ability for draw in draws])
        candidate.append([draw < ability + shift for draw in draws])
    return reference, candidate


def test_the_interval_covers_the_truth_when_answers_hang_together():
    # E[clip(u + s)] - E[u] for u uniform: s = -0.5 gives -0.375, s = 0.4 gives 0.32.
    truth, chance = (-0.375 + 0.32) / 4, random.Random(1)
    covered, widths, naive = 0, [], []
    for _ in range(400):
        found = compare_answers(*simulate(chance, 120, 4), 0.95)
        covered += found.low <= truth <= found.high
        widths.append(found.high - found.low)
        naive.append(found.design_effect)
    assert 0.92 <= covered / 400 <= 0.995
    assert sum(naive) / 400 > 1.5


def test_answers_that_do_not_hang_together_need_no_correction():
    chance = random.Random(2)
    rows = [[[chance.random() < 0.5 for _ in range(4)] for _ in range(500)] for _ in range(2)]
    assert compare_answers(*rows, 0.95).design_effect < 1.2
    assert compare_answers(rows[0], rows[0], 0.95).design_effect == 4


def equally_good(chance: random.Random, problems: int) -> tuple[list[list[bool]], list[list[bool]]]:
    """Half of the problems right; a fifth of the answers are another draw on the other side."""
    reference = [[chance.random() < 0.5] for _ in range(problems)]
    return reference, [
        [chance.random() < 0.5 if chance.random() < 0.2 else right for right in row] for row in reference
    ]


@pytest.mark.parametrize(("problems", "margin"), [(200, 0.05), (200, 0.1), (60, 0.1)])
def test_the_stated_power_is_how_often_an_equally_good_model_passes(problems, margin):
    chance = random.Random(5)
    found = [compare_answers(*equally_good(chance, problems), 0.95) for _ in range(400)]
    passed = sum(one.verdict(margin) == "pass" for one in found) / 400
    assert passed == pytest.approx(sum(one.power(margin) for one in found) / 400, abs=0.1)
    assert 0.2 < passed < 0.99


def test_as_many_problems_as_are_asked_for_give_the_power():
    found = compare_answers(*simulate(random.Random(6), 120, 4), 0.95)
    for power in (0.5, 0.8, 0.99):
        assert found.power(0.05, found.problems_for(power, 0.05)) == pytest.approx(power, abs=0.01)
    assert found.problems_for(0.8, 0.02) > 5 * found.problems_for(0.8, 0.05)
