"""Several engines as one, in processes of their own: nothing is lost or made twice when they fail, and all of
them serve one version of the weights."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import ExitStack

import pytest
import torch

from isthmus.engines import EngineError, Sampling
from isthmus.engines.channel import Channel
from isthmus.engines.fleet import Fleet
from isthmus.engines.local import LocalEngine
from isthmus.engines.remote import HttpEngine
from isthmus.engines.sharing import pieces
from isthmus.formats import get_format
from isthmus.formats.updates.wire import digest, pack
from tests.support.engine_bundle import small_tokenizer, thinking_model, write_small_bundle
from tests.support.meddling import meddling

PROMPTS = [[0, 2, 60 + number % 20, 61 + number // 20, 4] for number in range(24)]
SAMPLING = Sampling(16, temperature=1.0, seed=5, n=2)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fleet") / "fp32"
    write_small_bundle(folder, "fp32")
    return folder


def tensors_of(seed):
    model = thinking_model(small_tokenizer(), seed)
    return get_format("fp32").export(model.state_dict(), model.architecture), model


def bring(engine, seed, version):
    tensors, model = tensors_of(seed)
    payload = pack(tensors)
    engine.update(payload, version, digest(payload))
    return model


def wrote(model, groups):
    """Whether a model gives the tokens the log-probabilities that the engines told."""
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for one in group:
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *one.tokens]]))[0, len(prompt) - 1 : -1]
            expected = torch.log_softmax(logits, -1)[torch.arange(len(one.tokens)), one.tokens]
            if (expected - torch.tensor(one.logprobs)).abs().max() > 1e-3:
                return False
    return True


def tokens(groups):
    return [[one.tokens for one in group] for group in groups]


@pytest.fixture(scope="module")
def processes(bundle):
    with ExitStack() as stack:
        logs = [bundle.parent / f"{number}.log" for number in range(2)]
        yield [stack.enter_context(LocalEngine(bundle, log=log, slots=64)) for log in logs]


class Shore:
    """Engines in processes of their own behind proxies, and the fleet that they are."""

    def __init__(self, bundle, processes, stack):
        self.told, self.processes = [], processes
        for process in processes:
            if not process.answers(5.0):
                process.start(bundle)
        self.proxies = [stack.enter_context(meddling(process.url)) for process in processes]
        keys = [process.api_key for process in processes]
        engines = [HttpEngine(proxy.url, key) for proxy, key in zip(self.proxies, keys, strict=True)]
        self.fleet = Fleet(engines, lambda name, **facts: self.told.append((name, facts)))
        self.fleet.start(bundle)

    @property
    def left_out(self):
        return [facts["why"] for name, facts in self.told if name == "fallback"]


@pytest.fixture
def shore(bundle, processes):
    with ExitStack() as stack:
        yield Shore(bundle, processes, stack)


def test_prompts_are_divided_without_gap_or_overlap():
    for count in (1, 5, 24, 257):
        for members in (1, 2, 7):
            found = pieces(count, members)
            assert [number for piece in found for number in piece] == list(range(count))
            assert all(len(piece) for piece in found)


def test_a_fleet_writes_what_one_engine_writes_and_all_take_part(shore, bundle):
    model = bring(shore.fleet, 1, 7)
    found = shore.fleet.generate(PROMPTS, SAMPLING)
    assert wrote(model, found)
    assert {one.version for group in found for one in group} == {7}
    alone = Fleet([HttpEngine(shore.processes[0].url, shore.processes[0].api_key)], lambda *_, **__: None)
    alone.start(bundle)
    assert tokens(alone.generate(PROMPTS, SAMPLING)) == tokens(found)
    asked = [proxy.completions for proxy in shore.proxies]
    assert sum(asked) == len(PROMPTS) and min(asked) >= len(PROMPTS) // 4


@pytest.mark.parametrize("fault", ["error", "truncated", "garbage", "another shape", "old version", "cut"])
def test_what_a_sick_engine_answers_is_written_by_another_once(shore, fault):
    bring(shore.fleet, 1, 1)
    model = bring(shore.fleet, 2, 2)
    healthy = shore.fleet.generate(PROMPTS, SAMPLING)
    shore.proxies[0].fault = fault
    found = shore.fleet.generate(PROMPTS, SAMPLING)
    assert tokens(found) == tokens(healthy) and wrote(model, found)
    assert {one.version for group in found for one in group} == {2}
    assert len(shore.left_out) == 1
    words = {
        "error": "out of memory",
        "garbage": "no JSON",
        "another shape": "completions, ",
        "old version": "wrote with version 1",
    }
    assert words.get(fault, "does not answer") in shore.left_out[0]


def test_one_that_is_killed_loses_nothing_and_gets_the_current_version_when_it_is_back(shore, bundle, monkeypatch):
    monkeypatch.setattr("isthmus.engines.member.PAUSE_S", 0.0)
    model = bring(shore.fleet, 1, 1)
    long = Sampling(90, temperature=1.0, seed=5, n=4)
    healthy = shore.fleet.generate(PROMPTS, long)
    threading.Timer(0.15, lambda: os.kill(shore.processes[0].pid, signal.SIGKILL)).start()
    assert tokens(shore.fleet.generate(PROMPTS, long)) == tokens(healthy)
    time.sleep(0.2)
    assert tokens(shore.fleet.generate(PROMPTS, long)) == tokens(healthy)
    assert len(shore.left_out) == 1
    shore.processes[0].start(bundle)
    shore.proxies[0].target = shore.processes[0].url
    asked = shore.proxies[0].completions
    found = shore.fleet.generate(PROMPTS, SAMPLING)
    assert ("back", {"engine": shore.proxies[0].url, "weight_version": 1}) in shore.told
    assert shore.proxies[0].completions > asked and wrote(model, found)


def test_one_that_was_started_again_unseen_does_not_serve_its_old_weights(shore, bundle):
    """Its version has the same number, and its weights are others."""
    model = bring(shore.fleet, 1, 0)
    shore.processes[0].start(bundle)
    shore.proxies[0].target = shore.processes[0].url
    found = shore.fleet.generate(PROMPTS, SAMPLING)
    assert wrote(model, found)
    assert "other weights than it was given" in shore.left_out[0]


def test_one_that_hangs_is_left_out(shore, monkeypatch):
    model = bring(shore.fleet, 1, 1)
    stopped = shore.fleet.members[0].engine
    monkeypatch.setattr(stopped, "answers", lambda _: HttpEngine.answers(stopped, 0.3))
    os.kill(shore.processes[0].pid, signal.SIGSTOP)
    try:
        found = shore.fleet.generate(PROMPTS, SAMPLING)
    finally:
        os.kill(shore.processes[0].pid, signal.SIGCONT)
    assert wrote(model, found) and "healthy" in shore.left_out[0]


def test_a_version_is_on_all_or_on_none_and_one_that_cannot_follow_is_left_out(shore):
    fleet = shore.fleet
    bring(fleet, 1, 1)
    damaged = bytearray(payload := pack(tensors_of(2)[0]))
    damaged[len(damaged) // 2] ^= 1
    with pytest.raises(EngineError, match="SHA-256"):
        fleet.update(bytes(damaged), 2, digest(payload))
    assert not shore.left_out and [engine.engine.version for engine in fleet.members] == [1, 1]
    os.kill(shore.processes[1].pid, signal.SIGKILL)
    model = bring(fleet, 2, 2)
    assert "cannot follow to version 2" in shore.left_out[0]
    assert wrote(model, fleet.generate(PROMPTS, SAMPLING))
    os.kill(shore.processes[0].pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="no engine is left"):
        fleet.generate(PROMPTS, SAMPLING)


def test_deltas_reach_all_and_one_that_came_back_makes_all_weights_cross(shore, bundle):
    channel = Channel(
        shore.fleet, deltas=True, snapshot_every=100, tell=lambda name, **facts: shore.told.append((name, facts))
    )
    assert channel.send(1, tensors_of(1)[0]).kind == "snapshot"
    assert channel.send(2, tensors_of(2)[0]).kind == "delta"
    assert wrote(tensors_of(2)[1], shore.fleet.generate(PROMPTS, SAMPLING))
    os.kill(shore.processes[1].pid, signal.SIGKILL)
    assert channel.send(3, tensors_of(3)[0]).kind == "delta"
    assert len(shore.left_out) == 1
    shore.processes[1].start(bundle)
    shore.proxies[1].target = shore.processes[1].url
    assert channel.send(4, tensors_of(4)[0]).kind == "fallback"
    assert "came back" in shore.left_out[1]
    assert wrote(tensors_of(4)[1], shore.fleet.generate(PROMPTS, SAMPLING))
    assert channel.send(5, tensors_of(5)[0]).kind == "delta"


def test_a_prompt_that_is_refused_is_no_engine_s_fault(shore):
    with pytest.raises(EngineError, match="refused"):
        shore.fleet.generate([[5, 100_000]], SAMPLING)
    assert not shore.left_out
