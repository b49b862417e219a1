"""Requests with arrival times, what became of them, and a client that sends them to a server with OpenAI's API."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np


@dataclass(frozen=True)
class Request:
    """`at` is when it arrives, in seconds after the start of the load."""

    prompt: list[int]
    new_tokens: int
    at: float = 0.0


@dataclass(frozen=True)
class Answer:
    """When the first token and the whole answer came, in seconds after the start of the load."""

    tokens: list[int]
    first: float
    end: float


class Prompts:
    """Random prompts, none twice, of which the first `shared` tokens are alike. The same seed gives the same ones."""

    def __init__(self, seed: int, length: int, vocabulary: range, shared: int = 0):
        self._random, self._vocabulary = random.Random(seed), vocabulary
        self._own, self._start = length - shared, self._draw(shared)

    def batch(self, size: int, new_tokens: int) -> list[Request]:
        """`size` requests that arrive together."""
        return [Request(self._start + self._draw(self._own), new_tokens) for _ in range(size)]

    def poisson(self, size: int, new_tokens: int, per_second: float) -> list[Request]:
        """`size` requests with exponential gaps between them."""
        at, found = 0.0, []
        for request in self.batch(size, new_tokens):
            at += self._random.expovariate(per_second)
            found.append(Request(request.prompt, new_tokens, at))
        return found

    def _draw(self, length: int) -> list[int]:
        return self._random.choices(self._vocabulary, k=length)


def tokens_per_second(answers: list[Answer]) -> float:
    return sum(len(answer.tokens) for answer in answers) / max(answer.end for answer in answers)


def first_token_s(requests: list[Request], answers: list[Answer], percentile: float) -> float:
    """A percentile of the time to the first token, in seconds."""
    waits = [answer.first - request.at for request, answer in zip(requests, answers, strict=True)]
    return float(np.percentile(waits, percentile))


def between_tokens_s(answers: list[Answer]) -> float:
    """The median over answers of the mean time between two tokens, in seconds."""
    return float(np.median([(one.end - one.first) / (len(one.tokens) - 1) for one in answers]))


class Client:
    """Sends each request over a connection of its own, at its time. Greedy unless a temperature is given."""

    def __init__(self, url: str, model: str, temperature: float = 0.0):
        self._host, self._port = urlsplit(url).hostname, urlsplit(url).port
        self._model, self._temperature = model, temperature

    def run(self, requests: list[Request], streamed: bool) -> list[Answer]:
        return asyncio.run(self._run(requests, streamed))

    async def _run(self, requests: list[Request], streamed: bool) -> list[Answer]:
        began = time.perf_counter()
        return await asyncio.gather(*(self._one(request, streamed, began) for request in requests))

    async def _one(self, request: Request, streamed: bool, began: float) -> Answer:
        await asyncio.sleep(max(0.0, began + request.at - time.perf_counter()))
        body = {
            "model": self._model,
            "prompt": [request.prompt],
            "max_tokens": request.new_tokens,
            "ignore_eos": True,
            "temperature": self._temperature,
            "return_token_ids": True,
            "stream": streamed,
        }
        reader, writer = await asyncio.open_connection(self._host, self._port, limit=1 << 22)
        try:
            writer.write(_message(f"{self._host}:{self._port}", json.dumps(body).encode()))
            parts = [(content, time.perf_counter() - began) async for content in _contents(reader)]
        finally:
            writer.close()
        return _answer(parts, streamed)


def _message(host: str, body: bytes) -> bytes:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return (head + f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n").encode() + body


async def _contents(reader: asyncio.StreamReader) -> Any:
    """The body in the pieces in which it comes."""
    status = (await reader.readline()).split()[1]
    headers = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode().partition(":")
        headers[name.lower()] = value.strip()
    if status != b"200":
        raise RuntimeError(f"the server refused a request ({status.decode()}): {(await reader.read(500)).decode()}")
    if headers.get("transfer-encoding") != "chunked":
        yield await reader.readexactly(int(headers["content-length"]))
        return
    while size := int(await reader.readline(), 16):
        content = await reader.readexactly(size + 2)
        yield content[:-2]


def _answer(parts: list[tuple[bytes, float]], streamed: bool) -> Answer:
    if not streamed:
        end = parts[-1][1]
        return Answer(json.loads(b"".join(content for content, _ in parts))["choices"][0]["token_ids"], end, end)
    tokens: list[int] = []
    first = last = 0.0
    pending = b""
    for content, at in parts:
        *lines, pending = (pending + content).split(b"\n")
        for line in lines:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(f"the stream ended with an error: {event['error']}")
            new = [token for choice in event["choices"] for token in choice.get("token_ids") or []]
            if new and not tokens:
                first = at
            if new:
                last = at
            tokens += new
    return Answer(tokens, first, last)
