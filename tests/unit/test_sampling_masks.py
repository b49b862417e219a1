"""Samples of which top_p, top_k or min_p left tokens out: the engine tells which, the learner leaves them out too."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from isthmus.data.corpus import Document
from isthmus.engines import Completion, EngineError, Sampling
from isthmus.engines.elsewhere import check_telling
from isthmus.engines.kept import Kept, KeptSet
from isthmus.engines.local.core.core import Core
from isthmus.engines.local.core.sampler import draw, kept_sets
from isthmus.engines.remote import HttpEngine
from isthmus.engines.remote.openai import OpenAi
from isthmus.model.model import Model
from isthmus.recipe.schema import EngineOptions
from isthmus.recipe.steps import LossSection, OptimizerSection, RlSection
from isthmus.rewards import Scores
from isthmus.stages.steps.rl.rollout import Rollout
from isthmus.stages.steps.rl.samples import Samples
from isthmus.trainer.batch import pack
from isthmus.trainer.step import target_logprobs
from tests.support.engine_bundle import ask, finished, run_core, small_model
from tests.support.small import tiny_architecture

PROMPTS = [[5, 17, 230], [8] * 19, [44], [8] * 19 + [3]]
CUTS = [{"top_p": 0.8}, {"top_k": 7}, {"min_p": 0.2}, {"top_p": 0.9, "top_k": 20, "min_p": 0.01}]
INFINITE = float("-inf")


def nucleus(row, top_p):
    """The mask of the fewest likeliest of float64 probabilities [V] whose sum reaches top_p."""
    order = np.argsort(-row, kind="stable")
    before = np.cumsum(row[order]) - row[order]
    mask = np.zeros(len(row), dtype=bool)
    mask[order[before < top_p]] = True
    return mask


# --- what is written down --------------------------------------------------------------------------------------------


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(rows=st.lists(st.lists(st.booleans(), min_size=9, max_size=9).filter(any), max_size=5))
def test_a_set_is_what_was_written_down(rows):
    masks = np.array(rows, dtype=bool).reshape(-1, 9)
    found = Kept.of([KeptSet.of(mask) for mask in masks], 9).sets()
    for mask, one in zip(masks, found, strict=True):
        assert len(one.ids) <= 4, "the shorter list is written down"
        listed = np.isin(np.arange(9), one.ids)
        assert np.array_equal(~listed if one.left_out else listed, mask)


def test_what_was_kept_takes_little_room():
    """Of 150,000 tokens: 300 draws that keep 20 each, and 300 that keep all."""
    chance = np.random.default_rng(0)
    some = [KeptSet(np.sort(chance.choice(150_000, 20, replace=False)).astype(np.int32), False) for _ in range(300)]
    assert len(Kept.of(some, 150_000).data) < 300 * 20 * 4
    assert len(Kept.of([KeptSet.of(np.ones(150_000, dtype=bool))] * 300, 150_000).data) < 100


def test_damaged_sets_are_refused():
    good = Kept.of([KeptSet(np.array([2, 5], dtype=np.int32), False), KeptSet(np.array([1], dtype=np.int32), True)], 9)
    good.check([5, 0])
    for tokens in ([5, 1], [3, 0], [5], [5, 9]):
        with pytest.raises(ValueError, match=r"its draw kept|tokens come with"):
            good.check(tokens)
    large = Kept.of([KeptSet(np.arange(4, dtype=np.int32), False)] * 99, 9)
    for damaged in (
        replace(good, data=good.data[:-8]),
        replace(good, data="?"),
        replace(good, draws=3),
        replace(good, vocabulary=4),
        replace(large, draws=2),
    ):
        with pytest.raises(ValueError, match=r"."):
            damaged.sets()


# --- the engine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_the_learner_has_the_bits_of_the_engine_on_the_same_logits(cuts):
    logits = 3 * torch.randn(40, 50, generator=torch.Generator().manual_seed(1))
    uniform = torch.rand(40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    every = torch.ones(40)
    top_p, top_k, min_p = cuts.get("top_p", 1.0), cuts.get("top_k", 0), cuts.get("min_p", 0.0)
    found = draw(logits, 0.7 * every, top_p * every, uniform, top_k * every.long(), min_p * every)
    left_out = found.distribution == INFINITE
    assert left_out.any(1).all()
    ours = F.log_softmax((logits / 0.7).masked_fill(left_out, INFINITE), dim=-1)
    assert torch.equal(ours.gather(-1, found.tokens.unsqueeze(1)).squeeze(1), found.logprobs)
    sets = kept_sets(found.distribution)
    assert [len(one.ids) if not one.left_out else 50 - len(one.ids) for one in sets] == (~left_out).sum(1).tolist()


@pytest.mark.parametrize(
    "options", [{}, {"cache_tokens": 44, "chunk_tokens": 7, "block_size": 4}, {"speculate": True}], ids=str
)
def test_the_engine_tells_what_every_token_was_drawn_among(options):
    """Whatever way a token took: shared prompts, chunks, the way back to the line, a draft that was right or wrong."""
    model = small_model(8)
    core = Core(model, eos_id=-1, slots=6, length=40, options=EngineOptions(**options))
    request, events = ask(PROMPTS, 12, n=2, seed=3, kept=True, temperature=0.8, top_p=0.7)
    silent, others = ask(PROMPTS[:2], 12, seed=4, top_p=0.7)
    run_core(core, request, silent)
    assert all(end.kept is None for end in finished(others))
    if "cache_tokens" in options:
        assert core.scheduler.counters.preemptions > 0
    exact = small_model(8).double()
    for end in finished(events):
        prompt = PROMPTS[end.choice // 2]
        with torch.no_grad():
            rows = F.softmax(exact(torch.tensor([prompt + end.tokens]))[0, len(prompt) - 1 : -1] / 0.8, -1).numpy()
        end.kept.check(end.tokens)
        for row, one, token, logprob in zip(rows, end.kept.sets(), end.tokens, end.logprobs, strict=True):
            expected = nucleus(row, 0.7)
            listed = np.isin(np.arange(len(row)), one.ids)
            assert np.array_equal(~listed if one.left_out else listed, expected)
            assert logprob == pytest.approx(math.log(row[token] / row[expected].sum()), abs=2e-5)


def test_engines_that_cannot_tell_are_refused_by_name(monkeypatch):
    engine = HttpEngine("http://127.0.0.1:9")
    monkeypatch.setattr("isthmus.engines.remote.recognise", lambda *_: OpenAi(None, "m"))
    with pytest.raises(EngineError, match=r"OpenAI's API .*at http://127.0.0.1:9 is not asked to leave"):
        engine.generate([[1]], Sampling(1, top_k=3))
    with pytest.raises(EngineError, match=r"step.zero.loss.keep_sampling_mask .*127.0.0.1:9 cannot be asked"):
        check_telling("zero", LossSection(keep_sampling_mask=True), engine)


# --- the learner -----------------------------------------------------------------------------------------------------


def completion(tokens, sets, vocabulary, logprob=-1.0):
    told = Kept.of([KeptSet(np.array(ids, dtype=np.int32), out) for ids, out in sets], vocabulary)
    return Completion(tokens, [logprob] * len(tokens), "stop", 0, 0, kept=told)


def test_sets_stand_where_their_tokens_stand():
    first = completion([7, 8], [([7, 9], False), ([], True)], 10)
    second = completion([9], [([0], True)], 10)
    rollout = Rollout([], [[5, 6], [4]], [[first], [second]], Scores({}, []), 1.0)
    samples = Samples.of(rollout, [1, 0], torch.tensor([[1.0], [-1.0]]), world=2)
    for part in (samples, samples.with_rows(4), samples.select([1, 0]).select([1, 0])):
        at = part.batch.tokens[part.batch.target_mask].tolist()
        kept = {token: (~row).nonzero().flatten().tolist() for token, row in zip(at, part.left_out, strict=True)}
        assert kept == {7: [7, 9], 8: list(range(10)), 9: list(range(1, 10))}
    assert (
        samples.select([0]).left_out.shape[1] == 10
        and Samples.of(
            replace(rollout, completions=[[replace(first, kept=None)], [replace(second, kept=None)]]),
            [0, 1],
            torch.tensor([[1.0], [-1.0]]),
        ).left_out
        is None
    )


def test_log_probabilities_and_gradients_of_a_written_out_example():
    """A head that gives the logits 0, ln 2, ln 3, ln 4 at temperature 2; the third is left out, then two of them, then
    none. In float64: probabilities are square roots over the sums of those that are kept."""
    logits = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64).log()
    model = Model(tiny_architecture(vocab_size=4, num_nextn_predict_layers=0)).double()
    seen = logits.expand(3, 4).clone().requires_grad_()
    model.logits = lambda states: seen
    batch = pack([Document([0, 3, 1, 2], 1)])
    left_out = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0]]).bool()
    found, entropy = target_logprobs(model, batch, 2.0, left_out=left_out)
    roots = [1.0, math.sqrt(2), math.sqrt(3), 2.0]
    sums = [3 + roots[1], roots[1] + roots[2], sum(roots)]
    expected = [math.log(2 / sums[0]), math.log(roots[1] / sums[1]), math.log(roots[2] / sums[2])]
    assert found.tolist() == pytest.approx(expected, rel=1e-14)
    pairs = zip(sums, left_out.tolist(), strict=True)
    shares = [[r / total * (not out) for r, out in zip(roots, row, strict=True)] for total, row in pairs]
    assert entropy.tolist() == pytest.approx([-sum(p * math.log(p) for p in row if p) for row in shares], rel=1e-12)
    found.sum().backward()
    # Of log p_i by x_j at temperature T: ((i = j) - p_j) / T; 0 for what is left out.
    slopes = [
        [((token == j) - p) / 2 * (p > 0) for j, p in enumerate(row)]
        for token, row in zip([3, 1, 2], shares, strict=True)
    ]
    assert seen.grad.tolist() == [pytest.approx(row, rel=1e-12, abs=1e-15) for row in slopes]


def test_where_nothing_is_left_out_the_bits_are_those_of_no_mask():
    model = Model(tiny_architecture(num_nextn_predict_layers=0)).initialise(3)
    batch = pack([Document([3, 7, 9, 4, 1], 2), Document([5, 5, 6], 1)])

    def computed(left_out):
        model.zero_grad()
        logprobs, entropy = target_logprobs(model, batch, 0.8, left_out=left_out)
        logprobs.sum().backward()
        return [logprobs.detach(), entropy, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    nothing = torch.zeros(5, model.architecture.vocab_size, dtype=torch.bool)
    assert all(map(torch.equal, computed(None), computed(nothing)))


def test_the_learner_agrees_with_the_engine_where_the_mask_is_kept_alone():
    """What an engine in fp32 drew from a nucleus: the learner's log-probabilities differ by rounding with the mask, and
    by what the nucleus leaves out without it."""
    model = small_model(8)
    core = Core(model, eos_id=-1, slots=8)
    request, events = ask(PROMPTS, 12, n=2, seed=3, kept=True, temperature=0.8, top_p=0.9)
    run_core(core, request)
    ends = finished(events)
    groups = [
        [Completion(end.tokens, end.logprobs, "length", 0, 0, kept=end.kept) for end in ends[2 * p : 2 * p + 2]]
        for p in range(len(PROMPTS))
    ]
    rollout = Rollout([], PROMPTS, groups, Scores({}, []), 1.0)
    samples = Samples.of(rollout, list(range(8)), torch.ones(4, 2), row_length=60)
    engine = samples.at_targets(samples.engine)
    with torch.no_grad():
        masked, _ = target_logprobs(model, samples.batch, 0.8, left_out=samples.left_out)
        plain, _ = target_logprobs(model, samples.batch, 0.8)
    assert len(samples.batch.tokens) > 1 and (masked - engine).abs().max() < 1e-5
    assert (masked - plain).min() > 0.02


# --- the recipe ------------------------------------------------------------------------------------------------------


def section(**changes):
    return RlSection(
        name="zero", kind="rl", steps=1, optimizer=OptimizerSection(name="adamw", learning_rate=1e-3), **changes
    )


@pytest.mark.parametrize("cut", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}], ids=str)
def test_what_is_sampled_is_what_is_learnt_or_it_is_refused(cut):
    with pytest.raises(ValueError, match=r"set loss.keep_sampling_mask = true"):
        section(**cut)
    assert section(**cut, loss={"keep_sampling_mask": True}).cuts and not section().cuts
    with pytest.raises(ValueError, match=r"set one of them"):
        section(loss={"keep_sampling_mask": True})
    with pytest.raises(ValueError, match=r"a server scores all tokens"):
        section(**cut, loss={"keep_sampling_mask": True}, algorithm="opd", teacher={"url": "http://a"})
