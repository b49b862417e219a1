"""How much a server takes on: the waiting line as a whole, and what each key may ask per minute."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from isthmus.engines.local.api.protocol import ApiError

Clock = Callable[[], float]
MEMORY_S = 30.0
LONGEST_RETRY_S = 60
# The reasons that vLLM gives to the label of vllm:admission_rejections.
TOO_MANY_REQUESTS, TOO_MANY_TOKENS = "max_num_queued_reqs", "max_num_queued_tokens"


class Refused(ApiError):
    """A request that would be taken at another time: 503 or 429, and after how many seconds to ask again."""

    def __init__(self, message: str, *, status: int, reason: str, after_s: float):
        super().__init__(message, status=status, code="overloaded" if status == 503 else "rate_limit_exceeded")
        self.reason = reason
        self.headers = {"Retry-After": str(min(LONGEST_RETRY_S, max(1, math.ceil(after_s))))}

    def body(self) -> dict[str, dict[str, str | None]]:
        content = super().body()
        if self.status == 429:
            content["error"]["type"] = "rate_limit_error"
        return content


@dataclass(frozen=True)
class KeyLimits:
    """What each key may do; None is no limit. `concurrent` counts requests that are not answered yet."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None


class Rate:
    """How much happens per second: an average in which the weight of the past falls by e in `MEMORY_S`."""

    def __init__(self, clock: Clock = time.monotonic):
        self._clock, self._lock = clock, threading.Lock()
        self._began, self._last, self._sum = clock(), clock(), 0.0

    def add(self, amount: float) -> None:
        with self._lock:
            self._decay()
            self._sum += amount

    def per_second(self) -> float:
        """0 where nothing has happened lately."""
        with self._lock:
            self._decay()
            seen = -math.expm1(-(self._last - self._began) / MEMORY_S)
            return self._sum / (MEMORY_S * seen) if seen > 0 else 0.0

    def seconds_for(self, amount: float) -> float:
        """How long this much takes at this rate; 1 if nothing is known."""
        rate = self.per_second()
        return amount / rate if rate > 0 else 1.0

    def _decay(self) -> None:
        now = self._clock()
        self._sum *= math.exp(-(now - self._last) / MEMORY_S)
        self._last = now


class Bucket:
    """A token bucket that holds one minute's allowance. It may be overdrawn by what was not known beforehand."""

    def __init__(self, per_minute: int, clock: Clock = time.monotonic):
        self.per_minute, self._clock = per_minute, clock
        self._level, self._last = float(per_minute), clock()

    def level(self) -> float:
        """What is left now; below zero if more was taken than was there."""
        now = self._clock()
        self._level = min(float(self.per_minute), self._level + (now - self._last) * self.per_minute / 60)
        self._last = now
        return self._level

    def seconds_until(self, amount: float) -> float:
        """How long until `amount`, or a full bucket if that is less, is there."""
        return max(0.0, (min(amount, self.per_minute) - self.level()) * 60 / self.per_minute)

    def take(self, amount: float) -> None:
        self.level()
        self._level -= amount


class KeyBudget:
    """What one key has left."""

    def __init__(self, limits: KeyLimits, clock: Clock = time.monotonic):
        self.limits, self.open, self._lock = limits, 0, threading.Lock()
        self._requests = Bucket(limits.requests_per_minute, clock) if limits.requests_per_minute else None
        self._tokens = Bucket(limits.tokens_per_minute, clock) if limits.tokens_per_minute else None

    def enter(self) -> None:
        """Count one request that begins. Raises Refused (429)."""
        with self._lock:
            if self.limits.concurrent is not None and self.open >= self.limits.concurrent:
                raise _too_much("concurrent_requests", f"{self.limits.concurrent} requests at the same time", 1.0)
            if self._requests is not None:
                if wait := self._requests.seconds_until(1):
                    raise _too_much("requests_per_minute", f"{self._requests.per_minute} requests per minute", wait)
                self._requests.take(1)
            self.open += 1

    def leave(self) -> None:
        """Count one request that ended."""
        with self._lock:
            self.open -= 1

    def take_prompts(self, tokens: int) -> None:
        """Charge prompts before they are run. Raises Refused (429) if the minute's tokens are used up."""
        with self._lock:
            if self._tokens is None:
                return
            if wait := self._tokens.seconds_until(tokens):
                raise _too_much("tokens_per_minute", f"{self._tokens.per_minute} tokens per minute", wait)
            self._tokens.take(tokens)

    def take_generated(self, tokens: int) -> None:
        """Charge generated tokens. They are known afterwards only, so they may overdraw the budget."""
        with self._lock:
            if self._tokens is not None:
                self._tokens.take(tokens)

    def headers(self) -> dict[str, str]:
        """What is left, in OpenAI's headers."""
        found: dict[str, str] = {}
        with self._lock:
            for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
                if bucket is not None:
                    found[f"x-ratelimit-limit-{name}"] = str(bucket.per_minute)
                    found[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.level())))
                    found[f"x-ratelimit-reset-{name}"] = _duration(bucket.seconds_until(bucket.per_minute))
        return found


def _too_much(reason: str, allowed: str, wait_s: float) -> Refused:
    return Refused(
        f"this key may send {allowed}; try again in {_duration(wait_s)}", status=429, reason=reason, after_s=wait_s
    )


def _duration(seconds: float) -> str:
    """As OpenAI writes it: 1s, 6m0s, 20ms."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
