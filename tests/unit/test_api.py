"""What the openai client sees of answers whose tokens are known: calls, thinking, stops, echoes, and what the core was
asked for. The core's place is taken by a script.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from typing import Literal

import numpy as np
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel
from tokenizers import Tokenizer as BpeTokenizer
from transformers import PreTrainedTokenizerFast

from isthmus.engines.local.api.keys import Key, Keyring
from isthmus.engines.local.api.server import Server
from isthmus.engines.local.api.service import Identity, Service
from isthmus.engines.local.core.core import Core
from isthmus.engines.local.core.scheduler import Finished, PromptToken, Request, Token
from tests.support.chat_templates import tokenizer_for
from tests.support.engine_bundle import small_model
from tests.support.live_server import ask, call, live, refused

CHAT = [{"role": "user", "content": "Weather?"}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 3}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": CITY}}]
CALL = '<tool_call>\n{"name": "look", "arguments": {"city": "Oslo"}}\n</tool_call>'
VOCAB_SIZE = 340
LEGACY = ("tokens", "top_logprobs", "text_offset")


def bytes_of_name(name: str) -> bytes:
    """What a name of the legacy layout stands for."""
    return bytes.fromhex(name.removeprefix("bytes:").replace("\\x", "")) if "\\x" in name else name.encode()


class Script:
    """Answers requests with given texts or, where none is left, at random under the constraint of the request."""

    def __init__(self, tokenizer):
        self.tokenizer, self.texts, self.requests = tokenizer, [], []
        self.random = np.random.default_rng(0)
        self.cached = 0
        self.default: str | None = None

    def submit(self, request: Request) -> None:
        self.requests.append(request)
        threading.Thread(target=self._answer, args=(request,)).start()

    def _answer(self, request: Request) -> None:
        for choice in range(len(request.prompts) * request.n):
            tokens, reason, stop = self._tokens(request)
            top = [[(token, -0.5), (7, -2.0)][: request.top_logprobs] for token in tokens]
            if request.stream:
                for token, others in zip(tokens, top, strict=True):
                    request.listener(Token(choice, token, -0.5, others, 3))
            prompt = self._prompt_tokens(request, request.prompts[choice // request.n])
            request.listener(
                Finished(choice, tokens, [-0.5] * len(tokens), top, reason, 3, 4, 0.1, 0.2, self.cached, prompt, stop)
            )

    def _tokens(self, request: Request) -> tuple[list[int], str, int | None]:
        if request.max_new_tokens == 0:
            return [], "length", None
        text = self.texts.pop(0) if self.texts else self.default if request.constraint is None else None
        if text is not None:
            tokens = [*self.tokenizer.encode(text), self.tokenizer.eos_id]
        else:
            tokens = self._constrained(request)
        for place, token in enumerate(tokens):
            if token in request.stop_tokens:
                return tokens[: place + 1], "stop", token
        return tokens[: request.max_new_tokens], "stop" if len(tokens) <= request.max_new_tokens else "length", None

    def _constrained(self, request: Request) -> list[int]:
        assert request.constraint is not None
        state, tokens = request.constraint.start(), []
        texts = [self.tokenizer.decode([token], skip_special=False) for token in range(VOCAB_SIZE)]
        bias = np.array([4.0 if text == "</think>" else 0.0 if text.strip() else -8.0 for text in texts])
        while not state.done:
            logits = self.random.gumbel(size=VOCAB_SIZE) + bias
            mask = state.mask()
            token = int((logits if mask is None else np.where(mask, logits, -np.inf)).argmax())
            tokens.append(token)
            if token == self.tokenizer.eos_id:
                break
            state.accept(token)
        return tokens

    def _prompt_tokens(self, request: Request, prompt: list[int]) -> list[PromptToken] | None:
        if request.prompt_logprobs is None:
            return None
        likely = [(5, -1.0), (6, -2.0), (9, -3.0)][: request.prompt_logprobs]
        return [PromptToken(prompt[0], None, []), *(PromptToken(token, -4.0, likely, 12) for token in prompt[1:])]


def scripted_service(name, monkeypatch_context, **options):
    tokenizer = tokenizer_for(name, **options)
    model = small_model(vocab_size=VOCAB_SIZE, max_position_embeddings=1024)
    core = Core(model, eos_id=tokenizer.eos_id, slots=2)
    core.start()
    service = Service(Identity("small", "fp32"), model.architecture, core, tokenizer, {}, "")
    script = Script(tokenizer)
    monkeypatch_context.setattr(core, "submit", script.submit)
    return service, script


class Served:
    """A server, the client of it, and the script behind it."""

    def __init__(self, port, client, server, script):
        self.port, self.client, self.server, self.script = port, client, server, script
        self.service = server.service

    def chat(self, *texts, **fields):
        self.script.texts = list(texts)
        return self.client.chat.completions.create(**{"model": "small", "messages": CHAT, **fields})

    def complete(self, *texts, **fields):
        self.script.texts = list(texts)
        return self.client.completions.create(**{"model": "small", "prompt": "Use 3", **fields})

    def asked(self) -> Request:
        return self.script.requests[-1]


@pytest.fixture(scope="module")
def serve():
    """Servers by format, started when they are first wanted."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        started: dict[str, Served] = {}

        def get(name):
            if name not in started:
                service, script = scripted_service(name, patch)
                server = Server(service)
                port = stack.enter_context(live(server))
                url = f"http://127.0.0.1:{port}/v1"
                client = stack.enter_context(openai.OpenAI(base_url=url, api_key="none", max_retries=0))
                started[name] = Served(port, client, server, script)
            return started[name]

        yield get


