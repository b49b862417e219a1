"""The engine's core: against transformers, against recomputing everything, and against the distribution it samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from isthmus.engines.local.core.core import Core
from isthmus.engines.local.core.sampler import draw, stream_key, uniforms
from isthmus.engines.local.core.scheduler import Request, Token
from isthmus.model.config import hf_config
from isthmus.recipe.schema import EngineOptions
from tests.support.against_transformers import to_transformers_layout
from tests.support.engine_bundle import architecture, ask, finished, run_core, small_model

NO_EOS = -1
PROMPTS = [[5, 17, 230], [8] * 11, [44], [3, 9, 27, 81, 243, 129, 87]]


def generate(core, prompts, max_new_tokens, **options):
    request, events = ask(prompts, max_new_tokens, **options)
    run_core(core, request)
    return finished(events)


def teacher_forced(model, prompt, tokens, temperature=1.0):
    """Log-probabilities of `tokens` after `prompt`, from one pass without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens]]))[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, dim=-1)[torch.arange(len(tokens)), torch.tensor(tokens)]


def test_greedy_tokens_equal_transformers_generate():
    model = small_model(1)
    arch = model.architecture
    config = DeepseekV3Config(**hf_config(arch, dtype="float32", bos_token_id=0, eos_token_id=1))
    config._attn_implementation = "eager"
    reference = DeepseekV3ForCausalLM(config).eval()
    ours = {key: value for key, value in model.state_dict().items() if f"layers.{arch.num_hidden_layers}." not in key}
    reference.load_state_dict(to_transformers_layout(ours, reference), strict=True)
    found = generate(Core(model, eos_id=NO_EOS, slots=4), PROMPTS, 24, temperature=0.0)
    for prompt, sample in zip(PROMPTS, found, strict=True):
        expected = reference.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert sample.tokens == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_teacher_forcing_at_the_sampled_temperature(temperature):
    model = small_model(2)
    for sample in generate(Core(model, eos_id=NO_EOS, slots=3), PROMPTS, 30, temperature=temperature, n=2, seed=4):
        prompt = PROMPTS[sample.choice // 2]
        expected = teacher_forced(model, prompt, sample.tokens, temperature)
        torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=2e-4, rtol=1e-4)


def test_samples_do_not_depend_on_their_company():
    model = small_model(3)
    eos = generate(Core(model, eos_id=NO_EOS), [PROMPTS[0]], 40, seeds=[0])[0].tokens[9]
    alone = [generate(Core(model, eos_id=eos, slots=1), [prompt], 40, seeds=[i])[0] for i, prompt in enumerate(PROMPTS)]
    crowd = Core(model, eos_id=eos, slots=5)
    other, _ = ask([[100 + i, 50] for i in range(9)], 33, seed=99, n=3, temperature=1.5)
    request, events = ask(PROMPTS, 40, seeds=[0, 1, 2, 3])
    run_core(crowd, other, request)
    assert [sample.tokens for sample in finished(events)] == [sample.tokens for sample in alone]
    assert len({len(sample.tokens) for sample in alone}) > 1, "the test needs samples that end at different times"


def test_a_sample_draws_from_its_own_stream():
    model = small_model(4)
    with_seed = generate(Core(model, eos_id=NO_EOS), [PROMPTS[0]], 12, n=4, seeds=[21])
    again = generate(Core(model, eos_id=NO_EOS), [PROMPTS[1], PROMPTS[0]], 12, n=4, seeds=[5, 21])
    assert [sample.tokens for sample in again[4:]] == [sample.tokens for sample in with_seed]
    assert len({tuple(sample.tokens) for sample in with_seed}) == 4
    shared_seed = generate(Core(model, eos_id=NO_EOS), [PROMPTS[0]] * 3, 12, seed=21)
    assert len({tuple(sample.tokens) for sample in shared_seed}) == 3


def test_samples_of_a_prompt_share_one_prefill():
    core = Core(small_model(5), eos_id=NO_EOS, slots=16)
    widths = []
    hidden = core.runner.hidden
    core.runner.hidden = lambda batch: widths.append(len(batch)) or hidden(batch)
    samples = generate(core, PROMPTS[:2], 6, n=8, seed=1)
    assert widths == [3 + 11] + [16] * 5
    assert len({tuple(sample.tokens) for sample in samples}) == 16


