"""Samples that are written ahead of the learner, and prompts that are replaced because they tell nothing."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from isthmus.engines import Completion
from isthmus.engines.kept import Kept, KeptSet
from isthmus.errors import DamagedFile
from isthmus.recipe.steps import RlSection
from isthmus.rewards import Scores
from isthmus.stages.steps.rl import rollouts as module
from isthmus.stages.steps.rl.rollout import Rollout
from isthmus.stages.steps.rl.rollouts import Rollouts
from isthmus.tasks import Problem

STEPS, PROMPTS = 7, 3


class Writer:
    """An engine that says which version it has when it begins and when it ends; it waits at the gate between."""

    def __init__(self):
        self.version, self.asked, self.gate, self.entered = 0, [], threading.Event(), threading.Event()
        self.gate.set()

    def generate(self, prompts, sampling, seeds):
        first = self.version
        self.entered.set()
        assert self.gate.wait(10)
        last = self.version
        self.asked.append((first, last))
        runs = [(first, 1), (last, 3)]
        kept = Kept.of([KeptSet(np.array([token, 9], dtype=np.int32), False) for token in (5, 6, 7, 8)], 10)
        told = kept if sampling.kept and sampling.top_k == 2 else None
        one = Completion([5, 6, 7, 8], [-0.5] * 4, "stop", first, last, versions=runs, kept=told)
        return [[one] * sampling.n for _ in prompts]


class Earned:
    """Prompts of even numbers earn different rewards, others the same, or what is given."""

    def __init__(self, even: float = 0.0):
        self.even = even

    def score(self, samples):
        totals = [
            float(place % 2) if int(sample.id) % 10 < self.even * 10 else 1.0 for place, sample in enumerate(samples)
        ]
        return Scores({"accuracy": list(totals)}, list(totals), {"judge: late": 1}, {"cost": 2.0})


@pytest.fixture
def opened(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "prompt_ids", lambda _, problem: [int(problem.id)])

    def make(even: float = 1.0, **changes: Any) -> Rollouts:
        section = RlSection(
            name="all",
            kind="rl",
            steps=STEPS,
            prompts_per_step=PROMPTS,
            samples_per_prompt=2,
            optimizer={"name": "adamw", "learning_rate": 1e-3},
            **changes,
        )
        run = SimpleNamespace(
            recipe=SimpleNamespace(digest=lambda: "recipe"),
            keep=lambda path, content, _: path.write_bytes(content),
            read_kept=lambda path, _: path.read_bytes(),
            forget=lambda *_: None,
        )
        work: Any = SimpleNamespace(
            run=run,
            section=section,
            recipe=SimpleNamespace(seed=1),
            stream="all",
            folder=tmp_path,
            event=lambda *_, **__: None,
        )
        draw = lambda chance, count: [Problem(str(chance.randrange(10)), "q", "a") for _ in range(count)]  # noqa: E731
        tasks: Any = SimpleNamespace(draw=draw)
        found = Rollouts(work, tasks, None, Earned(even), Writer(), ThreadPoolExecutor(1))
        monkeypatch.setattr(found, "sample", lambda problem, _: problem)
        return found

    return make


def learn(rollouts: Rollouts, first: int = 0, last: int = STEPS):
    """What a loop does: take, learn, wait, send the next version."""
    lags = []
    for step in range(first, last):
        rollout = rollouts.take(step)
        lags.append(rollout.lags(step))
        rollouts.wait()
        rollouts.engine.version = step + 1
    return lags


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_samples_are_as_old_as_they_may_be_and_no_older(opened, ahead):
    rollouts = opened(staleness=ahead)
    lags = learn(rollouts)
    assert [one["staleness"] for one in lags] == [min(step, ahead) for step in range(STEPS)]
    assert all(one["written_across"] == 0 and one["staleness_mean"] == one["staleness"] for one in lags)
    assert len(rollouts.engine.asked) == STEPS, "no rollout beyond the last step"


def test_new_weights_reach_samples_that_are_being_written(opened):
    """The engine is held while two updates pass it by; the samples say which token is of which version."""
    rollouts = opened(staleness=3, update_while_writing=True)
    engine = rollouts.engine
    rollouts.take(0)
    rollouts.background.submit(int).result()
    engine.version = 1
    engine.gate.clear()
    engine.entered.clear()
    for version in (1, 2):
        assert rollouts.take(version).version == 0
        assert engine.entered.wait(10)
        rollouts.wait()
        engine.version = version + 1
    engine.gate.set()
    assert rollouts.take(3).lags(3) == {"staleness": 3, "staleness_mean": 3.0, "written_across": 0.0}
    assert rollouts.take(4).lags(4) == {"staleness": 3, "staleness_mean": (3 + 3 * 1) / 4, "written_across": 1.0}


def test_a_continued_run_learns_from_the_samples_that_were_ahead(opened, tmp_path):
    masks = {"top_k": 2, "loss": {"keep_sampling_mask": True}}
    whole = opened(staleness=2, **masks)
    learn(whole, 0, 3)
    whole.store(3, "weights")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rollout-000003.json", "rollout-000004.json"]
    again = opened(staleness=2, **masks)
    again.engine.version = 3
    again.restore(3)
    expected = [whole.take(3), whole.take(4)]
    assert [again.take(3), again.take(4)] == expected
    assert [one.ids.tolist() for one in expected[1].flat[0][1].kept.sets()] == [[5, 9], [6, 9], [7, 9], [8, 9]]
    again = opened(staleness=2)
    (tmp_path / "rollout-000004.json").write_text("{")
    with pytest.raises(DamagedFile, match=r"rollout-000004\.json cannot be read"):
        again.restore(3)


def test_prompts_that_tell_nothing_are_replaced(opened):
    """Half of the prompts tell something: rollouts are made until there are enough, and the first of them are taken."""
    plain = opened(even=0.5).generate(0)
    assert len(plain.prompts) == PROMPTS and plain.rolled_prompts is None
    rollouts = opened(even=0.5, algorithm="dapo")
    told = [rollouts.generate(step) for step in range(20)]
    assert all(one.totals.std(dim=1).min() > 0 and len(one.prompts) == PROMPTS for one in told)
    replaced = [one for one in told if one.rolled_prompts is not None]
    assert replaced and all(one.rolled_prompts % PROMPTS == 0 and one.rolled_prompts > PROMPTS for one in replaced)
    drawn = replaced[0]
    assert drawn.scores.left_out == {"judge: late": drawn.rolled_prompts // PROMPTS}
    assert drawn.scores.measures == {"cost": 2.0} and drawn.scores.values["accuracy"] == drawn.scores.totals
    assert drawn.shown()["rolled_prompts"] == drawn.rolled_prompts


def test_rollouts_of_a_step_are_bounded(opened):
    rollouts = opened(even=0.0, algorithm="dapo", options={"most_rollouts": 3})
    nothing = rollouts.generate(0)
    assert len(rollouts.engine.asked) == 3 and len(nothing.prompts) == PROMPTS and nothing.rolled_prompts == 9


def test_a_whole_rollout_that_tells_is_the_one_that_was_made(opened):
    """With the same seed the first rollout has the same prompts, whatever the algorithm."""
    first, dapo = opened(even=1.0).generate(4), opened(even=1.0, algorithm="dapo").generate(4)
    assert [one.id for one in first.problems] == [one.id for one in dapo.problems]
    assert isinstance(dapo, Rollout) and dapo.rolled_prompts is None


def test_updates_while_writing_need_something_written_ahead(opened):
    with pytest.raises(ValidationError, match="set staleness to 1 or more"):
        opened(update_while_writing=True)
