"""What the engine generates: equal to transformers whatever its options, and the same tokens in any company."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from isthmus.engines.local.core.core import Core
from isthmus.recipe.schema import EngineOptions
from tests.support.against_transformers import in_transformers
from tests.support.against_transformers import randomised as randomised_latent
from tests.support.engine_bundle import ask, finished, run_core
from tests.support.plain import mtp_logits
from tests.support.small import architecture
from tests.support.small_dense import dense_architecture, randomised, theirs

NO_EOS = -1
PROMPTS, NEW = 100, 12
TIE = 1e-4


def latent_model(seed: int = 1, **changes):
    return randomised_latent(architecture(**changes), seed).eval().requires_grad_(False)


MODELS = {
    "deepseek_v3": (latent_model, in_transformers),
    "qwen2": (lambda: randomised(dense_architecture("qwen2"), 1).eval().requires_grad_(False), theirs),
    "llama": (lambda: randomised(dense_architecture("llama"), 1).eval().requires_grad_(False), theirs),
}
OPTIONS = {
    "plain": {},
    "one at a time": {"slots": 1},
    "no prefix cache": {"prefix_cache": False},
    "small chunks": {"chunk_tokens": 7},
    "few blocks": {"cache_tokens": 128, "block_size": 4, "slots": 16},
    "drafts": {"speculate": True, "slots": 5},
    "batch invariant": {"batch_invariant": True},
    "torch": {"native": False},
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    """A model, and transformers' one with the same weights."""
    build, to_theirs = MODELS[request.param]
    model = build()
    return model, to_theirs(model)


def prompts(vocabulary: int) -> list[list[int]]:
    """100 prompts of 1 to 60 tokens; every third begins like the one before."""
    generator = np.random.default_rng(0)
    made: list[list[int]] = []
    for index in range(PROMPTS):
        prompt = generator.integers(0, vocabulary, generator.integers(1, 60)).tolist()
        made.append((made[-1][:40] + prompt)[:60] if index % 3 == 2 else prompt)
    return made


def made(model, options) -> Core:
    options = dict(options)
    native = options.pop("native", True)
    slots = options.pop("slots", 256)
    core = Core(model, eos_id=NO_EOS, length=80, slots=slots, options=EngineOptions(**options))
    if not native:
        core.runner.native = None
    return core


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_greedy_tokens_are_those_of_transformers(pair, options):
    model, reference = pair
    if options.get("speculate") and model.mtp_layer is None:
        with pytest.raises(Exception, match="no layer for multi-token prediction"):
            made(model, options)
        return
    core = made(model, options)
    asked = prompts(model.architecture.vocab_size)
    request, events = ask(asked, NEW, temperature=0.0)
    run_core(core, request)
    core.scheduler.check()
    assert core.scheduler.pool.used == 0
    samples = finished(events)
    sequences = [torch.tensor(prompt + sample.tokens) for prompt, sample in zip(asked, samples, strict=True)]
    padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    with torch.no_grad():
        logits = reference(padded).logits
    for prompt, sample, row in zip(asked, samples, logits, strict=True):
        assert len(sample.tokens) == NEW
        here = row[len(prompt) - 1 : len(prompt) - 1 + NEW]
        lost = here.amax(-1) - here[torch.arange(NEW), torch.tensor(sample.tokens)]
        assert lost.max() < TIE, "a token that is not the likeliest one"
    if "cache_tokens" in options:
        assert core.counters.preemptions > 0
    assert (core.counters.prefix_hits > 0) == options.get("prefix_cache", True)


def oracle(core: Core, answers: dict[int, list[int]], share: float) -> None:
    """Let drafts be right in about that share of cases, by knowing what will be drawn."""
    generator = np.random.default_rng(1)

    def draft(rows, logits):
        table = core.scheduler.rows
        for row in rows:
            drawn = int(table.drawn[row])
            answer = answers[table.samples[row].choice]
            if drawn + 1 < len(answer):
                right = generator.random() < share
                table.draft[row] = answer[drawn] if right else (answer[drawn] + 1) % logits.shape[1]

    core.steps.draft = draft


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_change_nothing_but_the_number_of_passes(share: float, temperature: float):
    model = latent_model(2)
    asked = [[5, 17, 30], [8] * 21, [44], [3, 9, 27, 81, 43, 29, 87]]
    plain = Core(model, eos_id=NO_EOS)
    options = {"temperature": temperature, "seeds": [3, 4, 5, 6], "top_logprobs": 2, "stream": True}
    request, events = ask(asked, 40, **options)
    run_core(plain, request)
    expected = finished(events)
    drafting = Core(model, eos_id=NO_EOS, options=EngineOptions(speculate=True))
    oracle(drafting, {sample.choice: sample.tokens for sample in expected}, share)
    request, streamed = ask(asked, 40, **options)
    run_core(drafting, request)
    drafting.scheduler.check()
    for ours, theirs_ in zip(finished(streamed), expected, strict=True):
        assert ours.tokens == theirs_.tokens
        np.testing.assert_allclose(ours.logprobs, theirs_.logprobs, atol=1e-4)
        assert [[token for token, _ in top] for top in ours.top] == [[token for token, _ in top] for top in theirs_.top]
        told = [event.token for event in streamed if event.choice == ours.choice and hasattr(event, "token")]
        assert told == ours.tokens
    counters = drafting.counters
    assert counters.draft_tokens > 0
    assert counters.accepted_draft_tokens == pytest.approx(
        share * counters.draft_tokens, abs=0.2 * counters.draft_tokens
    )
    assert drafting.counters.steps == (
        pytest.approx(40, abs=2) if share == 0 else pytest.approx(40 / (1 + share), abs=6)
    )


