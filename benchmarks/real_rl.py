"""A real model by the shipped stages: SmolLM2-135M-Instruct is taught and reinforced on a task of reasoning-gym.

    python -m benchmarks.real_rl [--recipe recipes/real/smollm2-sums.toml] [--keep FOLDER] [--set KEY=VALUE ...]
    python -m benchmarks.real_rl --join RUN                # run nothing; tell of a finished run folder

`isthmus run RECIPE --until reinforced` in a process of its own, with the checkpoint of tests/support/real_model.py. The
rival of reinforcement is the cold start that it begins with: both answer the same held-out problems once at temperature
1, and the gain is paired by problem, with a 95 % interval.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.conditions import store
from benchmarks.r1_tiny import gain
from isthmus.records import QualifyRecord, RlRecord
from isthmus.run import RunFolder
from tests.support.real_model import real_checkpoint

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "real" / "smollm2-sums.toml"
LAST = "reinforced"
SHOWN = ("reward", "completion_tokens", "rollout_s", "train_s", "sync_s", "mismatch_abs", "entropy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--keep", type=Path, help="the run folder is kept here")
    parser.add_argument("--join", type=Path, help="a finished run folder")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as `isthmus run` has it")
    options = parser.parse_args()
    if options.join:
        found = told(RunFolder.open(options.join))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            found = trained(options.recipe, options.keep or Path(scratch) / "run", options.set)
    show(found)
    store("real_rl", {"recipe": options.recipe.name, "changed": options.set, **found})


def trained(recipe: Path, folder: Path, changes: list[str]) -> dict[str, Any]:
    settings = [word for one in (f"model.from={real_checkpoint()}", *changes) for word in ("--set", one)]
    command = [sys.executable, "-m", "isthmus", "run", str(recipe), "--run", str(folder), "--until", LAST, *settings]
    began = time.monotonic()
    subprocess.run(command, cwd=ROOT, check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = {"wall_s": time.monotonic() - began, "cpu_s": used.ru_utime + used.ru_stime}
    return {**spent, "threads": os.environ.get("OMP_NUM_THREADS"), **told(RunFolder.open(folder))}


def told(run: RunFolder) -> dict[str, Any]:
    """What a run folder holds of its qualification and its steps."""
    record = run.require_record(f"steps/{LAST}/record", RlRecord, "run")
    qualified = run.require_record("qualify/home", QualifyRecord, "qualify")
    events = run.events(LAST, "step")
    seconds = {"qualify": qualified.seconds, LAST: record.seconds}
    seconds |= {one["stage"]: one["seconds"] for one in run.events("cold-start", "end")}
    return {
        "seconds": seconds,
        "skipped_probes": {one.probe: one.price_s for one in qualified.skipped},
        "heldout_problems": run.recipe.named(LAST).heldout_problems,  # pyright: ignore[reportAttributeAccessIssue]
        **gain(record),
        "steps": [{name: event.get(name) for name in SHOWN} for event in events],
    }


def show(found: dict[str, Any]) -> None:
    value, low, high = found["gain"]
    if "wall_s" in found:
        print(f"{found['wall_s'] / 60:.1f} min, {found['cpu_s'] / 60:.1f} min of CPU: {found['seconds']}")
    print(
        f"held-out accuracy {found['before']:.1f} % -> {found['after']:.1f} %: {value:+.1f} [{low:+.1f}, {high:+.1f}] "
        f"points, {found['after'] / found['before']:.2f} times the cold start's"
    )


if __name__ == "__main__":
    main()
