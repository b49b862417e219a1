"""The static tier on DeepSeek-V3's 671 billion parameters: seconds, processor time and memory, each case in a process.

    python -m benchmarks.static_tier [--chip ascend-910b-313t] [--repeats 3]

A case is what `isthmus coverage deepseek-v3` does once torch and the package are loaded: a training step of one rank
and two serving passes traced on the meta device and joined with the chip's tables. Once as one chip would hold the
whole model, once as one of 256 ranks, of which 64 exchange tokens. The rival traces the second case layer by layer, as
a trace without knowledge of the model would. Memory is the largest of the process, with the interpreter and torch
(ru_maxrss); times are of the process from its first import, the fastest of the repeats.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.conditions import store

CASES: dict[str, dict[str, Any]] = {
    "one rank": {"ranks": 1, "expert": 1},
    "one of 256 ranks, 64 of them with experts": {"ranks": 256, "expert": 64},
    "the same, every layer": {"ranks": 256, "expert": 64, "every_layer": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", default="ascend-910b-313t")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(once(options.chip, CASES[options.only])))
        return
    runs = {name: [in_a_process(options.chip, name) for _ in range(options.repeats)] for name in CASES}
    for name in list(CASES)[1:]:
        assert [run["flops"] for run in runs[name]] == [run["flops"] for run in runs["the same, every layer"]]
    results = {name: {**fastest(found), "runs": found} for name, found in runs.items()}
    ours, rival = (results[name] for name in list(CASES)[1:])
    ratio = {key: rival[key] / ours[key] for key in ("seconds", "cpu_seconds", "peak_mib")}
    Console().print(table(results))
    store("static_tier", {"chip": options.chip, "repeats": options.repeats, "results": results, "rival_to_ours": ratio})


def in_a_process(chip: str, name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.static_tier", "--chip", chip, "--only", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def once(chip_name: str, case: dict[str, Any]) -> dict[str, Any]:
    """One case in this process."""
    began = time.perf_counter()
    from isthmus.chips import get_chip
    from isthmus.chips.rehearse import profile_of
    from isthmus.probes.static.check import static_coverage
    from isthmus.probes.static.trace import Layout
    from isthmus.tools.coverage import recipe_of

    recipe = recipe_of("deepseek-v3", chip_name, case["ranks"], (f"train.expert={case['expert']}",))
    chip, profile = get_chip(chip_name), profile_of(chip_name)
    layout, every = Layout.of(recipe.model, recipe.train, case["ranks"]), case.get("every_layer", False)
    found = static_coverage(recipe, chip, profile, layout, every_layer=every)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_mib": used.ru_maxrss / 1024,
        "flops": [one.totals["flops"] for one in found],
        "operators": [len(one.rows) for one in found],
        "native_share_of_time": [one.share("native") for one in found],
        "headline": found[0].headline(),
    }


def fastest(runs: list[dict[str, Any]]) -> dict[str, Any]:
    best = {key: min(run[key] for run in runs) for key in ("seconds", "cpu_seconds")}
    return {**best, "peak_mib": max(run["peak_mib"] for run in runs), "headline": runs[0]["headline"]}


def table(results: dict[str, dict[str, Any]]) -> Table:
    rows = Table("case", "seconds", "CPU seconds", "peak MiB")
    for name, one in results.items():
        rows.add_row(name, f"{one['seconds']:.1f}", f"{one['cpu_seconds']:.1f}", f"{one['peak_mib']:,.0f}")
    return rows


if __name__ == "__main__":
    main()
