"""What a client may ask: the fields of OpenAI's completions and chat and of vLLM's, all honoured, and no others.

An unknown or unsupported field is refused by name, unless its value asks for nothing. Null means absent, as in OpenAI's
API.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from isthmus.engines.local.api.measure import TooLarge, check_measure
from isthmus.errors import IsthmusError

DEFAULT_COMPLETION_TOKENS = 16
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_BIASES = 1024
MAX_TOOLS = 128
MAX_DEPTH = 100
MAX_SAMPLES = 16_384
MANY_FIELDS = 200
"""More than any kind of request has: among so many, one is unknown."""
LONGEST_PAUSE_S = 86_400

# Values of fields that this server does not have, and with which they ask for nothing.
_ASKS_NOTHING: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "best_of": (1,),
    "continue_final_message": (False,),
    "echo": (False,),
    "length_penalty": (1, 1.0),
    "modalities": (["text"],),
    "priority": (0,),
    "spaces_between_special_tokens": (True,),
    "suffix": ("",),
    "tools": ([],),
    "use_beam_search": (False,),
}


_KEPT_BY_CLIENTS = frozenset(
    ("cache_control", "created_at", "createdAt", "id", "metadata", "opts", "provider_specific_fields", "timestamp")
)
"""What clients keep with a message, for themselves or for a cache elsewhere: it is no part of the conversation."""


class ApiError(IsthmusError):
    """A refused request: an HTTP status, and OpenAI's error object with the field that is at fault."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def _shallow(value: Any) -> Any:
    """Refuse JSON that is nested deeper than its readers can go."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for item in level for child in _children(item)]
        if not level:
            return value
    raise ValueError(f"is nested deeper than {MAX_DEPTH} levels")


def _measured(text: str) -> str:
    """A text that is to be read as JSON."""
    try:
        check_measure(text.encode())
    except TooLarge as error:
        raise ValueError(f"has {error}") from None
    return text


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]
TokenId = Annotated[int, Field(ge=0, strict=True)]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 64, strict=True)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS)]
Penalty = Annotated[float, Field(ge=-2, le=2, strict=True)]
Alternatives = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS, strict=True)]
Tokens = Annotated[list[Annotated[int, Field(strict=True)]], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Schema = Annotated[dict[str, Any], AfterValidator(_shallow)]
Version = Annotated[int, Field(ge=0, lt=1 << 63)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StreamOptions(Part):
    include_usage: Flag = False
    continuous_usage_stats: Flag = False
    include_obfuscation: Literal[False] = False


class JsonSchema(Part):
    """OpenAI's named schema. The answer keeps to it whatever `strict` says."""

    name: str
    description: str | None = None
    schema_: Schema | None = Field(default=None, alias="schema")
    strict: Flag | None = None


class ResponseFormat(Part):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_what_its_type_needs(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is given with type json_schema, and only then")
        return self


class StructuredOutputs(Part):
    """vLLM's: exactly one of what the answer must be. `grammar` is in llguidance's dialect of Lark."""

    json_: Schema | str | None = Field(default=None, alias="json")
    json_object: Flag | None = None
    regex: str | None = None
    choice: list[str] | None = Field(default=None, min_length=1)
    grammar: str | None = None
    disable_any_whitespace: Flag = False

    @model_validator(mode="after")
    def _is_one(self) -> StructuredOutputs:
        given = (self.json_, self.json_object or None, self.regex, self.choice, self.grammar)
        if sum(one is not None for one in given) != 1:
            raise ValueError("give exactly one of json, json_object, regex, choice and grammar")
        return self


class Ask(Part):
    """What completions and chat share.

    `user`, `metadata`, `store`, `service_tier`, `verbosity`, `safety_identifier`, `prompt_cache_key` and
    `prompt_cache_retention` change nothing here: they are for who pays, keeps or caches answers, or advice to a model.
    """

    model: str | None = None
    stream: Flag = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=256, strict=True)] = 1
    max_tokens: Count | None = None
    min_tokens: Count = 0
    temperature: Annotated[float, Field(ge=0, le=100, strict=True)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, strict=True)] = 1.0
    top_k: Annotated[int, Field(ge=-1, strict=True)] = 0
    min_p: Annotated[float, Field(ge=0, le=1, strict=True)] = 0.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, strict=True)] = 1.0
    logit_bias: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100, strict=True)]] = Field(
        default={}, max_length=MAX_BIASES
    )
    seed: Seed | None = None
    stop: Stops = []
    stop_token_ids: list[TokenId] = Field(default=[], max_length=MAX_BIASES)
    include_stop_str_in_output: Flag = False
    ignore_eos: Flag = False
    skip_special_tokens: Flag = True
    prompt_logprobs: Alternatives | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    metadata: Schema | None = None
    store: Flag | None = None
    service_tier: str | None = None
    verbosity: str | None = None
    request_id: Annotated[str, Field(pattern=r"^[\w.:-]{1,128}$")] | None = None
    return_token_ids: Flag = False

    @field_validator("stop", mode="before", json_schema_input_type=Stop | Stops)
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @property
    def limit(self) -> int | None:
        """Tokens asked for, or None."""
        return self.max_tokens

    @property
    def limit_name(self) -> str:
        """The field that asked for them."""
        return "max_tokens"

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Whether each chunk of a stream counts the tokens so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


