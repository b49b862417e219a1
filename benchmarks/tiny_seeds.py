"""The tiny recipe from start to end over several seeds: what RL gains on held-out problems, and what the run costs.

    python -m benchmarks.tiny_seeds --seeds 0 1 2

The rival is the same model before RL, on the same problems; the ratio is accuracy after by accuracy before.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.conditions import store
from isthmus.records import HandoffRecord, PlanRecord, RlRecord
from isthmus.run import RunFolder

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "tiny.toml")
    parser.add_argument("--keep", type=Path, help="keep the run folders here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = [one_seed(arguments.recipe, seed, arguments.keep or Path(scratch)) for seed in arguments.seeds]
    print(
        f"{'seed':>4} {'before':>7} {'after':>7} {'gain [95% interval]':>24} {'ratio':>6} "
        f"{'tokens':>12} {'wall s':>7} {'GiB':>5}"
    )
    for row in rows:
        interval = f"{row['gain']:.1f} [{row['gain_low']:.1f}, {row['gain_high']:.1f}]"
        tokens = f"{row['tokens_before']:.0f} -> {row['tokens_after']:.0f}"
        print(
            f"{row['seed']:>4} {row['before']:>7.1f} {row['after']:>7.1f} {interval:>24} "
            f"{row['after'] / row['before']:>6.2f} {tokens:>12} {row['wall_s']:>7.0f} {row['peak_gib']:>5.2f}"
        )
    store("tiny_seeds", {"recipe": arguments.recipe.name, "rows": rows})


def one_seed(recipe: Path, seed: int, root: Path) -> dict[str, float | str | None]:
    folder = root / f"seed-{seed}"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    command = [sys.executable, "-m", "isthmus", "run", str(recipe), "--run", str(folder), "--set", f"seed={seed}"]
    process = subprocess.Popen(command, start_new_session=True, cwd=ROOT)
    peak = PeakMemory(process.pid)
    if process.wait() != 0:
        raise SystemExit(f"seed {seed} ended with code {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = RunFolder.open(folder)
    rl, parity = run.read_record("steps/reasoning/record", RlRecord), run.read_record("parity", HandoffRecord)
    plan = run.read_record("plan", PlanRecord)
    assert rl is not None and parity is not None and plan is not None
    return {
        "seed": seed,
        "problems": rl.heldout_problems,
        "before": rl.accuracy_before.value,
        "after": rl.accuracy_after.value,
        "gain": rl.accuracy_gain.value,
        "gain_low": rl.accuracy_gain.low,
        "gain_high": rl.accuracy_gain.high,
        "tokens_before": rl.thought_tokens_before.value,
        "tokens_after": rl.thought_tokens_after.value,
        "greedy_before": rl.figures["greedy_accuracy_before"].value,
        "greedy_after": rl.figures["greedy_accuracy_after"].value,
        "mismatch_abs": rl.figures["mismatch_abs"].value,
        "parity": parity.verdict,
        "wall_s": time.monotonic() - began,
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_gib": peak.gib,
        "estimated_s": plan.estimate["total"].value,
    }


class PeakMemory:
    """Largest sum of the resident memory of a process and its descendants, sampled every 0.2 s."""

    def __init__(self, root: int):
        self._root = root
        self.gib = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while Path(f"/proc/{self._root}").exists():
            self.gib = max(self.gib, sum(self._resident(pid) for pid in self._family()) / 2**20)
            time.sleep(0.2)

    def _family(self) -> set[int]:
        parents = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                fields = _read(entry / "stat").rpartition(")")[2].split()
                if fields:
                    parents[int(entry.name)] = int(fields[1])
        family = {self._root}
        while grown := {pid for pid, parent in parents.items() if parent in family} - family:
            family |= grown
        return family

    def _resident(self, pid: int) -> int:
        """KiB."""
        for line in _read(Path(f"/proc/{pid}/status")).splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1])
        return 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


if __name__ == "__main__":
    main()
