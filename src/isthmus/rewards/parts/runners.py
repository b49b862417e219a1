"""Where a program of a model is run: in a service that is a sandbox, or here, which is none."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from isthmus.rewards.parts.http import Unanswered, post_json

OUTPUT_BYTES = 1 << 20
LIMITED = """
import os, resource, sys
for kind, most in zip((resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_FSIZE), map(int, sys.argv[1:])):
    resource.setrlimit(kind, (most, most))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
os.execv(sys.executable, [sys.executable, "-I", "program.py"])
"""
"""Sets limits, then becomes the program."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended: well or not, and what it printed."""

    is_good: bool
    stdout: str


class Runner(Protocol):
    def run(self, program: str, stdin: str) -> Outcome:
        """Raises Unanswered if it cannot be known what the program does."""
        ...


@dataclass(frozen=True)
class Sandbox:
    """A service with SandboxFusion's `POST /run_code`."""

    url: str
    language: str
    timeout_s: float
    memory_mib: int
    retries: int
    wait_s: float

    def run(self, program: str, stdin: str) -> Outcome:
        body = {
            "code": program,
            "language": self.language,
            "stdin": stdin,
            "compile_timeout": self.timeout_s,
            "run_timeout": self.timeout_s,
            "memory_limit_MB": self.memory_mib,
        }
        url = f"{self.url.rstrip('/')}/run_code"
        answer = post_json(
            url, body, headers={}, timeout_s=3 * self.timeout_s + 5, retries=self.retries, wait_s=self.wait_s
        )
        if answer.get("status") not in ("Success", "Failed"):
            raise Unanswered(f"the sandbox answers {answer.get('status')}")
        ran = answer.get("run_result") or {}
        good = answer["status"] == "Success" and ran.get("status") == "Finished" and ran.get("return_code") == 0
        return Outcome(good, ran.get("stdout") or "")


@dataclass(frozen=True)
class Here:
    """A process of this machine, with limits on time, memory and output, in an empty folder.

    It can read what this user can read, and reach the network: it is no sandbox.
    """

    timeout_s: float
    memory_mib: int

    def run(self, program: str, stdin: str) -> Outcome:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "program.py").write_text(program, encoding="utf-8")
            (folder / "in").write_text(stdin, encoding="utf-8")
            with (folder / "in").open("rb") as given, (folder / "out").open("wb") as printed:
                code = self._code_of_its_end(folder, given.fileno(), printed.fileno())
            text = (folder / "out").read_bytes()[:OUTPUT_BYTES].decode(errors="replace")
        return Outcome(code == 0, text)

    def _code_of_its_end(self, folder: Path, stdin: int, stdout: int) -> int | None:
        """None if it took too long."""
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", LIMITED, *map(str, self._limits)],
            cwd=folder,
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.DEVNULL,
            env={"PATH": os.defpath, "HOME": str(folder)},
            start_new_session=True,
        )
        try:
            return process.wait(self.timeout_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end_group(process)

    @property
    def _limits(self) -> tuple[int, int, int]:
        """Seconds of processor time, bytes of memory, bytes of a file."""
        return int(self.timeout_s) + 1, self.memory_mib << 20, OUTPUT_BYTES


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """The program, and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
