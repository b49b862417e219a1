"""Options of a request against other implementations of them, and what they do inside the engine."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from isthmus.engines.local.core.core import Core
from isthmus.engines.local.core.sampler import Adjustment, adjust, draw
from isthmus.recipe.schema import EngineOptions
from tests.support.engine_bundle import ask, finished, run_core, small_model

NO_EOS, VOCABULARY = -1, 300
PROMPT = [5, 17, 230, 17]


def generate(prompts, new, core=None, model=None, eos_id=NO_EOS, **options):
    core = core or Core(model or small_model(1), eos_id=eos_id)
    request, events = ask(prompts, new, **options)
    run_core(core, request)
    return finished(events)


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(
    seed=st.integers(0, 999),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 40]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
)
def test_the_distribution_is_that_of_transformers_warpers(seed, temperature, top_k, top_p, min_p):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(seed)) * 2
    warped = TemperatureLogitsWarper(temperature)(None, logits)
    for warper, wanted in (
        (MinPLogitsWarper, min_p or None),
        (TopKLogitsWarper, top_k or None),
        (TopPLogitsWarper, top_p if top_p < 1 else None),
    ):
        warped = warped if wanted is None else warper(wanted)(None, warped)
    rows = torch.ones(3)
    found = draw(
        logits, rows * temperature, rows * top_p, rows.double() * 0.5, torch.full((3,), top_k), rows * min_p
    ).distribution
    torch.testing.assert_close(found.exp(), torch.softmax(warped, -1), atol=1e-6, rtol=1e-4)


def test_rows_with_and_without_options_do_not_mix():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    plain = draw(logits, torch.ones(4), torch.ones(4), torch.rand(4).double())
    mixed = draw(
        logits, torch.ones(4), torch.tensor([1, 0.5, 1, 1]), torch.rand(4).double(),
        torch.tensor([0, 0, 3, 0]), torch.tensor([0, 0, 0, 0.3]),
    )  # fmt: skip
    assert torch.equal(mixed.distribution[0], plain.distribution[0])
    assert [int((row > float("-inf")).sum()) for row in mixed.distribution][2] == 3
    assert all((mixed.distribution[i] == float("-inf")).any() for i in (1, 2, 3))


NOTHING = Adjustment(0.0, 0.0, 1.0, {}, [], None)


def changed(logits, prompt, generated, **changes):
    found = logits.clone()
    adjust(found, NOTHING._replace(**changes), np.array(prompt, dtype=np.int32), np.array(generated, dtype=np.int32))
    return found


def test_the_repetition_penalty_is_that_of_transformers():
    logits = torch.randn(30, generator=torch.Generator().manual_seed(1))
    seen = torch.tensor([[3, 4, 4, 9, 20]])
    expected = RepetitionPenaltyLogitsProcessor(1.7)(seen, logits[None])[0]
    torch.testing.assert_close(changed(logits, [3, 4], [4, 9, 20], repetition_penalty=1.7), expected)


def test_presence_and_frequency_penalties_are_those_of_openai():
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence (OpenAI's guide), over generated tokens alone."""
    logits = torch.zeros(6)
    found = changed(logits, [5, 5], [1, 2, 2, 2], presence_penalty=0.5, frequency_penalty=0.25)
    assert found.tolist() == [0.0, -0.75, -1.25, 0.0, 0.0, 0.0]


def test_bias_and_masks():
    logits = torch.arange(6.0)
    allowed = np.array([1, 1, 0, 1, 1, 1], dtype=bool)
    found = changed(logits, [], [], logit_bias={0: 7.0, 2: 100.0}, forbidden=[5], allowed=allowed)
    assert found.tolist() == [7.0, 1.0, float("-inf"), 3.0, 4.0, float("-inf")]


def test_a_bias_decides_and_the_logprobs_are_those_of_what_was_sampled():
    sample = generate([PROMPT], 6, logit_bias={77: 100.0})[0]
    assert sample.tokens == [77] * 6 and sample.logprobs == pytest.approx([0.0] * 6, abs=1e-5)


def test_a_frequency_penalty_ends_repetition():
    free = generate([PROMPT], 30, temperature=0.0, logit_bias={77: 10.0})[0]
    held = generate([PROMPT], 30, temperature=0.0, logit_bias={77: 10.0}, frequency_penalty=2.0)[0]
    assert free.tokens.count(77) > 25 and held.tokens.count(77) < 12


