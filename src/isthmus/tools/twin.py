"""Records a training script step by step, and holds two such records against each other."""

from __future__ import annotations

import subprocess
from pathlib import Path

from isthmus.errors import IsthmusError
from isthmus.launch.with_torch import INTERRUPTED, environment_with, program
from isthmus.progress import Watch
from isthmus.supervise.twins import TwinVerdict, compare, read_twin


def record(command: list[str], watch: Watch, *, out: Path, state_every: int = 0) -> int:
    """Run a command with the recorder inside, writing into `out`, and give its exit code.

    Raises IsthmusError if there is no such program, `out` is no folder, or no process of the command made a step.
    """
    known = program(command, "twin record")
    if out.exists() and not out.is_dir():
        raise IsthmusError(f"{out} is a file: name a folder for the record with --out")
    before = set(out.glob("rank-*.jsonl"))
    environment = {
        **environment_with("isthmus.twin"),
        "ISTHMUS_TWIN_FOLDER": str(out.absolute()),
        "ISTHMUS_TWIN_STATE_EVERY": str(state_every),
    }
    code = _run(known, environment)
    written = sorted(set(out.glob("rank-*.jsonl")) - before)
    if not written:
        raise IsthmusError(
            "nothing was recorded: no process of the command stepped an optimiser of torch"
            + (f"; it ended with exit code {code}" if code else "")
        )
    watch.say(
        f"  {len(written)} files of this record in {out}; `isthmus twin compare {out} OTHER` holds it against another"
    )
    return code


def _run(command: list[str], environment: dict[str, str]) -> int:
    """The exit code of a command. Ctrl-C reaches it from the terminal; it is waited for."""
    with subprocess.Popen(command, env=environment) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()
            return INTERRUPTED
    return code if code >= 0 else 128 - code


def judge(first: Path, second: Path, band: str) -> TwinVerdict:
    """Hold two recorded folders against each other."""
    return compare(read_twin(first), read_twin(second), band)


def show(verdict: TwinVerdict, watch: Watch) -> None:
    """Print a verdict as a few lines."""
    largest = ", ".join(f"{name} {value:.2g}" for name, value in verdict.largest.items())
    if verdict.agree:
        watch.say(f"[bold]the twins agree[/] over {verdict.steps} steps within the band {verdict.band!r}")
        watch.say(f"  the narrowest band that holds is {verdict.narrowest!r}")
    elif verdict.parting is not None:
        where = f", module {verdict.parting.module}" if verdict.parting.module else ""
        watch.say(f"[bold]the twins part[/] at step {verdict.parting.step}: {verdict.parting.kind}{where}")
        watch.say(f"  {verdict.parting.reason}")
    watch.say(f"  largest relative differences: {largest}")
    if verdict.only_first or verdict.only_second:
        watch.say(f"  steps that one alone has: {verdict.only_first} of the first, {verdict.only_second} of the second")
    for note in verdict.notes:
        watch.say(f"  {note}")