@pytest.fixture
def hermes(serve):
    return serve("hermes")


@pytest.mark.parametrize("stream", [False, True])
def test_calls_come_apart_from_thinking_and_answer(hermes, stream):
    text = f"I wonder</think>\n\nLet me see.\n{CALL}\n{CALL.replace('Oslo', 'Århus')}"
    found = hermes.chat(text, "No call</think>Rain.", tools=TOOLS, n=2, stream=stream)
    if stream:
        found, whole = gather(found), None
    else:
        whole, found = found, [choice.model_dump() for choice in found.choices]
    first, second = found
    assert [json.loads(c["function"]["arguments"]) for c in first["message"]["tool_calls"]] == [
        {"city": "Oslo"},
        {"city": "Århus"},
    ]
    assert len({c["id"] for c in first["message"]["tool_calls"]}) == 2
    assert first["message"]["content"] == "Let me see." and first["message"]["reasoning_content"] == "I wonder"
    assert (first["finish_reason"], second["finish_reason"]) == ("tool_calls", "stop")
    assert second["message"]["content"] == "Rain." and not second["message"].get("tool_calls")
    if whole is not None:
        prompt = hermes.service.tokenizer.decode(hermes.asked().prompts[0], skip_special=False)
        assert '"name": "look"' in prompt and prompt.endswith("<think>\n")
        texts = ("I wonder</think>", "No call</think>")
        expected = sum(len(hermes.service.tokenizer.encode(text)) for text in texts)
        assert whole.usage.completion_tokens_details.reasoning_tokens == expected


def gather(chunks):
    """The choices that a stream adds up to."""
    found: dict[int, dict] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            one = found.setdefault(
                choice.index, {"message": {"content": "", "reasoning_content": "", "tool_calls": []}}
            )
            message = one["message"]
            message["content"] += choice.delta.content or ""
            message["reasoning_content"] += getattr(choice.delta, "reasoning_content", None) or ""
            for part in choice.delta.tool_calls or []:
                if part.index == len(message["tool_calls"]):
                    message["tool_calls"].append(
                        {"id": part.id, "function": {"name": part.function.name, "arguments": ""}}
                    )
                message["tool_calls"][part.index]["function"]["arguments"] += part.function.arguments or ""
            one["finish_reason"] = choice.finish_reason or one.get("finish_reason")
    return [found[index] for index in sorted(found)]


def test_special_marks_reach_the_reader_but_only_where_tools_are_offered(serve):
    deepseek = serve("deepseek")
    block = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>look\n```json\n{}\n```<｜tool▁call▁end｜>"
    text = f"</think><｜tool▁calls▁begin｜>{block}<｜tool▁calls▁end｜>"
    answer = deepseek.chat(text, tools=TOOLS).choices[0]
    assert answer.message.tool_calls[0].function.name == "look" and answer.message.content is None
    assert answer.finish_reason == "tool_calls"
    plain = deepseek.chat(text).choices[0]
    assert plain.message.tool_calls is None and plain.message.content == "functionlook\n```json\n{}\n```"
    shown = deepseek.chat(text, extra_body={"skip_special_tokens": False}).choices[0].message.content
    assert shown == text.removeprefix("</think>")


