"""Commands of isthmus in processes of their own, and what works for them: for benchmarks that kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Said:
    """How a command ended: its exit code, and what it wrote to standard output and error."""

    code: int
    output: str
    errors: str


def start(*words: object) -> subprocess.Popen[str]:
    """A command in a session of its own."""
    command = [sys.executable, "-m", "isthmus", *map(str, words)]
    environment = {**os.environ, "COLUMNS": "200"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, start_new_session=True, env=environment
    )


def said(process: subprocess.Popen[str], timeout: float = 3600) -> Said:
    """Wait for the end of a command."""
    output, errors = process.communicate(timeout=timeout)
    return Said(process.returncode, output, errors)


def isthmus(*words: object) -> Said:
    return said(start(*words))


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """Whatever happens within this, nothing of a command's session is left after it."""
    try:
        yield
    finally:
        for pid in members(process.pid):
            _kill(pid)
        process.wait()


def members(leader: int) -> dict[int, str]:
    """Living processes of a command, each with its command line: those of its session, and all that they started.

    Ranks of a group have sessions of their own.
    """
    sessions, parents, words = dict[int, int](), dict[int, int](), dict[int, str]()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                said_there = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if fields[0] not in "ZX":
                pid = int(entry.name)
                sessions[pid], parents[pid], words[pid] = int(fields[3]), int(fields[1]), said_there
    found = {pid for pid, session in sessions.items() if session == leader}
    while more := {pid for pid, parent in parents.items() if parent in found and pid not in found}:
        found |= more
    return {pid: words[pid] for pid in sorted(found)}


def cpu_seconds(leader: int) -> float:
    """Processor time of a command and all that works for it, with that of its processes that have ended."""
    return sum(map(_spent, members(leader)))


def _spent(pid: int) -> float:
    """Processor time of a process and of the children that it has waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def rank_of(pid: int) -> int | None:
    """Which rank of a group a process is; None if it is none."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((int(one.removeprefix(b"RANK=")) for one in variables if one.startswith(b"RANK=")), None)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def kill(*pids: int) -> None:
    """-9."""
    for pid in pids:
        _kill(pid)
