"""How weights cross in RL changes nothing of what is learnt, and an engine that computes something else is stopped."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch

from isthmus.engines.fleet import Fleet
from isthmus.engines.local import LocalEngine
from isthmus.errors import GateRefused
from isthmus.formats.updates.version_folder import read_versions
from isthmus.model.model import Model
from isthmus.progress import Watch
from isthmus.recipe.read import load_recipe
from isthmus.records import Placement, PlanRecord, Rejection, TextRecord
from isthmus.rewards import EachAlone, Rewards
from isthmus.run import RunFolder
from isthmus.stages.steps import data
from isthmus.stages.steps.rl import engines, loop
from isthmus.stages.steps.rl.crew import Crew
from isthmus.stages.steps.rl.crossing import SPOT_PROMPTS
from isthmus.stages.steps.step import StepRun
from isthmus.tasks import load_tasks, tasks_of
from isthmus.trainer.checkpoint import CheckpointWriter, TrainingState
from isthmus.trainer.mesh import alone
from tests.support.flow_recipe import RECIPE, REINFORCED, SMALL, TAUGHT, written

STEPS = 4
QUIET = Watch(quiet=True)


@pytest.fixture(autouse=True, scope="module")
def data_made_once():
    """All runs of this file have the same problems and the same tokenizer."""
    with pytest.MonkeyPatch.context() as patch:
        tasks = load_tasks(recipe_of({}))
        patch.setattr(data, "load_tasks", lambda _recipe: tasks)
        patch.setattr(loop, "tasks_of", lambda recipe, step: tasks_of(recipe, step, tasks))
        yield


def recipe_of(changes):
    small = {
        **SMALL,
        **{written(name): value for name, value in {"rl.steps": STEPS, "rl.max_new_tokens": 12, **changes}.items()},
    }
    return load_recipe(RECIPE, tuple(f"{name}={value}" for name, value in small.items()))


class OddIsRight(EachAlone):
    def judge(self, sample):
        return float(len(sample.text) % 2)


@contextlib.contextmanager
def shores_in(folder, **changes):
    """The stage as it stands before its loop, on a model that has learnt nothing; rewards are drawn from the texts."""
    run = RunFolder.create(folder, recipe_of(changes))
    model = Model(run.recipe.model).initialise(0)
    writer = CheckpointWriter(run.step_folder(TAUGHT) / "checkpoints", 1, None)
    writer.save(0, TrainingState(model.state_dict(), {}, {}))
    saved = writer.finish()
    placed = {"train": "home", "rollout": "away", "serve": "away"}
    places = [Placement(stage=stage, pool=pool, reason="") for stage, pool in placed.items()]
    others = [
        Rejection(stage="rollout", pool=name, reason="", acceptable=True) for name in run.recipe.place.rollout[1:]
    ]
    plan = PlanRecord(
        recipe_sha256=run.recipe.digest(), started=0, ended=0, placements=places, rejected=others, estimate={}
    )
    run.write_record("plan", plan)
    taught = TextRecord(
        recipe_sha256=run.recipe.digest(),
        started=0.0,
        ended=1.0,
        step=TAUGHT,
        kind="sft",
        pool="home",
        started_from="model",
        steps=0,
        resumed_from=[],
        checkpoint=str(saved.folder.relative_to(folder)),
        checkpoint_sha256=saved.sha256,
        figures={},
    )
    run.write_record(f"steps/{TAUGHT}/record", taught)
    with loop.open_shores(StepRun.of(run, REINFORCED), plan, Crew(alone(torch.device("cpu"))), QUIET) as shores:
        shores.rollouts.rewards = Rewards({"accuracy": OddIsRight()}, {"accuracy": 1.0})
        yield shores


def learn(folder, **changes):
    with shores_in(folder, **changes) as shores:
        loop.learn(shores, QUIET)
        weights = {name: tensor.clone() for name, tensor in shores.state.weights().items()}
    return shores.state.work.events("step"), weights


def test_deltas_teach_exactly_what_full_updates_teach(tmp_path):
    full, expected = learn(tmp_path / "full", **{"rl.update": "full"})
    delta, found = learn(tmp_path / "delta", **{"rl.snapshot_every": 3, "rl.publish": tmp_path / "pub"})
    timing = {key for key in full[0] if key.endswith("_s")} | {"time", "tokens_per_s"}
    ways = {key for key in full[0] if key.startswith("update_")}
    assert len(full) == STEPS and len({step["weight_sha256"] for step in full}) == STEPS, "every step learns"
    for one, other in zip(full, delta, strict=True):
        assert {k: v for k, v in one.items() if k not in timing | ways} == {
            k: v for k, v in other.items() if k not in timing | ways
        }
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert [step["update_kind"] for step in full] == ["full"] * STEPS
    assert [step["update_kind"] for step in delta] == ["delta", "delta", "snapshot", "delta"]
    assert all(step["update_bytes"] < step["update_full_bytes"] for step in delta if step["update_kind"] == "delta")
    assert [one.sha256 for one in read_versions(tmp_path / "pub")][-STEPS:] == [s["weight_sha256"] for s in full]
    assert all(0 <= step["parity_gap"] < 1e-3 and step["parity_tokens"] > 0 for step in delta)


def test_samples_without_unlikely_tokens_are_learnt_from_as_they_were_drawn(tmp_path):
    """In fp32 what trainer and engine think of them differs by rounding alone, at every step, and the KL that tokens
    pay for in their reward is 0 before anything was learnt."""
    changes = {
        "rl.staleness": 0,
        "rl.steps": 2,
        "rl.rollout_format": "fp32",
        "rl.top_p": 0.7,
        "rl.loss.keep_sampling_mask": "true",
        "rl.algorithm": "reinforce_pp",
        "rl.options": "{ kl_in_reward = 0.1 }",
    }
    steps, _ = learn(tmp_path / "run", **changes)
    assert all(step["mismatch_abs"] < 2e-6 and 0 < step["mismatch_max"] < 1e-4 for step in steps)
    assert all(step["grad_norm"] > 0 for step in steps)
    assert steps[0]["reward_kl"] == 0 != steps[1]["reward_kl"]


def test_weights_that_did_not_arrive_are_found_and_sent_again(tmp_path, monkeypatch):
    """An engine that says it took a delta and did not: the stale weights of one version ago."""
    monkeypatch.setattr(LocalEngine, "update_delta", lambda *_: 0.0)
    changes = {"rl.optimizer.learning_rate": 0.05, "rl.staleness": 0, "rl.steps": 1}
    steps, _ = learn(tmp_path / "run", **changes)
    alarms = RunFolder.open(tmp_path / "run").events(REINFORCED, "alarm")
    assert len(alarms) == 1 and alarms[0]["gap"] > alarms[0]["limit"] > 0
    assert alarms[0]["gap_after_snapshot"] < 1e-3 and steps[0]["parity_gap"] < 1e-3
    assert alarms[0]["what"] == "the engine does not hold what was sent to it" and alarms[0]["tensors"]
    assert steps[0]["checksums"] > 0 and steps[0]["checksums_unseen"] == 0


def test_an_engine_that_computes_something_else_generates_no_more(tmp_path, monkeypatch):
    with shores_in(tmp_path / "run", **{"rl.staleness": 0}) as shores:
        generate = LocalEngine.generate

        def wrong(*args):
            return [
                [dataclasses.replace(one, logprobs=[value - 0.2 for value in one.logprobs]) for one in group]
                for group in generate(*args)
            ]

        monkeypatch.setattr(LocalEngine, "generate", wrong)
        with pytest.raises(GateRefused, match=r"at version 2 .* in 2 checks in a row.*must not generate"):
            loop.learn(shores, QUIET)
    alarms = shores.state.work.events("alarm")
    assert [alarm["weight_version"] for alarm in alarms] == [1, 2]
    assert all(alarm["gap_after_snapshot"] == pytest.approx(0.2, abs=1e-3) for alarm in alarms)


def test_of_several_engines_the_one_that_computes_something_else_is_left_out_alone(tmp_path, monkeypatch):
    """It comes back once it computes what it was given."""
    sick, refused = [], []

    class Second(LocalEngine):
        def generate(self, prompts, *more):
            found = super().generate(prompts, *more)
            if not sick:
                return found
            refused.append(len(prompts) > SPOT_PROMPTS)
            return [
                [dataclasses.replace(one, logprobs=[value - 0.2 for value in one.logprobs]) for one in group]
                for group in found
            ]

    @contextlib.contextmanager
    def two(work, bundle, *_):
        log = tmp_path / "engine.log"
        with LocalEngine(bundle, log=log) as first, Second(bundle, log=log) as second:
            fleet = Fleet([first, second], work.event)
            fleet.start(bundle)
            yield fleet

    monkeypatch.setattr(engines, "engine_on", two)
    with shores_in(tmp_path / "run", **{"rl.staleness": 0}) as shores:
        send = shores.crossing.send

        def sent():
            sick[:] = [1] if shores.state.step == 2 else []
            return send()

        monkeypatch.setattr(shores.crossing, "send", sent)
        loop.learn(shores, QUIET)
    steps, told = shores.state.work.events("step"), shores.state.work.events("fallback")
    assert len(steps) == STEPS and not shores.state.work.events("incident")
    left_out = [one for one in told if "left out, 1 of 2" in one["what"]]
    assert len(left_out) == 1 and "at version 2 log-probabilities 0.2 nats" in left_out[0]["why"]
    assert refused and not any(refused), "a rollout was asked of it"
    assert [one["weight_version"] for one in shores.state.work.events("back")] == [3]
    assert all(step["parity_gap"] < 1e-3 for step in steps)


@pytest.mark.long
def test_a_check_now_and_then_and_none(tmp_path):
    steps, _ = learn(tmp_path / "some", **{"rl.parity_every": 2, "rl.steps": 2})
    assert ["parity_gap" in step for step in steps] == [False, True]
    steps, _ = learn(tmp_path / "none", **{"rl.parity_tokens": 0, "rl.steps": 1})
    assert "parity_gap" not in steps[0]
