"""The ranks of a stage where their pool is: here, alone or started by torchrun's agent, or on nodes of a cluster.

Loading this loads no torch: its only cost is the start of a process.
"""

from __future__ import annotations

import importlib
import shutil
import signal
from pathlib import Path
from typing import Any

from isthmus.errors import IsthmusError, RanksFailed
from isthmus.launch.alone import Options, executed, manner_of, run_alone
from isthmus.launch.rank import STOPPED, RankReport, error_of, last_lines, read_report
from isthmus.lines import read_json
from isthmus.nodes import OnNodes
from isthmus.pools import Pool
from isthmus.run import explain_io_errors


def run_on(pool: Pool, stage: str, run: Path, options: Options, ranks: int, logs: Path) -> None:
    """Execute a stage of a run folder in `ranks` processes of a pool; the first one speaks on this console.

    Raises the error that one of them met as if it was met here; RanksFailed with what is known of how it ended, if it
    ended in another way or its node is gone; KeyboardInterrupt if this process or those are asked to stop.
    """
    if pool.nodes is not None:
        _run_on_nodes(pool, stage, run, options, ranks, logs)
    elif ranks > 1:
        importlib.import_module("isthmus.launch.local").run_ranks(stage, run, options, ranks, logs)
    else:
        run_alone(stage, run, options, logs)


def _run_on_nodes(pool: Pool, stage: str, run: Path, options: Options, ranks: int, logs: Path) -> None:
    with explain_io_errors(logs):
        shutil.rmtree(logs, ignore_errors=True)
        logs.mkdir(parents=True)
    what = "-".join([stage, str(options.get("name") or pool.name)])
    code = executed(stage, run, options, logs, OnNodes(pool, run, what, ranks, logs))
    if code == 0:
        shutil.rmtree(logs, ignore_errors=True)
        return
    raise _explained(code, logs)


def _explained(code: int, logs: Path) -> BaseException:
    """The error of the rank that failed first; the others fail because it is gone, or are asked to stop then."""
    ends: list[dict[str, Any]] = read_json(logs / "ends.json", IsthmusError) if (logs / "ends.json").exists() else []
    reports = {end["rank"]: read_report(logs, end["rank"]) for end in ends}
    if not ends and (report := read_report(logs, 0)) is not None and report.error:
        return error_of(report)
    if not ends:
        return KeyboardInterrupt() if code == STOPPED else RanksFailed(f"the ranks stopped: {manner_of(code)}.")
    first = min(ends, key=lambda end: _order(end, reports[end["rank"]]))
    report = reports[first["rank"]]
    if report is not None and report.error:
        return error_of(report)
    if code == STOPPED and all(end["code"] == STOPPED for end in ends):
        return KeyboardInterrupt()
    manner = first["lost"] or (report.message if report else manner_of(first["code"]))
    path = logs / str(first["rank"]) / "stderr.log"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() and first["rank"] else ""
    advice = [f"What the ranks wrote is in {logs}."] if text else []
    return RanksFailed(
        "\n".join([f"rank {first['rank']} stopped: {manner}.", *last_lines(text), *advice]), first["rank"]
    )


def _order(end: dict[str, Any], report: RankReport | None) -> tuple[int, float]:
    """A lost node comes before what others say of it; a user's error is never the consequence of another; an end by
    SIGTERM always is, and being asked to stop."""
    if end["lost"] is not None:
        return 0, end["time"]
    if report is not None and report.error:
        return 1, report.time
    follows = end["code"] in (-signal.SIGTERM, STOPPED)
    return (3 if follows else 2), report.time if report is not None else end["time"]
