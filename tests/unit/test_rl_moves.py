"""Rollouts outlive their pool: an engine that fails is started again, then the next pool of place.rollout generates.

What is learnt is bit for bit what an undisturbed run learns."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import signal
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from isthmus.engines import Completion, EngineError
from isthmus.errors import GateRefused
from isthmus.recipe.supervise import SuperviseSection
from isthmus.records import IncidentRecord, incidents, rollout_pool
from isthmus.report_page.timing import held_rollouts
from isthmus.stages.steps.rl import engines, loop
from isthmus.stages.steps.rl.crossing import Crossing
from isthmus.supervise.ladder import Situation, decide
from isthmus.supervise.signals import Signal
from tests.unit.test_rl_updates import QUIET, REINFORCED, STEPS, data_made_once, shores_in

__all__ = ["data_made_once"]
TWO = {
    "pools.spare.chip": "cpu",
    "place.rollout": '["away", "spare"]',
    "rl.staleness": 1,
    "rl.checkpoint_every": 2,
    "rl.parity_tokens": 0,
    "supervise.restarts": 1,
}


class Scribe:
    """An engine in this process. What it writes depends on the weights that it has, the prompt and the seed alone."""

    takes_deltas, arithmetic, bits = False, "fp32", None

    def __init__(self, pool: str, asked: list[tuple[str, int]]):
        self.pool, self.asked, self.version, self.has, self.fails = pool, asked, None, "", None

    def update(self, payload, version, sha256):
        self._fail()
        self.version, self.has = version, sha256

    def generate(self, prompts, sampling, seeds=None):
        self._fail()
        self.asked.append((self.pool, self.version))
        return [
            [self.one(prompt, seed, n) for n in range(sampling.n)] for prompt, seed in zip(prompts, seeds, strict=True)
        ]

    def accounts(self):
        return []

    def probe(self, prompts, _sampling):
        return [("scribe", [[self.one(prompt, 0, 0)] for prompt in prompts])]

    def _fail(self):
        if self.fails is not None:
            raise EngineError(self.fails)

    def one(self, prompt, seed, number):
        chance = random.Random(f"{self.has} {prompt} {seed} {number}")
        tokens = [chance.randrange(3, 60) for _ in range(chance.randrange(2, 9))]
        logprobs = [-4 * chance.random() for _ in tokens]
        return Completion(tokens, logprobs, "stop", self.version, self.version)


class Pools:
    """What engines there are, and how they fail: `begins` says of a pool whether an engine comes up there."""

    def __init__(self, monkeypatch):
        self.asked: list[tuple[str, int]] = []
        self.running: Scribe | None = None
        self.begins = lambda pool: True
        monkeypatch.setattr(engines, "engine_on", self.engine_on)
        self._generate, self._patch = loop.Rollouts.generate, monkeypatch

    @contextmanager
    def engine_on(self, _work, _bundle, _form, pool, _threads, _options):
        if not self.begins(pool.name):
            raise EngineError(f"the engine could not start on {pool.name}")
        self.running = Scribe(pool.name, self.asked)
        yield self.running

    def at(self, step: int, act) -> None:
        """Do something once, before the samples of a step are asked for."""
        done = []

        def asked(rollouts, number):
            if number == step and not done:
                done.append(number)
                act()
            return self._generate(rollouts, number)

        self._patch.setattr(loop.Rollouts, "generate", asked)

    def dies_for_good(self, pool: str) -> None:
        assert self.running is not None
        self.running.fails = "its process was killed"
        self.begins = lambda name: name != pool


@pytest.fixture
def pools(monkeypatch) -> Pools:
    return Pools(monkeypatch)


def learnt(folder, **changes):
    """(events of the updates, weights after them, the step's work)."""
    with shores_in(folder, **{**TWO, **changes}) as shores:
        loop.learn(shores, QUIET)
        weights = {name: tensor.clone() for name, tensor in shores.state.weights().items()}
    return shores.state.work.events("step"), weights, shores.state.work


@pytest.fixture(scope="module")
def healthy(data_made_once, tmp_path_factory):
    """By staleness: what a step learns that nothing disturbs."""
    found = {}
    for staleness in (0, 1):
        with pytest.MonkeyPatch.context() as patch:
            Pools(patch)
            folder = tmp_path_factory.mktemp("healthy") / "run"
            found[staleness] = learnt(folder, **{"rl.staleness": staleness})
    return found


def as_learnt(events):
    """What the updates were made of: without times, the pool that wrote, and the way that weights took."""
    ways = ("_s", "_pool", "_kind", "_bytes", "_ratio")
    return [{key: value for key, value in one.items() if key != "time" and not key.endswith(ways)} for one in events]


def the_same(found, expected) -> bool:
    (events, weights, _), (others, same, _) = found, expected
    assert len({one["weight_sha256"] for one in events}) == STEPS, "every update learns"
    return as_learnt(events) == as_learnt(others) and all(torch.equal(weights[name], same[name]) for name in same)


def told(work):
    return [(one.side, one.signal, one.rung, one.outcome, one.to_pool) for one in incidents(work.run, REINFORCED)]


@pytest.mark.parametrize("staleness", [0, 1])
def test_rollouts_move_when_no_engine_comes_up_any_more_and_nothing_is_lost_or_doubled(
    healthy, pools, tmp_path, staleness
):
    pools.at(2, lambda: pools.dies_for_good("away"))
    found = learnt(tmp_path / "run", **{"rl.staleness": staleness})
    assert the_same(found, healthy[staleness])
    events, _, work = found
    assert [one["rollout_pool"] for one in events] == ["away"] * 2 + ["spare"] * 2
    assert [one["step"] for one in work.run.events(REINFORCED, "step", repeated=True)] == [1, 2, 3, 4]
    versions = [version for _, version in pools.asked]
    assert versions == [max(0, step - staleness) for step in range(STEPS)], "each rollout is written once"
    assert told(work) == [
        ("rollout", "ended", "restart engine", "failed", None),
        ("rollout", "ended", "move rollouts", "done", "spare"),
    ]
    assert rollout_pool(work.run, REINFORCED, "away") == "spare" == work.away.name
    assert work.place.pool == "home", "the learner stays"
    (move,) = work.run.events(REINFORCED, "revert")
    assert (move["side"], move["from_pool"], move["to_pool"]) == ("rollout", "away", "spare")


def test_an_engine_that_fails_while_weights_cross_gets_them_when_it_is_back(healthy, pools, tmp_path, monkeypatch):
    send = Crossing.send

    def sent(crossing):
        if crossing.state.step == 3:
            pools.running.fails = "it went away"
        return send(crossing)

    monkeypatch.setattr(Crossing, "send", sent)
    found = learnt(tmp_path / "run")
    assert the_same(found, healthy[1])
    assert told(found[2]) == [("rollout", "ended", "restart engine", "done", None)]
    assert {pool for pool, _ in pools.asked} == {"away"}


def test_an_engine_whose_log_probabilities_are_no_numbers_is_left(healthy, pools, tmp_path):
    def spoil():
        pools.running.__class__ = type("Spoilt", (Scribe,), {"one": spoilt})
        pools.begins = lambda name: name != "away"

    def spoilt(self, *asked):
        one = Scribe.one(self, *asked)
        return dataclasses.replace(one, logprobs=[math.nan] * len(one.tokens))

    pools.at(1, spoil)
    found = learnt(tmp_path / "run", **{"supervise.restarts": 0})
    assert the_same(found, healthy[1])
    assert told(found[2]) == [("rollout", "not finite", "move rollouts", "done", "spare")]


def test_an_engine_that_computes_something_else_is_left_at_its_last_strike(healthy, pools, tmp_path, monkeypatch):
    def spot(crossing, _answers, _tensors):
        over = crossing.engine.pool.name == "away" and crossing.state.step > 0
        return SimpleNamespace(is_over=over, mean=0.2, largest=0.3, limit=0.1, tokens=8, other_bits=None)

    monkeypatch.setattr(Crossing, "spot_of", spot)
    found = learnt(tmp_path / "run", **{"rl.staleness": 0, "rl.parity_tokens": 4})
    assert all(torch.equal(found[1][name], tensor) for name, tensor in healthy[0][1].items())
    assert told(found[2]) == [("rollout", "mismatch", "move rollouts", "done", "spare")]
    assert [one["rollout_pool"] for one in found[0]] == ["away"] * 2 + ["spare"] * 2


def test_with_nowhere_to_go_the_step_ends_with_what_the_engine_said(pools, tmp_path):
    pools.begins = lambda _name: False
    with pytest.raises(EngineError, match="could not start on away"):
        learnt(tmp_path / "run", **{"place.rollout": '["away"]'})


def test_a_pool_that_does_not_come_up_either_is_passed_over(pools, tmp_path):
    third = {"pools.third.chip": "cpu", "place.rollout": '["away", "spare", "third"]', "rl.steps": 1}
    pools.begins = lambda name: name == "third"
    events, _, work = learnt(tmp_path / "run", **third)
    assert [one["rollout_pool"] for one in events] == ["third"]
    moves = [(one.to_pool, one.outcome) for one in incidents(work.run, REINFORCED) if one.rung == "move rollouts"]
    assert moves == [("spare", "failed"), ("third", "done")]


def test_a_person_is_asked_before_rollouts_move(pools, tmp_path):
    pools.at(2, lambda: pools.dies_for_good("away"))
    with pytest.raises(GateRefused, match=r"(?s)generate on pool spare instead of away.*--revert"):
        learnt(tmp_path / "run", **{"supervise.on_revert": "ask"})


@pytest.mark.long
def test_a_killed_engine_and_one_that_hangs_are_started_again(data_made_once, tmp_path, monkeypatch):
    """Processes: one is killed with -9 while samples are asked of it, the next one is stopped."""
    changes = {"place.rollout": '["away"]', "supervise.restarts": 2, "rl.steps": 3, "rl.staleness": 0}
    expected = learnt(tmp_path / "healthy", **changes)
    for name, value in {"HANGS": 1, "HEALTH_S": 2.0, "LOOK_S": 0.5}.items():
        monkeypatch.setattr(engines, name, value)
    generate, hurt = loop.Rollouts.generate, {1: signal.SIGKILL, 2: signal.SIGSTOP}

    def asked(rollouts, number):
        if number in hurt:
            os.kill(rollouts.engine.engine.pid, hurt.pop(number))
        return generate(rollouts, number)

    monkeypatch.setattr(loop.Rollouts, "generate", asked)
    _, weights, work = learnt(tmp_path / "run", **changes)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected[1].items())
    assert [one[1:4] for one in told(work)] == [
        ("ended", "restart engine", "done"),
        ("no beat", "restart engine", "done"),
    ]


