"""Shares of the engine: a short request does not wait for all samples of those before it, and a held one gives way."""

from __future__ import annotations

import pytest
import torch

from isthmus.engines.local.core.core import Core
from isthmus.recipe.schema import EngineOptions
from tests.support.engine_bundle import ask, finished, run_core, small_model

NO_EOS = -1
OPTIONS = EngineOptions(block_size=4, cache_tokens=400)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr("isthmus.engines.local.core.scheduler.PATIENCE_S", 0.0)


def steps_until(core, events):
    steps = 0
    with torch.inference_mode():
        while not finished(events):
            core.step()
            steps += 1
    return steps


@pytest.mark.parametrize(("slots", "cache"), [(8, 4000), (64, 400)], ids=["places are short", "blocks are short"])
def test_a_short_request_behind_ten_of_many_samples_is_soon_answered(slots, cache):
    model = small_model(5)
    core = Core(model, eos_id=NO_EOS, slots=slots, options=EngineOptions(block_size=4, cache_tokens=cache))
    greedy = [ask([[i + 2] * 6], 60, n=16, owner="greedy") for i in range(10)]
    for request, _ in greedy:
        core.submit(request)
    with torch.inference_mode():
        for _ in range(3):
            core.step()
    short, events = ask([[7, 8, 9]], 5, temperature=0.0)
    core.submit(short)
    assert steps_until(core, events) < 30
    alone, expected = ask([[7, 8, 9]], 5, temperature=0.0)
    run_core(Core(model, eos_id=NO_EOS, options=OPTIONS), alone)
    assert finished(events)[0].tokens == finished(expected)[0].tokens


def test_a_key_with_many_requests_has_no_more_than_its_share():
    core = Core(small_model(6), eos_id=NO_EOS, slots=4, options=OPTIONS)
    many = [ask([[i + 2] * 4], 12, owner="many") for i in range(12)]
    few, events = ask([[99] * 4], 12, owner="few")
    for request, _ in many:
        core.submit(request)
    core.submit(few)
    steps_until(core, events)
    assert sum(len(finished(own)) for _, own in many) <= 8, "the other key's one request was behind all of these"


def test_a_held_request_runs_no_further_and_loses_nothing():
    model = small_model(7)
    core, reference = (Core(model, eos_id=NO_EOS, slots=4, options=OPTIONS) for _ in range(2))
    options = {"n": 3, "seed": 4, "stream": True}
    held, events = ask([[5, 6, 7]], 20, **options)
    other, others = ask([[9, 9]], 40, temperature=0.0)
    core.submit(held)
    core.submit(other)
    with torch.inference_mode():
        for _ in range(6):
            core.step()
        core.hold(held)
        core.step()
        seen = len(events)
        steps_until(core, others)
    assert len(events) == seen and core.scheduler.pool.used == 0 and core.running == 0
    core.release(held)
    run_core(core)
    again, expected = ask([[5, 6, 7]], 20, **options)
    run_core(reference, again)
    assert [end.tokens for end in finished(events)] == [end.tokens for end in finished(expected)]


def test_a_held_request_can_be_given_up():
    core = Core(small_model(7), eos_id=NO_EOS, slots=4, options=OPTIONS)
    held, events = ask([[5, 6, 7]], 20, n=2)
    core.submit(held)
    with torch.inference_mode():
        core.step()
        core.hold(held)
        core.step()
        core.end(held)
        core.step()
    assert [end.finish_reason for end in finished(events)] == ["abort"] * 2 and core.waiting == core.running == 0


def test_a_short_prompt_does_not_wait_for_the_chunks_of_a_long_one():
    options = EngineOptions(block_size=4, chunk_tokens=8, prefix_cache=False)
    core = Core(small_model(8), eos_id=NO_EOS, options=options)
    core.submit(ask([[2] * 80], 8)[0])
    short, events = ask([[50] * 4], 1)
    core.submit(short)
    assert steps_until(core, events) < 4, "ten chunks of the other stand before it"