class CompletionAsk(Ask):
    """POST /v1/completions. `seeds`, one per prompt, is an extension; `logprobs` counts the alternatives shown.

    `return_routed_experts`, as SGLang names it, asks for the experts of every token, and `return_sampling_mask`, as
    vLLM does, for the tokens that each was drawn among.
    """

    prompt: str | Texts | Tokens | Annotated[list[Tokens], Field(fail_fast=True)]
    logprobs: Alternatives | None = None
    echo: Flag = False
    add_special_tokens: Flag = True
    seeds: list[Seed] | None = None
    return_routed_experts: Flag = False
    return_sampling_mask: Flag = False

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list, each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        numbers = [part for part in self.prompt if isinstance(part, int)]
        return [numbers] if numbers else [part for part in self.prompt if not isinstance(part, int)]


class TextPart(Part):
    """A part of a message. `cache_control` is for a cache that has to be told, which this server's has not."""

    type: Literal["text"]
    text: str
    cache_control: Any = Field(default=None, exclude=True)


class FunctionCall(Part):
    name: str
    arguments: Annotated[str, AfterValidator(_measured)]


class ToolCall(Part):
    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None
    function: FunctionCall

    def plain(self) -> dict[str, Any]:
        """As a template reads it: the arguments as an object, where they are one."""
        arguments = read_object(self.function.arguments)
        function = {
            "name": self.function.name,
            "arguments": self.function.arguments if arguments is None else arguments,
        }
        return {"type": self.type, "function": function} | ({"id": self.id} if self.id is not None else {})


class Message(Part):
    """A turn. A client may send back what it received, thinking included; empty annotations and calls are left out.

    So is what clients keep with it, such as `id`, `metadata`, `cache_control` and `provider_specific_fields`.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_empty(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        empty = {"annotations": [], "tool_calls": []}
        said = {key: part for key, part in value.items() if key not in _KEPT_BY_CLIENTS}
        return {key: part for key, part in said.items() if part is not None and empty.get(key) != part}

    @model_validator(mode="after")
    def _has_what_its_role_needs(self) -> Message:
        if self.tool_calls is not None and self.role != "assistant":
            raise ValueError("only an assistant's message has tool_calls")
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError("only a tool's message has a tool_call_id")
        if self.content is None and self.tool_calls is None and self.thought is None:
            raise ValueError("content is missing")
        return self

    def plain(self) -> dict[str, Any]:
        """What the chat template sees. Content that is null, or left out, is null."""
        content = self.content
        text = "".join(part.text for part in content) if isinstance(content, list) else content
        shown: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.tool_calls is not None:
            shown["tool_calls"] = [call.plain() for call in self.tool_calls]
        for key in ("name", "tool_call_id"):
            if getattr(self, key) is not None:
                shown[key] = getattr(self, key)
        return shown if self.thought is None else {**shown, "reasoning_content": self.thought}

    @property
    def thought(self) -> str | None:
        """The thinking of an earlier turn, under either of its names."""
        return self.reasoning if self.reasoning_content is None else self.reasoning_content


class Function(Part):
    """A function that the model may call. `parameters` is a JSON schema; `strict` calls keep to it."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: Schema | None = None
    strict: Flag | None = None


class Tool(Part):
    type: Literal["function"]
    function: Function
    cache_control: Any = Field(default=None, exclude=True)


class FunctionName(Part):
    name: str


class NamedTool(Part):
    type: Literal["function"]
    function: FunctionName


