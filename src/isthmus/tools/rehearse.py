"""Runs a training script of a user under the rules of a chip that is not here, and reports what would happen there.

The script runs in processes of its own. Python's start-up hook in `launch/hook` waits there for torch; each
process leaves a report in a folder, and they are put together here.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from rich.table import Table

from isthmus.chips import check_tables, device_for
from isthmus.chips.rehearse import Profile, profile_of
from isthmus.chips.rehearse.faults import parse_fault
from isthmus.chips.rehearse.settings import SETTINGS, Settings
from isthmus.chips.rehearse.tables import MEANING, STATUSES, Status
from isthmus.errors import IsthmusError
from isthmus.launch.with_torch import INTERRUPTED, environment_with, program
from isthmus.lines import read_json_object
from isthmus.progress import Watch
from isthmus.run import write_atomic

LOOK_S = 0.05
GRACE_S = 10.0
"""What the other ranks get to end once one has failed, and all of them once the user has stopped the rehearsal."""
SHOWN = 12
"""Operators that are shown by name; the JSON has all."""


class Used(BaseModel):
    """An operator that the script used: how the chip's software runs it, and how often all ranks called it.

    `calls_per_step` is of one rank, the mean of those that made steps.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    status: Status
    calls: int
    calls_per_step: float | None = None


class RehearsalReport(BaseModel):
    """What a rehearsal found, all ranks together. Nothing here was measured on a chip."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    chip: str
    tables: str = Field(description="The versions of the vendor's software that the tables describe")
    command: list[str]
    ranks: int
    seed: int
    strict: bool
    noise: bool
    planted: list[str]
    exit_codes: list[int]
    interrupted: bool = Field(description="Whether the user stopped it, so that it says how far it came")
    seconds: float
    processes: int = Field(description="Processes that used the chip")
    watched: int = Field(description="Processes that loaded torch under the rehearsal")
    unfinished: int = Field(description="Of the watched ones, how many ended without a last report")
    steps: int
    operators: dict[str, Used]
    substitutions: dict[str, int]
    filled: dict[str, int]
    varied: dict[str, int]
    untested: dict[str, int]
    cautions: dict[str, int]
    refusals: list[str]
    collectives: int = Field(description="Of all ranks, those that torch starts itself included")
    collectives_by_name: dict[str, int] = Field(description="Those that torch's dispatcher showed")
    faults: list[str]
    peak_bytes: int

    def calls(self, status: Status) -> int:
        return sum(used.calls for used in self.operators.values() if used.status == status)

    def calls_per_step(self, status: Status) -> float:
        return sum(used.calls_per_step or 0.0 for used in self.operators.values() if used.status == status)

    @property
    def exit_code(self) -> int:
        """130 if the user stopped it, 1 after a refusal, else the first code of a rank that is not 0."""
        if self.interrupted:
            return INTERRUPTED
        if self.refusals:
            return 1
        return next((code if code > 0 else 128 - code for code in self.exit_codes if code), 0)


def execute(
    command: list[str],
    watch: Watch,
    *,
    chip: str,
    ranks: int | None = None,
    strict: bool = False,
    noise: bool = False,
    seed: int = 0,
    faults: tuple[str, ...] = (),
    json_file: Path | None = None,
) -> RehearsalReport:
    """Run `command` as a chip would run it, print what was found, and write it to `json_file`.

    Without `ranks` the command runs once, and may start ranks itself. Ctrl-C ends the command, and what was found until
    then is the report. Raises IsthmusError for a chip without tables, a
    fault that cannot be read, or a program that is not there.
    """
    check_tables(chip)
    profile = profile_of(chip)
    for text in faults:
        if parse_fault(text).rank >= (ranks or math.inf):
            raise IsthmusError(f"the fault {text!r} is planted on a rank that is not there, of {ranks}")
    with tempfile.TemporaryDirectory(prefix="isthmus-rehearsal-") as folder:
        settings = Settings(chip, folder, strict, noise, seed, faults)
        began = time.monotonic()
        codes, interrupted = _run(program(command, "rehearse"), settings, ranks)
        found = [read_json_object(path) for path in sorted(Path(folder).glob("*.json"))]
    report = _merged(found, profile, settings, command, codes, interrupted, time.monotonic() - began)
    if json_file is not None:
        write_atomic(json_file, report.model_dump_json(indent=2).encode() + b"\n")
    _show(report, watch)
    return report


def _run(command: list[str], settings: Settings, ranks: int | None) -> tuple[list[int], bool]:
    """The exit codes of the ranks, and whether the user stopped them.

    Once one has failed, or the user presses Ctrl-C, the others get a moment, and are ended.
    """
    port = _free_port()
    environments = [_environment(settings, rank, ranks, port) for rank in range(ranks or 1)]
    processes = [subprocess.Popen(command, env=environment) for environment in environments]
    interrupted = False
    try:
        _wait(processes)
    except KeyboardInterrupt:
        interrupted = True
        _interrupt(processes)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
        if interrupted:
            _kill_left(settings.folder)
    return [process.wait() for process in processes], interrupted


def _wait(processes: list[subprocess.Popen[bytes]]) -> None:
    """Until all have ended, or one has failed and the others had a moment."""
    failed: float | None = None
    while any(process.poll() is None for process in processes):
        if failed is None and any(process.returncode for process in processes):
            failed = time.monotonic()
        if failed is not None and time.monotonic() - failed > GRACE_S:
            break
        time.sleep(LOOK_S)


def _interrupt(processes: list[subprocess.Popen[bytes]]) -> None:
    """Pass Ctrl-C on, and give the processes a moment to say what they found; a second Ctrl-C cuts it short."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    until = time.monotonic() + GRACE_S
    with contextlib.suppress(KeyboardInterrupt):
        while any(process.poll() is None for process in processes) and time.monotonic() < until:
            time.sleep(LOOK_S)


