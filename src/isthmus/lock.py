"""One writer at a time: a lock file names the process that writes into a run folder or a bundle.

The file appears with its content, by a hard link, which file systems that several machines share do at once or not at
all. Its owner touches it every BEAT_S. A lock is left over if its process is gone from this machine, or, of another
machine, if nobody has touched it for STALE_S by the clock of the file system.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from isthmus.errors import IsthmusError

BEAT_S = 10.0
STALE_S = 60.0
NAME = ".lock"


@dataclass(frozen=True)
class Owner:
    """Who holds a lock. `place` tells machines, and containers of one, apart; `born` processes of one number."""

    host: str
    place: str
    pid: int
    born: str
    command: str
    since: float


@contextlib.contextmanager
def writing_run(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder. Raises IsthmusError that names who has it."""
    with _held(folder / NAME, folder):
        yield


@contextlib.contextmanager
def writing_bundle(folder: Path) -> Iterator[None]:
    """Hold the lock of a bundle, which may not be there yet: it lies beside the folder, whose files are counted.

    Where nothing can be written beside it, the lock is one of this machine alone.
    """
    absolute = folder.absolute()
    beside = absolute.with_name(f".{absolute.name}{NAME}")
    if absolute.parent.is_dir() and not os.access(absolute.parent, os.W_OK):
        beside = Path(tempfile.gettempdir()) / f"isthmus{str(absolute).replace(os.sep, '-')}{NAME}"
    with _held(beside, folder):
        yield


@contextlib.contextmanager
def _held(path: Path, folder: Path) -> Iterator[None]:
    owner = _this_process()
    path.parent.mkdir(parents=True, exist_ok=True)
    while not _take(path, owner):
        other = _read(path)
        if other is not None and not _is_left_over(path, other):
            raise IsthmusError(_explain(folder, other))
        _remove_left_over(path, other)
    over = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, over), name="lock", daemon=True)
    beat.start()
    try:
        yield
    finally:
        over.set()
        beat.join()
        if _read(path) == owner:
            path.unlink(missing_ok=True)


def _take(path: Path, owner: Owner) -> bool:
    """Make the lock, whole or not at all; False if there is one."""
    ours = path.with_name(f"{path.name}.{owner.pid}.{threading.get_ident()}")
    try:
        ours.write_text(json.dumps(asdict(owner)), encoding="utf-8")
        os.link(ours, path)
    except FileExistsError:
        return False
    except OSError as error:
        raise IsthmusError(f"{path} cannot be made: {error.strerror or error}") from error
    finally:
        ours.unlink(missing_ok=True)
    return True


def _read(path: Path) -> Owner | None:
    """Who holds the lock; None if there is none, or one that cannot be read."""
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _is_left_over(path: Path, owner: Owner) -> bool:
    if owner.place == _place():
        return _born(owner.pid) != owner.born
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name) as now:
        try:
            return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime > STALE_S
        except FileNotFoundError:
            return True


def _remove_left_over(path: Path, judged: Owner | None) -> None:
    """Take a lock away; if another process was quicker and holds a new one, it gets it back."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.left-over")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if _read(aside) != judged:
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink(missing_ok=True)


def _beat(path: Path, over: threading.Event) -> None:
    while not over.wait(BEAT_S):
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)


def _this_process() -> Owner:
    command = shlex.join(["isthmus", *sys.argv[1:]])
    return Owner(socket.gethostname(), _place(), os.getpid(), _born(os.getpid()), command, time.time())


def _place() -> str:
    """One kernel, and of it one space of process numbers: numbers of another say nothing here."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = str(Path("/proc/self/ns/pid").readlink()) if os.path.lexists("/proc/self/ns/pid") else ""
    return f"{boot.read_text().strip() if boot.is_file() else socket.gethostname()} {space}"


def _born(pid: int) -> str:
    """When a process started, in the kernel's ticks; empty if there is none, or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "" if Path("/proc/self").exists() or not _answers(pid) else "running"
    return "" if fields[0] in "ZX" else fields[19]


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _explain(folder: Path, owner: Owner) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner.since))
    return (
        f"{folder} is being written by process {owner.pid} on {owner.host} since {since} ({owner.command}). "
        "Wait until it has ended, or stop it; nothing was changed"
    )
