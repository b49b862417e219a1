"""What a client may ask of POST /v1/responses, OpenAI's later API, and the turn of a chat that it comes to.

Nothing is stored: a client sends the items of earlier turns again, as OpenAI's clients do with `store: false`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from isthmus.engines.local.api.protocol import MAX_TOOLS, Alternatives, ApiError, Flag, Part, Schema, Seed

LOGPROBS = "message.output_text.logprobs"
ENCRYPTED = "reasoning.encrypted_content"
"""Earlier thinking is sent back as it is, so nothing has to be encrypted."""
_CHAT_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text",
    "reasoning_effort": "reasoning",
}


class Loose(Part):
    """What a server has written and a client sends back: further fields are left alone."""

    model_config = {"extra": "ignore", "frozen": True}


class ContentText(Loose):
    type: Literal["input_text", "output_text", "text", "summary_text", "reasoning_text"]
    text: str


class ContentRefusal(Loose):
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


_Parts = list[Annotated[ContentText | ContentRefusal, Field(discriminator="type")]]
Content = Annotated[_Parts, BeforeValidator(_as_parts, json_schema_input_type=str | _Parts)]


class MessageItem(Loose):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class CallItem(Loose):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class OutputItem(Loose):
    type: Literal["function_call_output"]
    call_id: str
    output: Content


class ReasoningItem(Loose):
    type: Literal["reasoning"]
    content: list[ContentText] | None = None


def _kind_of(item: Any) -> str:
    return item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[OutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind_of),
]


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


Items = Annotated[list[Item], BeforeValidator(_as_items, json_schema_input_type=str | list[Item])]


class FunctionTool(Part):
    """A function, flat as this API has it. It is strict unless it says otherwise, as at OpenAI."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: Schema | None = None
    strict: Flag | None = None


class ChosenTool(Part):
    type: Literal["function"]
    name: str


class TextFormat(Part):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Schema | None = Field(default=None, alias="schema")
    strict: Flag | None = None


class TextOptions(Part):
    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningOptions(Part):
    """`summary` asks for a summary of the thinking; here it is given as it is."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponseStreamOptions(Part):
    include_obfuscation: Literal[False] = False


class ResponseAsk(Part):
    """POST /v1/responses. What is for who pays, keeps or caches answers changes nothing."""

    model: str | None = None
    input: Items = Field(min_length=1)
    instructions: str | None = None
    stream: Flag = False
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: Annotated[int, Field(ge=1, strict=True)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, strict=True)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, strict=True)] = 1.0
    seed: Seed | None = None
    top_logprobs: Alternatives | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] = []
    text: TextOptions = TextOptions()
    reasoning: ReasoningOptions = ReasoningOptions()
    tools: list[FunctionTool] = Field(default=[], max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | ChosenTool = "auto"
    parallel_tool_calls: Flag = True
    truncation: Literal["disabled"] = "disabled"
    background: Literal[False] = False
    store: Flag | None = None
    metadata: Schema | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _keeps_nothing(cls, value: Any) -> Any:
        kept = {"previous_response_id", "conversation"} & value.keys() if isinstance(value, dict) else set()
        if kept:
            raise ApiError(
                f"{min(kept)}: this server keeps no responses; send the items of earlier turns in `input`",
                param=min(kept),
                code="unsupported_parameter",
            )
        return value

    def chat(self, *, with_thinking: bool) -> dict[str, Any]:
        """The fields of the chat completion that this comes to.

        Without `with_thinking` that of earlier turns is left out: clients send it back unasked, and some templates have
        no place for it.
        """
        asked: dict[str, Any] = {
            "model": self.model,
            "messages": messages_of(self.input, self.instructions, with_thinking=with_thinking),
            "stream": self.stream,
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "reasoning_effort": self.reasoning.effort,
            "response_format": self._format(),
            "parallel_tool_calls": self.parallel_tool_calls,
            "logprobs": True if LOGPROBS in self.include or self.top_logprobs is not None else None,
            "top_logprobs": self.top_logprobs,
        }
        if self.tools:
            asked["tools"] = [{"type": "function", "function": _function(tool)} for tool in self.tools]
            asked["tool_choice"] = self.tool_choice
        if isinstance(self.tool_choice, ChosenTool):
            asked["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        elif self.tool_choice == "required":
            asked["tool_choice"] = "required"
        return {name: value for name, value in asked.items() if value is not None}

    def _format(self) -> dict[str, Any] | None:
        form = self.text.format
        if form is None or form.type == "text":
            return None
        if form.type == "json_object":
            return {"type": "json_object"}
        given = {"name": form.name or "answer", "schema": form.schema_, "strict": form.strict}
        schema = {name: value for name, value in given.items() if value is not None}
        return {"type": "json_schema", "json_schema": schema}


def in_its_own_words(error: ApiError) -> ApiError:
    """An error about a field of the chat, about the field that it came from."""
    error.param = _CHAT_NAMES.get(error.param or "", error.param)
    return error


def messages_of(items: list[Item], instructions: str | None, *, with_thinking: bool) -> list[dict[str, Any]]:
    """The conversation: instructions before it, calls in the assistant's message that they follow."""
    messages: list[dict[str, Any]] = [] if instructions is None else [{"role": "system", "content": instructions}]
    thought = ""
    for item in items:
        last = messages[-1] if messages else {}
        if isinstance(item, ReasoningItem):
            thought += _text(item.content or []) if with_thinking else ""
        elif isinstance(item, OutputItem):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
        elif isinstance(item, CallItem):
            if last.get("role") != "assistant":
                messages.append(_assistant(None, thought))
                thought = ""
            messages[-1].setdefault("tool_calls", []).append(_call(item))
        elif item.role == "assistant":
            messages.append(_assistant(_text(item.content), thought))
            thought = ""
        elif item.role in ("system", "developer") and last.get("role") == "system":
            last["content"] = f"{last['content']}\n\n{_text(item.content)}"
        else:
            role = "system" if item.role == "developer" else item.role
            messages.append({"role": role, "content": _text(item.content)})
    return messages


def _assistant(content: str | None, thought: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content} | ({"reasoning_content": thought} if thought else {})


def _text(parts: Sequence[ContentText | ContentRefusal]) -> str:
    return "".join(part.text for part in parts)


def _call(item: CallItem) -> dict[str, Any]:
    return {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}


def _function(tool: FunctionTool) -> dict[str, Any]:
    fields = {"description": tool.description, "parameters": tool.parameters, "strict": tool.strict}
    return {"name": tool.name, **{name: value for name, value in fields.items() if value is not None}}
