"""A fleet of engines that are objects here: what it does in the moments that processes do not reach on purpose."""

from __future__ import annotations

import dataclasses
import threading
import time

import pytest

from isthmus.engines import Completion, EngineError, OtherBase, Sampling
from isthmus.engines import member as members
from isthmus.engines.fleet import ASKING, Fleet
from isthmus.engines.member import Member, Patience, each
from isthmus.engines.remote import HttpEngine
from isthmus.engines.remote.transport import Transport
from isthmus.engines.sharing import Sharing

SAMPLING = Sampling(1)
PROMPTS = [[number] for number in range(8)]
LONG_S = 20.0


class Engine:
    """Writes one token, its version; `held` are the acts that wait until they are let go, `refused` those that fail."""

    takes_deltas, can_be_replaced = True, False

    def __init__(self, name):
        self.url, self.version, self.start_version = name, 0, 0
        self.staged, self.alive, self.calls, self.has = None, True, [], "start"
        self.refused, self.let_go, self.reached = set(), {}, {}

    def hold(self, act):
        self.let_go[act], self.reached[act] = threading.Event(), threading.Event()

    def _act(self, name):
        self.calls.append(name)
        if name in self.let_go:
            self.reached[name].set()
            assert self.let_go[name].wait(LONG_S)
        if name in self.refused:
            raise EngineError(f"{self.url} refuses {name}")

    def restart(self):
        self.version, self.has = self.start_version, "start"

    def start(self, bundle):
        self._act("start")

    def stage(self, payload, version, sha256):
        self._act("stage")
        self.staged = version

    def stage_delta(self, parts, base_version, version):
        self._act("stage_delta")
        if self.version != base_version:
            raise OtherBase(f"{self.url} has version {self.version}")
        self.staged = version

    def switch(self, version, sha256=None):
        self._act("switch")
        self.version, self.has = self.staged, f"weights {self.staged}"

    def in_use(self):
        self._act("in_use")
        return self.has

    def answers(self, seconds):
        return self.alive

    def generate(self, prompts, sampling, seeds):
        version = self.version
        self._act("generate")
        return [[Completion([version], [0.0], "length", version, version)] for _ in prompts]


@pytest.fixture
def pair(tmp_path):
    """(fleet, its two engines, what it told)."""
    told = []
    engines = [Engine("one"), Engine("two")]
    fleet = Fleet(engines, lambda name, **facts: told.append((name, facts)))
    fleet.start(tmp_path)
    fleet.update(b"", 1, "")
    return fleet, engines, told


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(members, "LOOK_S", 0.02)