class Conversation(Part):
    """What the chat template makes a prompt of. thinking.py says what becomes of the wishes in it."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    tools: list[Tool] = Field(default=[], max_length=MAX_TOOLS)
    reasoning_effort: str | None = None
    enable_thinking: Flag | None = None
    chat_template_kwargs: Schema = {}
    add_special_tokens: Flag = False
    add_generation_prompt: Flag = True
    continue_final_message: Flag = False

    @model_validator(mode="after")
    def _can_go_on(self) -> Conversation:
        last = self.messages[-1]
        if self.continue_final_message and (last.role != "assistant" or not last.content or last.tool_calls):
            raise ValueError("continue_final_message needs a last message of the assistant with text to go on with")
        return self


class ChatAsk(Ask, Conversation):
    """POST /v1/chat/completions."""

    max_completion_tokens: Count | None = None
    logprobs: Flag = False
    top_logprobs: Alternatives | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: Flag = True
    include_reasoning: Flag = True

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def limit_name(self) -> str:
        return "max_completion_tokens" if self.max_tokens is None else "max_tokens"

    @property
    def offered(self) -> list[Function]:
        """The functions that the model may call: none where the choice is `none`."""
        return [] if self.tool_choice == "none" else [tool.function for tool in self.tools]

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)


class TokenizeAsk(Part):
    """POST /tokenize of a text."""

    model: str | None = None
    prompt: str
    add_special_tokens: Flag = True
    return_token_strs: Flag = False


class TokenizeChatAsk(Conversation):
    """POST /tokenize of a conversation."""

    model: str | None = None
    return_token_strs: Flag = False


class DetokenizeAsk(Part):
    """POST /detokenize."""

    model: str | None = None
    tokens: Tokens


class PauseQuery(Part):
    """POST /pause. `seconds` ends the pause by itself."""

    mode: Literal["keep", "wait"] = "keep"
    seconds: Annotated[int, Field(ge=1, le=LONGEST_PAUSE_S)] | None = None


class StartUpdateQuery(Part):
    """POST /start_weight_update."""

    version: Version
    mode: Literal["full", "delta"] = "full"
    base_version: Version | None = None
    format: str | None = None
    abort: Literal["false", "true"] = "false"


class UpdateWeightsQuery(Part):
    """POST /update_weights. Without `version` it is a part of the open update."""

    sha256: Annotated[str, Field(min_length=1)]
    version: Version | None = None


class FinishUpdateQuery(Part):
    """POST /finish_weight_update."""

    version: Version
    sha256: str | None = None


AskType = TypeVar("AskType", bound=Part)


def parse(kind: type[AskType], body: bytes) -> AskType:
    """Read a request body. Raises ApiError (400) that names the first field at fault."""
    return read(kind, load(body))


def load(body: bytes) -> dict[str, Any]:
    """The JSON object of a body, without what asks for nothing. Raises ApiError (400)."""
    try:
        content = _DECODER.decode(body.decode())
        if b"\\u" in body:
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ApiError("the body must be a JSON object")
    return {key: value for key, value in content.items() if value is not None and not _asks_nothing(key, value)}


def read(kind: type[AskType], content: dict[str, Any]) -> AskType:
    """A request of its fields. Raises ApiError (400) that names the first field at fault."""
    if len(content) > MANY_FIELDS:
        raise _unknown(kind, next(name for name in content if name not in kind.model_fields))
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise _explain(kind, error) from None


def read_object(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is, or None."""
    try:
        content = _DECODER.decode(text)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def first_object(text: str) -> tuple[dict[str, Any], int] | None:
    """The JSON object that a text begins with and where it ends, or None if it is not complete or not valid."""
    try:
        content, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return None
    return (content, end) if isinstance(content, dict) else None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)


def _asks_nothing(key: str, value: Any) -> bool:
    return any(type(value) is type(nothing) and value == nothing for nothing in _ASKS_NOTHING.get(key, ()))


def _explain(kind: type[Part], error: ValidationError) -> ApiError:
    problem = error.errors(include_url=False, include_input=False)[0]
    field = str(problem["loc"][0]) if problem["loc"] else None
    where = ".".join(str(part) for part in problem["loc"])[:200]
    if problem["type"] == "extra_forbidden":
        return _unknown(kind, field or where, where)
    if problem["type"] == "missing":
        return ApiError(f"{where} is missing", param=field, code="missing_required_parameter")
    return ApiError(f"{where}: {problem['msg']}", param=field, code="invalid_value")


def _unknown(kind: type[Part], field: str, where: str | None = None) -> ApiError:
    known = ", ".join(sorted(kind.model_fields))
    shown = where or field[:200]
    message = f"{shown} is not supported by this server, so it is refused rather than ignored. Supported: {known}"
    return ApiError(message, param=field, code="unknown_parameter")


