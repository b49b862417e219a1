"""What a trainer that is timed step by step shares with the one that times it: its steps on request, and their parts.

On its standard streams: a line in asks for one step, and the line out is JSON of what the step took and found. The
first line out says that it is ready; standard input that closes ends it. It runs without our package.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

EARLY = frozenset("abcdefghijklmABCDEFGHIJKLM")


def early_letters(text: str) -> float:
    """A reward that hardly two samples share: the share of letters that are in the first half of the alphabet."""
    letters = [letter for letter in text if letter.isascii() and letter.isalpha()]
    return sum(letter in EARLY for letter in letters) / len(letters) if letters else 0.0


class Stopwatch:
    """Seconds of a clock by part, of processor time if nothing else is given; a part within another is not counted in
    that one."""

    def __init__(self, clock: Callable[[], float] = time.process_time) -> None:
        self.clock = clock
        self.seconds: dict[str, float] = {}
        self._inner: list[float] = []

    def wrap(self, owner: Any, method: str, part: str) -> None:
        """Count each call of a method, of a class or an object."""
        inner = getattr(owner, method)

        def timed(*arguments: Any, **options: Any) -> Any:
            with self.part(part):
                return inner(*arguments, **options)

        setattr(owner, method, timed)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = self.clock()
        self._inner.append(0.0)
        try:
            yield
        finally:
            whole = self.clock() - began
            self.seconds[name] = self.seconds.get(name, 0.0) + whole - self._inner.pop()
            if self._inner:
                self._inner[-1] += whole


class OnRequest:
    """Holds a trainer before each step until one is asked for, and answers when it comes to the next.

    What libraries print goes to standard error. Raises SystemExit where nothing is asked any more.
    """

    def __init__(self, clock: Callable[[], float] = time.process_time) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.watch = Stopwatch(clock)
        self.found: dict[str, Any] = {}
        self._began: float | None = None

    def before_step(self) -> None:
        if self._began is None:
            self._say({"ready": True})
        else:
            seconds = time.perf_counter() - self._began
            self._say({"seconds": seconds, "parts": dict(self.watch.seconds), **self.found})
        if not sys.stdin.readline():
            raise SystemExit
        self.watch.seconds.clear()
        self._began = time.perf_counter()

    def _say(self, said: dict[str, Any]) -> None:
        print(json.dumps(said), file=self._answers, flush=True)
