"""A drill of reinforcement learning: planted faults strike the learner's updates, and no figure of it is measured."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from isthmus.pools import get_pool
from isthmus.records import RlRecord, TrainPlace, incidents
from isthmus.run import Figure
from isthmus.stages.steps.drilled import Drill
from isthmus.stages.steps.rl import loop
from isthmus.supervise.guard import Guard
from isthmus.trainer.mesh import alone
from tests.unit.test_rl_moves import TWO, Pools
from tests.unit.test_rl_updates import QUIET, REINFORCED, data_made_once, shores_in

__all__ = ["data_made_once"]
NAN = "nan@rank=0,step=2"


def test_faults_strike_the_updates_of_reinforcement_learning_and_its_guard_meets_them(tmp_path, monkeypatch):
    Pools(monkeypatch)
    changes = {**TWO, "drill.seed": 0, "pools.away.faults": f'["{NAN}"]', "rl.steps": 3}
    with shores_in(tmp_path / "run", **changes) as shores:
        work, learner = shores.state.work, shores.learner
        learner.guard = Guard(work.run, REINFORCED, TrainPlace("home", 1), alone(torch.device("cpu")), QUIET)
        learner.drill = Drill.of(work.run, REINFORCED, get_pool(work.recipe, "away"), 0)
        with learner.under_way():
            loop.learn(shores, QUIET)
    (planted,) = work.events("planted")
    assert (planted["fault"], planted["update"]) == (NAN, 2)
    met = [(one.signal, one.rung, one.update) for one in incidents(work.run, REINFORCED)]
    assert met == [("not finite", "retry", 2), ("not finite", "skip batch", 2)]
    assert [event["updates"] for event in work.events("step")] == [1, 0, 1]


def test_a_record_of_a_drill_holds_no_measured_accuracy():
    def record(rehearsed: bool) -> RlRecord:
        figure = Figure.measured(1.0, "%", "x", rehearsed=True)
        accuracy = Figure.measured(1.0, "%", "x", rehearsed=rehearsed)
        return RlRecord(
            recipe_sha256="0", started=0, ended=0, step="x", pool="home", drill=True, started_from="model", steps=1,
            resumed_from=[], checkpoint="c", checkpoint_sha256="0", figures={}, rollout_pool="home",
            rollout_rehearsed=False, algorithm="grpo", weight_version=1, heldout_problems=1, accuracy_before=figure,
            accuracy_after=accuracy, accuracy_gain=figure, thought_tokens_before=figure, thought_tokens_after=figure,
            sample_before="", sample_after="",
        )  # fmt: skip

    assert record(rehearsed=True).drill
    with pytest.raises(ValidationError, match="figures of a drill are rehearsed; accuracy_after"):
        record(rehearsed=False)
