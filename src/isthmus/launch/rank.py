"""One rank of a stage: python -m isthmus.launch.rank LAUNCHER LOGS STAGE RUN OPTIONS

`isthmus.launch.local` or `alone` starts it. It executes the stage, leaves a report in LOGS if that fails, and ends when
its launcher is gone.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isthmus.errors import (
    DamagedFile,
    Diverged,
    EnginesLost,
    GateRefused,
    IsthmusError,
    SaveFailed,
    TooSlow,
    Unrepeatable,
)
from isthmus.launch.beats import create_beat, own_beat
from isthmus.lines import read_json_object
from isthmus.progress import Watch
from isthmus.run import RunFolder, write_atomic

LOOK_S = 0.2
STOPPED, LAST_LINES = 130, 12
HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
PR_SET_PDEATHSIG = 1
"""Linux, include/uapi/linux/prctl.h."""


@dataclass(frozen=True)
class RankReport:
    """Why a rank ended. `error` is the class of a user's error, empty for all else; `time` is Unix time, seconds."""

    time: float
    error: str
    message: str


def read_report(logs: Path, rank: int) -> RankReport | None:
    """What a rank reported; None if it ended without a word."""
    path = _report_path(logs, rank)
    return RankReport(**read_json_object(path)) if path.exists() else None


def last_lines(text: str) -> list[str]:
    """The end of what a rank wrote, for a message."""
    return [f"  {line}" for line in text.strip().splitlines()[-LAST_LINES:]]


def error_of(report: RankReport) -> IsthmusError:
    """The error that a rank met, with its class."""
    kinds = (DamagedFile, Diverged, EnginesLost, GateRefused, SaveFailed, TooSlow, Unrepeatable)
    known = {kind.__name__: kind for kind in kinds}
    return known.get(report.error, IsthmusError)(report.message)


def main() -> None:
    launcher, logs, stage, run, options = sys.argv[1:]
    _die_with_parent()
    threading.Thread(target=_end_with, args=(int(launcher),), daemon=True).start()
    for name in HANDLED:
        signal.signal(name, _stop)
    rank = int(os.environ.get("RANK", "0"))
    if (beat := own_beat(rank)) is not None:
        create_beat(beat)
    try:
        _execute(stage, Path(run), json.loads(options), rank)
    except KeyboardInterrupt as request:
        _write_report(Path(logs), rank, "", str(request))
        sys.exit(STOPPED)
    except IsthmusError as error:
        _write_report(Path(logs), rank, type(error).__name__, str(error))
        sys.exit(error.exit_code)
    except BaseException as error:
        _write_report(Path(logs), rank, "", f"{type(error).__name__}: {error}")
        raise


def _execute(stage: str, run: Path, options: Mapping[str, str | bool], rank: int) -> None:
    module = importlib.import_module(f"isthmus.stages.{stage}")
    module.execute(RunFolder.open(run), Watch(quiet=rank != 0), **options)


def _write_report(logs: Path, rank: int, error: str, message: str) -> None:
    report = RankReport(time.time(), error, message)
    write_atomic(_report_path(logs, rank), json.dumps(asdict(report)).encode())


def _report_path(logs: Path, rank: int) -> Path:
    return logs / f"rank-{rank}.json"


def _stop(number: int, _frame: Any) -> None:
    for name in HANDLED:
        signal.signal(name, signal.SIG_IGN)
    raise KeyboardInterrupt(f"asked to stop by {signal.Signals(number).name}")


def _die_with_parent() -> None:
    """At once where the kernel can do that; a rank that outlives its launcher for a moment may still write."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_with(launcher: int) -> None:
    """A rank that went on alone would write into the folder of the run that the user starts again."""
    while os.getppid() == launcher:
        time.sleep(LOOK_S)
    os._exit(STOPPED)


if __name__ == "__main__":
    main()