def test_sampled_frequencies_follow_softmax():
    rows, vocabulary = 40_000, 12
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(0)) * 2
    logits[4] = float("-inf")
    keys = np.array([stream_key(7, choice) for choice in range(rows)], dtype=np.uint64)
    uniform = torch.from_numpy(uniforms(keys, np.zeros(rows, dtype=np.int64)))
    found = draw(logits.expand(rows, -1), torch.full((rows,), 0.8), torch.ones(rows), uniform)
    expected = torch.softmax(logits / 0.8, dim=-1).double()
    counts = torch.bincount(found.tokens, minlength=vocabulary).double()
    assert counts[4] == 0
    possible = expected > 0
    chi_square = ((counts - rows * expected)[possible] ** 2 / (rows * expected[possible])).sum()
    assert chi_square < 31.3, "beyond the 99.9 % quantile of chi-square with 10 degrees of freedom"
    torch.testing.assert_close(found.logprobs, expected.log()[found.tokens].float(), atol=1e-6, rtol=1e-5)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.sampled_from([0.0, 2.0**-52, 0.5, 1 - 2.0**-52]))
def test_a_token_of_zero_probability_is_never_drawn(weights, uniform):
    probabilities = torch.tensor([*weights, 0.5], dtype=torch.float64)
    logits = probabilities.log().float().unsqueeze(0)
    found = draw(logits, torch.ones(1), torch.ones(1), torch.tensor([uniform], dtype=torch.float64))
    assert found.distribution.exp()[0, found.tokens[0]] > 0


@given(st.integers(0, 99), st.sampled_from([2048, 3001, 5000]))
def test_a_wide_vocabulary_is_drawn_from_as_numpy_would(seed, vocabulary):
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(20, vocabulary)) * 3
    logits[generator.random(logits.shape) < 0.5] = -np.inf
    uniform = generator.random(20)
    uniform[:2] = 0.0, 1 - 2.0**-52
    rows = torch.ones(20)
    found = draw(torch.from_numpy(logits).float(), rows, rows, torch.from_numpy(uniform))
    cumulated = torch.softmax(torch.from_numpy(logits).float(), -1).double().cumsum(-1).numpy()
    target = uniform * cumulated[:, -1]
    for row, token in enumerate(found.tokens.tolist()):
        assert logits[row, token] > -np.inf
        assert cumulated[row, token] > target[row] - 1e-6
        assert token == 0 or cumulated[row, token - 1] <= target[row] + 1e-6


@pytest.mark.parametrize("vocabulary", [97, 3001])
@pytest.mark.parametrize("nothing", [float("nan"), float("-inf")])
def test_a_row_of_no_numbers_draws_a_token_of_the_vocabulary(vocabulary, nothing):
    rows = torch.ones(1)
    found = draw(torch.full((1, vocabulary), nothing), rows, rows, torch.tensor([0.5], dtype=torch.float64))
    assert 0 <= found.tokens[0] < vocabulary and found.logprobs.isnan().all()


@pytest.mark.parametrize("temperature", [1e-3, 1e-37, 1e-44])
def test_the_smallest_temperatures_draw_the_likeliest_token(temperature):
    logits = torch.tensor([[-3.0, 20.0, 19.9, -50.0]])
    uniform = torch.tensor([1 - 2.0**-52], dtype=torch.float64)
    found = draw(logits, torch.tensor([temperature]), torch.ones(1), uniform)
    assert (found.tokens[0], found.logprobs[0]) == (1, 0.0)


def test_uniforms_are_uniform_and_independent_of_their_neighbours():
    keys = np.array([stream_key(seed, choice) for seed in range(40) for choice in range(25)], dtype=np.uint64)
    table = np.stack([uniforms(keys, np.full(len(keys), counter)) for counter in range(20)])
    assert len(np.unique(table)) == table.size and table.min() >= 0 and table.max() < 1
    steps = np.arange(1, table.size + 1) / table.size
    assert np.abs(np.sort(table.ravel()) - steps).max() < 1.95 / np.sqrt(table.size), "Kolmogorov-Smirnov at 0.1 %"
    by_seed = table[0].reshape(40, 25)
    for a, b in ((table[:-1], table[1:]), (by_seed[:-1], by_seed[1:]), (by_seed[:, :-1], by_seed[:, 1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / np.sqrt(a.size)


def test_top_p_keeps_the_fewest_likeliest_tokens_and_renormalises():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(2000, -1)
    uniform = torch.arange(2000, dtype=torch.float64) / 2000
    found = draw(logits, torch.ones(2000), torch.full((2000,), 0.7), uniform)
    assert set(found.tokens.tolist()) == {0, 1}
    assert found.tokens.eq(0).double().mean().item() == pytest.approx(0.5 / 0.8, abs=1e-3)
    expected = torch.tensor([0.625, 0.375]).log()[found.tokens]
    torch.testing.assert_close(found.logprobs, expected, atol=1e-6, rtol=1e-6)
    mixed = draw(logits[:3], torch.ones(3), torch.tensor([0.01, 1.0, 0.9]), torch.full((3,), 0.97, dtype=torch.float64))
    assert mixed.tokens.tolist() == [0, 3, 2]


def test_top_alternatives_are_those_of_the_sampled_distribution():
    model = small_model(6)
    sample = generate(Core(model, eos_id=NO_EOS), [PROMPTS[0]], 5, temperature=0.5, top_logprobs=3, seed=2)[0]
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPTS[0], *sample.tokens]]))[0, 2:-1]
    expected = torch.log_softmax(logits / 0.5, dim=-1).topk(3)
    assert [[token for token, _ in top] for top in sample.top] == expected.indices.tolist()
    found = torch.tensor([[value for _, value in top] for top in sample.top])
    torch.testing.assert_close(found, expected.values, atol=1e-4, rtol=1e-4)


