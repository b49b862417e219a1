"""The HTTP face: what the openai client sees, what is refused, and how tokens become text."""

from __future__ import annotations

import gc
import http.client
import json
import socket
import time

import openai
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as BpeTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from isthmus.data.tokenizer import Tokenizer
from isthmus.engines.local.api.host import bind
from isthmus.engines.local.api.server import Server
from isthmus.engines.local.api.service import load_service
from isthmus.engines.local.api.text import (
    CLOSE_THINK,
    OPEN_THINK,
    ChannelledText,
    PlainText,
    Rules,
    StopCutter,
    Vocabulary,
)
from isthmus.errors import IsthmusError
from tests.support.engine_bundle import small_tokenizer, write_small_bundle
from tests.support.live_server import call, live, refused

ADMIN_KEY = "sesame"
CHAT = [{"role": "user", "content": "Use 3, 4 and 5 to reach 23."}]


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server") / "small"
    write_small_bundle(folder)
    return load_service(folder, slots=8)


@pytest.fixture(scope="module")
def port(service):
    service.examples = ["Use 1, 2 and 3 to reach 6."]
    with live(Server(service, admin_key=ADMIN_KEY, page=True)) as port:
        yield port


@pytest.fixture(scope="module")
def client(port):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models_lists_the_one_that_is_served(client):
    models = client.models.list().data
    assert [model.id for model in models] == ["small"] and models[0].max_model_len == 96


def test_chat_keeps_the_thinking_apart_from_the_answer(client, service):
    answers = [
        client.chat.completions.create(
            model="small", messages=CHAT, seed=seed, max_tokens=30, extra_body={"return_token_ids": True}
        )
        for seed in range(8)
    ]
    end = service.vocabulary.close_think
    closed = 0
    for answer in answers:
        tokens, message = answer.choices[0].token_ids, answer.choices[0].message
        assert answer.usage.completion_tokens == len(tokens) and answer.system_fingerprint == "unsealed-v0"
        assert answer.prompt_token_ids == service.tokenizer.chat(CHAT) and answer.usage.prompt_tokens == len(
            answer.prompt_token_ids
        )
        if tokens.count(end) == 1 and service.vocabulary.open_think not in tokens:
            closed += 1
            thought, content = tokens[: tokens.index(end)], tokens[tokens.index(end) + 1 :]
            assert (message.reasoning_content or "") == service.tokenizer.decode(thought)
            assert message.content == service.tokenizer.decode(content).lstrip("\n")
            assert message.reasoning == message.reasoning_content
        if end not in tokens:
            assert message.content == "" and message.reasoning_content == service.tokenizer.decode(tokens)
    assert closed, "the test needs a completion that closes its thinking"


@pytest.mark.parametrize("stop", [None, ["e", "3"]])
def test_a_streamed_chat_says_what_the_whole_one_says(client, stop):
    options = {
        "model": "small",
        "messages": CHAT,
        "seed": 3,
        "max_completion_tokens": 40,
        "n": 3,
        "logprobs": True,
        "stop": stop,
    }
    whole = client.chat.completions.create(**options)
    texts = {channel: [""] * 3 for channel in ("content", "reasoning_content", "reasoning")}
    reasons, tokens, count, roles = {}, [[], [], []], None, []
    for chunk in client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        assert chunk.object == "chat.completion.chunk"
        count = chunk.usage or count
        for choice in chunk.choices:
            roles += [choice.delta.role] if choice.delta.role else []
            for channel, found in texts.items():
                found[choice.index] += getattr(choice.delta, channel, None) or ""
            tokens[choice.index] += [step.token for step in (choice.logprobs.content if choice.logprobs else [])]
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert roles == ["assistant"] * 3
    for choice in whole.choices:
        message = choice.message
        assert texts["content"][choice.index] == message.content
        assert (
            texts["reasoning_content"][choice.index]
            == (message.reasoning_content or "")
            == texts["reasoning"][choice.index]
        )
        assert reasons[choice.index] == choice.finish_reason
        assert tokens[choice.index] == [step.token for step in choice.logprobs.content]
        if stop:
            assert not set("e3") & set(message.content + (message.reasoning_content or ""))
    assert count == whole.usage


