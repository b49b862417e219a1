"""The API and the engine together: constraints, penalties, biases, stops and prompt log-probabilities of a model."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import jsonschema
import openai
import pytest
import torch
from llguidance import LLParserLimits

from isthmus.engines import Sampling
from isthmus.engines.local.api.server import Server
from isthmus.engines.local.api.service import Identity, Service
from isthmus.engines.local.core.core import Core
from isthmus.engines.remote import HttpEngine
from isthmus.model.moe import Trace
from isthmus.recipe.schema import EngineOptions
from tests.support.engine_bundle import small_model, small_tokenizer
from tests.support.live_server import call, live

CHAT = [{"role": "user", "content": "Use 3, 4 and 5 to reach 23."}]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "é"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def service():
    tokenizer = small_tokenizer()
    model = small_model(vocab_size=320, max_position_embeddings=256)
    model.lm_head.weight[tokenizer.encode("</think>")[0]] *= 3
    core = Core(model, eos_id=tokenizer.eos_id, slots=8)
    core.start()
    return Service(Identity("small", "fp32"), model.architecture, core, tokenizer, {}, "")


@pytest.fixture(scope="module")
def port(service):
    with live(Server(service)) as port:
        yield port


@pytest.fixture(scope="module")
def client(port):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client, **fields):
    body = {"return_token_ids": True, **fields.pop("body", {})}
    return client.completions.create(**{"model": "small", "prompt": "Use 3", "seed": 1, **fields}, extra_body=body)


def test_answers_keep_to_a_schema_after_free_thinking(client):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    bias = {str(token): -100 for token in blanks()}
    options = {"model": "small", "messages": CHAT, "seed": 2, "response_format": form, "n": 6, "logit_bias": bias}
    answer = client.chat.completions.create(**options)
    ended = [choice for choice in answer.choices if choice.finish_reason == "stop"]
    assert len(ended) >= 3 and any(choice.message.reasoning_content for choice in ended)
    for choice in ended:
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    streamed: dict[int, str] = {}
    for chunk in client.chat.completions.create(**options, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
    assert streamed == {choice.index: choice.message.content for choice in answer.choices}


def blanks():
    tokenizer = small_tokenizer()
    return [token for token in range(tokenizer.vocab_size) if not tokenizer.decode([token], skip_special=False).strip()]


@pytest.mark.parametrize("pattern", [r"[ab]{2,9}", r"(3|4)( \+ (3|4)){0,3}"])
def test_constrained_and_free_requests_run_beside_each_other(client, pattern):
    found = complete(client, n=8, max_tokens=40, body={"structured_outputs": {"regex": pattern}})
    for choice in found.choices:
        assert choice.finish_reason == "stop" and re.fullmatch(pattern, choice.text)


def test_logprobs_under_a_constraint_are_those_of_what_was_sampled(client):
    choice = complete(client, max_tokens=9, logprobs=3, body={"structured_outputs": {"choice": ["4", "5"]}}).choices[0]
    first = choice.logprobs.top_logprobs[0]
    assert set(first) == {"4", "5"} and sum(torch.tensor(list(first.values())).exp()).item() == pytest.approx(
        1, abs=1e-4
    )


def test_a_bias_forbids_forces_and_a_stop_token_ends(client, service):
    token = service.tokenizer.encode("✓")[-1]
    forced = complete(client, max_tokens=5, body={"logit_bias": {str(token): 100}}).choices[0]
    assert forced.token_ids == [token] * 5 and forced.finish_reason == "length"
    ended = complete(client, max_tokens=5, body={"logit_bias": {str(token): 100}, "stop_token_ids": [token]}).choices[0]
    assert (ended.token_ids, ended.finish_reason, ended.stop_reason) == ([token], "stop", token)
    later = complete(
        client, max_tokens=9, body={"logit_bias": {str(token): 100}, "stop_token_ids": [token], "min_tokens": 4}
    ).choices[0]
    assert len(later.token_ids) == 5 and later.token_ids.index(token) == 4
    end = service.tokenizer.eos_id
    body = {"logit_bias": {str(end): 100}}
    assert complete(client, max_tokens=4, body=body).choices[0].token_ids == [end]
    assert complete(client, max_tokens=4, body={**body, "ignore_eos": True}).choices[0].token_ids == [end] * 4


def test_penalties_keep_tokens_from_coming_back(client):
    greedy = {"max_tokens": 40, "temperature": 0}
    free = complete(client, **greedy, body={"ignore_eos": True}).choices[0].token_ids
    kept = complete(client, **greedy, presence_penalty=2, frequency_penalty=2, body={"ignore_eos": True}).choices[0]
    assert len(set(kept.token_ids)) > len(set(free))


def test_prompt_logprobs_and_echo_agree_with_the_model(client, service):
    prompt = service.tokenizer.encode("Use 3, 4 and 5 to reach 23.")
    with torch.no_grad():
        expected = torch.log_softmax(service.core.runner.model(torch.tensor([prompt]))[0], -1)
    answer = complete(client, prompt=prompt, echo=True, logprobs=2, max_tokens=0, body={"prompt_logprobs": 3})
    choice = answer.choices[0]
    assert answer.usage.completion_tokens == 0 and choice.finish_reason == "length"
    for place, token in enumerate(prompt[1:]):
        row = expected[place]
        shown = choice.prompt_logprobs[place + 1]
        assert shown[str(token)]["logprob"] == pytest.approx(row[token].item(), abs=1e-3)
        assert shown[str(token)]["rank"] == int((row > row[token]).sum()) + 1
        assert choice.logprobs.token_logprobs[place + 1] == shown[str(token)]["logprob"]
        best = row.topk(3)
        for rank, (value, other) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True), 1):
            assert shown[str(other)]["rank"] == rank and shown[str(other)]["logprob"] == pytest.approx(value, abs=1e-3)


def test_the_experts_of_tokens_come_with_a_completion(port, client, service):
    body = {"return_routed_experts": True}
    status, refused = call(port, "POST", "/v1/completions", {"model": "small", "prompt": [5, 6], **body})
    assert status == 400 and "--record-routes" in refused["error"]["message"]
    core = Core(service.core.runner.model, eos_id=-1, slots=2, options=EngineOptions(record_routes=True))
    core.start()
    with live(Server(replace(service, core=core))) as other:
        engine = HttpEngine(f"http://127.0.0.1:{other}")
        assert engine.cannot_tell_routes == []
        first, second = engine.generate([[5, 6, 7], [9]], Sampling(4, seed=2, routes=True))
    assert HttpEngine(f"http://127.0.0.1:{port}").cannot_tell_routes
    for prompt, (one,) in (([5, 6, 7], first), ([9], second)):
        trace = Trace()
        service.core.runner.model.hidden(torch.tensor([prompt + one.tokens]), trace=trace)
        expected = torch.cat([routing.experts for routing in trace.routings], dim=1)[:-1]
        assert torch.equal(torch.from_numpy(one.routes.array()).long(), expected)
        assert one.versions == [(0, 4)]


def test_what_tokens_were_drawn_among_comes_with_a_completion(port, service):
    """Over HTTP as in the engine: of the likeliest tokens of the model those whose probability reaches top_p."""
    body = {"model": "small", "prompt": [5, 6], "return_sampling_mask": True}
    for more in ({"stream": True}, {"stop": ["x"]}):
        status, refused = call(port, "POST", "/v1/completions", {**body, **more})
        assert status == 400 and "sampling masks cannot be streamed" in refused["error"]["message"]
    engine = HttpEngine(f"http://127.0.0.1:{port}")
    assert engine.cannot_tell_kept == []
    (one, other), _ = engine.generate([[5, 6, 7], [9]], Sampling(4, seed=2, n=2, top_p=0.6, kept=True))
    (plain,) = engine.generate([[5, 6, 7]], Sampling(4, seed=2))[0]
    assert plain.kept is None and one.kept != other.kept
    with torch.no_grad():
        rows = torch.softmax(service.core.runner.model(torch.tensor([[5, 6, 7, *one.tokens]]))[0, 2:-1].double(), -1)
    for row, told, token, logprob in zip(rows, one.kept.sets(), one.tokens, one.logprobs, strict=True):
        ordered = row.sort(descending=True)
        count = int((ordered.values.cumsum(0) - ordered.values < 0.6).sum())
        nucleus = sorted(ordered.indices[:count].tolist())
        assert nucleus == (sorted(set(range(320)) - set(told.ids.tolist())) if told.left_out else told.ids.tolist())
        assert token in nucleus and logprob == pytest.approx((row[token] / row[nucleus].sum()).log().item(), abs=1e-4)


def test_a_prompt_that_was_seen_comes_from_the_prefix_cache(client):
    prompt = [7 + place % 200 for place in range(120)]
    first, second = (complete(client, prompt=prompt, max_tokens=3, temperature=0) for _ in range(2))
    assert second.usage.prompt_tokens_details.cached_tokens > first.usage.prompt_tokens_details.cached_tokens
    assert first.choices[0].token_ids == second.choices[0].token_ids


def test_a_format_that_becomes_too_costly_is_told_and_the_next_request_is_served(port, service, monkeypatch):
    monkeypatch.setattr(service.grammars, "limits", LLParserLimits(max_lexer_states=60, verbose_errors=False))
    endless = {str(token): -100 for token in range(300) if "c" in service.tokenizer.decode([token])}
    wanted = {"regex": "(a|b)*a(a|b){12}c"}
    body = {"prompt": "a", "seed": 4, "max_tokens": 200, "structured_outputs": wanted, "logit_bias": endless}
    status, answer = call(port, "POST", "/v1/completions", body)
    assert status == 400 and answer["error"]["code"] == "format_too_complex"
    assert call(port, "POST", "/v1/completions", {"prompt": "a", "max_tokens": 2})[0] == 200
