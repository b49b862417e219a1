"""The local engine: our own scheduler, cache, runner and sampler, in a process of its own on the CPU."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from isthmus.engines import EngineError
from isthmus.engines.local.api.keys import ADMIN_KEY, API_KEYS
from isthmus.engines.local.core.options import DEFAULT_OPTIONS, flags
from isthmus.engines.remote import HttpEngine
from isthmus.nodes import HERE, Launcher
from isthmus.recipe.schema import EngineOptions

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0
_LOG_TAIL_LINES = 15
_LAST_WORDS_S = 1.0
# glibc hands large blocks back to the system at every step otherwise, and faulting them in again costs a fifth of it.
_KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "268435456",
    "MALLOC_TOP_PAD_": "33554432",
}


def report_kernels(tell: Callable[..., None], kernels: str) -> None:
    """Tell an event if an engine runs without its compiled layers, and so more slowly than it might."""
    if kernels != "native":
        tell("fallback", what="the compiled layers of the engine", why=kernels)


class LocalEngine(HttpEngine):
    """Starts the engine's process and speaks to it. As a context manager it serves `bundle_folder` until the end.

    `rehearse` names a chip whose rules the engine must keep. `log` receives what the process prints; if the process
    dies, its last lines are in the error. `kernels` is what its core computes with, once it runs. `launcher` says where
    the process runs; one on a node of a cluster takes up to `node_s` to get there.
    """

    def __init__(
        self,
        bundle_folder: Path,
        *,
        log: Path,
        threads: int = 1,
        rehearse: str | None = None,
        slots: int = 256,
        options: EngineOptions = DEFAULT_OPTIONS,
        launcher: Launcher = HERE,
        node_s: float = 0.0,
    ):
        super().__init__(url="", api_key=secrets.token_hex(16), start_wait_s=0.0)
        self.bundle_folder, self.log = bundle_folder, log
        self.threads, self.rehearse, self.slots, self.options = threads, rehearse, slots, options
        self.launcher, self.node_s = launcher, node_s
        self.kernels = ""
        self._started_before = False
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start(self.bundle_folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, bundle_folder: Path) -> None:
        """Start the process and wait until it answers. Raises EngineError with its own words if it does not."""
        self.stop()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(bundle_folder, again=self._started_before),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environment(),
                start_new_session=True,
            )
        self._started_before = True
        try:
            ready = self._await_ready(self._process)
            self.url, self.kernels = ready["url"], ready["kernels"]
            super().start(bundle_folder)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the process: it is asked first, and killed if it does not answer."""
        super().stop()
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def kill(self) -> None:
        """End the process at once; what is asked of it fails."""
        if self._process is not None:
            self._process.kill()

    @property
    def can_be_replaced(self) -> bool:
        """One that was lost is started anew, on another node if its own is gone."""
        return True

    @property
    def is_there(self) -> bool:
        """Whether its process was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """The process, while there is one."""
        return self._process.pid if self._process else None

    def _command(self, bundle_folder: Path, *, again: bool) -> list[str]:
        words = ["-m", "isthmus.engines.local", "--bundle", str(bundle_folder), "--port", "0"]
        words += ["--host", self.launcher.host, "--threads", str(self.threads), "--slots", str(self.slots)]
        words += ["--admin", "--follow-stdin", *flags(self.options)]
        words += ["--rehearse", self.rehearse] if self.rehearse else []
        return self.launcher.command(words, [*_KEEP_MEMORY, *self._own()], again=again)

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **_KEEP_MEMORY, **self._own()}

    def _own(self) -> dict[str, str]:
        """On a node other machines reach it: without a key of its own, a user is refused there."""
        threads = str(self.threads)
        own = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}
        keys = {ADMIN_KEY: self.api_key or ""} | ({} if self.launcher is HERE else {API_KEYS: secrets.token_hex(16)})
        return own | keys

    def _await_ready(self, process: subprocess.Popen[bytes]) -> dict[str, Any]:
        assert process.stdout is not None
        limit = START_TIMEOUT_S + self.node_s
        line = _read_line(process.stdout, limit)
        if line is None:
            raise EngineError(f"the engine did not answer within {limit:.0f} s.{self._explain()}")
        if not line:
            process.wait(STOP_TIMEOUT_S)
            raise EngineError(f"the engine could not start (exit code {process.returncode}).{self._explain()}")
        return json.loads(line)

    def _explain(self) -> str:
        """What the process said last, for the errors of HttpEngine."""
        ended = ""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                ended = f" Its process ended with code {self._process.wait(_LAST_WORDS_S)}."
        lines = self.log.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:] if self.log.exists() else []
        said = "\n".join(f"    {line}" for line in lines)
        return f"{ended} Its log {self.log} ends:\n{said}" if said else ended


def _read_line(pipe: IO[bytes], timeout_s: float) -> bytes | None:
    """The first line of a pipe, what there was if it closed before, or None if neither happened in time."""
    end, line = time.monotonic() + timeout_s, b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([pipe], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            return None
        part = os.read(pipe.fileno(), 4096)
        if not part:
            return b""
        line += part
    return line