def test_logprobs_of_chat_come_with_alternatives(client):
    answer = client.chat.completions.create(
        model="small", messages=CHAT, seed=1, max_tokens=5, temperature=1.0, logprobs=True, top_logprobs=4
    )
    for step in answer.choices[0].logprobs.content:
        values = [top.logprob for top in step.top_logprobs]
        assert len(values) == 4 and values == sorted(values, reverse=True)
        text = bytes(step.bytes).decode(errors="backslashreplace")
        assert text == step.token
        assert step.logprob <= values[0] + 1e-6


def test_completions_take_texts_and_token_ids_alike(client, service):
    text = "Use 3, 4"
    ids = service.tokenizer.encode(text)
    options = {"model": "small", "max_tokens": 10, "temperature": 0.0, "extra_body": {"return_token_ids": True}}
    one, many, tokens, lists = (
        client.completions.create(prompt=prompt, **options) for prompt in (text, [text, "5"], ids, [ids, ids])
    )
    assert one.choices[0].token_ids == many.choices[0].token_ids == tokens.choices[0].token_ids
    assert [choice.index for choice in lists.choices] == [0, 1]
    assert [choice.prompt_token_ids for choice in many.choices] == [ids, service.tokenizer.encode("5")]
    assert one.choices[0].text == service.tokenizer.decode(one.choices[0].token_ids)
    assert client.completions.create(model="small", prompt=text, seed=1).usage.completion_tokens <= 16


def test_completion_logprobs_have_the_legacy_layout_streamed_or_not(client):
    options = {"model": "small", "prompt": "Use 3", "max_tokens": 12, "seed": 5, "temperature": 1.0}
    whole = client.completions.create(**options, logprobs=2).choices[0].logprobs
    assert len(whole.tokens) == len(whole.token_logprobs) == len(whole.top_logprobs) == len(whole.text_offset)
    assert whole.text_offset == sorted(whole.text_offset) and whole.text_offset[0] == 0
    assert all(
        len(top) <= 2 and max(top.values()) >= value - 1e-6
        for top, value in zip(whole.top_logprobs, whole.token_logprobs, strict=True)
    )
    assert client.completions.create(**options, logprobs=0).choices[0].logprobs.top_logprobs is None
    parts = [
        choice.logprobs
        for chunk in client.completions.create(**options, logprobs=2, stream=True)
        for choice in chunk.choices
        if choice.logprobs
    ]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [item for part in parts for item in getattr(part, name)] == getattr(whole, name)


def test_seeds_give_each_prompt_its_own_stream(client):
    def tokens(**options):
        answer = client.completions.create(
            model="small",
            max_tokens=12,
            temperature=1.0,
            extra_body={"return_token_ids": True, **options.pop("extra", {})},
            **options,
        )
        return [choice.token_ids for choice in answer.choices]

    both = tokens(prompt=["a", "b"], extra={"seeds": [4, 9]})
    assert both == tokens(prompt=["a"], seed=4) + tokens(prompt=["b"], seed=9)
    assert tokens(prompt="a") != tokens(prompt="a"), "without a seed each request has its own"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"best_of": 3}, "best_of"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"suffix": "b"}, "suffix"),
        ({"min_p": 1.5}, "min_p"),
        ({"top_k": -2}, "top_k"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"300": 1}}, "logit_bias"),
        ({"logit_bias": {"3": 101}}, "logit_bias"),
        ({"stop_token_ids": [300]}, "stop_token_ids"),
        ({"stop": ["a"] * 900_000}, "stop"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"seed": 1 << 70}, "seed"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"echo": True, "logprobs": 1, "stream": True}, "echo"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"top_p": 0}, "top_p"),
        ({"logprobs": 21}, "logprobs"),
        ({"seeds": [1, 2]}, "seeds"),
        ({"seeds": [1], "seed": 2}, "seeds"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [1, -4]}, "prompt"),
        ({"prompt": [1, 300]}, "prompt"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"stop": ""}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_refused_by_name(port, fields, named):
    error = refused(port, "/v1/completions", **{"prompt": "a", **fields})
    assert error["param"] == named and named in error["message"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "look"}}]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"messages": [{"role": "user", "content": "long " * 200}]}, "messages"),
        ({"max_completion_tokens": 96}, "max_completion_tokens"),
    ],
)
def test_chat_refuses_what_it_cannot_do(port, fields, named):
    assert refused(port, "/v1/chat/completions", **{"messages": CHAT, **fields})["param"] == named


