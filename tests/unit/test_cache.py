"""Blocks, shared prefixes and preemption: nothing is lost, nothing leaks, and nothing stale is found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.engines import EngineError
from isthmus.engines.local.core.cache import BlockPool, chained_digest
from isthmus.engines.local.core.core import Core
from isthmus.recipe.schema import EngineOptions
from tests.support.engine_bundle import ask, finished, run_core, small_model

NO_EOS = -1


def generate(core: Core, prompts, new, **options):
    request, events = ask(prompts, new, **options)
    run_core(core, request)
    core.scheduler.check()
    return finished(events)


def test_blocks_are_given_away_in_the_order_free_then_longest_unused():
    pool = BlockPool(5)
    held = [pool.allocate() for _ in range(4)]
    assert sorted(held) == [1, 2, 3, 4] and pool.allocate() is None and pool.used == 4
    for index, block in enumerate(held[:3]):
        pool.register(block, bytes([index]))
    pool.release([held[1]])
    pool.release([held[0]])
    pool.release([held[3]])
    assert pool.available == 3
    assert pool.allocate() == held[3]
    assert pool.allocate() == held[1] and pool.find(b"\x01") is None
    pool.share(held[0])
    assert pool.find(b"\x00") == held[0] and pool.allocate() is None
    with pytest.raises(AssertionError, match="released twice"):
        pool.release([held[2], held[2]])


def test_a_digest_stands_for_all_tokens_before():
    a, b = np.arange(4, dtype=np.int32), np.arange(4, 8, dtype=np.int32)
    chained = chained_digest(chained_digest(b"", a), b)
    assert chained != chained_digest(b"", b) != chained_digest(chained_digest(b"", b), b)
    assert chained == chained_digest(chained_digest(b"", a.copy()), b.copy())


def test_a_second_prompt_computes_only_what_is_new():
    core = Core(small_model(1), eos_id=NO_EOS, options=EngineOptions(block_size=4))
    computed = []
    hidden = core.runner.hidden
    core.runner.hidden = lambda batch: computed.append(len(batch)) or hidden(batch)
    beginning = list(range(20, 33))
    first = generate(core, [[*beginning, 7, 8]], 3, temperature=0.0)[0]
    assert (first.cached_tokens, computed) == (0, [15, 1, 1])
    computed.clear()
    second = generate(core, [[*beginning, 9, 9, 9]], 3, temperature=0.0)[0]
    assert (second.cached_tokens, computed) == (12, [4, 1, 1])
    fresh = generate(Core(small_model(1), eos_id=NO_EOS), [[*beginning, 9, 9, 9]], 3, temperature=0.0)[0]
    assert second.tokens == fresh.tokens
    counters = core.counters
    assert (counters.prefix_queries, counters.prefix_hits) == (31, 12)


def test_a_conversation_finds_the_answer_that_was_generated():
    core = Core(small_model(2), eos_id=NO_EOS, options=EngineOptions(block_size=4))
    prompt = list(range(20, 30))
    answer = generate(core, [prompt], 11, temperature=0.0)[0].tokens
    after = generate(core, [[*prompt, *answer, 5, 6]], 2, temperature=0.0)[0]
    assert after.cached_tokens == 20


def test_the_same_prompt_computes_its_last_token_again():
    core = Core(small_model(2), eos_id=NO_EOS, options=EngineOptions(block_size=4))
    first = generate(core, [[9] * 8], 4, temperature=0.0)[0]
    second = generate(core, [[9] * 8], 4, temperature=0.0)[0]
    assert second.cached_tokens == 4 and second.tokens == first.tokens


def test_new_weights_find_nothing_of_the_old():
    old, new = small_model(3), small_model(4)
    core = Core(old, eos_id=NO_EOS, options=EngineOptions(block_size=4))
    prompt = list(range(20, 40))
    running, events = ask([prompt], 12, temperature=0.0)
    core.submit(running)
    with torch.inference_mode():
        for _ in range(3):
            core.step()
    core.runner.use(new)
    core.scheduler.forget_prefixes()
    run_core(core)
    again = generate(core, [[*prompt, *finished(events)[0].tokens]], 4, temperature=0.0)[0]
    assert again.cached_tokens == 0, "the running sequence holds entries of the old weights"
    fresh = generate(Core(new, eos_id=NO_EOS), [[*prompt, *finished(events)[0].tokens]], 4, temperature=0.0)[0]
    assert again.tokens == fresh.tokens
    assert generate(core, [[*prompt, 1]], 1)[0].cached_tokens == 20


def test_without_the_prefix_cache_nothing_is_found():
    core = Core(small_model(1), eos_id=NO_EOS, options=EngineOptions(block_size=4, prefix_cache=False))
    generate(core, [[9] * 20], 2)
    assert generate(core, [[9] * 20], 2)[0].cached_tokens == 0 and core.counters.prefix_queries == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_preempted_samples_lose_nothing(temperature: float):
    model = small_model(5)
    prompts = [[i + 2] * (1 + 3 * i) for i in range(9)]
    options = {"temperature": temperature, "n": 2, "seed": 8, "stream": True, "top_logprobs": 1}
    roomy, tight = (
        Core(model, eos_id=NO_EOS, options=EngineOptions(block_size=4, cache_tokens=tokens)) for tokens in (2000, 96)
    )
    expected = generate(roomy, prompts, 25, **options)
    request, events = ask(prompts, 25, **options)
    run_core(tight, request)
    tight.scheduler.check()
    assert roomy.counters.preemptions == 0 and tight.counters.preemptions > 3
    for ours, theirs in zip(finished(events), expected, strict=True):
        assert ours.tokens == theirs.tokens and len(ours.top) == 25
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)
        assert [e.token for e in events if e.choice == ours.choice and hasattr(e, "token")] == ours.tokens


def test_the_first_to_come_is_never_sent_back():
    core = Core(small_model(6), eos_id=NO_EOS, options=EngineOptions(block_size=4, cache_tokens=96))
    first, events = ask([[5] * 10], 60)
    others, _ = ask([[7] * 20], 60, n=6)
    order = []
    core.observers.append(lambda end: order.append(end.choice))
    core.submit(first)
    core.submit(others)
    with torch.inference_mode():
        while not finished(events):
            core.step()
            assert core.scheduler.running == 0 or first in [s.request for s in core.scheduler.rows.samples] or not order
    run_core(core)
    assert order[0] == 0 and core.counters.preemptions > 0


def test_a_job_that_is_dropped_leaves_nothing_that_is_no_number():
    model = small_model(8)
    model.model.embed_tokens.weight[13] = float("nan")
    core = Core(model, eos_id=NO_EOS, slots=2, options=EngineOptions(block_size=4, chunk_tokens=8))
    doomed, events = ask([[13] * 30], 4)
    core.submit(doomed)
    with torch.inference_mode():
        core.step()
        assert not core.scheduler.store.holds_numbers(core.scheduler.jobs[0].table)
        core.end(doomed)
        core.step()
    assert finished(events)[0].finish_reason == "abort"
    assert core.scheduler.store.holds_numbers(list(range(core.scheduler.store.blocks)))
    assert core.scheduler.pool.find(chained_digest(b"", np.full(4, 13, dtype=np.int32))) is None


def test_a_cache_that_cannot_hold_one_sequence_is_refused():
    with pytest.raises(EngineError, match="cannot hold one sequence of 96; give it 96 or more"):
        Core(small_model(1), eos_id=NO_EOS, options=EngineOptions(cache_tokens=64))


def test_numbers_that_are_none_stay_in_their_sequence_whoever_had_its_row_before():
    """The short sequence takes a row whose last owner held the blocks that the spoilt one gets now."""
    model = small_model(1)
    model.model.embed_tokens.weight[7] = float("nan")
    core = Core(
        model, eos_id=NO_EOS, length=48, options=EngineOptions(block_size=4, cache_tokens=192, prefix_cache=False)
    )
    generate(core, [[5] * 40], 4)
    short, short_events = ask([[3, 4]], 20)
    for request in (short, ask([[8] * 24], 1)[0], ask([[6] * 34], 12)[0]):
        core.submit(request)
    with torch.inference_mode():
        core.step()
    spoilt, spoilt_events = ask([[9] * 20 + [7] + [9] * 3], 8)
    run_core(core, spoilt)
    assert finished(spoilt_events)[0].finish_reason == "error"
    assert finished(short_events)[0].finish_reason == "length"


@settings(max_examples=25, derandomize=True, deadline=None, database=None)
@given(st.data())
def test_whatever_comes_and_goes_no_block_is_lost(data):
    core = Core(
        small_model(7),
        eos_id=data.draw(st.sampled_from([NO_EOS, 5])),
        slots=data.draw(st.integers(1, 6)),
        options=EngineOptions(
            block_size=data.draw(st.sampled_from([1, 3, 8])),
            cache_tokens=data.draw(st.sampled_from([97, 128, 400])) // 1 + 8,
            chunk_tokens=data.draw(st.sampled_from([1, 9, 64])),
            speculate=data.draw(st.booleans()),
        ),
    )
    open_requests, all_events = [], []
    with torch.inference_mode():
        for turn in range(30):
            action = data.draw(st.sampled_from(["submit", "end", "end one", "step", "step", "swap"]))
            if action == "submit":
                prompts = data.draw(
                    st.lists(st.lists(st.integers(2, 4), min_size=1, max_size=40), max_size=3, min_size=1)
                )
                request, events = ask(prompts, data.draw(st.integers(1, 20)), n=data.draw(st.integers(1, 3)), seed=turn)
                open_requests.append(request)
                all_events.append((request, events))
                core.submit(request)
            elif action.startswith("end") and open_requests:
                request = data.draw(st.sampled_from(open_requests))
                core.end(request, None if action == "end" else 0)
            elif action == "swap":
                core.runner.use(small_model(turn))
                core.scheduler.forget_prefixes()
            core.step()
            core.scheduler.check()
        while core.running or core.waiting:
            core.step()
            core.scheduler.check()
    assert core.scheduler.pool.used == 0
    for request, events in all_events:
        ends = finished(events)
        assert [end.choice for end in ends] == list(range(len(request.prompts) * request.n))
        assert all(len(end.tokens) <= request.max_new_tokens for end in ends)


@pytest.mark.parametrize("cached", [False, True])
def test_a_sample_whose_prompt_spans_an_update_says_so(cached):
    core = Core(small_model(), eos_id=1, slots=4, length=64, options=EngineOptions(block_size=4, chunk_tokens=8))
    prompt, later = list(range(2, 34)), list(range(40, 72))
    if cached:
        run_core(core, ask([prompt[:16] + later], 1)[0])
    first, second = (ask([tokens], 4, temperature=0.0) for tokens in (prompt, later))
    with torch.inference_mode():
        core.submit(first[0])
        core.step()
        core.submit(second[0])
        core.runner.use(small_model(1))
        core.steps.version = 1
        core.scheduler.forget_prefixes()
        while core.running or core.waiting or not finished(second[1]):
            core.step()
    assert [(end.version, end.last_version) for end in finished(first[1])] == [(0, 1)]
    assert [(end.version, end.last_version) for end in finished(second[1])] == [(1, 1)]