def _kill_left(folder: str) -> None:
    """Kill what the command started and left behind: the processes that report into this folder."""
    for report in Path(folder).glob("*.json"):
        environment = Path(f"/proc/{report.stem}/environ")
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if folder.encode() in environment.read_bytes():
                os.kill(int(report.stem), signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _environment(settings: Settings, rank: int, ranks: int | None, port: int) -> dict[str, str]:
    """What a rank finds: the hook on its path, the settings, and the variables that torchrun sets."""
    environment = {
        **environment_with("isthmus.chips.rehearse.child"),
        SETTINGS: settings.environment(),
        "TORCHDYNAMO_DISABLE": "1",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }
    if ranks is not None:
        environment |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    return environment


def _merged(
    found: list[dict],
    profile: Profile,
    settings: Settings,
    command: list[str],
    codes: list[int],
    interrupted: bool,
    seconds: float,
) -> RehearsalReport:
    used = [one for one in found if one["operators"] or one["refusals"] or one["collectives"] or one["faults"]]
    stepping = sum(one["steps"] > 0 for one in used)
    calls: Counter[str] = Counter()
    per_step: Counter[str] = Counter()
    statuses: dict[str, Status] = {}
    for one in used:
        statuses.update({name: row["status"] for name, row in one["operators"].items()})
        calls.update({name: row["calls"] for name, row in one["operators"].items()})
        per_step.update(one["per_step"])
    return RehearsalReport(
        chip=settings.chip,
        tables=profile.version,
        command=command,
        ranks=len(codes),
        seed=settings.seed,
        strict=settings.strict,
        noise=settings.noise,
        planted=list(settings.faults),
        exit_codes=codes,
        interrupted=interrupted,
        seconds=seconds,
        processes=len(used),
        watched=len(found),
        unfinished=sum(one["state"] != "ended" for one in found),
        steps=max((one["steps"] for one in used), default=0),
        operators={
            name: Used(
                status=statuses[name], calls=calls[name], calls_per_step=per_step[name] / stepping if stepping else None
            )
            for name in sorted(statuses)
        },
        **{key: dict(_summed(used, key)) for key in _COUNTED},
        refusals=sorted({text for one in used for text in one["refusals"]}),
        collectives=sum(one["collectives"] for one in used),
        faults=[f"rank {one['rank']}: {text}" for one in used for text in one["faults"]],
        peak_bytes=max((one["peak_bytes"] for one in used), default=0),
    )


_COUNTED = ("substitutions", "filled", "varied", "untested", "cautions", "collectives_by_name")


def _summed(found: list[dict], key: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for one in found:
        total.update(one[key])
    return total


def _show(report: RehearsalReport, watch: Watch) -> None:
    title = f"[bold]rehearsal of {report.chip}[/] by the tables of {report.tables}; it does not speak for the vendor"
    watch.console.print(f"\n{title}", highlight=False, soft_wrap=True)
    if report.interrupted:
        watch.say("  stopped before its end: it says how far the command came")
    if not report.processes:
        device = device_for(report.chip)
        if not report.watched:
            watch.say("  nothing was rehearsed: no process of the command loaded torch")
        elif report.unfinished:
            watch.say("  nothing is known to have run on the chip: a process ended before it could report")
        else:
            watch.say(f"  nothing ran on the chip: the script put no tensor on the device {device!r}")
        _say_exit_codes(report, watch)
        return
    table = Table("", "operators", "calls", "calls per step", box=None, pad_edge=False)
    for status in STATUSES:
        names = [name for name, used in report.operators.items() if used.status == status]
        if names:
            per_step = f"{report.calls_per_step(status):,.1f}" if report.steps else "no optimiser step"
            table.add_row(f"  {status} ({MEANING[status]})", str(len(names)), f"{report.calls(status):,}", per_step)
    watch.console.print(table, highlight=False)
    watch.say(f"  {report.steps} optimiser steps, {report.collectives:,} collectives, {report.processes} process(es)")
    for title, counted in _details(report).items():
        if counted:
            watch.say(f"  [bold]{title}[/]")
            for line in counted[:SHOWN]:
                watch.console.print(f"    {line}", highlight=False, markup=False, soft_wrap=True)
            if len(counted) > SHOWN:
                watch.say(f"    and {len(counted) - SHOWN} more")
    _say_exit_codes(report, watch)
    if report.unfinished:
        watch.say(f"  {report.unfinished} process(es) ended without a last report: what is said of them may be short")


def _say_exit_codes(report: RehearsalReport, watch: Watch) -> None:
    """Which ranks of the command did not end well."""
    for rank, code in enumerate(report.exit_codes):
        if code:
            watch.say(f"  [red]rank {rank} of the command ended with code {code}[/]")


def _details(report: RehearsalReport) -> dict[str, list[str]]:
    """What a reader has to look at, under its title."""
    fallbacks = sorted(
        (f"{name}: {used.calls:,} calls" + _each_step(used), -used.calls)
        for name, used in report.operators.items()
        if used.status == "fallback"
    )
    unknown = [name for name, used in report.operators.items() if used.status == "unknown"]
    return {
        "refused": report.refusals,
        "run on the host's CPU": [line for line, _ in sorted(fallbacks, key=lambda pair: pair[1])],
        "replaced silently": _counted(report.substitutions),
        "dtypes that the vendor does not list as tested": _counted(report.untested),
        "limits that the vendor documents": _counted(report.cautions),
        "memory that nobody initialised, which holds NaN here": _counted(report.filled),
        "results that vary from run to run": _counted(report.varied),
        "not in the table, so not judged": unknown,
        "planted": report.planted,
        "planted, and never happened": [] if report.faults else report.planted,
        "planted, and happened": report.faults,
    }


def _each_step(used: Used) -> str:
    return f", {used.calls_per_step:,.1f} per step" if used.calls_per_step else ""


def _counted(counts: dict[str, int]) -> list[str]:
    return [f"{name}: {count:,} calls" for name, count in sorted(counts.items(), key=lambda pair: -pair[1])]
