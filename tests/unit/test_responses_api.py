"""What the openai client's `client.responses` sees: text, thinking, calls, formats, streams and refusals."""

from __future__ import annotations

import json

import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel

from tests.support.live_server import call
from tests.unit.test_api import CALL, CITY, Served, serve  # noqa: F401

ASKED = "Weather?"
TOOL = {"type": "function", "name": "look", "parameters": CITY, "strict": True}


@pytest.fixture
def hermes(serve) -> Served:  # noqa: F811
    return serve("hermes")


def respond(served: Served, *texts: str, **fields) -> Response:
    served.script.texts = list(texts)
    return served.client.responses.create(**{"model": "small", "input": ASKED, **fields})


def prompt_of(served: Served) -> str:
    return served.service.tokenizer.decode(served.asked().prompts[0], skip_special=False)


def test_an_answer_is_the_same_as_in_a_chat(hermes):
    found = respond(
        hermes, "I wonder</think>\n\nRain.", instructions="Be short.", max_output_tokens=99, metadata={"a": "b"}
    )
    asked = hermes.asked()
    chat = hermes.chat(
        "I wonder</think>\n\nRain.",
        messages=[{"role": "system", "content": "Be short."}, {"role": "user", "content": ASKED}],
    )
    assert asked.prompts == hermes.asked().prompts and asked.max_new_tokens == 99
    assert (found.output_text, found.status, found.error) == ("Rain.", "completed", None)
    thought, message = found.output
    assert (thought.type, thought.content[0].text, message.role) == ("reasoning", "I wonder", "assistant")
    assert (
        found.usage.output_tokens == chat.usage.completion_tokens
        and found.usage.input_tokens == chat.usage.prompt_tokens
    )
    details = found.usage.output_tokens_details
    assert details.reasoning_tokens == chat.usage.completion_tokens_details.reasoning_tokens > 0
    assert (found.instructions, found.metadata, found.max_output_tokens) == ("Be short.", {"a": "b"}, 99)


def test_an_answer_that_is_cut_is_incomplete(hermes):
    found = respond(hermes, "</think>Rain and snow", max_output_tokens=4)
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")


TEXT = f"I wonder</think>\n\nLet me see 🙂.\n{CALL}\n{CALL.replace('Oslo', 'Rome')}"


def test_a_stream_says_the_same_in_order_and_the_client_puts_it_together(hermes):
    hermes.script.texts = [TEXT]
    with hermes.client.responses.stream(model="small", input=ASKED, tools=[TOOL]) as stream:
        events = list(stream)
        final = stream.get_final_response()
    whole = respond(hermes, TEXT, tools=[TOOL])

    def plain(response) -> list[tuple]:
        return [
            (item.type, item.name, json.loads(item.arguments))
            if item.type == "function_call"
            else (item.type, item.content[0].text)
            for item in response.output
        ]

    assert plain(final) == plain(whole)
    assert plain(whole) == [
        ("reasoning", "I wonder"),
        ("message", "Let me see 🙂."),
        ("function_call", "look", {"city": "Oslo"}),
        ("function_call", "look", {"city": "Rome"}),
    ]
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Let me see 🙂."
    assert "".join(event.delta for event in events if event.type == "response.reasoning_text.delta") == "I wonder"
    numbers = [event.sequence_number for event in events]
    assert numbers == list(range(len(numbers)))
    added, done = (kinds.count(f"response.output_item.{what}") for what in ("added", "done"))
    assert added == done == len(whole.output)
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_the_items_of_an_answer_can_be_sent_back(hermes):
    first = respond(hermes, TEXT, tools=[TOOL])
    calls = [item for item in first.output if item.type == "function_call"]
    results = [{"type": "function_call_output", "call_id": one.call_id, "output": "Rain"} for one in calls]
    again = [{"role": "user", "content": [{"type": "input_text", "text": ASKED}]}, *first.output, *results]
    answer = respond(hermes, "</think>It rains.", input=again, tools=[TOOL])
    sent = prompt_of(hermes)
    hermes.chat(
        "</think>It rains.",
        tools=[{"type": "function", "function": {"name": "look", "parameters": CITY, "strict": True}}],
        messages=[
            {"role": "user", "content": ASKED},
            {
                "role": "assistant",
                "content": "Let me see 🙂.",
                "tool_calls": [
                    {"id": one.call_id, "type": "function", "function": {"name": "look", "arguments": one.arguments}}
                    for one in calls
                ],
            },
            *({"role": "tool", "tool_call_id": one.call_id, "content": "Rain"} for one in calls),
        ],
    )
    assert answer.output_text == "It rains." and sent == prompt_of(hermes) and sent.count("Rain") == 2


class City(BaseModel):
    city: str


def test_a_format_holds_and_is_parsed(hermes):
    hermes.script.texts = []
    parsed = hermes.client.responses.parse(model="small", input=ASKED, text_format=City, max_output_tokens=900)
    assert isinstance(parsed.output_parsed, City)
    forced = respond(hermes, tools=[TOOL], tool_choice={"type": "function", "name": "look"}, max_output_tokens=500)
    assert [item.name for item in forced.output if item.type == "function_call"] == ["look"]


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_those_of_the_text(hermes, stream):
    include = ["message.output_text.logprobs"]
    found = respond(hermes, "so</think>é🙂", include=include, top_logprobs=2, stream=stream)
    if stream:
        found = list(found)[-1].response
    logprobs = found.output[-1].content[0].logprobs
    assert bytes(byte for one in logprobs[:-1] for byte in one.bytes).decode() == "é🙂"
    assert all(len(one.top_logprobs) == 2 for one in logprobs)


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "keeps no responses"),
        ({"conversation": "c"}, "conversation", "keeps no responses"),
        ({"background": True}, "background", "False"),
        ({"truncation": "auto"}, "truncation", "disabled"),
        ({"tools": [{"type": "web_search"}]}, "tools", "function"),
        ({"input": []}, "input", "at least 1"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input", "item_reference"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input", "input_image"),
        ({"input": "x" * 99_999}, "input", "maximum context length"),
        ({"tool_choice": "required"}, "tool_choice", "tools"),
        ({"max_tokens": 5}, "max_tokens", "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "b"}}}}, "text", "Invalid type"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_own_name(hermes, fields, param, said):
    status, body = call(hermes.port, "POST", "/v1/responses", {"model": "small", "input": ASKED, **fields})
    assert status == 400 and body["error"]["param"] == param and said in body["error"]["message"]


def test_a_wrong_name_is_not_found(hermes):
    with pytest.raises(openai.NotFoundError):
        hermes.client.responses.create(model="other", input=ASKED)