def in_background(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    return thread, found


def written(groups):
    return {one.tokens[0] for group in groups for one in group}


def test_what_is_written_while_all_switch_may_have_the_version_before(pair):
    fleet, engines, told = pair
    for engine in engines:
        engine.hold("switch")
    update, _ = in_background(lambda: fleet.update(b"", 2, ""))
    for engine in engines:
        assert engine.reached["switch"].wait(LONG_S)
    assert written(fleet.generate(PROMPTS, SAMPLING)) == {1}
    for engine in engines:
        engine.let_go["switch"].set()
    update.join()
    assert written(fleet.generate(PROMPTS, SAMPLING)) == {2}
    assert not told


def test_one_that_wrote_with_a_version_before_the_one_in_use_is_left_out(pair):
    fleet, engines, told = pair
    fleet.update(b"", 2, "")
    engines[0].version = 1
    assert written(fleet.generate(PROMPTS, SAMPLING)) == {2}
    assert "wrote with version 1" in told[0][1]["why"]


def lose(fleet, engines):
    """The first engine is lost, and comes back with what it started with."""
    engines[0].refused = {"in_use"}
    fleet.generate(PROMPTS, SAMPLING)
    assert fleet.members[0].why is not None
    engines[0].refused = set()
    engines[0].restart()


def test_one_that_came_back_does_not_write_before_it_has_the_version_in_use(pair):
    fleet, engines, told = pair
    lose(fleet, engines)
    engines[0].hold("stage")
    update, _ = in_background(lambda: fleet.update(b"", 2, ""))
    assert engines[0].reached["stage"].wait(LONG_S)
    engines[0].calls.clear()
    fleet.generate(PROMPTS, SAMPLING)
    assert engines[0].calls == [], "it was asked, or brought weights by two threads"
    engines[0].let_go["stage"].set()
    update.join()
    assert written(fleet.generate(PROMPTS, SAMPLING)) == {2} and "generate" in engines[0].calls
    assert ("back", {"engine": "one", "weight_version": 2}) in told


def test_after_a_delta_one_that_came_back_waits_for_all_weights(pair):
    fleet, engines, _ = pair
    lose(fleet, engines)
    with pytest.raises(OtherBase, match="one came back"):
        fleet.update_delta([b""], 1, 2, "")
    engines[0].calls.clear()
    assert written(fleet.generate(PROMPTS, SAMPLING)) == {1}
    fleet.update(b"", 2, "")
    assert written(fleet.generate(PROMPTS, SAMPLING)) == {2} and "generate" in engines[0].calls


def test_one_that_stops_telling_its_weights_or_begins_to_is_left_out(tmp_path):
    for at_first, then in (("weights 1", None), (None, "start")):
        told = []
        engines = [Engine("one"), Engine("two")]
        fleet = Fleet(engines, lambda name, told=told, **facts: told.append(facts["why"]))
        fleet.start(tmp_path)
        fleet.update(b"", 1, "")
        engines[0].has = fleet.members[0].has = at_first
        assert written(fleet.generate(PROMPTS, SAMPLING)) == {1} and not told
        engines[0].has = then
        fleet.generate(PROMPTS, SAMPLING)
        assert "other weights than it was given" in told[0]


def test_weights_that_somebody_else_brings_while_it_writes_are_noticed(pair):
    """Under the same number: no version that is told shows them."""
    fleet, engines, told = pair
    honest = engines[0].generate

    def meddled_with(prompts, *more):
        groups = honest(prompts, *more)
        engines[0].has = "another trainer's"
        return [[dataclasses.replace(one, tokens=[99]) for one in group] for group in groups]

    engines[0].generate = meddled_with
    assert written(fleet.generate(PROMPTS, SAMPLING)) == {1}
    assert "other weights than it was given: another trainer's" in told[0][1]["why"]


def test_one_that_computed_something_else_comes_back_with_a_new_version_alone(pair):
    fleet, engines, told = pair
    fleet.leave_out("one", "it computes something else")
    assert told == [
        ("fallback", {"what": "the engine one is left out, 1 of 2 go on", "why": "it computes something else"})
    ]
    engines[0].calls.clear()
    fleet.generate(PROMPTS, SAMPLING)
    assert engines[0].calls == [], "nothing looks at it before it writes"
    fleet.update(b"", 2, "")
    assert ("back", {"engine": "one", "weight_version": 2}) in told
    fleet.members[0].pause_s = 0.0
    lose(fleet, engines)
    engines[0].calls.clear()
    fleet.generate(PROMPTS, SAMPLING)
    assert "generate" in engines[0].calls, "it is trusted again"


def test_a_switch_that_all_refuse_leaves_the_version_before_in_use(pair):
    fleet, engines, told = pair
    for engine in engines:
        engine.refused = {"switch"}
    with pytest.raises(EngineError, match="refuses switch"):
        fleet.update(b"", 2, "")
    assert written(fleet.generate(PROMPTS, SAMPLING)) == {1} and not told
    engines[0].restart()
    assert written(fleet.generate(PROMPTS, SAMPLING)) == {1} and "other weights" in told[0][1]["why"]


@pytest.mark.parametrize("act", ["stage", "switch", "in_use"])
def test_an_engine_that_falls_silent_in_an_update_does_not_hold_up_the_others(pair, act, monkeypatch):
    fleet, engines, told = pair
    engines[0].hold(act)
    engines[0].alive = False
    began = time.monotonic()
    fleet.update(b"", 2, "")
    assert time.monotonic() - began < LONG_S / 2
    assert "healthy" in told[0][1]["why"]
    engines[0].alive = True
    engines[0].calls.clear()
    assert written(fleet.generate(PROMPTS, SAMPLING)) == {2}
    assert engines[0].calls == [], "an engine that still is at something was asked for more"
    engines[0].let_go[act].set()
    fleet.members[0].abandoned.join()
    fleet.generate(PROMPTS, SAMPLING)
    assert ("back", {"engine": "one", "weight_version": 2}) in told


def test_one_that_hangs_where_all_others_refuse_is_left_out_alone(pair):
    fleet, engines, told = pair
    engines[0].hold("stage")
    engines[0].alive = False
    engines[1].refused = {"stage"}
    with pytest.raises(EngineError):
        fleet.update(b"", 2, "")
    assert [facts["what"] for _, facts in told] == ["the engine one is left out, 1 of 2 go on"]
    assert written(fleet.generate(PROMPTS, SAMPLING)) == {1}
    engines[0].let_go["stage"].set()


def test_the_slowest_is_waited_for_as_long_as_the_others_keep_what_was_staged():
    engines = [Engine("one"), Engine("two")]
    engines[0].hold("stage")
    everyone = [Member(engine) for engine in engines]
    done, failed = each(everyone, lambda engine: engine.stage(b"", 1, ""), Patience(behind_s=0.1))
    assert done == [everyone[1]] and "after the first" in str(failed[0][1]) and everyone[0].busy
    engines[0].let_go["stage"].set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_that_is_no_engine_s_is_raised():
    def act(engine):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        each([Member(Engine("one"))], act, ASKING)


def test_one_that_does_not_come_back_is_asked_less_and_less_often(pair, monkeypatch):
    fleet, engines, told = pair
    now = [1000.0]
    monkeypatch.setattr(members, "monotonic", lambda: now[0])
    engines[0].refused = {"stage", "start"}
    fleet.update(b"", 2, "")
    tried = []
    for _ in range(400):
        engines[0].calls.clear()
        fleet.update(b"", 3, "")
        tried += [now[0] - 1000.0] if "start" in engines[0].calls else []
        now[0] += 10.0
    assert tried == [0, 10, 30, 70, 150, 310, 630, 1230, 1830, 2430, 3030, 3630]
    assert len(told) == 1


def test_one_that_comes_back_and_is_lost_again_rests_until_it_wrote_something(pair):
    fleet, engines, _ = pair
    lose(fleet, engines)
    engines[0].refused = {"generate"}
    fleet.generate(PROMPTS, SAMPLING)
    assert fleet.members[0].why is not None
    engines[0].refused = set()
    engines[0].calls.clear()
    fleet.generate(PROMPTS, SAMPLING)
    assert engines[0].calls == []
    fleet.members[0].rests_until = 0.0
    fleet.generate(PROMPTS, SAMPLING)
    assert "generate" in engines[0].calls and fleet.members[0].pause_s == 0.0


def test_with_nobody_left_the_reason_of_each_is_told(pair):
    fleet, engines, _ = pair
    for engine in engines:
        engine.refused = {"generate"}
    for _ in range(3):
        with pytest.raises(EngineError, match=r"no engine is left: .*one refuses generate; .*two refuses generate"):
            fleet.generate(PROMPTS, SAMPLING)


def test_a_wrong_number_of_answers_loses_the_engine_and_no_prompt():
    lost = []

    def ask(member, piece):
        groups = [[Completion([number], [0.0], "length", 0, 0)] for number in piece]
        return groups[1:] if member == "sick" else groups

    sharing = Sharing(["sick", "well"], 12, ask, lambda member, why: lost.append((member, why)), lambda member: True)
    thread, found = in_background(sharing.run)
    thread.join(LONG_S)
    assert [group[0].tokens for group in found[0]] == [[number] for number in range(12)]
    assert lost[0][0] == "sick" and "cannot be read" in lost[0][1]


def test_what_is_ready_before_anyone_looks_is_not_waited_for(monkeypatch):
    """The answer is there while the last of many threads is started, and nobody tells of a change after that."""
    monkeypatch.setattr("isthmus.engines.sharing.LANES", 200)
    sharing = Sharing(["one"], 1, lambda member, piece: [[]], lambda *_: None, lambda member: True, look_s=LONG_S)
    began = time.monotonic()
    assert sharing.run() == [[]]
    assert time.monotonic() - began < LONG_S / 2


GOOD = {
    "/health": {"engine": "isthmus", "model": "small", "weight_version": 0},
    "/weight_info": {"version": 0, "sha256": "ab", "format": "bf16"},
    "/finish_weight_update": {"version": 1},
    "/update_weights": {"version": 1},
}
ACTS = {
    "start": lambda engine: engine.start("bundle"),
    "in_use": lambda engine: engine.in_use(),
    "check_exchange": lambda engine: engine.check_exchange("bf16"),
    "switch": lambda engine: engine.switch(1),
    "update": lambda engine: engine.update(b"", 1, ""),
    "score": lambda engine: engine.score([[1, 2]]),
    "generate": lambda engine: engine.generate([[1]], SAMPLING),
}


@pytest.mark.parametrize(
    ("act", "path", "answer"),
    [
        ("start", "/health", GOOD["/health"] | {"weight_version": None}),
        ("in_use", "/weight_info", {"version": 0}),
        ("in_use", "/weight_info", None),
        ("check_exchange", "/weight_info", {"version": 0}),
        ("switch", "/finish_weight_update", {"version": None}),
        ("switch", "/finish_weight_update", {"version": "new"}),
        ("update", "/update_weights", []),
        ("score", "/v1/completions", {}),
        ("generate", "/v1/completions", {"choices": [{"index": 0}]}),
        ("generate", "/v1/completions", {"choices": ["text"]}),
    ],
)
def test_half_an_answer_is_that_engine_s_error(act, path, answer, monkeypatch):
    answers = dict(GOOD)

    def call(self, method, asked, body=None, kind=None):
        return answers[asked.partition("?")[0]]

    monkeypatch.setattr(Transport, "call", call)
    monkeypatch.setattr(Transport, "wait_until_healthy", lambda *_: None)
    engine = HttpEngine("http://one:1")
    engine.start("bundle")
    answers[path] = answer
    with pytest.raises(EngineError, match="http://one:1 cannot be read"):
        ACTS[act](engine)


def test_every_engine_is_asked_on_its_own_and_one_that_cannot_answer_is_left_out(pair, monkeypatch):
    fleet, engines, told = pair

    def broken(*_):
        raise EngineError("it answers nothing")

    for engine, act in zip(engines, (lambda *_: [("one", [])], broken), strict=True):
        monkeypatch.setattr(engine, "probe", act, raising=False)
        monkeypatch.setattr(engine, "accounts", lambda url=engine.url: [(url, None)], raising=False)
    assert [url for url, _ in fleet.accounts()] == [engine.url for engine in engines]
    assert fleet.probe([[1]], Sampling(1)) == [("one", [])]
    assert [facts["why"] for name, facts in told if name == "fallback"] == ["it answers nothing"]
    assert [url for url, _ in fleet.accounts()] == [engines[0].url]
    monkeypatch.setattr(engines[0], "probe", broken)
    with pytest.raises(EngineError, match="no engine is left"):
        fleet.probe([[1]], Sampling(1))
