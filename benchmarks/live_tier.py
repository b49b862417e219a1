"""The live tier of software on a device that is here: its errors, its price, and its false alarms.

    python -m benchmarks.live_tier --chip cpu --seeds 100
    python -m benchmarks.live_tier --chip nvidia-h100-sxm --keep

Each seed draws other inputs for every operator call of the recipe. A finding on a device that is known to be healthy is
a false alarm. `--keep` stores the largest errors, which are then what is trusted of an operator, as
src/isthmus/probes/trusted/<chip>.json; the raw errors of each seed go into results/.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.conditions import conditions, store
from isthmus.chips import device_for, get_chip
from isthmus.probes.calls import edge_calls, recipe_calls
from isthmus.probes.portable.compiled import check_compiled
from isthmus.probes.portable.operators import check_operators
from isthmus.probes.portable.traps import check_traps
from isthmus.probes.software import REPEATS, longest_sum, run_dtypes
from isthmus.recipe.read import load_recipe

ROOT = Path(__file__).parents[1]
TRUSTED = ROOT / "src" / "isthmus" / "probes" / "trusted"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", default="cpu")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "tiny.toml")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="trust these errors from now on")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recipe, chip = load_recipe(arguments.recipe), get_chip(arguments.chip)
    rank = SimpleNamespace(rank=0, world=1, device=torch.device(device_for(chip.slug)), beat=lambda *_: None)
    began = time.process_time()
    calls = [*recipe_calls(recipe), *edge_calls(bool(chip.capabilities.grouped_matmul))]
    recording = time.process_time() - began
    dtypes = run_dtypes(recipe, chip)
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    rows = [one_seed(rank, calls, dtypes, seed, longest_sum(recipe)) for seed in seeds]
    summary = {**summarise(rows, recording, len(calls)), "compile": compilation(rank)}
    print(json.dumps(summary, indent=1))
    store("live_tier", {"chip": chip.slug, "dtypes": dtypes, **summary, "rows": rows})
    if arguments.keep:
        errors = largest([row["errors"] for row in rows])
        content = {"chip": chip.slug, "conditions": conditions(), "seeds": list(seeds), "errors": errors}
        TRUSTED.joinpath(f"{chip.slug}.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def one_seed(rank: Any, calls: list[Any], dtypes: list[str], seed: int, length: int) -> dict[str, Any]:
    began, clock = time.process_time(), time.perf_counter()
    found = check_operators(rank, calls, dtypes, repeats=REPEATS, seed=seed)
    operators_s = time.process_time() - began
    trapped = check_traps(rank, dtypes=dtypes, length=length, seed=seed)
    row = {
        "seed": seed,
        "cpu_s": operators_s,
        "traps_cpu_s": time.process_time() - began - operators_s,
        "wall_s": time.perf_counter() - clock,
        "checked": found["checked"],
        "closest": found["closest"],
        "findings": found["findings"],
        "noted": found["noted"],
        "unchecked": found["unchecked"],
        "traps": [one for one in trapped["traps"] if one["failed"]],
        "errors": found["errors"],
    }
    print(
        f"seed {seed}: {operators_s:.2f} s of CPU, {len(row['findings'])} findings, closest {row['closest']:.3f}",
        flush=True,
    )
    return row


def compilation(rank: Any) -> dict[str, Any]:
    """Eager against compiled once: what it found, and its processor time with that of the compiler."""
    began = processor_seconds()
    found = check_compiled(rank)
    return {"cpu_s": processor_seconds() - began, "unchecked": found["unchecked"], "detail": found["detail"]}


def processor_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def summarise(rows: list[dict[str, Any]], recording: float, calls: int) -> dict[str, Any]:
    """Alarms by seed with the 95 % upper bound of their rate, and what a call costs."""
    alarms = sum(bool(row["findings"] or any(one["needed_for"] for one in row["traps"])) for row in rows)
    seconds = [row["cpu_s"] / row["checked"] for row in rows]
    return {
        "calls": calls,
        "seeds": len(rows),
        "alarms": alarms,
        "alarm_rate_upper_95": 1.0 - 0.05 ** (1.0 / len(rows)) if alarms == 0 else None,
        "closest_to_a_limit": max(row["closest"] for row in rows),
        "record_cpu_s": recording,
        "call_cpu_s": sorted(seconds)[len(seconds) // 2],
        "traps_cpu_s": sorted(row["traps_cpu_s"] for row in rows)[len(rows) // 2],
    }


def largest(errors: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    merged: dict[str, dict[str, float]] = {}
    for one in errors:
        for key, found in one.items():
            kept = merged.setdefault(key, dict.fromkeys(found, -math.inf))
            merged[key] = {name: max(kept[name], found[name]) for name in found}
    return merged


if __name__ == "__main__":
    main()
