"""Every file in algos/ keeps the contract; GRPO against an example worked out by hand."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from isthmus.algos import Scores, algorithm_config, algorithm_names, get_algorithm
from isthmus.algos.parts.policy import reference_kl
from isthmus.errors import IsthmusError
from isthmus.recipe.steps import OptimizerSection, RlSection
from tests.support.algos import tokens_of


def section(**changes) -> RlSection:
    return RlSection(
        name="reinforced", kind="rl", steps=1, optimizer=OptimizerSection(name="adamw", learning_rate=1e-3), **changes
    )


CONFIGS = {name: get_algorithm(name).Config for name in algorithm_names()}
GROUPED = [name for name, c in CONFIGS.items() if c.learns_from == "rewards" and c.compares == "group"]
VARIANTS = [*((name, {}) for name in GROUPED), ("grpo", {"divide_by_std": False})]


def advantages_of(name, rewards, lengths=None, **options):
    algorithm = get_algorithm(name)
    lengths = torch.ones(rewards.shape, dtype=torch.long) if lengths is None else lengths
    return algorithm.advantages(Scores(rewards, lengths), algorithm.Config(**options))


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@given(value=st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False), group=st.integers(2, 64))
@example(value=torch.tensor(0.1).item(), group=8)
def test_equal_rewards_teach_nothing_and_leave_other_groups_alone(name, options, value, group):
    other = torch.arange(group, dtype=torch.float32)
    together = advantages_of(name, torch.stack([torch.full((group,), value), other]), **options)
    assert torch.all(together[0] == 0)
    assert torch.equal(together[1:], advantages_of(name, other[None], **options)) and together[1].abs().max() > 0


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_samples_without_a_reward_do_not_enter(name, options):
    """A group is as if they had not been drawn; a group with one reward, or none, teaches nothing."""
    nan, rewards = math.nan, torch.tensor([0.5, 2.0, 3.25])
    alone = advantages_of(name, rewards[None], **options)[0]
    whole = torch.tensor([3.0, 1.0, 1.0, 0.0, 7.0])
    rows = [[0.5, nan, 2.0, 3.25, nan], [nan, nan, 4.0, nan, nan], [nan] * 5, [1.0, nan, 1.0, 1.0, 1.0], whole.tolist()]
    found = advantages_of(name, torch.tensor(rows), **options)
    torch.testing.assert_close(found[0], torch.stack([alone[0], alone[0] * 0, *alone[1:], alone[0] * 0]))
    assert torch.all(found[1:4] == 0)
    assert torch.equal(found[4], advantages_of(name, whole[None], **options)[0])


@pytest.mark.parametrize("name", algorithm_names())
def test_the_gradient_raises_good_samples_and_lowers_bad_ones(name):
    algorithm = get_algorithm(name)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0, 0.0])
    teacher = -1 + advantages if algorithm.Config.learns_from == "teacher" else None
    logprobs = torch.full((6,), -1.0, requires_grad=True)
    tokens = tokens_of(logprobs, advantages, [0, 0, 1, 1, 2, 2], teacher=teacher)
    algorithm.loss(tokens, algorithm.Config()).value.backward()
    assert torch.equal(torch.sign(-logprobs.grad), advantages)


@pytest.mark.parametrize("name", algorithm_names())
def test_parts_of_an_update_add_up_to_the_whole(name):
    """In microbatches, and over ranks, one of which may have no token: the loss and its gradient are the same."""
    algorithm = get_algorithm(name)
    chance = torch.Generator().manual_seed(4)
    old, teacher = (-torch.rand(7, generator=chance, dtype=torch.float64) for _ in range(2))
    now, weights = (old + 0.6 * torch.rand(7, generator=chance, dtype=torch.float64) - 0.3), torch.rand(7).double()
    advantages, sample = torch.tensor([1.0, 1, 1, -0.5, -0.5, 2, 2]).double(), torch.tensor([0, 0, 0, 1, 1, 2, 2])

    def gradient(places):
        value = now.clone().requires_grad_()
        tokens = tokens_of(
            value[places],
            advantages[places],
            sample[places],
            old=old[places],
            weights=weights[places],
            teacher=teacher[places],
            samples=3,
            totals=tokens_of(now, advantages, sample).totals,
        )
        loss = algorithm.loss(tokens, algorithm.Config())
        loss.value.backward()
        return loss.value.detach(), loss.clipped, value.grad

    whole = gradient(torch.arange(7))
    parts = [gradient(torch.tensor(part, dtype=torch.long)) for part in ([5, 6, 0, 1, 2], [3, 4], [])]
    for index in range(3):
        torch.testing.assert_close(sum(part[index] for part in parts), whole[index])
    assert whole[2].abs().max() > 0


@pytest.mark.parametrize("name", algorithm_names())
def test_a_token_of_weight_zero_teaches_nothing(name):
    algorithm = get_algorithm(name)
    logprobs = torch.tensor([-1.0, -0.5, -2.0, -0.1], requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    tokens = tokens_of(logprobs, advantages, [0, 0, 1, 1], weights=torch.tensor([1.0, 0, 0, 0]), teacher=advantages)
    algorithm.loss(tokens, algorithm.Config()).value.backward()
    assert torch.all(logprobs.grad[1:] == 0) and logprobs.grad[0] != 0


@pytest.mark.parametrize("name", algorithm_names())
def test_an_algorithm_loads_without_torch(name):
    code = f"import sys, isthmus.algos as a; a.get_algorithm({name!r}).Config(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_grpo_written_out():
    grpo = get_algorithm("grpo")
    options = {"clip_low": 0.2, "clip_high": 0.28}
    advantages = advantages_of("grpo", torch.tensor([[1.0, 0.0, 0.0, 0.0]]), **options)
    std = math.sqrt((0.75**2 + 3 * 0.25**2) / 3)
    torch.testing.assert_close(advantages, torch.tensor([[0.75, -0.25, -0.25, -0.25]]) / std, atol=1e-4, rtol=1e-4)

    # Two samples: A (advantage 2, tokens with ratio 1.5 and 0.5), B (advantage -1, one token with ratio 0.5).
    old = torch.tensor([0.2, 0.4, 0.6]).log()
    now = torch.tensor([0.3, 0.2, 0.3]).log()
    weights = torch.tensor([1.0, 0.5, 2.0])
    written = tokens_of(now, torch.tensor([2.0, 2.0, -1.0]), [0, 0, 1], old=old, weights=weights)
    # min(1.5 * 2, 1.28 * 2) = 2.56; min(0.5 * 2, 0.8 * 2) = 1.0; min(0.5 * -1, 0.8 * -1) = -0.8
    tokens = [1.0 * 2.56, 0.5 * 1.0, 2.0 * -0.8]
    result = grpo.loss(written, grpo.Config(**options))
    assert result.value.item() == pytest.approx(-sum(tokens) / 3, rel=1e-5)
    assert result.clipped == 2
    expected = -((tokens[0] + tokens[1]) / 2 + tokens[2]) / 2
    by_sample = grpo.loss(written, grpo.Config(**options, aggregation="sample-mean"))
    assert by_sample.value.item() == pytest.approx(expected, rel=1e-5)


def test_options_are_checked_with_the_names_that_exist():
    with pytest.raises(IsthmusError, match="did you mean 'grpo'"):
        algorithm_config(section(algorithm="grop"))
    with pytest.raises(IsthmusError, match=r"step.reinforced.options.clip_hihg.*clip_high"):
        algorithm_config(section(options={"clip_hihg": 0.3}))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"importance": "mask"}, '"mask" needs importance_floor'),
        ({"importance_floor": 0.4}, '"mask" needs importance_floor, and nothing else'),
        ({"importance": "mask", "importance_floor": 3.0}, "importance_floor must be below importance_cap, 2"),
        ({"kl_times_ratio": True}, "set kl_weight"),
    ],
)
def test_shared_keys_that_mean_nothing_are_refused(keys, words):
    with pytest.raises(ValueError, match=words):
        section(loss=keys)


def test_the_kl_to_a_reference_written_out():
    """k3 of r = 0.5 and 2; its gradient by hand, d/dx (e^(ref-x) - 1 - (ref-x)) = 1 - r, times the ratio 1.25 with the
    product rule."""
    old = torch.tensor([0.4, 0.2], dtype=torch.float64).log()
    for times_ratio, factors in ((False, [1.0, 1.0]), (True, [1.25, 0.5])):
        now = (old + torch.tensor(factors, dtype=torch.float64).log()).requires_grad_()
        reference = now.detach() + torch.tensor([0.5, 2.0], dtype=torch.float64).log()
        tokens = tokens_of(now, torch.zeros(2), [0, 0], old=old, reference=reference)
        kl = reference_kl(tokens, times_ratio)
        k3 = [0.5 - 1 - math.log(0.5), 2 - 1 - math.log(2)]
        assert kl.tolist() == pytest.approx([f * k for f, k in zip(factors, k3, strict=True)])
        kl.sum().backward()
        slopes = [f * ((1 - r) + (k if times_ratio else 0)) for f, r, k in zip(factors, (0.5, 2), k3, strict=True)]
        assert now.grad.tolist() == pytest.approx(slopes)


def test_what_an_algorithm_cannot_honour_is_refused_by_name():
    with pytest.raises(
        IsthmusError, match=r"step.reinforced.loss.off_policy_mask: opd cannot honour it, for .*advantage"
    ):
        algorithm_config(section(algorithm="opd", teacher={"step": "x"}, loss={"off_policy_mask": 0.1}))
    algorithm_config(section(algorithm="opd", teacher={"step": "x"}, loss={"kl_weight": 0.1}))
    plus = {"algorithm": "reinforce_pp", "loss": {"off_policy_mask": 0.1}}
    algorithm_config(section(**plus))
    with pytest.raises(IsthmusError, match=r"reinforce_pp cannot honour it, for .*an advantage of its own"):
        algorithm_config(section(**plus, options={"kl_in_reward": 0.1}))
