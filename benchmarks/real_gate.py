"""How good the gate is on a real model: faults planted in SmolLM2-135M-Instruct, beside healthy targets.

    python -m benchmarks.real_gate                              # the whole model, 300 healthy targets: hours
    python -m benchmarks.real_gate --layers 2 --healthy 60      # its first layers alone

The model is that of tests/support/real_model.py, its prompts are stretches of answers that it gave, and it is asked as
benchmarks/gate.py asks random models: converted, captured and listed as the source's machine does it, then every fault
that it can have is planted, and the gate is asked on an imitated device. Each round draws prompts, faults and noise
anew. Healthy targets differ as real ones do: sums in bf16, fp16 or fp32 in an order of their own, rows together or one
by one, one thread or two.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import product
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
    summary,
)
from isthmus.formats import format_names, get_format
from tests.support.gate_real import real_model
from tests.support.gate_rivals import propagate
from tests.support.gate_run import Case, prepare
from tests.support.real_model import real_checkpoint

HEALTHY = [*product(("bf16", "fp16", "fp32"), (False, True), (1, 2))]
"""What a healthy target sums in, whether it takes rows one by one, and its threads."""


def main() -> None:
    options = parse()
    real_checkpoint()
    began, seconds = time.perf_counter(), 0.0
    jobs = [
        (round_, name, options.layers, options.healthy, options.faults)
        for round_ in range(options.first, options.first + options.rounds)
        for name in options.formats
    ]
    trials: list[Trial] = []
    with ProcessPoolExecutor(options.workers) as workers:
        for done, (found, spent) in enumerate(workers.map(examine, *zip(*jobs, strict=True)), 1):
            trials += found
            seconds += spent
            print_progress(done, len(jobs), trials, seconds)
    result = summary(trials)
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
        }
        misses = [asdict(trial) for trial in trials if is_miss(trial)]
        store("real_gate", {**described, "cpu_s": seconds, **result, "misses": misses})


def parse() -> argparse.Namespace:
    usable = [name for name in format_names() if not get_format(name).needs_calibration]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="the first layers alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--healthy", type=int, default=20, help="healthy targets per round and format")
    parser.add_argument("--no-faults", dest="faults", action="store_false", help="healthy targets alone")
    parser.add_argument("--formats", nargs="+", choices=usable, default=[name for name in usable if name != "fp32"])
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--no-store", dest="store", action="store_false", help="no result is stored")
    return parser.parse_args()


def examine(round_: int, format_name: str, layers: int | None, healthy: int, faults: bool) -> tuple[list[Trial], float]:
    """All trials of one round in one format, and the CPU seconds that they took."""
    torch.set_num_threads(1)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        case = prepare(real_model(round_, layers, Path(scratch) / "source"), format_name, Path(scratch) / "bundle")
        trials = [*healthy_trials(case, healthy), *(faulty_trials(case) if faults else ())]
    return trials, time.process_time() - began


def healthy_trials(case: Case, count: int) -> Iterator[Trial]:
    reference = propagate(case.subject.build(), case.subject.model.prompts())
    for number in range(count):
        dtype, rows_alone, threads = HEALTHY[number % len(HEALTHY)]
        trial = new_trial(case, "healthy", dtype, number)
        trial.rows_alone, trial.threads = rows_alone, threads
        yield judged(case, trial, None, reference)


if __name__ == "__main__":
    main()
