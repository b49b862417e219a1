"""Processes of a whole run are killed with -9, runs are started twice, and single bits of what they leave are flipped.

    python -m benchmarks.kills               # 100 kills, two at once at 50 offsets, 200 faults; --kills and so on
    python -m benchmarks.kills --quick       # a few of each, and no result is stored

A run of kills.toml is killed at a random moment of its whole time, qualification included: all of its processes, the
engine, or the process of the step; the same command goes on until it ends. It has to end with the checkpoints, records
and content id of a run that nobody disturbed. Stages that ended before the moment are not made again: a run starts
from the folder that they left. What is done is kept in --state, and a benchmark that was stopped goes on from there.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from scipy.stats import binomtest

from benchmarks.conditions import store
from benchmarks.kills_told import differences, one_fault, told
from benchmarks.processes import ROOT, Said, ended, isthmus, kill, members, said, start
from isthmus.records import read_weights
from isthmus.run import RunFolder
from isthmus.tools.inspect import check_run

RECIPE = ROOT / "benchmarks" / "kills.toml"
TAUGHT, REINFORCED = "taught", "reasoning"
TARGETS = {"group": "", "engine": "isthmus.engines.local", "rank": "isthmus.launch.rank"}
"""What is killed, by what its command line has. Where it is not at work, and does not come soon, all are killed."""
STARTS = 6
"""So often the same command is given until the run counts as stuck."""
TOGETHER = 10
"""Other starts of one run."""
BUSY = "is being written by process"
Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A part of a run: `before` is the folder that it starts from, None for nothing; seconds that it takes alone."""

    name: str
    before: Path | None
    seconds: float


@dataclass
class Reference:
    """A run that nobody disturbed, made stage by stage, and one made by one command, which has to be the same."""

    parts: list[Part]
    whole: Path
    told: dict[str, Any]
    seconds: float
    differences: list[str]

    @property
    def taught(self) -> str:
        return read_weights(RunFolder.open(self.whole), TAUGHT).checkpoint_sha256


def reference(state: Path) -> Reference:
    """Made once; `state` keeps it."""
    folder, notes = state / "reference", state / "reference.json"
    if not notes.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        notes.write_text(json.dumps(_made(folder)))
    known = json.loads(notes.read_text())
    parts = [Part(name, folder / before if before else None, seconds) for name, before, seconds in known["parts"]]
    whole = folder / "whole"
    mine = told(whole)
    return Reference(parts, whole, mine, known["seconds"], differences(told(folder / "run"), mine))


def _made(folder: Path) -> Row:
    whole, run = folder / "whole", folder / "run"
    seconds = _timed("run", RECIPE, "--run", whole)
    parts: list[tuple[str, str | None, float]] = [("qualify", None, _timed("qualify", RECIPE, "--run", run))]
    for name, words in (
        (TAUGHT, ("--until", TAUGHT)),
        (REINFORCED, ("--only", REINFORCED)),
        ("handoff", ()),
    ):
        shutil.copytree(run, folder / f"before-{name}")
        parts.append((name, f"before-{name}", _timed("run", run, *words)))
    return {"seconds": seconds, "parts": parts}


def _timed(*words: object) -> float:
    began = time.perf_counter()
    result = isthmus(*words)
    assert result.code == 0, result.output + result.errors
    return round(time.perf_counter() - began, 2)


def one_kill(known: Reference, folder: Path, seed: str) -> Row:
    """Kill once, go on to the end, and compare with the undisturbed run."""
    chance = random.Random(seed)
    part = chance.choices(known.parts, [part.seconds for part in known.parts])[0]
    target, offset = chance.choice(list(TARGETS)), chance.uniform(0.0, part.seconds)
    command: tuple[object, ...] = ("run", folder)
    if part.before is None:
        command = ("run", RECIPE, "--run", folder)
    else:
        shutil.copytree(part.before, folder)
    began = time.perf_counter()
    process = start(*command)
    with ended(process):
        killed = _killed(process, target, offset, part.seconds / 3)
        results = [said(process)]
    while results[-1].code != 0 and len(results) < STARTS:
        results.append(isthmus("run", folder) if (folder / "recipe.json").exists() else isthmus(*command))
    row = {"part": part.name, "target": target, "offset_s": round(offset, 2), "killed": killed, "starts": len(results)}
    row |= {"codes": [result.code for result in results], "trace": _traces(results)}
    row |= _compared(folder, known) if results[-1].code == 0 else {"differs": [results[-1].errors[-300:]], "breaks": []}
    shutil.rmtree(folder, ignore_errors=True)
    return row | {"ok": not row["differs"] and not row["breaks"], "seconds": round(time.perf_counter() - began, 1)}


