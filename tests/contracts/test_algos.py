"""Every file in algos/ keeps the contract; GRPO against an example worked out by hand."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from isthmus.algos import algorithm_config, algorithm_names, get_algorithm
from isthmus.errors import IsthmusError
from isthmus.recipe.steps import OptimizerSection, RlSection


def section(**changes) -> RlSection:
    return RlSection(
        name="reinforced", kind="rl", steps=1, optimizer=OptimizerSection(name="adamw", learning_rate=1e-3), **changes
    )


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in algorithm_names()), ("grpo", {"divide_by_std": False})]
)
@given(value=st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False), group=st.integers(2, 64))
@example(value=torch.tensor(0.1).item(), group=8)
def test_equal_rewards_teach_nothing_and_leave_other_groups_alone(name, options, value, group):
    algorithm = get_algorithm(name)
    config = algorithm.Config(**options)
    other = torch.arange(group, dtype=torch.float32)
    together = algorithm.advantages(torch.stack([torch.full((group,), value), other]), config)
    assert torch.all(together[0] == 0)
    assert torch.equal(together[1:], algorithm.advantages(other[None], config)) and together[1].abs().max() > 0


@pytest.mark.parametrize("name", algorithm_names())
def test_the_gradient_raises_good_samples_and_lowers_bad_ones(name):
    algorithm = get_algorithm(name)
    logprobs = torch.full((6,), -1.0, requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0, 0.0])
    sample = torch.tensor([0, 0, 1, 1, 2, 2])
    loss = algorithm.loss(logprobs, logprobs.detach(), advantages, torch.ones(6), sample, algorithm.Config())
    loss.value.backward()
    assert torch.equal(torch.sign(-logprobs.grad), advantages)


@pytest.mark.parametrize("name", algorithm_names())
def test_an_algorithm_loads_without_torch(name):
    code = f"import sys, isthmus.algos as a; a.get_algorithm({name!r}).Config(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_grpo_written_out():
    grpo = get_algorithm("grpo")
    config = grpo.Config(clip_low=0.2, clip_high=0.28)
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    advantages = grpo.advantages(rewards, config)
    std = math.sqrt((0.75**2 + 3 * 0.25**2) / 3)
    torch.testing.assert_close(advantages, torch.tensor([[0.75, -0.25, -0.25, -0.25]]) / std, atol=1e-4, rtol=1e-4)

    # Two samples: A (advantage 2, tokens with ratio 1.5 and 0.5), B (advantage -1, one token with ratio 0.5).
    old = torch.tensor([0.2, 0.4, 0.6]).log()
    now = torch.tensor([0.3, 0.2, 0.3]).log()
    advantage, sample = torch.tensor([2.0, 2.0, -1.0]), torch.tensor([0, 0, 1])
    weights = torch.tensor([1.0, 0.5, 2.0])
    # min(1.5 * 2, 1.28 * 2) = 2.56; min(0.5 * 2, 0.8 * 2) = 1.0; min(0.5 * -1, 0.8 * -1) = -0.8
    tokens = [1.0 * 2.56, 0.5 * 1.0, 2.0 * -0.8]
    result = grpo.loss(now, old, advantage, weights, sample, config)
    assert result.value.item() == pytest.approx(-sum(tokens) / 3, rel=1e-5)
    assert result.clipped == pytest.approx(2 / 3)
    by_sample = grpo.Config(clip_low=0.2, clip_high=0.28, aggregation="sample-mean")
    expected = -((tokens[0] + tokens[1]) / 2 + tokens[2]) / 2
    assert grpo.loss(now, old, advantage, weights, sample, by_sample).value.item() == pytest.approx(expected, rel=1e-5)


def test_options_are_checked_with_the_names_that_exist():
    with pytest.raises(IsthmusError, match="did you mean 'grpo'"):
        algorithm_config(section(algorithm="grop"))
    with pytest.raises(IsthmusError, match=r"rl.options.clip_hihg.*clip_high"):
        algorithm_config(section(options={"clip_hihg": 0.3}))
