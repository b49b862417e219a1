"""One process of a stage, without ranks: started here, and ended with this process however that ends.

Loading this does not load torch: its only cost is the start of a process.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from isthmus.errors import RanksFailed
from isthmus.launch.rank import STOPPED, error_of, read_report
from isthmus.nodes import HERE, PARENT, Launcher
from isthmus.run import explain_io_errors

GRACE_S = 2.0
"""What the process gets to end by itself after a Ctrl-C, which the terminal sends to both."""


Options = Mapping[str, str | bool | int | list[str] | None]
"""What a stage is executed with, as JSON has it."""


def run_alone(stage: str, run: Path, options: Options, logs: Path, launcher: Launcher = HERE) -> None:
    """Execute a stage of a run folder in a process that speaks on this console.

    Raises the error that it met as if it was met here; RanksFailed with the signal or exit code if it ended in another
    way; KeyboardInterrupt if this process or that one is asked to stop. SIGTERM is passed on and waited for: the stage
    may save what it has.
    """
    with explain_io_errors(logs):
        shutil.rmtree(logs, ignore_errors=True)
        logs.mkdir(parents=True)
    try:
        code = executed(stage, run, options, logs, launcher)
    except BaseException:
        shutil.rmtree(logs, ignore_errors=True)
        raise
    report = read_report(logs, 0)
    shutil.rmtree(logs, ignore_errors=True)
    if code == 0:
        return
    if report is not None and report.error:
        raise error_of(report)
    if code == STOPPED:
        raise KeyboardInterrupt
    if report is not None:
        raise RanksFailed(f"the process of the step stopped: {report.message}.", 0)
    raise RanksFailed(f"the process of the step stopped: {manner_of(code)}.", 0)


def executed(stage: str, run: Path, options: Options, logs: Path, launcher: Launcher) -> int:
    """The exit code of the process that executes a stage; it is ended with an error or a Ctrl-C of this one."""
    paths = [str(logs), stage, str(run)] if launcher is HERE else [str(logs.absolute()), stage, str(run.absolute())]
    words = ["-m", "isthmus.launch.rank", PARENT, *paths, json.dumps(options)]
    process = subprocess.Popen(launcher.command(words))
    try:
        with _passing_on_sigterm(process):
            return process.wait()
    except BaseException:
        _end(process)
        raise


def manner_of(code: int) -> str:
    """How a process ended, in words."""
    return f"killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"


@contextmanager
def _passing_on_sigterm(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Only the main thread can; in another one SIGTERM does what it did."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def pass_on(number: int, _frame: FrameType | None) -> None:
        process.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(process: subprocess.Popen[bytes]) -> None:
    """By itself, else asked, else by force."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            process.wait(GRACE_S)
            return
        except subprocess.TimeoutExpired:
            process.send_signal(number)
    process.wait()
