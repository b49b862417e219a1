"""The gate of a revert on reinforcement learning: its updates are computed again from the samples that were kept, and a
restore that is not whole is refused with its name."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from pydantic import TypeAdapter

from isthmus.records import Placement, PlanRecord, TrainPlace
from isthmus.run import RunFolder
from isthmus.stages.steps import repeat
from isthmus.stages.steps.rl import loop
from isthmus.stages.steps.rl.crew import Crew
from isthmus.stages.steps.rl.learner import Learner
from isthmus.stages.steps.rl.rollouts import Replay
from isthmus.stages.steps.rl.state import State
from isthmus.stages.steps.step import StepRun
from isthmus.supervise import gate
from isthmus.supervise.guard import Guard
from isthmus.trainer.mesh import alone
from tests.unit.test_rl_updates import QUIET, REINFORCED, STEPS, data_made_once, shores_in

__all__ = ["data_made_once"]
CPU = torch.device("cpu")
EVERY = {"rl.checkpoint_every": 2, "rl.parity_tokens": 0}


def learnt(folder, guarded: bool = False, **changes):
    """A step of reinforcement learning that was carried out with a checkpoint in its middle."""
    with shores_in(folder, **{**EVERY, **changes}) as shores:
        work = shores.state.work
        if guarded:
            places = [Placement(stage=stage, pool="home", reason="") for stage in ("train", "rollout", "serve")]
            plan = PlanRecord(recipe_sha256="0", started=0, ended=0, placements=places, rejected=[], estimate={})
            work.run.write_record("plan", plan)
            shores.learner.guard = Guard(work.run, REINFORCED, TrainPlace("home", 1), alone(CPU), QUIET)
        loop.learn(shores, QUIET)
        weights = {name: tensor.clone() for name, tensor in shores.state.weights().items()}
    return work, weights


@pytest.fixture(scope="module")
def healthy(data_made_once, tmp_path_factory):
    """(a step that nothing disturbed, the weights after it)."""
    return learnt(tmp_path_factory.mktemp("healthy") / "run")


def judged(work, bands=gate.SAME, spoil=lambda state: None, monkeypatch=None):
    """The verdict over the checkpoints of the step. `spoil` gets the state right after it is restored."""

    def again(at, _side):
        state = State.empty(work, Crew(alone(CPU)))
        state.is_trial = True
        if monkeypatch is not None:
            load = repeat.load_checkpoint

            def spoilt(*arguments):
                loaded = load(*arguments)
                return spoil(state) or loaded

            with monkeypatch.context() as patch:
                patch.setattr(repeat, "load_checkpoint", spoilt)
                return repeat.repeated_rl(state, repeat.checkpoint_of(work, at), gate.COUNT)
        return repeat.repeated_rl(state, repeat.checkpoint_of(work, at), gate.COUNT)

    def saved(at):
        return repeat.read_manifest(repeat.checkpoint_of(work, at))[0].extra

    events = work.events("step")
    steps = gate.checkpoints(work.run, REINFORCED)
    return gate.judge(
        steps, gate.recorded(events), again, saved, lambda at: gate.updates_made(events, at, reinforced=True), bands
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"rl.updates_per_rollout": 2, "rl.loss.kl_weight": 0.05},
        {"rl.staleness": 1},
    ],
    ids=["several updates and a reference", "samples a version old"],
)
def test_the_updates_after_a_checkpoint_come_out_alike_bit_for_bit(tmp_path, changes):
    work, _ = learnt(tmp_path / "run", **changes)
    before = [path.read_bytes() for path in sorted(work.folder.rglob("*")) if path.is_file()]
    verdict = judged(work)
    assert (verdict.verdict, verdict.checkpoint_step, verdict.repeated_steps) == ("go", 2, [3, 4]), verdict.reason
    assert {check.name for check in verdict.checks} >= {"digest of the batch", "loss", "norm of the gradient"}
    assert all(check.ok for check in verdict.checks) and STEPS == 4
    after = [path.read_bytes() for path in sorted(work.folder.rglob("*")) if path.is_file()]
    assert before == after, "a trial leaves nothing"


def forget_moments(state):
    for tensor in state.optimizer.state().values():
        if tensor.dim():
            tensor.zero_()


def forget_second_moments(state):
    """Then the first update after it divides by nothing, and the second one has no number."""
    for name, tensor in state.optimizer.state().items():
        if "exp_avg_sq" in name:
            tensor.zero_()


def turn_over(state):
    matrix = next(one for one in state.model.parameters() if one.dim() == 2)
    matrix.data.copy_(matrix.data.flip(0))


def restart_schedule(state):
    state.optimizer.schedule = lambda step, whole=state.optimizer.schedule: whole(max(0.0, step - 2)) * 0.5


def count_anew(state):
    for name, tensor in state.optimizer.state().items():
        if name.startswith("adam.step."):
            tensor.zero_()


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (forget_moments, "moments of every parameter"),
        (forget_second_moments, "moments of every parameter"),
        (turn_over, "model weights"),
        (restart_schedule, "learning rate"),
        (count_anew, "step count"),
    ],
)
def test_a_broken_restore_is_refused_with_its_name(healthy, monkeypatch, spoil, named):
    verdict = judged(healthy[0], spoil=spoil, monkeypatch=monkeypatch)
    assert verdict.verdict == "refuse" and named in verdict.reason


def test_other_samples_than_were_learnt_from_are_refused(healthy, monkeypatch):
    assert judged(healthy[0]).repeated_steps == [3, 4]
    read = repeat.read_replay

    def other(work, number):
        replay = read(work, number)
        for group in replay.rollout.completions:
            group[0].tokens[0] += 1
        return replay

    monkeypatch.setattr(repeat, "read_replay", other)
    verdict = judged(healthy[0])
    assert verdict.verdict == "refuse" and "digest of the batch of update 3" in verdict.reason


def test_an_update_of_another_try_with_other_samples_is_not_compared(healthy, tmp_path):
    """A restart whose engine samples otherwise keeps other samples for update 3 than those that its event is of."""
    shutil.copytree(healthy[0].run.path, tmp_path / "run")
    work = StepRun.of(RunFolder.open(tmp_path / "run"), REINFORCED)
    replay = repeat.read_replay(work, 2)
    assert replay is not None
    replay.rollout.completions[0][0].tokens[0] += 1
    path = work.folder / "replay-000003.json"
    work.run.keep(path, TypeAdapter(Replay).dump_json(replace(replay, attempt=replay.attempt + 1)), {})
    verdict = judged(work)
    assert (verdict.verdict, verdict.repeated_steps) == ("go", [])


def fail_at(monkeypatch, update: int, times: int):
    """The gradient of an update is no number, the first few times that it is computed."""
    compute, left = Learner.compute, [times]

    def computed(self, samples, totals):
        found = compute(self, samples, totals)
        if self.state.step + 1 == update and left[0]:
            left[0] -= 1
            return replace(found, norm=math.nan, rest={**found.rest, "grad_norm": math.nan, "mismatch_abs": math.nan})
        return found

    monkeypatch.setattr(Learner, "compute", computed)


def test_an_update_that_is_no_number_once_is_computed_again_and_nothing_changes(healthy, tmp_path, monkeypatch):
    _, expected = healthy
    fail_at(monkeypatch, 3, 1)
    work, weights = learnt(tmp_path / "disturbed", guarded=True)
    assert [(one["signal"], one["rung"]) for one in work.events("incident")] == [("not finite", "retry")]
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert judged(work).verdict == "go"


def test_a_batch_that_stays_no_number_is_left_out_and_the_gate_leaves_it_out_too(healthy, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fail_at(patch, 3, 2)
        work, weights = learnt(tmp_path / "run", guarded=True)
    assert [one["rung"] for one in work.events("incident")] == ["retry", "skip batch"]
    told = {event["step"]: (event["updates"], event.get("updates_left_out")) for event in work.events("step")}
    assert told == {1: (1, None), 2: (1, None), 3: (0, [0]), 4: (1, None)}
    assert any(not torch.equal(weights[name], tensor) for name, tensor in healthy[1].items())
    verdict = judged(work, gate.SAME)
    assert verdict.verdict == "go" and not any("update 3" in check.name for check in verdict.checks), (
        "an update that had no number says nothing of the checkpoint before it"
    )


def test_a_step_that_is_asked_to_stop_saves_and_leaves(tmp_path, monkeypatch):
    asked = SimpleNamespace(step=3)
    after = Guard.after

    def ask(self, update, seconds):
        self.stop.asked = update == asked.step
        after(self, update, seconds)

    monkeypatch.setattr(Guard, "after", ask)
    with pytest.raises(KeyboardInterrupt, match="saved after update 3"):
        learnt(tmp_path / "run", guarded=True)
    assert (tmp_path / "run" / "steps" / REINFORCED / "checkpoints" / "step-000003").is_dir()