@pytest.mark.parametrize("speculate", [False, True])
def test_penalties_count_what_the_draft_has_added(speculate: bool):
    """Every token, with a penalty that forbids repeating, occurs once: a draft counts too."""
    core = Core(small_model(2, vocab_size=40), eos_id=NO_EOS, options=EngineOptions(speculate=speculate))
    if speculate:
        core.steps.draft = lambda rows, logits: core.scheduler.rows.draft.__setitem__(
            rows, 39 - core.scheduler.rows.drawn[rows]
        )
    bias = {token: 20.0 * token for token in range(40)}
    sample = generate(
        [[1, 2]], 30, core, temperature=0.0, presence_penalty=2.0, frequency_penalty=2000.0, logit_bias=bias
    )[0]
    assert sample.tokens == list(range(39, 9, -1))
    assert core.counters.accepted_draft_tokens == (14 if speculate else 0)


def test_stop_tokens_end_a_sample_and_are_named():
    free = generate([PROMPT], 12, temperature=0.0)[0].tokens
    stop = free[5]
    first = free.index(stop)
    sample = generate([PROMPT], 12, temperature=0.0, stop_tokens=frozenset({stop, 299}))[0]
    assert (sample.tokens, sample.finish_reason, sample.stop_token) == (free[: first + 1], "stop", stop)


def test_the_end_token_can_be_ignored_or_put_off():
    free = generate([PROMPT], 12, temperature=0.0)[0].tokens
    eos = free[4]
    first = free.index(eos)
    assert generate([PROMPT], 12, eos_id=eos, temperature=0.0)[0].tokens == free[: first + 1]
    assert generate([PROMPT], 12, eos_id=eos, temperature=0.0, ignore_eos=True)[0].tokens == free
    late = generate([PROMPT], 12, eos_id=eos, temperature=0.0, min_tokens=first + 3)[0]
    assert eos not in late.tokens[: first + 3] and len(late.tokens) >= first + 3


class Evens:
    """Only even tokens; after four of them the sample is complete."""

    def start(self):
        return EvensState()


class EvensState:
    def __init__(self):
        self.accepted = []

    def mask(self):
        return np.arange(VOCABULARY) % 2 == 0 if self.accepted else None

    def accept(self, token):
        self.accepted.append(token)

    @property
    def done(self):
        return len(self.accepted) >= 5


@pytest.mark.parametrize("speculate", [False, True])
def test_a_constraint_is_kept_by_every_sample(speculate: bool):
    core = Core(small_model(3), eos_id=NO_EOS, options=EngineOptions(speculate=speculate))
    samples = generate([PROMPT, [9]], 20, core, n=3, seed=1, constraint=Evens())
    for sample in samples:
        assert sample.finish_reason == "stop" and len(sample.tokens) == 5
        assert all(token % 2 == 0 for token in sample.tokens[1:])
    assert any(sample.tokens[0] % 2 for sample in samples), "the first token is free"


def test_log_probabilities_of_prompts_are_those_of_the_model():
    model = small_model(4)
    prompts = [[5, 17, 230, 17, 9, 200, 3] * 4, [8], [44, 45]]
    core = Core(model, eos_id=NO_EOS, options=EngineOptions(chunk_tokens=11, block_size=4))
    generate([prompts[0]], 2, core)
    for new in (0, 3):
        samples = generate(prompts, new, core, n=2, prompt_logprobs=2, temperature=0.0)
        assert [len(sample.tokens) for sample in samples] == [new] * 6
        for prompt, sample in zip(prompts, samples[::2], strict=True):
            with torch.no_grad():
                expected = torch.log_softmax(model(torch.tensor([prompt]))[0], -1)
            found = sample.prompt_tokens
            assert [one.token for one in found] == prompt and found[0][1:] == (None, [], None)
            for place, one in enumerate(found[1:]):
                row = expected[place]
                assert one.logprob == pytest.approx(float(row[one.token]), abs=1e-4)
                assert one.rank == int((row > row[one.token]).sum()) + 1
                assert [token for token, _ in one.top] == row.topk(2).indices.tolist()
        assert all(sample.prompt_tokens is None for sample in samples[1::2])
    core.scheduler.check()


def test_a_pause_holds_everything_and_resuming_goes_on():
    core = Core(small_model(5), eos_id=NO_EOS)
    core.start()
    core.pause()
    request, events = ask([PROMPT], 20, temperature=0.0, stream=True)
    core.submit(request)
    core.swap(small_model(6), version=3)
    assert core.paused and events == []
    done = threading.Event()
    core.observers.append(lambda _: done.set())
    core.resume()
    assert done.wait(60)
    core.stop()
    sample = finished(events)[0]
    assert (sample.version, sample.last_version) == (3, 3)
    assert sample.tokens == generate([PROMPT], 20, model=small_model(6), temperature=0.0)[0].tokens
