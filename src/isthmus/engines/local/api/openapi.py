"""The OpenAPI document of a server: made of its table of routes and of the very models that read its requests."""

from __future__ import annotations

import inspect
import mimetypes
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response

from isthmus import __version__
from isthmus.engines.local.api.keys import Level
from isthmus.engines.local.api.protocol import Part

JSON, EVENTS, TEXT, BYTES = "application/json", "text/event-stream", "text/plain", "application/octet-stream"
Handler = Callable[[Request], Awaitable[Response]]
_IN_NAMES = str.maketrans("/", "_", "{}")
_SCHEMAS = "#/components/schemas/"
_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
                "param": {"type": ["string", "null"], "description": "the field at fault"},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
_MEANINGS = {
    200: "done",
    400: "the request is wrong; the message names what is",
    401: "a key is missing or unknown",
    403: "the key may not use this route",
    404: "there is no such model or thing",
    408: "the request did not arrive in time",
    409: "the order of the weight update is wrong",
    413: "the body is too long",
    415: "the body is no JSON by its Content-Type",
    429: "a limit of the key is reached; Retry-After says when to ask again",
    500: "the weights are damaged",
    503: "a limit is reached, or the server is not in a state to answer; Retry-After says when to ask again",
}


@dataclass(frozen=True)
class Operation:
    """A route: who may use it, and what it takes and gives.

    A body is read by one of the models `takes`, or is bytes if `takes_bytes`. `form` is the type of a JSON answer.
    `also` are statuses beside those that follow from the rest. A route that takes nothing answers 503 in the same form
    as 200.
    """

    level: Level
    method: str
    path: str
    handler: Handler
    takes: tuple[type[Part], ...] = ()
    takes_bytes: bool = False
    query: type[Part] | None = None
    gives: tuple[str, ...] = (JSON,)
    also: tuple[int, ...] = ()
    form: str = "object"

    @property
    def statuses(self) -> list[int]:
        """Every status that this route may answer."""
        found = {200, *self.also}
        if self.takes:
            found |= {400, 404, 408, 413, 415}
        if self.query:
            found.add(400)
        if self.level > Level.PUBLIC:
            found.add(401)
        if self.level == Level.ADMIN:
            found.add(403)
        return sorted(found)


def file_operation(path: str, name: str, handler: Handler) -> Operation:
    """The route of a file that everyone may read."""
    return Operation(Level.PUBLIC, "GET", path, handler, gives=(mimetypes.guess_type(name)[0] or BYTES,))


def document(operations: list[Operation], *, users_need_keys: bool) -> dict[str, Any]:
    """The document, in OpenAPI 3.1."""
    kinds = {kind for one in operations for kind in one.takes}
    pairs = [(kind, "validation") for kind in sorted(kinds, key=lambda kind: kind.__name__)]
    names, schemas = models_json_schema(pairs, ref_template=_SCHEMAS + "{model}")  # pyright: ignore[reportArgumentType]
    paths: dict[str, dict[str, Any]] = {}
    for one in operations:
        body = [names[kind, "validation"] for kind in one.takes]
        paths.setdefault(_plain(one.path), {})[one.method.lower()] = _operation(one, body, users_need_keys)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Isthmus", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {**schemas.get("$defs", {}), "Error": _ERROR},
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(one: Operation, body: list[Any], users_need_keys: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "operationId": f"{one.method.lower()}{_plain(one.path)}".translate(_IN_NAMES),
        "summary": (inspect.getdoc(one.handler) or one.path).splitlines()[0],
        "security": [{"bearer": []}] if one.level == Level.ADMIN or users_need_keys else [{}, {"bearer": []}],
        "responses": {str(status): _response(one, status) for status in one.statuses},
    }
    if one.level == Level.PUBLIC:
        del shown["security"]
    if body:
        schema = body[0] if len(body) == 1 else {"anyOf": body}
        shown["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
    if one.takes_bytes:
        shown["requestBody"] = {"required": True, "content": {BYTES: {"schema": {}}}}
    parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in _names(one)]
    if one.query is not None:
        parameters += _parameters(one.query)
    return {**shown, "parameters": parameters} if parameters else shown


def _names(one: Operation) -> list[str]:
    """The parameters in a path."""
    return re.findall(r"{(\w+)", one.path)


def _plain(path: str) -> str:
    """A path without the kinds of its parameters, which are Starlette's."""
    return re.sub(r":\w+}", "}", path)


def _response(one: Operation, status: int) -> dict[str, Any]:
    says = {"description": _MEANINGS[status]}
    fails = status != 200 and not (status == 503 and not one.takes)
    if fails:
        return {**says, "content": {JSON: {"schema": {"$ref": _SCHEMAS + "Error"}}}}
    content = {kind: {"schema": {"type": one.form}} if kind == JSON else {} for kind in one.gives}
    return {**says, "content": content} if content else says


def _parameters(query: type[Part]) -> list[dict[str, Any]]:
    """The fields of a query: none of them has a model of its own."""
    schema = query.model_json_schema()
    required = schema.get("required", [])
    return [
        {"name": name, "in": "query", "required": name in required, "schema": field}
        for name, field in schema["properties"].items()
    ]