def check_options(ask: Ask) -> None:
    """Refuse options that contradict each other or would change nothing."""
    if ask.stream_options is not None and not ask.stream:
        raise ApiError("stream_options needs stream = true", param="stream_options")
    if ask.prompt_logprobs is not None and ask.stream:
        raise ApiError("prompt_logprobs cannot be streamed; send stream = false", param="prompt_logprobs")
    if ask.response_format is not None and ask.response_format.type != "text" and ask.structured_outputs is not None:
        raise ApiError("give response_format or structured_outputs, not both", param="structured_outputs")
    if isinstance(ask, ChatAsk):
        _check_chat(ask)
    if isinstance(ask, CompletionAsk):
        _check_completion(ask)
        if (samples := len(ask.prompts) * ask.n) > MAX_SAMPLES:
            message = f"{samples:,} samples are too many for one request; {MAX_SAMPLES:,} are allowed"
            raise ApiError(message, param="prompt", code="too_large")
    if ask.limit == 0 and ask.prompt_logprobs is None and not (isinstance(ask, CompletionAsk) and ask.echo):
        name = "max_tokens" if ask.max_tokens is not None else "max_completion_tokens"
        raise ApiError(f"{name} is 0: nothing is left to answer without echo or prompt_logprobs", param=name)


def _check_chat(ask: ChatAsk) -> None:
    if ask.top_logprobs and not ask.logprobs:
        raise ApiError("top_logprobs needs logprobs = true", param="top_logprobs")
    names = [tool.function.name for tool in ask.tools]
    if len(set(names)) < len(names):
        raise ApiError("two tools have the same name", param="tools", code="invalid_value")
    if not names and ask.tool_choice not in (None, "none"):
        raise ApiError("tool_choice needs tools", param="tool_choice")
    if isinstance(ask.tool_choice, NamedTool) and ask.tool_choice.function.name not in names:
        raise ApiError(f"tool_choice names {ask.tool_choice.function.name!r}, which is no tool", param="tool_choice")


def _check_completion(ask: CompletionAsk) -> None:
    if ask.echo and ask.stream and ask.logprobs is not None:
        raise ApiError("echo with logprobs cannot be streamed; send stream = false", param="echo")
    if ask.return_routed_experts and ask.stream:
        raise ApiError("routed experts cannot be streamed; send stream = false", param="return_routed_experts")
    if ask.return_sampling_mask and (ask.stream or ask.stop):
        what = "sampling masks cannot be streamed, nor cut at a stop string; send stream = false and no stop"
        raise ApiError(what, param="return_sampling_mask")
    if ask.seeds is None:
        return
    if ask.seed is not None:
        raise ApiError("give seed or seeds, not both", param="seeds")
    if len(ask.seeds) != len(ask.prompts):
        raise ApiError(f"{len(ask.seeds)} seeds for {len(ask.prompts)} prompts; give one for each", param="seeds")


def check_tokens(ask: Ask, vocab_size: int) -> None:
    """Refuse token ids that the model does not have."""
    for name in ("stop_token_ids", "logit_bias"):
        if any(token >= vocab_size for token in getattr(ask, name)):
            raise ApiError(
                f"{name}: token ids must be between 0 and {vocab_size - 1}", param=name, code="invalid_value"
            )


def too_long(length: int, prompt: int, completion: int, what: str, param: str, *, at_least: bool = False) -> ApiError:
    """The refusal of a sequence beyond `length` tokens, in OpenAI's words: clients recognise them, and shorten."""
    about = "at least " if at_least else ""
    return ApiError(
        f"This model's maximum context length is {length} tokens. However, you requested {about}{prompt + completion} "
        f"tokens ({about}{prompt} in the {what}, {completion} in the completion). Please reduce the length of the "
        f"{what if prompt >= length else f'{what} or the completion'}.",
        param=param,
        code="context_length_exceeded",
    )


def envelope(kind: str, model: str, fingerprint: str, request_id: str | None = None) -> dict[str, Any]:
    """The fields that every response and every chunk of a stream begins with."""
    prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
    return {
        "id": f"{prefix}-{request_id or uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": fingerprint,
    }


def usage(prompt_tokens: int, completion_tokens: int, cached: int, reasoning: int | None) -> dict[str, Any]:
    """Tokens of a request; `cached` of the prompts' came from the prefix cache. `reasoning` is None where unknown."""
    details = {} if reasoning is None else {"completion_tokens_details": {"reasoning_tokens": reasoning}}
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
        **details,
    }
