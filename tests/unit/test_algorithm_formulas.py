"""Each algorithm on an example that is worked out here, and against TRL's own trainers on the same numbers.

`trl_losses.json` is what benchmarks/rivals/trl_losses.py prints, with its inputs.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from isthmus.algos import Scores, Totals, get_algorithm
from isthmus.algos.parts.policy import aggregate, reference_kl, token_returns
from isthmus.trainer.correction import off_policy_samples
from tests.support.algos import tokens_of

TRL = json.loads(Path(__file__).with_name("trl_losses.json").read_text())
WRITTEN, FOUND = TRL["written"], TRL["found"]
SAMPLE = [0, 0, 1, 2, 2]


def flat(rows):
    return torch.tensor([value for row in rows for value in row], dtype=torch.float64)


def written(weights=True, **changes):
    """Ratios 1.5, 0.9 | 0.5 | 1.1, 0.7 with the advantages 2 | -1 | -1, as trainable tokens."""
    old = flat(WRITTEN["old"])
    now = (old + flat(WRITTEN["ratios"]).log()).requires_grad_()
    advantages = torch.tensor(WRITTEN["advantages"], dtype=torch.float64)[torch.tensor(SAMPLE)]
    fields = {
        "old": old,
        "engine": now.detach() + flat(WRITTEN["engine_less_now"]),
        "weights": flat(WRITTEN["weights"]) if weights else torch.ones(5, dtype=torch.float64),
        "reference": flat(WRITTEN["reference"]),
        "longest": WRITTEN["longest"],
    }
    return tokens_of(now, advantages, SAMPLE, **{**fields, **changes})


def differentiated(name, tokens, **options):
    algorithm = get_algorithm(name)
    loss = algorithm.loss(tokens, algorithm.Config(**options))
    loss.value.backward()
    return loss, tokens.logprobs.grad.tolist()


# A token in range passes on -w * ratio * A, over the denominator; one that is cut off nothing. With ratios clipped to
# [0.8, 1.2] the first, third and fifth are cut off, and what each is worth, w * min(ratio * A, clip * A), is
#   1 * 2.4,  0.5 * 1.8,  2 * -0.8,  1 * -1.1,  1.5 * -0.8   =   2.4, 0.9, -1.6, -1.1, -1.2.
WORTH, SLOPES = [2.4, 0.9, -1.6, -1.1, -1.2], [0.0, -0.5 * 0.9 * 2, 0.0, 1.1, 0.0]
# CISPO with the cap 1.2: w * min(ratio, 1.2) * A, all tokens; the worth has log pi beside it.
CISPO = [1 * 1.2 * 2, 0.5 * 0.9 * 2, 2 * 0.5 * -1, 1.1 * -1, 1.5 * 0.7 * -1]
NOW = [o + math.log(r) for o, r in zip(flat(WRITTEN["old"]).tolist(), flat(WRITTEN["ratios"]).tolist(), strict=True)]
# GSPO: sample ratios sqrt(1.35), 0.5, sqrt(0.77) in [0.8, 1.1]: the third alone is in range.
ROOT = math.sqrt(0.77)
# OPD: ratio * (teacher - old), with the reference as teacher.
GAP = (flat(WRITTEN["reference"]) - flat(WRITTEN["old"])).tolist()
OPD = [w * r * g for w, r, g in zip([1, 0.5, 2, 1, 1.5], [1.5, 0.9, 0.5, 1.1, 0.7], GAP, strict=True)]
BY_HAND = {
    "grpo": ({}, True, -sum(WORTH) / 5, [s / 5 for s in SLOPES], 3),
    "grpo by samples": (
        {"aggregation": "sample-mean"},
        True,
        -((2.4 + 0.9) / 2 - 1.6 + (-1.1 - 1.2) / 2) / 3,
        [s / n / 3 for s, n in zip(SLOPES, [2, 2, 1, 2, 2], strict=True)],
        3,
    ),
    "dapo": ({}, True, -(sum(WORTH) + 2 * 0.08) / 5, [s / 5 for s in SLOPES], 3),
    "dr_grpo": ({}, True, -sum(WORTH) / (3 * 8), [s / 24 for s in SLOPES], 3),
    "reinforce_pp": ({}, True, -sum(WORTH) / 5, [s / 5 for s in SLOPES], 3),
    "cispo": (
        {"ratio_cap": 1.2},
        True,
        -sum(c * x for c, x in zip(CISPO, NOW, strict=True)) / 5,
        [-c / 5 for c in CISPO],
        1,
    ),
    "gspo": (
        {"clip_low": 0.2, "clip_high": 0.1},
        False,
        -(1.1 * 2 - 0.8 - ROOT) / 3,
        [0, 0, 0, ROOT / 2 / 3, ROOT / 2 / 3],
        3,
    ),
    "rloo": (
        {"clip_low": 0.3, "clip_high": 0.4},
        False,
        -(1.35 * 2 - 0.7 - 0.77) / 3,
        [-2.7 / 3, -2.7 / 3, 0, 0.77 / 3, 0.77 / 3],
        1,
    ),
    "opd": ({}, True, -sum(OPD) / 5, [-o / 5 for o in OPD], 0),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_the_loss_and_its_gradient_are_those_of_the_formula(case):
    options, weights, value, gradient, clipped = BY_HAND[case]
    tokens = written(weights)
    loss, found = differentiated(case.split()[0], replace(tokens, teacher=tokens.reference), **options)
    assert loss.value.item() == pytest.approx(value, rel=1e-12)
    assert found == pytest.approx(gradient, rel=1e-12) and loss.clipped == clipped


@pytest.mark.parametrize(
    ("case", "name", "options"),
    [
        ("grpo", "grpo", {"aggregation": "sample-mean"}),
        ("dapo", "dapo", {}),
        ("dr_grpo", "dr_grpo", {}),
        ("cispo", "cispo", {"ratio_cap": 1.2}),
        ("gspo", "gspo", {"clip_low": 0.2, "clip_high": 0.1}),
        ("rloo", "rloo", {"clip_low": 0.3, "clip_high": 0.4}),
    ],
)
def test_it_is_what_trl_computes(case, name, options):
    loss, gradient = differentiated(name, written(weights=name not in ("gspo", "rloo")), **options)
    assert loss.value.item() == pytest.approx(FOUND[case]["loss"], rel=1e-12)
    assert gradient == pytest.approx(FOUND[case]["gradient"], rel=1e-12)


@pytest.mark.parametrize(("case", "times_ratio"), [("kl", False), ("kl_times_ratio", True)])
def test_a_kl_beside_the_loss_is_what_trl_computes(case, times_ratio):
    dapo, tokens = get_algorithm("dapo"), written(weights=False)
    kl = aggregate(reference_kl(tokens, times_ratio), tokens, dapo.Config().aggregated())
    value = dapo.loss(tokens, dapo.Config()).value + 0.3 * kl
    value.backward()
    assert value.item() == pytest.approx(FOUND[case]["loss"], rel=1e-12)
    assert tokens.logprobs.grad.tolist() == pytest.approx(FOUND[case]["gradient"], rel=1e-12)


def test_the_mask_of_off_policy_samples_is_trls():
    tokens = written()
    masked = off_policy_samples(tokens.logprobs.detach(), tokens.engine, tokens.advantages, tokens.sample, limit=0.2)
    assert masked.tolist() == [False, False, True, False, False]
    loss, gradient = differentiated("dapo", replace(tokens, weights=tokens.weights.masked_fill(masked, 0.0)))
    assert loss.value.item() == pytest.approx(FOUND["off_policy_mask"]["loss"], rel=1e-12)
    assert gradient == pytest.approx(FOUND["off_policy_mask"]["gradient"], rel=1e-12)


def test_distillation_descends_the_reverse_kl():
    """Over all tokens that might be sampled, by their probability, the gradient is that of the whole KL: TRL's, fp32
    there."""
    student = torch.tensor(WRITTEN["student_logits"], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor(WRITTEN["teacher_logits"], dtype=torch.float64).log_softmax(-1)
    logprobs = student.log_softmax(-1)
    once = Totals(tokens=1, samples=1, rolled_tokens=1, rolled_samples=1, longest=1)
    tokens = tokens_of(
        logprobs, torch.ones(4), [0] * 4, teacher=teacher, weights=logprobs.detach().exp(), samples=1, totals=once
    )
    opd = get_algorithm("opd")
    loss = opd.loss(tokens, opd.Config()).value
    loss.backward()
    assert loss.item() == pytest.approx(FOUND["reverse_kl"]["loss"], rel=1e-6)
    assert student.grad.tolist() == pytest.approx(FOUND["reverse_kl"]["gradient"], rel=1e-6)


@pytest.mark.parametrize("name", ["gspo", "rloo"])
def test_an_off_policy_weight_scales_what_its_token_passes_on(name):
    """Of a loss with one ratio for a whole sample too; the ratio itself stays that of the whole sample."""
    options = {"clip_low": 0.9, "clip_high": 9.0}
    _, plain = differentiated(name, written(weights=False), **options)
    _, weighted = differentiated(name, written(), **options)
    assert weighted == pytest.approx([w * g for w, g in zip([1, 0.5, 2, 1, 1.5], plain, strict=True)])


def advantages(name, rewards, lengths=None, **options):
    algorithm = get_algorithm(name)
    rewards = torch.tensor(rewards, dtype=torch.float64)
    lengths = torch.ones(rewards.shape, dtype=torch.long) if lengths is None else torch.tensor(lengths)
    return algorithm.advantages(Scores(rewards, lengths), algorithm.Config(**options)).flatten().tolist()


def test_advantages_written_out():
    root = math.sqrt(2) + 1e-6
    for name in ("grpo", "dapo", "gspo", "cispo"):
        assert advantages(name, [[1.0, 3.0]]) == pytest.approx([-1 / root, 1 / root], rel=1e-12)
    assert advantages("dr_grpo", [[1.0, 3.0, 8.0]]) == [-3.0, -1.0, 4.0]
    assert advantages("rloo", [[1.0, 3.0, 8.0]]) == pytest.approx([1 - 5.5, 3 - 4.5, 8 - 2.0])
    assert advantages("opd", [[1.0, math.nan]]) == [1.0, 0.0]


def test_reinforce_pp_holds_a_reward_against_the_batch():
    # Four tokens: 1, 1, 1, 5 with the mean 2 and the variance 3.
    rewards, lengths = [[1.0, 1.0], [1.0, 5.0]], [[1, 1], [1, 1]]
    assert advantages("reinforce_pp", rewards, lengths) == pytest.approx([-1 / math.sqrt(3)] * 3 + [math.sqrt(3)])
    # Six tokens: 1, 1, 1, 1, 1, 5 with the mean 10 / 6 and the variance (5 * (2/3)^2 + (10/3)^2) / 6 = 20 / 9.
    deviation = math.sqrt(20) / 3
    assert advantages("reinforce_pp", rewards, [[1, 3], [1, 1]]) == pytest.approx(
        [-2 / 3 / deviation] * 3 + [10 / 3 / deviation]
    )
    # Less the groups' means: 0, 0, -2, 2; the mean over tokens is 0, the variance 2.
    root = math.sqrt(2)
    assert advantages("reinforce_pp", rewards, lengths, baseline="group") == pytest.approx([0, 0, -root, root])


def test_reinforce_pp_leaves_out_what_has_no_reward_or_no_company():
    nan = math.nan
    rewards = [[1.0, nan, 5.0], [nan, 9.0, nan], [3.0, 3.0, nan]]
    found = advantages("reinforce_pp", rewards)
    assert [found[index] for index in (1, 3, 4, 5, 8)] == [0.0] * 5
    assert [found[index] for index in (0, 2, 6, 7)] == pytest.approx([-math.sqrt(2), math.sqrt(2), 0, 0])
    assert advantages("reinforce_pp", [[2.0, 2.0], [2.0, nan]]) == [0.0] * 4
    assert advantages("reinforce_pp", [[nan, nan]]) == [0.0] * 2


def by_openrlhf(rewards, kl, coefficient):
    """OpenRLHF's way, of a list of KLs per sample: `compute_reward` puts the reward on the last token and -coefficient
    * KL on each, `get_cumulative_returns` adds up from behind, `masked_normalize` divides over the batch
    (openrlhf/models/utils.py and trainer/ppo_utils/experience_maker.py, with gamma 1)."""
    paid = [[-coefficient * one for one in row] for row in kl]
    for row, reward in zip(paid, rewards, strict=True):
        row[-1] += reward
    returns = [[sum(row[place:]) for place in range(len(row))] for row in paid]
    tokens = [one for row in returns for one in row]
    mean = sum(tokens) / len(tokens)
    deviation = math.sqrt(sum((one - mean) ** 2 for one in tokens) / len(tokens))
    return returns, [(one - mean) / deviation for one in tokens]


def test_reinforce_pp_with_the_kl_in_the_reward():
    """Two samples with the rewards 1 and 0 and the KLs 0.5, -0.2, 0.1 and 0.3, 0.4: with the weight 2 the tokens of the
    first still get 1 - 2 * 0.4, 1 + 2 * 0.1, 1 - 2 * 0.1, those of the second -2 * 0.7 and -2 * 0.4."""
    kl, sample = torch.tensor([0.5, -0.2, 0.1, 0.3, 0.4]), torch.tensor([4, 4, 4, 2, 2])
    returns = token_returns(torch.tensor([1.0, 1, 1, 0, 0]), kl, sample, 2.0)
    assert returns.tolist() == pytest.approx([0.2, 1.2, 0.8, -1.4, -0.8], abs=1e-7)
    written_out, expected = by_openrlhf([1.0, 0.0], [[0.5, -0.2, 0.1], [0.3, 0.4]], 2.0)
    assert returns.tolist() == pytest.approx([one for row in written_out for one in row], abs=1e-7)
    plus = get_algorithm("reinforce_pp")
    halves = plus.token_advantages([returns[:2], returns[2:]], lambda sums: sums)
    assert torch.cat(halves).tolist() == pytest.approx(expected, abs=1e-6)
    equal = plus.token_advantages([torch.full((3,), 0.1).double(), torch.full((4,), 0.1).double()], lambda sums: sums)
    assert torch.all(torch.cat(equal) == 0)


def test_without_a_kl_the_advantages_of_tokens_are_those_of_their_samples():
    rewards, lengths = torch.tensor([[1.0, 1.0], [1.0, 5.0]]), [[1, 3], [1, 1]]
    flat = rewards.flatten().repeat_interleave(torch.tensor(lengths).flatten())
    sample = torch.arange(4).repeat_interleave(torch.tensor(lengths).flatten())
    plus = get_algorithm("reinforce_pp")
    (found,) = plus.token_advantages([token_returns(flat, torch.zeros(6), sample, 1.0)], lambda sums: sums)
    whole = torch.tensor(advantages("reinforce_pp", rewards.tolist(), lengths))
    assert found.tolist() == pytest.approx(whole[sample].tolist(), rel=1e-6)


def test_with_the_kl_in_the_reward_samples_keep_their_rewards_until_their_tokens_are_known():
    nan = math.nan
    rewards = [[1.0, nan, 5.0], [nan, 9.0, nan], [3.0, 3.0, nan]]
    assert advantages("reinforce_pp", rewards, kl_in_reward=0.1) == [1, 0, 5, 0, 0, 0, 3, 3, 0]
    grouped = advantages("reinforce_pp", rewards, kl_in_reward=0.1, baseline="group")
    assert grouped == [-2, 0, 2, 0, 0, 0, 0, 0, 0]
    assert advantages("reinforce_pp", [[2.0, 2.0]], kl_in_reward=0.1) == [2.0, 2.0]
