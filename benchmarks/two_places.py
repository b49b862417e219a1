"""Two places: what becomes of a step of reinforcement learning when engines by URL fail, and what the crossing costs.

    python -m benchmarks.two_places                                # 200 failures, 24 of them in whole runs; overhead
    python -m benchmarks.two_places --what faults --count 40       # fewer; --whole for those in whole runs
    python -m benchmarks.two_places --what overhead
    python -m benchmarks.two_places --what vllm --vllm PYTHON --plug-in FOLDER
                                    # recipes/tiny.toml on a live vLLM; FOLDER: pip install --target FOLDER ./plugin
    python -m benchmarks.two_places --quick                        # one of each kind, and no result is stored

What is done of the failures is kept in --state, and a benchmark that was stopped goes on from there; with --count 0 it
stores what there is.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

import torch

from benchmarks.conditions import store
from benchmarks.two_places_faults import Note, by_kind, failures_alone, whole_runs
from benchmarks.two_places_overhead import overhead
from benchmarks.two_places_shore import KINDS, Row, opened
from benchmarks.two_places_vllm import vllm

TOLD = ("fallback", "back", "alarm")
NONE: Row = {"rows": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=["faults", "overhead", "vllm"], action="append")
    parser.add_argument("--count", type=int, default=200, help="failures in all")
    parser.add_argument("--whole", type=int, default=24, help="of them in whole runs of `isthmus run`")
    parser.add_argument("--state", type=Path, help="a file that keeps what is done of the failures")
    parser.add_argument("--rounds", type=int, default=3, help="of the overhead, each at all numbers of engines")
    parser.add_argument("--vllm", metavar="PYTHON", help="the python of an environment with vLLM")
    parser.add_argument("--plug-in", metavar="FOLDER", help="where the wheel of plugin/ was installed")
    parser.add_argument("--set", action="append", default=[], help="of the recipe that vLLM runs, as `isthmus run` has")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    for what in options.what or ["faults", "overhead"]:
        {"faults": faults, "overhead": overhead, "vllm": vllm}[what](options)


def faults(options: argparse.Namespace) -> None:
    """Plant failures, print a table by kind, and store everything."""
    whole, count = (2, len(KINDS) + 2) if options.quick else (options.whole, options.count)
    kinds = list(islice(cycle(KINDS), count))
    wanted = {"alone": kinds[whole:], "whole": kinds[:whole]}
    done = _read(options.state)
    began = time.perf_counter()
    left = {name: _left(some, [row["kind"] for row in done.get(name, NONE)["rows"]]) for name, some in wanted.items()}
    if any(left.values()):
        with tempfile.TemporaryDirectory() as scratch, opened(Path(scratch)) as (shore, prepared):
            for name, act in (("alone", failures_alone), ("whole", whole_runs)):
                if left[name]:
                    one = done.setdefault(name, {"rows": [], "calm": None})
                    one["calm"] = act(shore, prepared, Path(scratch), left[name], _noting(one["rows"], done, options))
                    _keep(done, options)
    tables = {name: by_kind(one["rows"]) for name, one in done.items() if one["rows"]}
    for name, table in tables.items():
        print(name, done[name]["calm"])
        for row in table:
            print("  ", row)
    if not options.quick:
        seconds = time.perf_counter() - began
        store("two_places", {"what": "faults", "seconds": seconds, "summary": tables, "parts": done})


def _noting(rows: list[Row], done: dict[str, Row], options: argparse.Namespace) -> Note:
    def note(row: Row) -> None:
        rows.append(row)
        print({key: value for key, value in row.items() if key not in TOLD}, flush=True)
        for event in row.get("fallback", []):
            print("    ", event["what"], "|", event["why"][:150], flush=True)
        _keep(done, options)

    return note


def _keep(done: dict[str, Row], options: argparse.Namespace) -> None:
    if options.state:
        options.state.write_text(json.dumps(done))


def _left(wanted: list[str], done: list[str]) -> list[str]:
    """Kinds that are still to come."""
    left = list(wanted)
    for kind in done:
        if kind in left:
            left.remove(kind)
    return left


def _read(state: Path | None) -> dict[str, Row]:
    return json.loads(state.read_text()) if state is not None and state.exists() else {}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
