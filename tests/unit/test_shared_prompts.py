"""Samples of one prompt: the learner computes it once, and learns what it learns of each sample alone."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.data.corpus import Document
from isthmus.engines import Completion
from isthmus.model.model import Model
from isthmus.model.moe import Trace
from isthmus.rewards import Scores
from isthmus.stages.steps.rl.rollout import Rollout
from isthmus.stages.steps.rl.samples import Samples
from isthmus.trainer.batch import pack
from isthmus.trainer.step import target_logprobs
from tests.support.small import tiny_architecture
from tests.support.small_dense import dense_architecture

TEMPERATURE = 0.7
FAMILIES = {
    "deepseek_v3": tiny_architecture(num_nextn_predict_layers=0),
    "llama": dense_architecture("llama"),
    "mistral, whose window ends within prompts": dense_architecture("mistral", sliding_window=5),
}


@st.composite
def rollouts(draw: st.DrawFn) -> tuple[Rollout, list[int]]:
    """A few prompts with samples of any lengths, and which of them are learnt from, in any order."""
    token = st.integers(0, 60)
    samples = draw(st.integers(2, 4))
    prompts = draw(st.lists(st.lists(token, min_size=1, max_size=20), min_size=1, max_size=3))
    completions = [
        [
            Completion(tokens, [-1.0] * len(tokens), "stop", 0, 0)
            for tokens in draw(st.lists(st.lists(token, min_size=1, max_size=12), min_size=samples, max_size=samples))
        ]
        for _ in prompts
    ]
    numbers = st.sampled_from(range(samples * len(prompts)))
    kept = draw(st.lists(numbers, min_size=1, unique=True))
    return Rollout([], prompts, completions, Scores({}, []), 1.0), kept


def alone(model: Model, rollout: Rollout, number: int) -> torch.Tensor:
    """Log-probabilities of the tokens of one sample, by the plain model on nothing else."""
    prompt, one = rollout.flat[number]
    tokens = torch.tensor([[*rollout.prompts[prompt], *one.tokens]])
    rows = (model(tokens)[0, -len(one.tokens) - 1 : -1] / TEMPERATURE).log_softmax(-1)
    return rows.gather(1, tokens[0, -len(one.tokens) :, None]).squeeze(1)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, derandomize=True, deadline=None, database=None)
@given(drawn=rollouts(), row_length=st.none() | st.integers(8, 40), world=st.integers(1, 3), seed=st.integers(0, 9))
def test_log_probabilities_and_gradients_are_those_of_each_sample_alone(family, drawn, row_length, world, seed):
    """In float64, with a weight for each sample."""
    (rollout, kept), model = drawn, Model(FAMILIES[family]).initialise(seed).double()
    weights = torch.randn(len(rollout.flat), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    samples = Samples.of(rollout, kept, weights.view(len(rollout.prompts), -1), row_length, world)
    found, _ = target_logprobs(model, samples.batch, TEMPERATURE)
    (found * samples.at_targets(samples.advantages)).sum().backward()
    gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    expected = {position: alone(model, rollout, number) for position, number in enumerate(kept)}
    torch.stack([(values * weights[kept[at]]).sum() for at, values in expected.items()]).sum().backward()
    for position, values in expected.items():
        own = samples.sample == position
        assert samples.batch.tokens[samples.batch.target_mask][own].tolist() == rollout.flat[kept[position]][1].tokens
        torch.testing.assert_close(found[own], values, rtol=1e-10, atol=1e-12)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-12)


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(drawn=rollouts(), row_length=st.none() | st.integers(8, 40), world=st.integers(1, 3))
def test_a_prompt_is_there_once_unless_its_samples_would_fill_more_than_a_row(drawn, row_length, world):
    rollout, kept = drawn
    documents = [[*rollout.prompts[prompt], *one.tokens] for prompt, one in map(rollout.flat.__getitem__, kept)]
    batch = Samples.of(
        rollout, kept, torch.zeros(len(rollout.prompts), len(rollout.completions[0])), row_length, world
    ).batch
    completions = sum(len(rollout.flat[number][1].tokens) for number in kept)
    asked = {rollout.flat[number][0] for number in kept}
    once = completions + sum(len(rollout.prompts[prompt]) for prompt in asked)
    each = sum(map(len, documents))
    assert once <= batch.num_tokens <= each and int(batch.target_mask.sum()) == completions
    if row_length is None:
        assert batch.num_tokens == once
    assert len(batch.tokens) % world == 0
    most = max(row_length or each, *map(len, documents))
    for positions, document in zip(batch.positions, batch.document, strict=True):
        real = int((document >= 0).sum())
        beginnings = (positions[:real] == 0).nonzero().flatten().tolist()
        lengths = [after - before for before, after in pairwise([*beginnings, real])]
        assert all(length <= most for length in lengths)


def test_documents_that_share_nothing_are_packed_as_ever():
    documents = [Document([3, 7, 9, 4, 1], 2), Document([5, 5, 6], 1), Document([8, 8, 8, 8], 3)]
    for row_length in (None, 5):
        plain, listed = pack(documents, row_length), pack(documents, row_length, 1, [[0], [1], [2]])
        for name in ("tokens", "positions", "document", "target_mask"):
            assert torch.equal(getattr(plain, name), getattr(listed, name))
        assert not plain.shares_prompts


def test_each_token_of_a_shared_prompt_is_routed_once():
    model = Model(FAMILIES["deepseek_v3"]).initialise(0)
    tokens = [Completion([token, 4], [-1.0, -1.0], "stop", 0, 0) for token in (1, 2, 3)]
    rollout = Rollout([], [[9, 8, 7, 6, 5]], [tokens], Scores({}, []), 1.0)
    batch = Samples.of(rollout, [0, 1, 2], torch.zeros(1, 3)).batch
    trace = Trace()
    model.hidden(batch.tokens, batch.positions, trace=trace)
    assert batch.tokens.tolist() == [[9, 8, 7, 6, 5, 1, 4, 2, 4, 3, 4]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 5, 6, 5, 6]]
    assert {len(routing.experts) for routing in trace.routings} == {11}