def test_an_over_long_prompt_says_how_long_it_may_be(port):
    error = refused(port, "/v1/completions", prompt=[5] * 96)
    assert error["message"].startswith(
        "This model's maximum context length is 96 tokens. However, you requested 112 tok"
    )
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    over = refused(port, "/v1/completions", prompt=[5] * 90, max_tokens=7)
    assert (over["code"], over["param"]) == ("context_length_exceeded", "max_tokens")
    assert "you requested 97 tokens (90 in the prompt, 7 in the completion). Please reduce" in over["message"]
    chat = refused(port, "/v1/chat/completions", messages=[{"role": "user", "content": "x" * 9000}])
    assert "maximum context length is 96 tokens" in chat["message"] and chat["param"] == "messages"
    assert call(port, "POST", "/v1/completions", {"prompt": [5] * 90, "max_tokens": 6})[0] == 200


def test_other_mistakes_get_their_own_status(port):
    status, body = call(port, "POST", "/v1/chat/completions", {"model": "gpt", "messages": CHAT})
    assert status == 404 and body["error"]["code"] == "model_not_found"
    assert call(port, "POST", "/v1/completions", {"prompt": "a"}, {"Content-Type": "text/plain"})[0] == 415
    assert call(port, "GET", "/v1/completions")[0] == 405
    assert "error" in call(port, "GET", "/v1/nothing")[1]
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/v1/completions", "{", {"Content-Type": "application/json"})
    assert connection.getresponse().status == 400
    connection.close()


def test_null_and_user_ask_for_nothing(port):
    fields = {"prompt": "a", "max_tokens": 2, "user": "me", "tools": None, "seed": None, "logprobs": None}
    assert call(port, "POST", "/v1/completions", fields)[0] == 200


def test_admin_routes_want_the_key_and_exist_only_with_one(port, service):
    assert call(port, "GET", "/weight_info")[0] == 401
    status, info = call(port, "GET", "/weight_info", headers={"Authorization": f"Bearer {ADMIN_KEY}"})
    assert status == 200 and info["version"] == service.core.version and info["format"] == "fp32"
    assert "/update_weights" not in {getattr(route, "path", "") for route in Server(service).app().routes}


def test_health_and_metrics_tell_the_truth(port, client, service):
    def metric(name):
        lines = call(port, "GET", "/metrics")[1].splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))

    before = metric("vllm:generation_tokens_total")
    finished = metric("vllm:request_success_total")
    answer = client.completions.create(model="small", prompt="Use", max_tokens=9, n=3)
    assert metric("vllm:generation_tokens_total") - before == answer.usage.completion_tokens
    assert metric("vllm:request_success_total") - finished == 3
    assert metric("vllm:num_requests_running") == 0 and metric("vllm:e2e_request_latency_seconds_count") >= 3
    status, health = call(port, "GET", "/health")
    assert status == 200 and (health["engine"], health["format"], health["rehearsal"]) == ("isthmus", "fp32", None)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slots(port, service, stream):
    connection = socket.create_connection(("127.0.0.1", port))
    body = json.dumps({"prompt": ["a"] * 64, "n": 8, "max_tokens": 90, "stream": stream}).encode()
    lines = [
        "POST /v1/completions HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
    wait_until(lambda: service.core.running == 8)
    connection.close()
    wait_until(lambda: service.core.running == 0 and service.core.waiting == 0)


def test_too_many_waiting_requests_are_turned_away(port, service):
    service.max_waiting = 0
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("POST", "/v1/completions", '{"prompt": "a"}', {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 503 and response.headers["Retry-After"] == "1"
        connection.close()
    finally:
        service.max_waiting = 4096


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_core_that_fails_is_told_to_everyone(tmp_path, monkeypatch):
    write_small_bundle(tmp_path / "small")
    broken = load_service(tmp_path / "small", slots=2)

    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(broken.core.runner, "hidden", fail)
    with live(Server(broken)) as port:
        assert call(port, "POST", "/v1/completions", {"prompt": "a"})[0] == 503
        status, body = call(port, "POST", "/v1/completions", {"prompt": "a"})
        assert status == 503 and "out of memory" in body["error"]["message"]
        assert "out of memory" in call(port, "POST", "/v1/completions", {"prompt": "a", "stream": True})[1]
        status, health = call(port, "GET", "/health")
        assert (status, health["status"]) == (503, "failed")


def wait_until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it did not happen within 10 s"
        time.sleep(0.005)


def test_a_taken_port_is_named_with_the_option_that_changes_it():
    with bind("127.0.0.1", 0, flag="--port") as taken:
        port = taken.getsockname()[1]
        with pytest.raises(IsthmusError, match=rf"port {port} .*--port"):
            bind("127.0.0.1", port, flag="--port")


@given(
    st.text(alphabet="ab", max_size=30),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
    st.integers(1, 5),
)
def test_stop_strings_cut_at_the_first_one_however_the_text_arrives(text, stops, size):
    cutter = StopCutter(stops)
    given_out = "".join(cutter.push(text[i : i + size]) for i in range(0, len(text), size)) + cutter.flush()
    places = [text.find(stop) for stop in stops if stop in text]
    if size == 1:
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        first = min((end for end, _ in ends), default=None)
        expected = text[: min(start for end, start in ends if end == first)] if ends else text
        assert given_out == expected
    assert cutter.stopped == bool(places)
    assert text.startswith(given_out) and (places or given_out == text)


@given(st.text(max_size=40), st.booleans())
def test_text_survives_the_way_through_tokens(text, thinking):
    assume(not any(mark in text for mark in (OPEN_THINK, CLOSE_THINK)))
    tokenizer = small_tokenizer_once()
    vocabulary = Vocabulary(tokenizer)
    tokens = tokenizer.encode(text)
    plain = PlainText(vocabulary, Rules())
    expected = tokenizer.decode(tokens)
    assert (
        "".join(d.text for token in tokens for d in plain.push(token)) + "".join(d.text for d in plain.finish())
        == expected
    )
    writer = ChannelledText(vocabulary, Rules(), "inside" if thinking else "without")
    deltas = [delta for token in tokens for delta in writer.push(token)] + writer.finish()
    assert "".join(delta.text for delta in deltas) == expected
    assert {delta.channel for delta in deltas} <= {"reasoning" if thinking else "content"}


def test_half_a_character_is_held_back():
    tokenizer = small_tokenizer_once()
    tokens = tokenizer.encode("é中🙂")
    assert len(tokens) > 4, "the test needs characters of several tokens"
    plain = PlainText(Vocabulary(tokenizer), Rules())
    parts = [delta.text for token in tokens for delta in plain.push(token)]
    assert parts == ["é", "中", "🙂"]


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("I wonder</think>\n\nRain < 3", "I wonder", "Rain < 3"),
        ("no end </thin", "no end </thin", ""),
        ("</think></think>", "", "</think>"),
    ],
)
def test_thinking_is_told_apart_where_its_end_is_no_token(text, thought, answer):
    bpe = BpeTokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        ["think"] * 9, trainers.BpeTrainer(vocab_size=270, special_tokens=["<end>"], initial_alphabet=alphabet)
    )
    tokenizer = Tokenizer(bpe, "{{ messages[0].content }}<think>", None, "<end>")
    vocabulary = Vocabulary(tokenizer)
    assert vocabulary.close_think is None and tokenizer.opens_thinking
    writer = ChannelledText(vocabulary, Rules(), "inside")
    deltas = [delta for token in tokenizer.encode(text) for delta in writer.push(token)] + writer.finish()
    for channel, expected in (("reasoning", thought), ("content", answer)):
        assert "".join(delta.text for delta in deltas if delta.channel == channel) == expected
    assert 0 < writer.reasoning_tokens <= len(tokenizer.encode(text))


_TOKENIZER = small_tokenizer()


def small_tokenizer_once():
    return _TOKENIZER


@pytest.mark.parametrize("streamed", [False, True])
def test_what_has_ended_is_held_by_nothing_and_needs_no_collector(client, streamed):
    """Grammars and texts are large; those of a thousand requests must not wait for a search for cycles."""
    gc.collect()
    gc.disable()
    try:
        body = {"structured_outputs": {"regex": "[ab]{3}"}}
        for _ in range(3):
            answer = client.completions.create(
                model="small", prompt="Use", max_tokens=8, stream=streamed, extra_body=body
            )
            _ = [part.choices for part in answer] if streamed else answer.choices
        end = time.monotonic() + 5
        while (held := _alive("GrammarConstraint", "Exchange", "Request")) and time.monotonic() < end:
            time.sleep(0.05)
        assert not held
    finally:
        gc.enable()


def _alive(*names: str) -> list[str]:
    kinds = [type(one) for one in gc.get_objects()]
    return [kind.__name__ for kind in kinds if kind.__name__ in names and kind.__module__.startswith("isthmus.engines")]
