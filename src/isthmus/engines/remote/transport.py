"""HTTP with one connection per call, and errors that repeat what the server said."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from isthmus.engines import EngineError

_POLL_S = 0.2
_NOT_YET_UP = 503


class Refused(EngineError):
    """The server answered with an error status. `code` is the word for it in a body of OpenAI's shape."""

    def __init__(self, message: str, status: int, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


class Unreachable(EngineError):
    """There is no server, or it went away."""


class Transport:
    """Calls to the server at `url`. `explain` adds to the message when it does not answer."""

    def __init__(self, url: str, api_key: str | None, timeout_s: float, explain: Callable[[], str] = str):
        self.url, self.api_key, self.timeout_s, self.explain = url.rstrip("/"), api_key, timeout_s, explain

    def get(self, path: str) -> Any:
        """The JSON that answers a GET; None for an empty answer."""
        return self.call("GET", path)

    def post(self, path: str, content: Any = None) -> Any:
        """The JSON that answers a POST of JSON."""
        body = None if content is None else json.dumps(content).encode()
        return self.call("POST", path, body, None if content is None else "application/json")

    def call(self, method: str, path: str, body: bytes | None = None, kind: str | None = None) -> Any:
        """One request. Raises Unreachable, Refused with the server's reason, EngineError for no JSON."""
        status, content = self._exchange(method, path, body, kind)
        if status >= 300:
            raise Refused(
                f"the engine at {self.url} refused {path} ({status}): {reason(content)}", status, _code(content)
            )
        try:
            return json.loads(content) if content else None
        except ValueError:
            raise EngineError(f"the engine at {self.url} answered {path} with no JSON: {_beginning(content)}") from None

    def wait_until_healthy(self, seconds: float) -> None:
        """Return when GET /health succeeds. A server that is not there or answers 503 is asked again until then."""
        end = time.monotonic() + seconds
        while True:
            try:
                status, content = self._exchange("GET", "/health", None, None)
            except Unreachable:
                if time.monotonic() > end:
                    raise
            else:
                if status < 300:
                    return
                if status != _NOT_YET_UP or time.monotonic() > end:
                    raise Refused(f"the engine at {self.url} is not healthy ({status}): {reason(content)}", status)
            time.sleep(_POLL_S)

    def _exchange(self, method: str, path: str, body: bytes | None, kind: str | None) -> tuple[int, bytes]:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        if kind:
            headers["Content-Type"] = kind
        connection = self._connect()
        try:
            connection.request(method, urlsplit(self.url).path + path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        except TimeoutError as error:
            raise Unreachable(
                f"the engine at {self.url} did not answer {path} within {self.timeout_s:.0f} s.{self.explain()}"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"the engine at {self.url} does not answer ({error!r}).{self.explain()}") from error
        finally:
            connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise EngineError(f"{self.url!r} is not the URL of an engine; write http://host:port")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(parts.hostname, parts.port, timeout=self.timeout_s)


def reason(content: bytes) -> str:
    """The message in an error body of OpenAI's, FastAPI's or SGLang's shape, or the beginning of whatever was sent."""
    try:
        body = json.loads(content)
    except ValueError:
        return _beginning(content)
    found = body
    while isinstance(found, dict):
        found = next((found[key] for key in ("error", "message", "detail") if found.get(key)), None)
    return found if isinstance(found, str) else _beginning(content)


def _code(content: bytes) -> str | None:
    try:
        error = json.loads(content)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return None
    return error if isinstance(error, str) else None


def _beginning(content: bytes) -> str:
    return content[:300].decode(errors="replace") or "no reason given"