def incident(number: int, rung: str, **fields) -> IncidentRecord:
    given = {
        "recipe_sha256": "0", "started": 0, "ended": 0, "step": REINFORCED, "detail": "", "pool": "a", "ranks": 1,
        "update": 5, "checkpoint": 0, "why": "", "outcome": "done", "signal": "ended", "side": "rollout",
    }  # fmt: skip
    return IncidentRecord(**{**given, "number": number, "rung": rung, **fields})


RESTARTS = [incident(number, "restart engine") for number in range(3)]
MOVED = [*RESTARTS, incident(4, "move rollouts", to_pool="b")]


@pytest.mark.parametrize(
    ("kind", "fields", "rung", "to"),
    [
        ("ended", {}, "restart engine", None),
        ("ended", {"past": RESTARTS}, "move rollouts", "b"),
        ("ended", {"past": RESTARTS, "checkpoint": 10}, "restart engine", None),
        ("ended", {"past": [one.model_copy(update={"side": "train"}) for one in RESTARTS]}, "restart engine", None),
        ("ended", {"past": RESTARTS, "next_pools": []}, "stop", None),
        ("ended", {"ours_to_start": False}, "move rollouts", "b"),
        ("mismatch", {}, "move rollouts", "b"),
        ("mismatch", {"next_pools": []}, "stop", None),
        ("ended", {"past": MOVED, "pool": "b"}, "restart engine", None),
        ("mismatch", {"past": MOVED, "pool": "b"}, "stop", None),
        ("mismatch", {"past": MOVED, "pool": "b", "section": SuperviseSection(reverts=2)}, "move rollouts", "c"),
        ("mismatch", {"past": [incident(1, "move rollouts", to_pool="b", outcome="failed")]}, "move rollouts", "c"),
    ],
)
def test_the_rung_of_a_signal_of_an_engine(kind, fields, rung, to):
    now = Situation(SuperviseSection(), pool="a", ranks=1, checkpoint=0, next_pools=["b", "c", "a"], side="rollout")
    decision = decide(Signal(kind, "x"), dataclasses.replace(now, **fields))
    assert (decision.rung, decision.to_pool) == (rung, to) and decision.why


def test_time_is_counted_for_each_pool_that_generated():
    def event(time, kind, **fields):
        return {"time": time, "stage": "rl", "event": kind, **fields}

    events = [
        event(0.0, "start", pool="home", rollout_pool="a"),
        event(5.0, "step", step=1, rollout_pool="a", tokens=3),
        event(8.0, "revert", side="rollout", from_pool="a", to_pool="b"),
        event(9.0, "step", step=2, rollout_pool="a", tokens=4),
        event(20.0, "step", step=3, rollout_pool="b", tokens=5),
        event(100.0, "start", pool="home", rollout_pool="b"),
        event(107.0, "end", seconds=7.0),
    ]
    held = held_rollouts(events, "rl")
    assert {pool: seconds for pool, (seconds, _) in held.items()} == {"a": 8.0, "b": 12.0 + 7.0}
    assert {pool: sum(one["tokens"] for one in made) for pool, (_, made) in held.items()} == {"a": 7, "b": 5}