def test_tool_choice_none_offers_nothing_and_one_call_ends_where_one_is_allowed(hermes):
    hermes.chat(f"</think>{CALL}", tools=TOOLS, tool_choice="none")
    assert "look" not in hermes.service.tokenizer.decode(hermes.asked().prompts[0])
    for stream in (False, True):
        answer = hermes.chat(f"</think>{CALL}\n{CALL}", tools=TOOLS, parallel_tool_calls=False, stream=stream)
        one = gather(answer)[0] if stream else answer.choices[0].model_dump()
        assert len(one["message"]["tool_calls"]) == 1 and one["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("name", ["hermes", "deepseek", "deepseek v3.1", "llama"])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}])
def test_a_required_call_is_made_by_whatever_model(serve, name, choice):
    served = serve(name)
    answer = served.chat(tools=TOOLS, tool_choice=choice).choices[0]
    assert answer.message.tool_calls and answer.finish_reason == "tool_calls"
    for made in answer.message.tool_calls:
        assert len(json.loads(made.function.arguments)["city"]) <= 3 and made.function.name == "look"
    assert served.asked().constraint is not None


class City(BaseModel):
    city: Literal["Oslo", "Rome"]


def test_the_answer_is_parsed_into_a_model_and_thinking_is_free(hermes):
    hermes.script.texts = []
    for seed in range(3):
        hermes.script.random = np.random.default_rng(seed)
        answer = hermes.client.chat.completions.parse(
            model="small", messages=CHAT, response_format=City, max_tokens=400
        )
        assert isinstance(answer.choices[0].message.parsed, City) and answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].message.reasoning_content
    tool = openai.pydantic_function_tool(City)
    hermes.script.texts = ['</think><tool_call>{"name": "City", "arguments": {"city": "Rome"}}</tool_call>']
    answer = hermes.client.chat.completions.parse(model="small", messages=CHAT, tools=[tool])
    assert answer.choices[0].message.tool_calls[0].function.parsed_arguments == City(city="Rome")
    state = hermes.asked().constraint.start()
    assert not accepts(hermes, state, '</think><tool_call>\n{"name": "City", "arguments": {"city": "Bonn"')
    state = hermes.asked().constraint.start()
    assert accepts(hermes, state, '</think>Rome it is.\n<tool_call>\n{"name": "City", "arguments": {"city": "Rome"}}\n')


def accepts(served, state, text):
    for token in served.service.tokenizer.encode(text):
        if not state.mask()[token]:
            return False
        state.accept(token)
    return True


def test_an_answer_has_its_format_where_it_does_not_call(hermes):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": 42}}}
    assert hermes.chat("</think>42", tools=TOOLS, response_format=form).choices[0].message.content == "42"
    constraint = hermes.asked().constraint
    assert accepts(hermes, constraint.start(), "</think>42")
    assert accepts(
        hermes, constraint.start(), '</think><tool_call>\n{"name": "look", "arguments": {"city": "B"}}\n</tool_call>'
    )
    assert not accepts(hermes, constraint.start(), "</think>43")


@pytest.mark.parametrize(
    ("wanted", "check"),
    [
        ({"regex": "[ab]{3}"}, lambda text: len(text) == 3 and set(text) <= set("ab")),
        ({"choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"json": {"enum": [1, 2]}}, lambda text: text in ("1", "2")),
        ({"json": '{"enum": [1, 2]}', "disable_any_whitespace": True}, lambda text: text in ("1", "2")),
        ({"grammar": 'start: "x" | "(" start ")"'}, lambda text: "x" in text),
    ],
)
def test_structured_outputs_hold_in_chat_and_completions(hermes, wanted, check):
    options = {"max_tokens": 450, "extra_body": {"structured_outputs": wanted}}
    assert check(hermes.chat(**options).choices[0].message.content)
    assert check(hermes.complete(**options).choices[0].text)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"structured_outputs": {"regex": "("}}, "unclosed group"),
        ({"structured_outputs": {"grammar": "start: x"}}, "refused"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "b"}}}},
            "Invalid type",
        ),
        ({"structured_outputs": {"choice": ["a"]}, "min_tokens": 3}, "min_tokens"),
        ({"tools": TOOLS, "tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
        ({"tools": TOOLS, "structured_outputs": {"choice": ["a"]}}, "tool_choice none"),
    ],
)
def test_a_format_that_cannot_be_kept_is_refused_with_the_reason(hermes, fields, reason):
    error = refused(hermes.port, "/v1/chat/completions", messages=CHAT, **fields)
    assert reason in error["message"] and error["param"] in fields