def test_more_samples_than_slots_and_prefill_room_all_finish():
    model = small_model(7)
    eos = generate(Core(model, eos_id=NO_EOS), [[2]], 20, seed=3)[0].tokens[5]
    core = Core(model, eos_id=eos, slots=3, options=EngineOptions(chunk_tokens=12))
    prompts = [[i + 2] * (1 + i % 9) for i in range(11)]
    samples = generate(core, prompts, 20, n=5, seed=3)
    assert [sample.choice for sample in samples] == list(range(55))
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    for sample in samples:
        ended = sample.tokens[-1] == eos
        assert sample.finish_reason == ("stop" if ended else "length") and (ended or len(sample.tokens) == 20)
        expected = teacher_forced(model, prompts[sample.choice // 5], sample.tokens)
        torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=2e-4, rtol=1e-4)


def test_new_weights_take_over_between_two_steps_and_the_samples_say_so():
    old, new = small_model(8), small_model(9)
    core = Core(old, eos_id=NO_EOS, slots=2)
    request, events = ask([PROMPTS[0], PROMPTS[1], PROMPTS[2]], 10, temperature=0.0, stream=True)
    core.submit(request)
    with torch.inference_mode():
        for _ in range(5):
            core.step()
        core.runner.use(new)
        core.steps.version = 1
    run_core(core)
    first, second, third = finished(events)
    assert [(s.version, s.last_version) for s in (first, second, third)] == [(0, 1), (0, 1), (1, 1)]
    untouched = generate(Core(old, eos_id=NO_EOS), [PROMPTS[0], PROMPTS[1]], 10, temperature=0.0)
    assert first.tokens[:5] == untouched[0].tokens[:5] and first.tokens != untouched[0].tokens
    assert third.tokens == generate(Core(new, eos_id=NO_EOS), [PROMPTS[2]], 10, temperature=0.0)[0].tokens
    versions = [event.version for event in events if isinstance(event, Token) and event.choice == 0]
    assert versions == [0] * 5 + [1] * 5


def test_ending_a_request_frees_its_slots_and_leaves_the_others_alone():
    model = small_model(10)
    core = Core(model, eos_id=NO_EOS, slots=3)
    doomed, gone = ask(PROMPTS, 50, n=2)
    kept, events = ask([PROMPTS[3]], 12, seeds=[6])
    core.submit(doomed)
    core.submit(kept)
    with torch.inference_mode():
        for _ in range(5):
            core.step()
    core.end(doomed)
    run_core(core)
    ends = finished(gone)
    assert core.scheduler.rows.samples == [] and len(ends) == 8 and {end.finish_reason for end in ends} == {"abort"}
    assert sorted(len(end.tokens) for end in ends) == [0, 0, 0, 0, 0, 0, 5, 5]
    assert finished(events)[0].tokens == generate(Core(model, eos_id=NO_EOS), [PROMPTS[3]], 12, seeds=[6])[0].tokens


def test_numbers_that_are_none_end_one_sample_and_spoil_no_other():
    model = small_model(11)
    model.model.embed_tokens.weight[13] = float("nan")
    core = Core(model, eos_id=NO_EOS, slots=2)
    samples = generate(core, [[13, 2], PROMPTS[0], PROMPTS[3]], 8, temperature=0.0)
    assert [sample.finish_reason for sample in samples] == ["error", "length", "length"]
    clean = generate(Core(small_model(11), eos_id=NO_EOS), [PROMPTS[0], PROMPTS[3]], 8, temperature=0.0)
    assert [sample.tokens for sample in samples[1:]] == [sample.tokens for sample in clean]


def test_compressed_queries_decode_as_they_compute():
    model = small_model(12, q_lora_rank=20, first_k_dense_replace=2)
    sample = generate(Core(model, eos_id=NO_EOS), [PROMPTS[3]], 15, seed=1)[0]
    expected = teacher_forced(model, PROMPTS[3], sample.tokens)
    torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=2e-4, rtol=1e-4)


def test_a_request_keeps_its_prompts_and_choices_apart():
    request = Request([[1], [2]], print, 4, n=3, seed=5)
    assert len({request.key(prompt, sample) for prompt in range(2) for sample in range(3)}) == 6
    assert architecture().max_position_embeddings == Core(small_model(), eos_id=0, slots=1).length
