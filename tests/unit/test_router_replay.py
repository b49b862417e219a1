"""Router replay: the engine notes where it sent each token, and the learner sends it there."""

from __future__ import annotations

import base64
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from isthmus.algos import algorithm_config
from isthmus.data.corpus import Document
from isthmus.engines import Completion, EngineError, Routes, Sampling
from isthmus.engines.elsewhere import check_telling
from isthmus.engines.local.core.core import Core
from isthmus.engines.remote import HttpEngine
from isthmus.engines.remote.openai import OpenAi
from isthmus.errors import IsthmusError
from isthmus.model.model import Model
from isthmus.model.moe import Router, Trace
from isthmus.recipe.schema import EngineOptions
from isthmus.recipe.steps import LossSection, OptimizerSection, RlSection
from isthmus.stages.steps.rl.rollout import Rollout
from isthmus.stages.steps.rl.samples import Samples
from isthmus.trainer.batch import pack
from isthmus.trainer.step import target_logprobs
from tests.support.engine_bundle import ask, finished, run_core, small_model
from tests.support.small import tiny_architecture
from tests.support.small_dense import FAMILIES

PROMPTS = [[5, 17, 230], [8] * 19, [44], [8] * 19 + [3]]


def routes_of(model, tokens):
    """[T, layers * K] of one pass over the whole sequence."""
    trace = Trace()
    with torch.no_grad():
        model.hidden(torch.tensor([tokens]), trace=trace)
    return torch.cat([routing.experts for routing in trace.routings], dim=1)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"cache_tokens": 44, "chunk_tokens": 7, "block_size": 4}, {"speculate": True}], ids=str
)
def test_the_engine_notes_the_experts_of_every_token(native, options, monkeypatch):
    """Whatever way a token took: shared prompts, chunks, the way back to the line, a draft that was right or wrong."""
    model = small_model(8)
    if not native:
        monkeypatch.setattr("isthmus.engines.local.core.runner.NATIVE_WORK", 0)
    core = Core(model, eos_id=-1, slots=6, length=40, options=EngineOptions(record_routes=True, **options))
    request, events = ask(PROMPTS, 12, n=2, seed=3, routes=True)
    run_core(core, request)
    ends = finished(events)
    assert len(ends) == 8
    if "cache_tokens" in options:
        assert core.scheduler.counters.preemptions > 0
    for end in ends:
        expected = routes_of(model, PROMPTS[end.choice // 2] + end.tokens)[:-1]
        assert torch.equal(torch.from_numpy(end.routes).long().sort(1).values, expected.sort(1).values)


def test_without_asking_nothing_is_noted():
    core = Core(small_model(8), eos_id=-1)
    request, events = ask(PROMPTS[:1], 3)
    run_core(core, request)
    assert finished(events)[0].routes is None and not core.records_routes


def test_a_sample_says_which_weights_wrote_each_token():
    core = Core(small_model(8), eos_id=-1, slots=2)
    request, events = ask(PROMPTS[:2], 10, temperature=0.0)
    core.submit(request)
    with torch.inference_mode():
        for _ in range(4):
            core.step()
        core.runner.use(small_model(9))
        core.steps.version = 5
    run_core(core)
    assert [end.versions for end in finished(events)] == [[0] * 4 + [5] * 6] * 2


def test_a_router_takes_over_experts_and_weighs_them_by_its_own_scores():
    router = Router(tiny_architecture(n_group=1, topk_group=1))
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(1))
    x = torch.randn(5, router.weight.shape[1], generator=torch.Generator().manual_seed(2))
    own = router(x)
    assert torch.equal(router(x, own.experts).weights, own.weights)
    assert torch.equal(router(x, torch.full((5, 2), -1)).experts, own.experts)
    chosen = torch.tensor([[3, 0]] * 5)
    taken = router(x, chosen)
    scores = F.linear(x, router.weight).sigmoid()[:, [3, 0]]
    expected = router.scaling * scores / scores.sum(1, keepdim=True)
    torch.testing.assert_close(taken.weights, expected)
    taken.weights[:, 0].sum().backward()
    assert (router.weight.grad[[0, 3]] != 0).any(1).all() and torch.all(router.weight.grad[[1, 2]] == 0)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_learner_computes_what_an_engine_of_other_routes_computed(recompute):
    """Other routers choose; with their choices and its own scores the learner's log-probabilities and gradients are
    those of a model that has no choice."""
    model = Model(tiny_architecture(num_nextn_predict_layers=0)).initialise(3)
    if recompute:
        model.recompute_activations()
    batch = pack([Document([3, 7, 9, 4, 1], 2), Document([5, 5, 6], 1)])
    layers = len(model.routers())
    chance = torch.Generator().manual_seed(5)
    pairs = torch.rand(*batch.tokens.shape, layers, 4, generator=chance).topk(2).indices
    replayed, _ = target_logprobs(model, batch, 0.8, pairs)
    replayed.sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    for index, router in enumerate(model.routers()):
        flat = pairs[:, :, index].reshape(-1, 2)
        router.choose = lambda _biased, flat=flat: flat
    forced, _ = target_logprobs(model, batch, 0.8)
    forced.sum().backward()
    assert torch.equal(replayed, forced)
    own = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(torch.equal(one, other) for one, other in zip(gradients, own, strict=True))


def completion(tokens, routes):
    told = torch.tensor(routes, dtype=torch.uint8).numpy()
    return Completion(tokens, [-1.0] * len(tokens), "stop", 0, 0, routes=_packed(told))


def _packed(told):
    return Routes(told.shape, "uint8", base64.b64encode(told.tobytes()).decode())


def test_routes_stand_where_their_tokens_stand():
    """Two prompts of 2 and 1 tokens, packed; the last token of a sample has no route."""
    first = completion([7, 8], [[1, 0], [2, 0], [3, 0]])
    second = replace(completion([9], [[4, 200]]), logprobs=[-2.0])
    rollout = Rollout([], [[5, 6], [4]], [[first], [second]], [], 1.0)
    samples = Samples.of(rollout, [0, 1], torch.tensor([[1.0], [-1.0]]))
    flat = dict(zip(samples.batch.tokens[0].tolist(), samples.routes[0].tolist(), strict=True))
    assert flat == {5: [1, 0], 6: [2, 0], 7: [3, 0], 8: [-1, -1], 4: [4, 200], 9: [-1, -1]}
    part = samples.with_rows(3).select([0, 2])
    assert part.routes.shape == (2, 6, 2) and part.engine[0].tolist() == samples.engine[0].tolist()


def test_what_cannot_be_replayed_is_refused(monkeypatch):
    section = RlSection(
        name="all",
        kind="rl",
        steps=1,
        optimizer=OptimizerSection(name="adamw", learning_rate=1e-3),
        loss=LossSection(router_replay=True),
    )
    dense = next(iter(FAMILIES.values()))
    with pytest.raises(IsthmusError, match=r"loss.router_replay: a dense model has no experts"):
        algorithm_config(section, dense)
    algorithm_config(section, tiny_architecture())
    engine = HttpEngine("http://127.0.0.1:9")
    monkeypatch.setattr("isthmus.engines.remote.recognise", lambda *_: OpenAi(None, "m"))
    with pytest.raises(EngineError, match=r"cannot tell the experts.*--record-routes"):
        engine.generate([[1]], Sampling(1, routes=True))
    with pytest.raises(EngineError, match=r"step.all.loss.router_replay .*127.0.0.1:9 cannot tell"):
        check_telling("all", section.loss, engine)