def test_strict_functions_hold_where_the_marks_of_calls_are_text():
    with pytest.MonkeyPatch.context() as patch:
        service, script = scripted_service("hermes", patch, single=False)
        with live(Server(service)) as port:
            strict = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}]
            script.texts = ["</think>Rain"]
            status, answer = call(port, "POST", "/v1/chat/completions", {"messages": CHAT, "tools": strict})
            assert status == 200 and answer["choices"][0]["message"]["content"] == "Rain"
            state, tokenizer = script.requests[-1].constraint.start(free=False), service.tokenizer
            for token in tokenizer.encode('Well: <tool_call>\n{"name": "look", "arguments": {"'):
                assert state.mask()[token]
                state.accept(token)
            assert state.mask()[tokenizer.encode("c")[0]] and not state.mask()[tokenizer.encode("x")[0]]


def test_variables_of_the_template_are_taken_and_may_close_the_thinking(hermes):
    answer = hermes.chat("Rain", extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    prompt = hermes.service.tokenizer.decode(hermes.asked().prompts[0], skip_special=False)
    assert prompt.endswith("<think>\n\n</think>\n\n") and answer.choices[0].message.content == "Rain"
    assert answer.choices[0].message.reasoning_content is None
    hidden = hermes.chat("secret</think>Rain", extra_body={"include_reasoning": False}).choices[0].message
    assert hidden.content == "Rain" and hidden.reasoning is None
    streamed = gather(hermes.chat("secret</think>Rain", stream=True, extra_body={"include_reasoning": False}))
    assert streamed[0]["message"] == {"content": "Rain", "reasoning_content": "", "tool_calls": []}


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_is_named_and_kept_on_request(hermes, stream):
    def texts(**fields):
        answer = hermes.complete("to reach 23 now", "nothing here", n=2, stream=stream, stop=["reach 2", "x"], **fields)
        found: dict[int, list] = {}
        for chunk in answer if stream else [answer]:
            for choice in chunk.choices:
                text, _ = found.get(choice.index, ["", None])
                found[choice.index] = [text + choice.text, getattr(choice, "stop_reason", None)]
        return [found[0], found[1]]

    assert texts() == [["to ", "reach 2"], ["nothing here", None]]
    assert texts(extra_body={"include_stop_str_in_output": True})[0] == ["to reach 2", "reach 2"]


def test_a_stop_token_ends_the_answer_and_has_no_text(hermes):
    token = hermes.service.tokenizer.encode("✓")[-1]
    for keep in (False, True):
        body = {"stop_token_ids": [token], "include_stop_str_in_output": keep, "return_token_ids": True}
        choice = hermes.complete("find ✓ it", extra_body=body, max_tokens=100).choices[0]
        assert (choice.stop_reason, choice.finish_reason, choice.token_ids[-1]) == (token, "stop", token)
        assert choice.text.endswith("✓") == keep and choice.weight_versions == [3, 4]


def test_prompt_logprobs_have_vllms_layout(hermes):
    tokenizer = hermes.service.tokenizer
    prompt = tokenizer.encode("Use 3")
    choices = hermes.complete("a", "b", n=2, extra_body={"prompt_logprobs": 2}).choices
    shown = choices[0].prompt_logprobs
    assert hermes.asked().prompt_logprobs == 2 and choices[1].prompt_logprobs == shown
    assert shown[0] is None and len(shown) == len(prompt)
    for token, one in zip(prompt[1:], shown[1:], strict=True):
        assert one[str(token)] == {"logprob": -4.0, "rank": 12, "decoded_token": tokenizer.decode([token])}
        assert one["5"] == {"logprob": -1.0, "rank": 1, "decoded_token": "</think>"} and one["6"]["rank"] == 2
    chat = hermes.chat(extra_body={"prompt_logprobs": 0}, max_tokens=0)
    assert [len(one) for one in chat.prompt_logprobs[1:]] == [1] * (chat.usage.prompt_tokens - 1)
    assert chat.choices[0].finish_reason == "length" and chat.usage.completion_tokens == 0


def test_an_echoed_prompt_comes_before_the_completion(hermes):
    tokenizer = hermes.service.tokenizer
    prompt = tokenizer.encode("Use 3")
    for given in ("Use 3", prompt):
        choice = hermes.complete(" reach", prompt=given, echo=True, logprobs=2).choices[0]
        assert choice.text == "Use 3 reach" and "".join(choice.logprobs.tokens).startswith("Use 3 reach")
        assert choice.logprobs.token_logprobs[: len(prompt) + 1] == [None] + [-4.0] * (len(prompt) - 1) + [-0.5]
        assert choice.logprobs.top_logprobs[0] is None and len(choice.logprobs.top_logprobs[1]) == 2
        assert choice.logprobs.text_offset[len(prompt)] == len("Use 3")
    only = hermes.complete(echo=True, logprobs=0, max_tokens=0).choices[0]
    assert only.text == "Use 3" and len(only.logprobs.tokens) == len(prompt) and only.logprobs.top_logprobs is None
    assert hermes.asked().max_new_tokens == 0 and hermes.asked().prompt_logprobs == 0
    chunks = hermes.complete(" reach", "!", prompt=prompt, echo=True, stream=True, n=2)
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["Use 3 reach", "Use 3!"]


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_of_a_character_have_their_own_bytes_names_and_places(hermes, stream):
    text, tokenizer = "a🙂é中!", hermes.service.tokenizer
    tokens = tokenizer.encode(text)
    assert len(tokens) > len(text) + 3, "the test needs characters of several tokens"
    answer = hermes.complete(text, logprobs=2, prompt="x", stream=stream)
    choices = [choice for chunk in answer for choice in chunk.choices] if stream else answer.choices
    parts = [choice.logprobs for choice in choices if choice.logprobs]
    names, tops, places = ([one for part in parts for one in getattr(part, name)] for name in LEGACY)
    assert len(tops) == len(tokens) + 1 and all(len(top) == 2 for top in tops)
    assert all(name in top for name, top in zip(names, tops, strict=True))
    joined = [b"".join(map(tokenizer.bytes_of, tokens[:n])) for n in range(len(tokens) + 1)]
    assert places == [len(seen.decode(errors="ignore")) for seen in joined] and set(places) == set(range(len(text) + 1))
    assert b"".join(map(bytes_of_name, names[:-1])).decode() == text


def test_the_bytes_of_a_chats_tokens_are_its_text(hermes):
    text = "a🙂é中!"
    steps = hermes.chat(text, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert bytes(byte for step in steps[:-1] for byte in step.bytes).decode() == text
    assert any(step.token.startswith("\\x") for step in steps)
    assert all((step.top_logprobs[0].token, step.top_logprobs[0].bytes) == (step.token, step.bytes) for step in steps)


def test_a_stop_string_and_an_echo_move_no_token_beyond_the_text(hermes):
    choice = hermes.complete("ab STOP cd", prompt="é🙂 ", echo=True, logprobs=1, stop=["STOP"]).choices[0]
    assert choice.text == "é🙂 ab "
    named = list(zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True))
    assert all(place == len(choice.text) or choice.text[place] == name[0] for name, place in named if "\\x" not in name)
    assert [place for name, place in named if "\\x" in name] == [1, 1, 1, 1]


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("chat", [True, False])
def test_each_chunk_counts_the_tokens_so_far_if_that_is_wanted(hermes, chat, include):
    ask = hermes.chat if chat else hermes.complete
    options = {"include_usage": include, "continuous_usage_stats": True}
    chunks = list(ask("Rain and snow", stream=True, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert (
        counts == sorted(counts)
        and counts[0] <= 1
        and counts[-1] == len(hermes.service.tokenizer.encode("Rain and snow")) + 1
    )
    assert all(
        chunk.usage.total_tokens == chunk.usage.prompt_tokens + chunk.usage.completion_tokens for chunk in chunks
    )
    assert (not chunks[-1].choices) == include


def test_a_chat_without_a_limit_may_use_the_rest_of_the_context(hermes):
    prompt = hermes.chat("Rain").usage.prompt_tokens
    assert hermes.asked().max_new_tokens == hermes.service.core.length - prompt


def test_a_model_is_found_by_each_of_its_names_and_by_no_other(hermes):
    hermes.service.other_names = ("org/small", "gpt-4o")
    try:
        assert [model.id for model in hermes.client.models.list()] == ["small", "org/small", "gpt-4o"]
        assert hermes.client.models.retrieve("org/small").root == "small"
        assert hermes.chat("Rain", model="gpt-4o").model == "gpt-4o"
        with pytest.raises(openai.NotFoundError) as caught:
            hermes.client.models.retrieve("org/large")
        assert caught.value.code == "model_not_found" and "'org/small'" in str(caught.value)
    finally:
        hermes.service.other_names = ()


PREFILLS = ["The sea is", "The sea is ", "<think>\nIt is", "<think>\nso\n</think>\n\nThe sea is"]


@pytest.mark.parametrize("content", PREFILLS)
@pytest.mark.parametrize("name", ["hermes", "llama", "deepseek v3.1"])
def test_a_last_message_goes_on_as_transformers_lets_it(serve, name, content):
    served = serve(name)
    messages = [*CHAT, {"role": "assistant", "content": content}]
    answer = served.chat(
        "blue", messages=messages, extra_body={"continue_final_message": True, "add_generation_prompt": False}
    )
    prompt = served.service.tokenizer.decode(served.asked().prompts[0], skip_special=False)
    tokenizer = served.service.tokenizer
    theirs = PreTrainedTokenizerFast(tokenizer_object=BpeTokenizer.from_str(tokenizer.serialise()))
    theirs.chat_template, theirs.bos_token, theirs.eos_token = tokenizer.chat_template, tokenizer.bos, tokenizer.eos
    try:
        expected = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    except ValueError:
        return
    assert prompt == expected
    message = answer.choices[0].message
    inside = served.service.vocabulary.thinks and "<think>" in content and "</think>" not in content
    assert (message.reasoning_content if inside else message.content) == "blue"


def test_only_text_of_the_assistant_goes_on(hermes):
    error = refused(hermes.port, "/v1/chat/completions", messages=CHAT, continue_final_message=True)
    assert "last message of the assistant" in error["message"]
    hermes.chat("blue", extra_body={"add_generation_prompt": False})
    assert "assistant" not in hermes.service.tokenizer.decode(hermes.asked().prompts[0], skip_special=False)[-20:]


def test_fields_that_are_for_others_change_nothing(hermes):
    more = {"metadata": {"a": "b"}, "store": True, "user": "me", "verbosity": "low", "request_id": "req-7"}
    answer = hermes.chat("Rain", extra_body=more)
    assert answer.choices[0].message.content == hermes.chat("Rain").choices[0].message.content
    assert answer.id == "chatcmpl-req-7"


@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd, gzip"])
def test_a_compressed_body_is_refused_in_words(hermes, encoding):
    status, body = call(hermes.port, "POST", "/v1/completions", b"\x1f\x8b", {"Content-Encoding": encoding})
    assert (status, body["error"]["code"]) == (415, "unsupported_content_encoding") and encoding in body["error"][
        "message"
    ]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("localhost", 200),
        ("chat.localhost:1", 200),
        ("Inside.Example", 200),
        ("attacker.example", 403),
        ("127.0.0.1.attacker.example:8000", 403),
        ("localhost.attacker.example", 403),
        ("[::1", 403),
    ],
)
def test_without_keys_a_server_answers_to_its_own_names_alone(hermes, host, status):
    hermes.server.gate.hosts = ("inside.example",)
    found, body = call(hermes.port, "GET", "/v1/models", headers={"Host": host})
    assert found == status and (status == 200 or "allowed_hosts" in body["error"]["message"])


def test_pages_of_a_listed_origin_may_ask_and_with_keys_any_name_is_answered_to():
    with pytest.MonkeyPatch.context() as patch:
        service, _ = scripted_service("hermes", patch)
        keys = Keyring([Key.of("alice", "sk-alice")])
        with live(Server(service, keys=keys, origins=["https://chat.example"])) as port:
            wanted = {"Origin": "https://chat.example", "Host": "any.example"}
            preflight = {
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization,x-stainless-os",
            }
            status, headers, _ = ask(port, "OPTIONS", "/v1/chat/completions", headers=wanted | preflight)
            assert status == 200 and headers["Access-Control-Allow-Origin"] == "https://chat.example"
            assert "x-stainless-os" in headers["Access-Control-Allow-Headers"]
            for key, said in (("sk-wrong", "Incorrect API key provided"), (None, "needs an API key")):
                status, headers, body = ask(port, "GET", "/v1/models", key=key, headers=wanted)
                assert status == 401 and said in body["error"]["message"] and "sk-wrong" not in body["error"]["message"]
                assert headers["Access-Control-Allow-Origin"] == "https://chat.example"
            assert ask(port, "GET", "/v1/models", key="sk-alice", headers=wanted)[0] == 200
            other = ask(port, "GET", "/v1/models", key="sk-alice", headers={"Origin": "https://other.example"})
            assert "Access-Control-Allow-Origin" not in other[1]


# What vLLM's own board asks for: examples/observability/prometheus_grafana/grafana.json of vLLM, by series and labels.
BOARD = {
    **{f"vllm:e2e_request_latency_seconds_{part}": {"model_name"} for part in ("bucket", "sum", "count")},
    **{f"vllm:inter_token_latency_seconds_{part}": {"model_name"} for part in ("bucket", "sum", "count")},
    **{f"vllm:time_to_first_token_seconds_{part}": {"model_name"} for part in ("bucket", "sum", "count")},
    "vllm:prompt_tokens_total": {"model_name"},
    "vllm:generation_tokens_total": {"model_name"},
    "vllm:num_requests_running": {"model_name"},
    "vllm:num_requests_waiting": {"model_name"},
    "vllm:kv_cache_usage_perc": {"model_name"},
    "vllm:request_prompt_tokens_bucket": {"model_name", "le"},
    "vllm:request_generation_tokens_bucket": {"model_name", "le"},
    "vllm:request_success_total": {"model_name", "finished_reason"},
    "vllm:request_queue_time_seconds_sum": {"model_name"},
    "vllm:request_prefill_time_seconds_sum": {"model_name"},
    "vllm:request_decode_time_seconds_sum": {"model_name"},
    "vllm:request_max_num_generation_tokens_sum": {"model_name"},
}


def samples_of(port: int) -> dict[str, list]:
    """The samples of /metrics by name, as the official parser reads them."""
    found: dict[str, list] = {}
    for family in text_string_to_metric_families(call(port, "GET", "/metrics")[1]):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def test_every_series_of_vllms_board_is_there_and_moves(hermes):
    before = samples_of(hermes.port)
    hermes.complete("Rain", "Rain and snow", n=2, max_tokens=50)
    after = samples_of(hermes.port)
    for name, labels in BOARD.items():
        assert after.get(name), name
        assert all(labels <= sample.labels.keys() and sample.labels["model_name"] == "small" for sample in after[name])

    def change(name: str) -> float:
        return sum(one.value for one in after[name]) - sum(one.value for one in before.get(name, []))

    lengths = [len(hermes.service.tokenizer.encode(text)) + 1 for text in ("Rain", "Rain and snow")]
    assert change("vllm:request_max_num_generation_tokens_sum") == max(lengths)
    assert change("vllm:request_max_num_generation_tokens_count") == change("vllm:request_params_n_count") == 1
    assert (change("vllm:request_params_n_sum"), change("vllm:request_params_max_tokens_sum")) == (2, 100)
    assert change("vllm:generation_tokens_total") == sum(lengths)
    assert change("vllm:request_prefill_time_seconds_sum") == pytest.approx(2 * 0.1)
    assert change("vllm:request_decode_time_seconds_sum") == pytest.approx(2 * 0.1)
    assert change("vllm:request_inference_time_seconds_sum") == pytest.approx(2 * 0.2)


def test_every_option_reaches_the_core(hermes):
    options = {
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.2,
        "min_tokens": 2,
        "ignore_eos": True,
        "temperature": 0.6,
        "top_p": 0.9,
    }
    body = {**options, "logit_bias": {"5": -100, "7": 3.5}, "stop_token_ids": [9, 9], "prompt": "a", "seed": -4}
    hermes.script.texts = ["b"]
    assert call(hermes.port, "POST", "/v1/completions", body)[0] == 200
    asked = hermes.asked()
    assert {name: getattr(asked, name) for name in options} == options
    assert (asked.logit_bias, asked.stop_tokens, asked.seed) == ({5: -100.0, 7: 3.5}, frozenset({9}), -4)
    hermes.script.texts = ["b"]
    assert call(hermes.port, "POST", "/v1/completions", {"prompt": "a", "top_k": 10**30})[0] == 200
    assert hermes.asked().top_k == VOCAB_SIZE and hermes.asked().constraint is None
    assert hermes.asked() is not asked and Request([[1]], print, 1).min_p == hermes.asked().min_p


def test_tokens_from_the_prefix_cache_are_counted_once_a_prompt(hermes):
    hermes.script.cached = 2
    try:
        usage = hermes.complete("a", "b", "c", "d", prompt=["Use 3", "Use 4"], n=2).usage
        assert usage.prompt_tokens_details.cached_tokens == 4 and usage.completion_tokens_details is None
        *_, last = hermes.chat("a", stream=True, stream_options={"include_usage": True})
        assert last.usage.prompt_tokens_details.cached_tokens == 2
    finally:
        hermes.script.cached = 0


def test_tokenize_and_detokenize_count_what_a_prompt_has(hermes):
    tokenizer = hermes.service.tokenizer
    ids = tokenizer.encode("Use 3, 4 ✓")
    status, body = call(hermes.port, "POST", "/tokenize", {"prompt": "Use 3, 4 ✓", "return_token_strs": True})
    assert (status, body["tokens"], body["count"], body["max_model_len"]) == (200, ids, len(ids), 1024)
    assert body["token_strs"] == [tokenizer.decode([token]) for token in ids]
    assert call(hermes.port, "POST", "/detokenize", {"tokens": ids})[1] == {"prompt": "Use 3, 4 ✓"}
    chat = call(hermes.port, "POST", "/tokenize", {"model": "small", "messages": CHAT, "tools": TOOLS})[1]
    assert chat["tokens"] == tokenizer.chat(CHAT, TOOLS) and chat["token_strs"] is None
    usage = hermes.chat("a", tools=TOOLS).usage
    assert usage.prompt_tokens == chat["count"]
    assert refused(hermes.port, "/detokenize", tokens=[VOCAB_SIZE])["param"] == "tokens"
    assert call(hermes.port, "POST", "/tokenize", {"model": "gpt", "prompt": "a"})[0] == 404


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "' + b"a" * 10_000_000 + b'"}',
        b'{"prompt": "a", "x": ' + b"[" * 100_000 + b"}",
        b'{"prompt": "\xff"}',
        b'{"prompt": "a", "stop": [' + b'"b",' * 900_000 + b'"b"]}',
        b'{"prompt": [[' + b"5," * 900_000 + b"5]]}",
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "max_tokens": -1}',
        b'{"prompt": "a", "structured_outputs": {"json": ' + b'{"items":' * 150 + b"{}" + b"}" * 152,
    ],
    ids=["10 MB", "deep", "UTF-8", "stops", "tokens", "NaN", "negative", "deep schema"],
)
def test_hostile_bodies_get_a_400_and_the_next_request_is_served(hermes, body):
    connection = http.client.HTTPConnection("127.0.0.1", hermes.port, timeout=60)
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 400 and json.loads(response.read())["error"]["message"]
    connection.close()
    assert hermes.complete("b").choices[0].text == "b"


def test_a_text_that_cannot_fit_is_refused_before_it_is_split(hermes, monkeypatch):
    monkeypatch.setattr(hermes.service.tokenizer, "encode", lambda _: pytest.fail("it was split"))
    for path, fields in (
        ("/v1/completions", {"prompt": "a" * 100_000}),
        ("/tokenize", {"prompt": "a" * 100_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 100_000}]}),
    ):
        assert refused(hermes.port, path, **fields)["code"] == "context_length_exceeded"