def _killed(process: subprocess.Popen[str], target: str, offset: float, patience: float) -> str | None:
    """Kill at a moment, or once what is wanted is there; all, if it does not come. None: the run had ended."""
    begins = time.monotonic() + offset
    while process.poll() is None:
        alive = members(process.pid) if time.monotonic() >= begins else {}
        wanted = [pid for pid, words in alive.items() if target == "group" or TARGETS[target] in words]
        if wanted or time.monotonic() >= begins + patience:
            kill(*(wanted or alive))
            return target if wanted else "group"
        time.sleep(0.02)
    return None


def _traces(results: Sequence[Said]) -> bool:
    return any("Traceback" in result.errors for result in results)


def _compared(folder: Path, known: Reference) -> Row:
    return {"differs": differences(told(folder), known.told), "breaks": check_run(folder).breaks}


def together(known: Reference, folder: Path, seed: str) -> Row:
    """A run that is started again and again while it goes on: early, when it is not clear who is first, and later."""
    chance = random.Random(seed)
    early = [chance.uniform(0.0, 3.0) for _ in range(TOGETHER // 2)]
    offsets = sorted(early + [chance.uniform(3.0, 0.8 * known.seconds) for _ in range(TOGETHER - len(early))])
    began, processes = time.monotonic(), [start("run", RECIPE, "--run", folder)]
    results: list[Said] = []
    try:
        for offset in offsets:
            time.sleep(max(0.0, began + offset - time.monotonic()))
            processes.append(start("run", RECIPE, "--run", folder))
        results = [said(process) for process in processes]
    finally:
        for process in processes:
            kill(*members(process.pid))
    codes = Counter(result.code for result in results)
    refused = [result for result in results if result.code == 2]
    row = {
        "offsets_s": [round(offset, 2) for offset in offsets],
        "codes": dict(codes),
        "one_ended": codes[0] == 1,
        "others_say_why": len(refused) == len(offsets) and all(BUSY in " ".join(one.errors.split()) for one in refused),
        "trace": _traces(results),
        "said": [result.errors[-300:] for result in results if result.code not in (0, 2)],
    }
    row |= _compared(folder, known)
    shutil.rmtree(folder, ignore_errors=True)
    return row | {"ok": row["one_ended"] and row["others_say_why"] and not row["differs"] and not row["breaks"]}


def half_done(known: Reference, folder: Path) -> Path:
    """The folder of a run that was killed within its first step, after its second checkpoint."""
    before = next(part.before for part in known.parts if part.name == TAUGHT)
    assert before is not None
    for _ in range(STARTS):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)
        process = start("run", folder, "--until", TAUGHT)
        with ended(process):
            while len(list(folder.glob(f"steps/{TAUGHT}/checkpoints/step-*"))) < 2 and process.poll() is None:
                time.sleep(0.002)
            kill(*members(process.pid))
        if not (folder / "steps" / TAUGHT / "record.json").exists():
            return folder
    raise AssertionError("the first step ends before it can be killed")


def faults(
    known: Reference, state: Path, count: int, seed: int, done: Callable[[str], bool]
) -> Iterator[tuple[str, Row]]:
    """Three of four in a run that has ended, one in a run that was killed within a step."""
    finished, half = state / "finished", state / "half"
    shutil.rmtree(finished, ignore_errors=True)
    shutil.copytree(known.whole, finished)
    half_done(known, half)
    contents = {folder: _contents(folder) for folder in (finished, half)}
    for index in range(count):
        key, folder = f"fault/{index}", half if index % 4 == 3 else finished
        if not done(key):
            chance = random.Random(f"{seed}/{key}")
            yield key, {"of": folder.name, **one_fault(folder, contents[folder], known.taught, chance)}


def _contents(folder: Path) -> dict[Path, bytes]:
    """All files but what programs print and what marks a writer: neither is read by a run."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path: path.read_bytes() for path in paths if path.suffix != ".log" and not path.name.startswith(".")}


class Progress:
    """The rows that are done, one a line in a file; those of an earlier start are not made again."""

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.rows: dict[str, Row] = dict(json.loads(line) for line in lines)

    def done(self, key: str) -> bool:
        return key in self.rows

    def add(self, key: str, row: Row) -> None:
        self.rows[key] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([key, row]) + "\n")
        print(key, row, flush=True)

    def of(self, kind: str) -> list[Row]:
        return [row for key, row in self.rows.items() if key.startswith(f"{kind}/")]


def measure(kills: int, twice: int, count: int, seed: int, state: Path) -> Row:
    state.mkdir(parents=True, exist_ok=True)
    known, progress, place = reference(state), Progress(state / "rows.jsonl"), state / "case"
    print(f"a run takes {known.seconds} s; stage by stage it differs in {known.differences}", flush=True)
    for key, row in faults(known, state, count, seed, progress.done):
        progress.add(key, row)
    for kind, number, one in (("kill", kills, one_kill), ("together", twice, together)):
        for index in range(number):
            key = f"{kind}/{index}"
            if not progress.done(key):
                shutil.rmtree(place, ignore_errors=True)
                progress.add(key, one(known, place, f"{seed}/{key}"))
    return summary(known, progress, seed)


def rate(rows: Sequence[Row], name: str) -> Row:
    """How many have it, with the exact 95 % interval."""
    count = sum(bool(row[name]) for row in rows)
    found = binomtest(count, len(rows)).proportion_ci(method="exact") if rows else None
    return {
        "count": count,
        "of": len(rows),
        "low": found and round(found.low, 4),
        "high": found and round(found.high, 4),
    }


def summary(known: Reference, progress: Progress, seed: int) -> Row:
    killed, twice, planted = progress.of("kill"), progress.of("together"), progress.of("fault")
    struck = [row for row in killed if row["killed"]]
    return {
        "seed": seed,
        "seconds_of_a_run": known.seconds,
        "stage_by_stage_differs_in": known.differences,
        "kills": {
            "like_the_undisturbed_run": rate(struck, "ok"),
            "ended_before_the_kill": len(killed) - len(struck),
            "by_part": dict(Counter(row["part"] for row in struck)),
            "by_target": dict(Counter(row["killed"] for row in struck)),
            "went_on_by_itself": sum(row["starts"] == 1 for row in struck),
            "most_starts": max((row["starts"] for row in struck), default=0),
            "tracebacks": sum(row["trace"] for row in struck),
            "median_seconds": median([row["seconds"] for row in struck] or [0.0]),
            "wrong": [row for row in struck if not row["ok"]],
        },
        "two_at_once": {
            "offsets": sum(len(row["offsets_s"]) for row in twice),
            "runs": rate(twice, "ok"),
            "tracebacks": sum(row["trace"] for row in twice),
            "wrong": [row for row in twice if not row["ok"]],
        },
        "faults": {
            "noticed": rate(planted, "noticed"),
            "named": rate(planted, "named"),
            "goes_on_unseen": rate(planted, "goes_on_unseen"),
            "by_kind": dict(Counter(row["kind"] for row in planted)),
            "by_folder": dict(Counter(row["of"] for row in planted)),
            "not_covered": "*.log",
            "wrong": [row for row in planted if not row["noticed"] or row["goes_on_unseen"]],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--together", type=int, default=5, help=f"runs that are started {TOGETHER} times more")
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, default=ROOT / "build" / "kills", help="what is done so far")
    parser.add_argument("--quick", action="store_true", help="3 kills, 1 run started again, 40 faults; store no result")
    options = parser.parse_args()
    numbers = (3, 1, 40) if options.quick else (options.kills, options.together, options.faults)
    state = options.state / f"{'quick-' if options.quick else ''}{options.seed}"
    result = measure(*numbers, options.seed, state.absolute())
    for name, found in result.items():
        print(f"{name}: {found}")
    if not options.quick:
        store("kills", result)
    shutil.rmtree(state)


if __name__ == "__main__":
    main()
