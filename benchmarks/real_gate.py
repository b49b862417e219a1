"""How good the gate is on a real model: faults planted in SmolLM2-135M-Instruct, beside healthy targets.

    python -m benchmarks.real_gate                              # the whole model, 300 healthy targets: hours
    python -m benchmarks.real_gate --layers 4 --minutes 10      # its first layers alone, and what ten minutes allow
    python -m benchmarks.real_gate --keep trials.jsonl          # every trial is kept in a line, and not done again

The model is that of tests/support/real_model.py, its prompts are stretches of answers that it gave, and it is asked as
benchmarks/gate.py asks random models: converted, captured and listed as the source's machine does it, then every fault
that it can have is planted, and the gate is asked on an imitated device. Each round draws prompts, faults and noise
anew. Healthy targets differ as real ones do: sums in bf16, fp16 or fp32 in an order of their own, rows together or one
by one, one thread or two. Healthy and faulty targets take turns, and each round and format gets an even share of the
minutes, so that what a budget allows is a sample of all. A rate is of the trials that were done; the result says how
many there would have been.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

import torch

from benchmarks.conditions import store
from benchmarks.gate import (
    Trial,
    faulty_trials,
    is_miss,
    judged,
    new_trial,
    print_misses,
    print_progress,
    print_tables,
    share,
    summary,
)
from isthmus.formats import format_names, get_format
from tests.support.gate_real import real_model
from tests.support.gate_rivals import propagate
from tests.support.gate_run import Case, prepare
from tests.support.real_model import real_checkpoint

HEALTHY = [
    (dtype, alone, threads) for alone, threads, dtype in product((False, True), (1, 2), ("bf16", "fp16", "fp32"))
]
"""What a healthy target sums in, whether it takes rows one by one, and its threads."""


@dataclass(frozen=True)
class Job:
    """One round in one format. `done` are the devices of trials that were kept, `seconds` what the others may take."""

    round: int
    format: str
    layers: int | None
    healthy: int
    faults: bool
    keep: Path | None
    done: frozenset[int]
    seconds: float | None


def main() -> None:
    options = parse()
    real_checkpoint()
    began, seconds = time.perf_counter(), 0.0
    trials = kept_trials(options.keep, options.layers)
    jobs = [*jobs_of(options, trials)]
    complete = True
    with ProcessPoolExecutor(options.workers) as workers:
        for done, (found, spent, whole) in enumerate(workers.map(examine, jobs), 1):
            trials += found
            seconds += spent
            complete &= whole
            print_progress(done, len(jobs), trials, seconds)
    result = {**summary(trials), "healthy_by_arithmetic": by_arithmetic(trials)}
    print_tables(result)
    print_misses(trials)
    wall = time.perf_counter() - began
    print(f"{len(trials)} verifications, {seconds:.0f} s of CPU time and {wall:.0f} s, preparation and rivals included")
    if options.store:
        described: dict[str, Any] = {
            "model": "SmolLM2-135M-Instruct",
            "layers": options.layers or "all 30",
            "rounds": options.rounds,
            "formats": options.formats,
            "complete": complete,
            "trials": len(trials),
        }
        misses = [asdict(trial) for trial in trials if is_miss(trial)]
        store("real_gate", {**described, "cpu_s": seconds, **result, "misses": misses})


def parse() -> argparse.Namespace:
    usable = [name for name in format_names() if not get_format(name).needs_calibration]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="the first layers alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--healthy", type=int, default=20, help="healthy targets per round and format, one at least")
    parser.add_argument("--no-faults", dest="faults", action="store_false", help="healthy targets alone")
    parser.add_argument("--formats", nargs="+", choices=usable, default=[name for name in usable if name != "fp32"])
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--minutes", type=float, help="end after about this time, and store what there is")
    parser.add_argument("--keep", type=Path, help="a file of trials: those in it are not done again")
    parser.add_argument("--no-store", dest="store", action="store_false", help="no result is stored")
    options = parser.parse_args()
    if options.healthy < 1:
        parser.error("--healthy: the rivals' limits are set on healthy targets, so there must be one at least")
    return options


def jobs_of(options: argparse.Namespace, kept: list[Trial]) -> Iterator[Job]:
    rounds = range(options.first, options.first + options.rounds)
    pairs: list[tuple[int, str]] = [*product(rounds, options.formats)]
    seconds = None if options.minutes is None else 60.0 * options.minutes * options.workers / len(pairs)
    for round_, name in pairs:
        done = frozenset(trial.device for trial in kept if (trial.model, trial.format) == (round_, name))
        yield Job(round_, name, options.layers, options.healthy, options.faults, options.keep, done, seconds)


def kept_trials(path: Path | None, layers: int | None) -> list[Trial]:
    """The trials in a file that are of so many layers; a line that was cut off is none."""
    if path is None or not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
    return [Trial(**line["trial"]) for line in lines if line["layers"] == layers]


def examine(job: Job) -> tuple[list[Trial], float, bool]:
    """The trials of a job that are not done yet, the CPU seconds that they took, and whether these are all."""
    torch.set_num_threads(1)
    busy, until = time.process_time(), None if job.seconds is None else time.monotonic() + job.seconds
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory() as scratch:
        model = real_model(job.round, job.layers, Path(scratch) / "source")
        case = prepare(model, job.format, Path(scratch) / "bundle")
        for trial in in_turns(healthy_trials(case, job), faulty_trials(case, job.done) if job.faults else iter(())):
            trials.append(trial)
            keep(trial, job)
            if until is not None and time.monotonic() > until:
                return trials, time.process_time() - busy, False
    return trials, time.process_time() - busy, True


def in_turns(*several: Iterator[Trial]) -> Iterator[Trial]:
    """One of each in turn, until all are at their end."""
    return (trial for some in zip_longest(*several) for trial in some if trial is not None)


def keep(trial: Trial, job: Job) -> None:
    if job.keep is not None:
        with job.keep.open("a") as file:
            file.write(json.dumps({"layers": job.layers, "trial": asdict(trial)}) + "\n")


def healthy_trials(case: Case, job: Job) -> Iterator[Trial]:
    reference = propagate(case.subject.build(), case.subject.model.prompts())
    for number in range(job.healthy):
        dtype, rows_alone, threads = HEALTHY[number % len(HEALTHY)]
        trial = new_trial(case, "healthy", dtype, number)
        if trial.device in job.done:
            continue
        trial.rows_alone, trial.threads = rows_alone, threads
        yield judged(case, trial, None, reference)


def by_arithmetic(trials: list[Trial]) -> dict[str, Any]:
    """False alarms among the healthy targets of each arithmetic."""
    healthy = [trial for trial in trials if trial.fault is None]
    return {
        dtype: share(trial.refused for trial in healthy if trial.dtype == dtype)
        for dtype in sorted({trial.dtype for trial in healthy})
    }


if __name__ == "__main__":
    main()
