"""The learner on several ranks: the same samples teach what they teach one rank."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from isthmus.engines import Completion
from isthmus.engines.kept import Kept, KeptSet
from isthmus.model.model import Model
from isthmus.recipe.schema import TrainSection
from isthmus.recipe.steps import RlSection
from isthmus.rewards import Scores
from isthmus.stages.steps.rl.beside import Beside
from isthmus.stages.steps.rl.crew import Crew
from isthmus.stages.steps.rl.learner import Learner
from isthmus.stages.steps.rl.rollout import Rollout
from isthmus.stages.steps.rl.state import State
from isthmus.trainer.mesh import Ranks
from isthmus.trainer.parts import initialise
from tests.support.small import tiny_architecture
from tests.support.worlds import in_world

STEPS, PROMPTS, GROUP = 30, 3, 4
OPTIMIZER = {"name": "adamw", "learning_rate": 3e-3, "warmup_steps": 4}
LOSS = {"kl_weight": 0.05, "kl_times_ratio": True, "off_policy_mask": 0.5}
Seen = tuple[list[dict[str, Any]], dict[str, np.ndarray], list[str]]


def rollout_of(step: int, masks: bool = False) -> tuple[Rollout, torch.Tensor]:
    """Drawn by the step: lengths from 1 to 9 tokens, log-probabilities of an engine, and rewards, some of which are
    missing; with `masks` each token was drawn among a few."""
    chance = torch.Generator().manual_seed(step)

    def tokens(least: int, most: int) -> list[int]:
        count = int(torch.randint(least, most, (1,), generator=chance))
        return torch.randint(0, 96, (count,), generator=chance).tolist()

    def completion() -> Completion:
        written = tokens(1, 10)
        logprobs = (-(3.3 if masks else 4.5) - torch.rand(len(written), generator=chance)).tolist()
        among = torch.rand(len(written), 96, generator=torch.Generator().manual_seed(sum(written))) < 0.3
        among[range(len(written)), written] = True
        kept = Kept.of([KeptSet.of(row) for row in among.numpy()], 96) if masks else None
        return Completion(written, logprobs, "stop", step, step, kept=kept)

    prompts = [tokens(1, 6) for _ in range(PROMPTS)]
    completions = [[completion() for _ in range(GROUP)] for _ in prompts]
    rewards = torch.rand(PROMPTS, GROUP, generator=chance).round(decimals=1)
    rewards[0, step % GROUP] = math.nan
    rewards[1] = 0.5
    return Rollout([], prompts, completions, Scores({}, []), 1.0), rewards


def taught(rank: int, train: dict[str, Any], changes: dict[str, Any], folder: str, world: int = 1) -> Seen | None:
    """What the first rank sees of STEPS updates, the weights after them, and its events."""
    section = RlSection(
        name="all", kind="rl", steps=STEPS, optimizer=OPTIMIZER, max_new_tokens=12, **{"loss": LOSS, **changes}
    )
    told: list[str] = []
    work: Any = SimpleNamespace(
        stream="rl",
        section=section,
        recipe=SimpleNamespace(train=TrainSection(**train), seed=3),
        architecture=tiny_architecture(vocab_size=96, num_nextn_predict_layers=0),
        folder=Path(folder),
        event=lambda name, **_: told.append(name),
        events=lambda _: [],
        start=SimpleNamespace(fill=lambda model, seed, *_: initialise(model, seed)),
    )
    storage = dist.new_group(backend="gloo") if world > 1 else None
    crew = Crew(Ranks(rank, world, torch.device("cpu"), grouped=world > 1, storage=storage))
    state = State.open(work, crew, lambda _: None)
    learner = Learner(state, Beside.of(state))
    if rank:
        crew.follow(state.orders() | learner.orders())
        return None
    seen = []
    with crew.leading():
        for step in range(STEPS):
            rollout, rewards = rollout_of(step, section.loss.keep_sampling_mask)
            seen.append(learner.update(rollout, rewards, learner.advantages(rollout, rewards)).measures)
            state.step += 1
        weights = {name: tensor.numpy().copy() for name, tensor in state.weights().items()}
        assert state.save_last().step == STEPS
    return seen, weights, told


def in_ranks(rank: int, world: int, *arguments: Any) -> Seen | None:
    return taught(rank, *arguments, world)


def on(world: int, train: dict[str, Any], **changes: Any) -> Seen:
    with tempfile.TemporaryDirectory() as folder:
        if world == 1:
            found = taught(0, train, changes, folder)
        else:
            found = in_world(world, in_ranks, world, train, changes, folder)[0]
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("world", "train", "changes"),
    [
        pytest.param(
            2,
            {},
            {
                "algorithm": "gspo",
                "options": {"clip_low": 0.1, "clip_high": 0.1},
                "updates_per_rollout": 2,
                "top_p": 0.9,
                "loss": {**LOSS, "keep_sampling_mask": True},
            },
            id="two, several updates, masks",
        ),
        pytest.param(
            2,
            {"rows_per_microbatch": 1},
            {"algorithm": "reinforce_pp", "options": {"kl_in_reward": 0.1}, "updates_per_rollout": 2, "loss": {}},
            id="two, a KL in the reward, microbatches",
            marks=pytest.mark.long,
        ),
        pytest.param(
            4,
            {"expert": 2, "rows_per_microbatch": 1},
            {"algorithm": "dr_grpo"},
            id="four, experts spread, microbatches",
            marks=pytest.mark.long,
        ),
    ],
)
def test_several_ranks_learn_what_one_learns(world, train, changes):
    (ours, weights, told), (expected, whole, _) = on(world, train, **changes), on(1, {}, **changes)
    for found, alone in zip(ours, expected, strict=True):
        assert found.keys() == alone.keys() and found["trained_tokens"] == alone["trained_tokens"] > 0
        for name in set(found) - {"mismatch_slope"}:
            assert found[name] == pytest.approx(alone[name], abs=1e-5, rel=1e-5), name
    assert len({one["loss"] for one in ours}) == STEPS
    assert (max(one["clipped"] for one in ours) > 0) == ("updates_per_rollout" in changes)
    assert weights.keys() == Model(tiny_architecture(vocab_size=96, num_nextn_predict_layers=0)).state_dict().keys()
    assert list(weights) == list(whole)
    for name, alone in whole.items():
        np.testing.assert_allclose(weights[name], alone, atol=2e-4, rtol=1e-3, err_msg=name)
    assert told == []
