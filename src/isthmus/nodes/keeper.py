"""What Ray runs on a node: it keeps one process there. Needs the standard library alone, and Ray, which runs it.

The interpreter that Ray has on a node need not have Isthmus: this file is sent to it, and the process that it keeps has
an interpreter of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

LEASE_S = 60.0
"""A process that nobody asks about for so long is ended: whoever started it cannot be reached, and starts another."""
WAIT_S = 0.3
LOOK_S = 0.5
BEATS = "ISTHMUS_BEATS"
VISIBLE = "_VISIBLE_DEVICES"
"""How the names of variables end by which Ray gives devices to a process."""


class Keeper:
    """One process. Every method answers at once, `read` within WAIT_S."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._told: queue.Queue[tuple[int, bytes]] = queue.Queue()
        self._readers: list[threading.Thread] = []
        self._beats = Path(tempfile.mkdtemp(prefix="isthmus-beats-"))
        self._asked = time.monotonic()
        self._started = threading.Event()
        self._problem: str | None = None

    def where(self) -> dict[str, Any]:
        """The node, a free port of it, and the devices that Ray gave to this process, by variable."""
        ray = importlib.import_module("ray")
        context = ray.get_runtime_context()
        with socket.socket() as listener:
            listener.bind(("", 0))
            port = listener.getsockname()[1]
        devices = {name: value for name, value in os.environ.items() if name.endswith(VISIBLE) and value}
        host = ray.util.get_node_ip_address()
        return {
            "node": context.get_node_id(),
            "host": host,
            "port": port,
            "devices": devices,
            "gcs": context.gcs_address,
        }

    def start(self, words: list[str], variables: dict[str, str], folder: str, mark: str, content: str) -> str | None:
        """Run a command in a folder; what is wrong with it, or None. The file `mark` must be seen here, as it is."""
        if not Path(mark).is_file() or Path(mark).read_text(encoding="utf-8") != content:
            return f"does not see the folder {Path(mark).parent}"
        if not Path(folder).is_dir():
            return f"does not see the folder {folder}, in which the command was given"
        own = {name: value for name, value in os.environ.items() if not _is_of_ray(name)}
        threading.Thread(target=self._run, args=(words, {**own, **variables, BEATS: str(self._beats)}, folder)).start()
        self._started.wait()
        return self._problem

    def read(self) -> dict[str, Any]:
        """What it printed since the last call, its beats, and its exit code once all of that is read."""
        self._asked = time.monotonic()
        told: list[tuple[int, bytes]] = []
        with contextlib.suppress(queue.Empty):
            told.append(self._told.get(timeout=WAIT_S))
            while True:
                told.append(self._told.get_nowait())
        code = None if self._process is None else self._process.poll()
        over = code is not None and not any(one.is_alive() for one in self._readers) and self._told.empty()
        beats = [(path.name.partition("-")[0], path.read_bytes()) for path in self._beats.glob("*-*")]
        if over:
            shutil.rmtree(self._beats, ignore_errors=True)
        return {"told": told, "beats": beats, "now": time.monotonic(), "code": code if over else None}

    def send(self, number: int) -> None:
        """A signal to the process."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def close_input(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def end(self) -> None:
        """By force, with all that the process started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _run(self, words: list[str], variables: dict[str, str], folder: str) -> None:
        """In a thread that lives as long as the process, which ends with the thread that started it."""
        pipe = subprocess.PIPE
        words = [sys.executable if word == "{python}" else word for word in words]
        words = [str(os.getpid()) if word == "{parent}" else word for word in words]
        try:
            process = subprocess.Popen(
                words, stdin=pipe, stdout=pipe, stderr=pipe, env=variables, cwd=folder, start_new_session=True
            )
        except OSError as error:
            self._problem = f"cannot start {words[0]}: {error.strerror}"
            self._started.set()
            return
        self._process = process
        assert process.stdout is not None and process.stderr is not None
        for number, stream in ((1, process.stdout), (2, process.stderr)):
            self._readers.append(threading.Thread(target=self._listen, args=(number, stream), daemon=True))
            self._readers[-1].start()
        self._started.set()
        while process.poll() is None:
            time.sleep(LOOK_S / 10)
            if time.monotonic() - self._asked > LEASE_S:
                self.end()
        self.end()

    def _listen(self, number: int, stream: IO[bytes]) -> None:
        while part := os.read(stream.fileno(), 1 << 16):
            self._told.put((number, part))


def _is_of_ray(name: str) -> bool:
    """What Ray tells its own workers, and would mislead a program that connects to it."""
    return name.startswith("RAY_") and not name.startswith("RAY_EXPERIMENTAL_")
