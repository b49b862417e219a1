"""The ranks of a stage on this machine, started and watched by torchrun's agent."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from isthmus.errors import IsthmusError, RanksFailed
from isthmus.launch.alone import Options
from isthmus.launch.places import variables_set
from isthmus.launch.rank import RankReport, error_of, last_lines, read_report
from isthmus.run import explain_io_errors

LEAVE_S = 7200
"""What ranks get to save and leave once they are asked to: torch's own 30 s are less than a large checkpoint takes. A
rank that gives no sign of life is ended before that by whoever watches the step. The agent of torch 2.11 keeps to its
30 s; later ones read the variable (pytorch/pytorch pull request 172596)."""
LEAVE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
HANDLED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
"""The signals that the agent takes to itself, and passes on to the ranks."""


def run_ranks(stage: str, run: Path, options: Options, ranks: int, logs: Path) -> None:
    """Execute a stage of a run folder in `ranks` processes; the first one speaks on this console.

    What else they write is under `logs` while they run, and stays there if one fails. They end when this process ends,
    however it ends.

    Raises the error that one of them met as if it was met here; RanksFailed with the rank, the signal or exit code and
    its last words if one ended in another way; KeyboardInterrupt if this process is asked to stop.
    """
    with explain_io_errors(logs):
        shutil.rmtree(logs, ignore_errors=True)
        logs.mkdir(parents=True)
    with variables_set({LEAVE: str(LEAVE_S)}):
        config = _config(ranks, logs)
    words = ["-m", "isthmus.launch.rank", str(os.getpid()), str(logs), stage, str(run), json.dumps(options)]
    with _agent_in_the_background():
        try:
            elastic_launch(config, sys.executable)(*words)
        except ChildFailedError as error:
            raise _explained(error.failures, logs) from None
        except SignalException:
            shutil.rmtree(logs)
            raise KeyboardInterrupt from None
    sys.stderr.write(_stderr(logs, 0))
    shutil.rmtree(logs)


def _config(ranks: int, logs: Path) -> LaunchConfig:
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        max_restarts=0,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        run_id="isthmus",
        logs_specs=DefaultLogsSpecs(
            log_dir=str(logs), redirects={rank: Std.ALL if rank else Std.ERR for rank in range(ranks)}
        ),
        signals_to_handle=",".join(HANDLED),
    )


@contextmanager
def _agent_in_the_background() -> Iterator[None]:
    """The agent says nothing, and the handlers that it sets are set back."""
    handlers = {name: signal.getsignal(getattr(signal, name)) for name in HANDLED}
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict if ".elastic" in name]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name, handler in handlers.items():
            signal.signal(getattr(signal, name), handler or signal.SIG_DFL)


def _explained(failures: dict[int, ProcessFailure], logs: Path) -> IsthmusError:
    """The error of the rank that failed first; the others fail because it is gone, or are stopped by the agent."""
    reports = {rank: read_report(logs, rank) for rank in failures}
    rank = min(failures, key=lambda rank: _order(failures[rank], reports[rank]))
    report = reports[rank]
    if report is not None and report.error:
        return error_of(report)
    lines = last_lines(_stderr(logs, rank))
    advice = f"What the ranks wrote is in {logs}."
    manner = _manner(failures[rank], report)
    return RanksFailed("\n".join([f"rank {rank} stopped: {manner}.", *lines, advice]), rank)


def _order(failure: ProcessFailure, report: RankReport | None) -> tuple[int, float]:
    """A user's error is never the consequence of another; a silent end by SIGTERM always is: so the agent stops ranks.

    The time of an end without a report is known in whole seconds, and later than it was.
    """
    if report is None:
        return 2 if failure.exitcode == -signal.SIGTERM else 1, failure.timestamp - 1
    return 0 if report.error else 1, report.time


def _manner(failure: ProcessFailure, report: RankReport | None) -> str:
    if report is not None:
        return report.message
    if failure.exitcode < 0:
        return f"killed by signal {-failure.exitcode} ({failure.signal_name()})"
    return f"exit code {failure.exitcode}"


def _stderr(logs: Path, rank: int) -> str:
    return "".join(path.read_text(encoding="utf-8", errors="replace") for path in logs.rglob(f"{rank}/stderr.log"))