def test_drafts_are_those_of_multi_token_prediction():
    """Against the model's own MTP over the whole sequence, without a cache."""
    model = latent_model(4)
    core = Core(model, eos_id=NO_EOS, options=EngineOptions(speculate=True, chunk_tokens=16))
    drafts = {}
    draft = core.steps.draft

    def noted(rows, logits):
        draft(rows, logits)
        drafts[int(core.scheduler.rows.drawn[0])] = logits[0].clone()

    core.steps.draft = noted
    prompt = list(range(3, 40))
    request, events = ask([prompt], 20, temperature=0.0)
    run_core(core, request)
    tokens = torch.tensor([prompt + finished(events)[0].tokens])
    with torch.no_grad():
        length = tokens.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        expected = mtp_logits(model, model.hidden(tokens), tokens, torch.arange(length)[None], mask)[0]
    assert len(drafts) >= 15
    for drawn, logits in drafts.items():
        torch.testing.assert_close(logits, expected[len(prompt) + drawn - 2], atol=1e-4, rtol=1e-3)


def test_frequencies_of_drafted_tokens_follow_the_model():
    """Second and third tokens of 1,500 samples with drafts that are often right, against their exact distribution."""
    model = latent_model(5, vocab_size=8, initializer_range=0.1)
    core = Core(model, eos_id=NO_EOS, slots=8, options=EngineOptions(speculate=True))
    request, events = ask([[1, 2]], 3, n=1500, seed=1)
    generator = np.random.default_rng(2)
    core.steps.draft = lambda rows, logits: core.scheduler.rows.draft.__setitem__(
        rows, generator.integers(0, 8, len(rows))
    )
    run_core(core, request)
    assert core.counters.accepted_draft_tokens > 150
    with torch.no_grad():
        first = torch.softmax(model(torch.tensor([[1, 2]]))[0, -1], -1)
        pairs = [[1, 2, a] for a in range(8)]
        second = torch.softmax(model(torch.tensor(pairs))[:, -1], -1)
        triples = [[1, 2, a, b] for a in range(8) for b in range(8)]
        third = torch.softmax(model(torch.tensor(triples))[:, -1], -1)
    expected = (first[:, None] * second).reshape(-1, 1) * third
    counts = torch.zeros(8, 8, 8)
    for sample in finished(events):
        counts[tuple(sample.tokens)] += 1
    for axes in ((0, 1), (0, 2), (1, 2)):
        seen, wanted = counts.sum(axes), 1500 * expected.view(8, 8, 8).sum(axes)
        assert ((seen - wanted) ** 2 / wanted).sum() < 24.3, "beyond the 99.9 % quantile of chi-square, 7 degrees"


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("kind", ["deepseek_v3", "llama"])
def test_batch_invariance_is_bitwise(native: bool, kind: str):
    model = MODELS[kind][0]()
    asked = [[5, 17, 30], [8] * 21, [44], [3, 9, 27, 81, 43, 29, 87]]

    def run(options, *requests):
        run_core(made(model, {"block_size": 4, "batch_invariant": True, "native": native, **options}), *requests)

    alone = []
    for index, prompt in enumerate(asked):
        request, events = ask([prompt], 16, seeds=[index])
        run({"slots": 1}, request)
        alone += finished(events)
    drafts = {"speculate": True} if model.mtp_layer is not None else {}
    for options in ({}, {"chunk_tokens": 5, "cache_tokens": 100, **drafts}):
        crowd, _ = ask([[i, 50] for i in range(4)], 9, seed=99, n=2, temperature=1.5)
        request, events = ask(asked, 16, seeds=[0, 1, 2, 3])
        run(options, crowd, request)
        for together, lonely in zip(finished(events), alone, strict=True):
            assert together.tokens == lonely.tokens and together.logprobs == lonely.logprobs
