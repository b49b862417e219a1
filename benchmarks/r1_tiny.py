"""R1's recipe on tiny models over several seeds: what each step can do, and whether R1's finding holds at this size.

    python -m benchmarks.r1_tiny --seeds 0 1 2
    python -m benchmarks.r1_tiny --join RUN [RUN ...]        # run nothing; tell of finished run folders

All steps answer the same held-out problems. The rival of distilling is the same student by reinforcement alone;
R1 found that distilling wins for small models (arXiv 2501.12948, section 4.1). Differences are paired by problem, with
95 % intervals.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.conditions import store
from isthmus.parity.paired import compare_answers
from isthmus.records import EvaluationRecord, RlRecord, evaluation_of, step_record
from isthmus.run import RunFolder

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "r1-tiny.toml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", type=Path, help="keep the run folders here")
    parser.add_argument("--join", type=Path, nargs="+", help="finished run folders")
    arguments = parser.parse_args()
    if arguments.join:
        rows = [told(RunFolder.open(folder), None) for folder in arguments.join]
    else:
        with tempfile.TemporaryDirectory() as scratch:
            rows = [one_seed(seed, arguments.keep or Path(scratch)) for seed in arguments.seeds]
    for row in rows:
        show(row)
    store("r1_tiny", {"recipe": RECIPE.name, "rows": rows})


def one_seed(seed: int, root: Path) -> dict[str, Any]:
    folder, began = root / f"seed-{seed}", time.monotonic()
    command = [sys.executable, "-m", "isthmus", "run", str(RECIPE), "--run", str(folder), "--set", f"seed={seed}"]
    subprocess.run(command, cwd=ROOT, check=True)
    return told(RunFolder.open(folder), time.monotonic() - began)


def told(run: RunFolder, wall_s: float | None) -> dict[str, Any]:
    """What a run folder holds of its steps."""
    found = {name: one for name in run.recipe.evaluation.after if (one := evaluation_of(run, name)) is not None}
    reinforced = [one for step in run.recipe.step if isinstance(one := step_record(run, step.name), RlRecord)]
    return {
        "seed": run.recipe.seed,
        "wall_s": wall_s,
        "after": {name: asked(one) for name, one in found.items()},
        "rl": {one.step: gain(one) for one in reinforced},
        "compared": {
            f"{second} against {first}": difference(found[first], found[second])
            for first, second in run.recipe.evaluation.compare
            if first in found and second in found
        },
    }


def asked(one: EvaluationRecord) -> dict[str, Any]:
    figures = {"accuracy": one.accuracy, "greedy": one.greedy_accuracy, "language": one.language, "tokens": one.tokens}
    return {name: [figure.value, figure.low, figure.high] for name, figure in figures.items()}


def gain(one: RlRecord) -> dict[str, Any]:
    return {"before": one.accuracy_before.value, "after": one.accuracy_after.value} | {
        "gain": [one.accuracy_gain.value, one.accuracy_gain.low, one.accuracy_gain.high]
    }


def difference(first: EvaluationRecord, second: EvaluationRecord) -> list[float]:
    pairs = compare_answers(first.correct, second.correct, 0.95)
    return [100 * value for value in (pairs.difference, pairs.low, pairs.high)]


def show(row: dict[str, Any]) -> None:
    print(f"seed {row['seed']}" + (f", {row['wall_s'] / 60:.0f} min" if row["wall_s"] else ""))
    print(f"  {'after':<14} {'accuracy %':>22} {'greedy %':>9} {'one language %':>15} {'tokens':>7}")
    for name, one in row["after"].items():
        accuracy, low, high = one["accuracy"]
        print(
            f"  {name:<14} {f'{accuracy:.1f} [{low:.1f}, {high:.1f}]':>22} {one['greedy'][0]:>9.1f} "
            f"{one['language'][0]:>15.1f} {one['tokens'][0]:>7.0f}"
        )
    for name, one in row["rl"].items():
        value, low, high = one["gain"]
        ends = f"{one['before']:.1f} -> {one['after']:.1f}"
        print(f"  RL {name:<11} {ends}: {value:+.1f} [{low:+.1f}, {high:+.1f}] points")
    for name, (value, low, high) in row["compared"].items():
        print(f"  {name}: {value:+.1f} [{low:+.1f}, {high:+.1f}] points")


if __name__ == "__main__":
    main()
