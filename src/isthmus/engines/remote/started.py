"""Engines of other makes that are started for one bundle and ended again, by a command that the user gives."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from isthmus.engines import EngineError
from isthmus.engines.remote import HttpEngine
from isthmus.engines.remote.transport import Refused, Unreachable

START_S = 900.0
STOP_S = 20.0
NOT_YET_UP = 503
POLL_S = 1.0
LAST_LINES = 15


@contextlib.contextmanager
def started(
    command: str, bundle: Path, log: Path, url: str | None = None, api_key: str | None = None
) -> Iterator[HttpEngine]:
    """The engine that the command serves this bundle with, once it answers; its process group is ended at the end.

    `{bundle}` and `{port}` in the command, and `{port}` in the url, are the bundle's folder and a free port here; the
    url is that of this machine if absent. `log` receives what the process prints. Raises EngineError with its last
    lines if it ends, or does not answer within START_S.
    """
    if "{bundle}" not in command:
        raise EngineError("the command that serves a bundle must contain {bundle}, and {port} where the port goes")
    port = str(_free_port())
    words = [part.replace("{bundle}", str(bundle.absolute())).replace("{port}", port) for part in shlex.split(command)]
    engine = HttpEngine((url or "http://127.0.0.1:{port}").replace("{port}", port), api_key, start_wait_s=0.0)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        try:
            process = subprocess.Popen(words, stdout=out, stderr=out, start_new_session=True)
        except OSError as error:
            raise EngineError(f"{words[0]} cannot be started: {error}") from None
    try:
        _await(engine, process, bundle, log)
        yield engine
    finally:
        _end(process)


def _await(engine: HttpEngine, process: subprocess.Popen[bytes], bundle: Path, log: Path) -> None:
    end = time.monotonic() + START_S
    while True:
        try:
            engine.start(bundle)
            return
        except (Unreachable, Refused) as error:
            waits = isinstance(error, Unreachable) or error.status == NOT_YET_UP
            if not waits or time.monotonic() > end:
                raise
        if process.poll() is not None:
            last = "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
            code = process.returncode
            raise EngineError(f"the engine for {bundle} ended with exit code {code}; it said last:\n{last}")
        time.sleep(POLL_S)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
