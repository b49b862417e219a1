"""What a client may ask: the fields of OpenAI's completions and chat, all of which are honoured, and no others.

An unknown or unsupported field is refused by name. Null means absent, as in OpenAI's API.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from isthmus.errors import IsthmusError

Count = Annotated[int, Field(ge=1, strict=True)]
Seed = Annotated[int, Field(strict=True)]
DEFAULT_COMPLETION_TOKENS = 16
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16


class ApiError(IsthmusError):
    """A refused request: an HTTP status, and OpenAI's error object with the field that is at fault."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StreamOptions(Part):
    include_usage: bool = False


class Ask(Part):
    """The fields that completions and chat share. `user` is accepted because it asks for nothing."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=256, strict=True)] = 1
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Seed | None = None
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default=[], max_length=MAX_STOPS)
    user: str | None = None
    return_token_ids: bool = False

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @property
    def limit(self) -> int | None:
        """Tokens asked for, or None."""
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionAsk(Ask):
    """POST /v1/completions. `seeds`, one per prompt, is an extension; `logprobs` counts the alternatives shown."""

    prompt: str | list[str] | list[Annotated[int, Field(strict=True)]] | list[list[Annotated[int, Field(strict=True)]]]
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS, strict=True)] | None = None
    seeds: list[Seed] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list, each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        numbers = [part for part in self.prompt if isinstance(part, int)]
        return [numbers] if numbers else [part for part in self.prompt if not isinstance(part, int)]


class TextPart(Part):
    type: Literal["text"]
    text: str


class Message(Part):
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    def plain(self) -> dict[str, str]:
        """Role and text. Earlier thinking is left out, as R1's template leaves it out."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatAsk(Ask):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS, strict=True)] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


AskType = TypeVar("AskType", bound=Ask)


def parse(kind: type[AskType], body: bytes) -> AskType:
    """Read a request body. Raises ApiError (400) that names the first field at fault."""
    try:
        content = json.loads(body)
    except ValueError as error:
        raise ApiError(f"the body is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ApiError("the body must be a JSON object")
    try:
        return kind.model_validate({key: value for key, value in content.items() if value is not None})
    except ValidationError as error:
        raise _explain(kind, error) from None


def _explain(kind: type[Ask], error: ValidationError) -> ApiError:
    problem = error.errors()[0]
    field = str(problem["loc"][0]) if problem["loc"] else None
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = ", ".join(sorted(kind.model_fields))
        message = f"{where} is not supported by this server, so it is refused rather than ignored. Supported: {known}"
        return ApiError(message, param=field, code="unknown_parameter")
    if problem["type"] == "missing":
        return ApiError(f"{where} is missing", param=field, code="missing_required_parameter")
    return ApiError(f"{where}: {problem['msg']}", param=field, code="invalid_value")


def check_options(ask: Ask) -> None:
    """Refuse options that contradict each other or would change nothing."""
    if ask.stream_options is not None and not ask.stream:
        raise ApiError("stream_options needs stream = true", param="stream_options")
    if isinstance(ask, ChatAsk) and ask.top_logprobs is not None and not ask.logprobs:
        raise ApiError("top_logprobs needs logprobs = true", param="top_logprobs")
    if isinstance(ask, CompletionAsk) and ask.seeds is not None:
        if ask.seed is not None:
            raise ApiError("give seed or seeds, not both", param="seeds")
        if len(ask.seeds) != len(ask.prompts):
            raise ApiError(f"{len(ask.seeds)} seeds for {len(ask.prompts)} prompts; give one for each", param="seeds")


def envelope(kind: str, model: str, fingerprint: str) -> dict[str, Any]:
    """The fields that every response and every chunk of a stream begins with."""
    prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": fingerprint,
    }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
