"""A function in a process of its own, with a deadline: what hangs in a library that others wrote is killed.

The process speaks JSON, a line a call. It is started at the first call, and anew after it was killed; it ends with the
one that started it.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

START_S = 120.0
"""For a process that starts, and imports what the function needs, on a busy machine."""
MEMORY_MIB = 4096
SAID = 1000
"""Characters of an exception that are passed on."""


class WorkerFailed(Exception):
    """A call that came to nothing: why in a few words, and what the function said, if it said something."""

    def __init__(self, reason: str, said: str = ""):
        super().__init__(reason)
        self.said = said or reason


class Worker:
    """Calls `module:function`, one call at a time, with what JSON can hold.

    A process that starts calls it with `first`, if that is given: what it loads is not held against the deadline.
    """

    def __init__(self, function: str, deadline_s: float, first: Sequence[Any] | None = None):
        self.function, self.deadline_s, self.first = function, deadline_s, first
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._held = b""

    def call(self, *arguments: Any) -> Any:
        """What the function returns. Raises WorkerFailed if it raises, ends its process, or takes too long."""
        with self._lock:
            if self._process is None:
                self._start()
                if self.first is not None:
                    self._ask(self.first, START_S)
            said = self._ask(arguments, self.deadline_s)
        if "error" in said:
            raise WorkerFailed(said["error"], said["said"])
        return said["value"]

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _ask(self, arguments: Sequence[Any], seconds: float) -> dict[str, Any]:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(arguments).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._stop()
            raise WorkerFailed("its process ended") from None
        return self._read(seconds)

    def _start(self) -> None:
        command = [sys.executable, "-m", __name__, self.function, str(MEMORY_MIB)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._held = b""
        self._process = process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        weakref.finalize(self, _kill, process)
        said = self._read(START_S)
        if "error" in said:
            self._stop()
            raise WorkerFailed(said["error"], said["said"])

    def _read(self, seconds: float) -> dict[str, Any]:
        """The next line of the process, which is killed if there is none in time."""
        assert self._process is not None and self._process.stdout is not None
        pipe, end = self._process.stdout.fileno(), time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while b"\n" not in self._held:
                if not selector.select(max(end - time.monotonic(), 0.0)):
                    self._stop()
                    raise WorkerFailed("timed out")
                block = os.read(pipe, 1 << 16)
                if not block:
                    self._stop()
                    raise WorkerFailed("its process ended")
                self._held += block
        line, _, self._held = self._held.partition(b"\n")
        return json.loads(line)

    def _stop(self) -> None:
        if self._process is not None:
            _kill(self._process)
        self._process = None


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None and not pipe.closed:
            _close(pipe)


def _close(pipe: Any) -> None:
    try:
        pipe.close()
    except BrokenPipeError:  # what was not written any more is flushed on closing
        return


def serve(function: str, memory_mib: int) -> None:
    """The process: one line of arguments in, one line with a value or the kind of an exception out."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_mib << 20, memory_mib << 20))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer

    def say(**said: Any) -> None:
        answers.write(json.dumps(said) + "\n")
        answers.flush()

    module, _, name = function.partition(":")
    with ThreadPoolExecutor(max_workers=1) as pool:
        loaded = pool.submit(importlib.import_module, module)
        if error := loaded.exception():
            say(error=type(error).__name__, said=str(error)[:SAID])
            return
        say(value=None)
        for line in sys.stdin:
            called = pool.submit(getattr(loaded.result(), name), *json.loads(line))
            error = called.exception()
            said = {"error": type(error).__name__, "said": str(error)[:SAID]} if error else {"value": called.result()}
            say(**said)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
