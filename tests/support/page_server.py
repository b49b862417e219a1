"""The real server on a small bundle, whose chat can be given scripts: what to send, when, and how it breaks off."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from isthmus.engines.local.api.host import bind

DEADLINE_S = 30
HANG_UP = "hang up"
DONE = b"data: [DONE]\n\n"


class HungUp(Exception):
    """The scripted end of a connection."""


@dataclass
class Script:
    """An answer of the chat: bytes are sent, an Event is waited for, HANG_UP breaks the connection off."""

    steps: list[bytes | threading.Event | str]
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "text/event-stream"})
    left: threading.Event = field(default_factory=threading.Event)

    async def send(self, receive: Receive, send: Send) -> None:
        headers = [(name.lower().encode(), value.encode()) for name, value in self.headers.items()]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        watching = asyncio.ensure_future(self._watch(receive))
        try:
            for step in self.steps:
                if isinstance(step, bytes):
                    await send({"type": "http.response.body", "body": step, "more_body": True})
                elif isinstance(step, threading.Event):
                    await self._wait(step)
                else:
                    raise HungUp
                if self.left.is_set():
                    return
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            watching.cancel()

    async def _wait(self, gate: threading.Event) -> None:
        end = time.monotonic() + DEADLINE_S
        while not gate.is_set() and not self.left.is_set():
            assert time.monotonic() < end, "nobody opened the gate of a script"
            await run_in_threadpool(gate.wait, 0.02)

    async def _watch(self, receive: Receive) -> None:
        message: Message = {"type": ""}
        while message["type"] != "http.disconnect":
            message = await receive()
        self.left.set()


@dataclass(frozen=True)
class Asked:
    """A chat request as it came."""

    headers: dict[str, str]
    body: dict[str, Any]


class Scripted:
    """An application in front of the real one: scripts answer the chat while there are any, `pages` replace routes."""

    def __init__(self, app: ASGIApp):
        self._app = app
        self.reset()

    def reset(self) -> None:
        self.scripts: deque[Script] = deque()
        self.pages: dict[str, Any] = {}
        self.asked: list[Asked] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path")
        if path in self.pages:
            await JSONResponse(self.pages[path])(scope, receive, send)
        elif path == "/v1/chat/completions" and self.scripts:
            request = Request(scope, receive)
            self.asked.append(Asked(dict(request.headers), json.loads(await request.body())))
            with contextlib.suppress(HungUp):
                await self.scripts.popleft().send(receive, send)
        else:
            await self._app(scope, receive, send)

    def script(self, *steps: bytes | threading.Event | str, **options: Any) -> Script:
        """The next answer of the chat."""
        script = Script(list(steps), **options)
        self.scripts.append(script)
        return script


@contextlib.contextmanager
def live(app: ASGIApp):
    """An application on a free port, in a thread; yields its address."""
    listener = bind("127.0.0.1", 0, flag="--port")
    # A scripted end of a connection is an error to uvicorn; the tests say what has to follow from it.
    host = uvicorn.Server(uvicorn.Config(app, log_level="critical", ws="none", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=lambda: host.run(sockets=[listener]))
    thread.start()
    while not host.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    host.should_exit = True
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


def event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


def piece(content: str = "", thought: str = "", finish: str | None = None) -> bytes:
    """One chunk of a streamed chat."""
    delta = {name: text for name, text in (("content", content), ("reasoning_content", thought)) if text}
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return event({"model": "small", "system_fingerprint": "unsealed-v0", "choices": [choice]})


def ending(prompt: int = 5, completion: int = 7, finish: str = "stop") -> bytes:
    """The last chunks: how it ended, what it cost."""
    count = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return piece(finish=finish) + event({"model": "small", "choices": [], "usage": count}) + DONE
