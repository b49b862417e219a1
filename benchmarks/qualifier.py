"""How good the qualification is: faults planted in healthy pools, beside the same pools without, and the field's rules.

    python -m benchmarks.qualifier                        # 1,000 healthy pools and 75 of each fault: hours
    python -m benchmarks.qualifier --quick                # 3 healthy, 1 of each, and no result is stored
    python -m benchmarks.qualifier --healthy 200 --times 20 --kinds crash nan --keep one.jsonl     # a part of it
    python -m benchmarks.qualifier --join one.jsonl other.jsonl    # what parts of any --seed saw, as one result

A pool is four ranks on this machine's CPU. Each trial qualifies it once, cheapest probe first, with a soak of one
second, and counts as found if some finding fails; a faulty pool is not looked at any further then. Where a rank is at
fault, it also has to be named. A healthy pool of which a finding fails is a false alarm. Most healthy pools see the
probes that cost little, every fifth sees them all; false alarms are also counted by probe. Parts may run
side by side: a pool on a busy machine is healthy too. Faults are drawn: the rank,
the step, the peer, the operator, and for faults that come and go how often they come. The comparison of compiled code
is left out: no fault that is planted here shows in it alone.

The rivals look at the same pools and faults as health checks in the field do: they time a matrix product and an
all-gather on each rank and compare with the peers (DLRover: over twice the median; NVRx: 0.75 of the reference), time
out on a hang, or look for NaN in a training step. They compare no result with a known one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.conditions import conditions, store
from isthmus.chips import get_chip
from isthmus.chips.rehearse.faults import FAULT_KINDS, Fault
from isthmus.launch.crew import Crew
from isthmus.parity.paired import wilson_interval
from isthmus.pools import get_pool
from isthmus.probes import PRELOAD, live_probes, software
from isthmus.probes.asking import ask
from isthmus.probes.budget import choose
from isthmus.probes.contract import Probe, Setting
from isthmus.recipe.read import load_recipe
from isthmus.recipe.schema import Recipe
from isthmus.run import RunFolder
from tests.support.flow_recipe import RECIPE, SMALL

RANKS = 4
CONFIDENCE = 0.95
LEFT_OUT, CHEAP_S = "eager against compiled", 3.0
MUST_FIND = ("crash", "hang", "wrong-sum", "slow-link", "fallback", "dtype-swap", "nan")
RARE = (1.0, 0.1, 0.01)
"""How often a fault that comes and goes comes, per opportunity."""


@dataclass
class Trial:
    """One qualification. `findings` are the names of those that failed."""

    kind: str
    fault: str | None
    rate: float
    found: bool = False
    named: bool = False
    seconds: float = 0.0
    found_after: float | None = None
    findings: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    probes: list[str] = field(default_factory=list)
    alarmed: list[str] = field(default_factory=list)
    rivals: dict[str, bool] = field(default_factory=dict)
    load: float = 0.0
    commit: str = ""
    seed: int = 0


def small_recipe() -> Recipe:
    settings = {**SMALL, "pools.home.count": RANKS, "step.cold-start.batch_size": 8}
    overrides = [f"{key}={value}" for key, value in settings.items()]
    return load_recipe(RECIPE, (*overrides, 'place.rollout=["home"]', 'place.serve=["home"]'))


def draw(kind: str, number: int, generator: random.Random) -> Fault:
    """A fault of a kind. Kinds that come and go get each of the `RARE` rates in turn."""
    rank = generator.randrange(RANKS)
    seed = generator.randrange(2**31)
    match kind:
        case "slow-rank":
            return Fault(kind, rank, size=generator.choice([3.0, 5.0, 10.0]), seed=seed)
        case "slow-link":
            peer = generator.choice([one for one in range(RANKS) if one != rank])
            return Fault(kind, rank, peer=peer, size=generator.choice([5.0, 10.0, 30.0]), seed=seed)
        case "link-cut":
            peer = generator.choice([one for one in range(RANKS) if one != rank])
            return Fault(kind, rank, peer=peer, seed=seed)
        case "crash" | "hang" | "out-of-memory":
            return Fault(kind, rank, step=generator.randrange(1, 4), seed=seed)
        case "fallback":
            return Fault(kind, rank, operator=generator.choice(["aten::mm", "aten::bmm"]), seed=seed)
        case "dtype-swap":
            return Fault(kind, rank, operator="aten::mm", seed=seed)
        case "small-error":
            size = generator.choice([0.1, 0.01])
            return Fault(kind, rank, rate=RARE[number % len(RARE)], size=size, operator="aten::mm", seed=seed)
        case "flipped-bit":
            bit = generator.choice([8, 16, 22, 26])
            return Fault(kind, rank, rate=RARE[number % len(RARE)], size=float(bit), operator="aten::mm", seed=seed)
        case _:
            return Fault(kind, rank, seed=seed)  # pyright: ignore[reportArgumentType]


def qualify(fault: Fault | None, setting: Setting, probes: list[Probe]) -> Trial:
    """One pool, with or without a fault, asked by the probes in order. A fault that is found ends it."""
    trial = Trial(fault.kind if fault else "healthy", str(fault) if fault else None, fault.rate if fault else 0.0)
    began = time.monotonic()
    with Crew(RANKS, faults=(fault,) if fault else (), preload=PRELOAD) as crew:
        for probe in probes:
            (answer,) = ask(crew, setting, [probe])
            failing = [item for item in answer.evidence or () if item.outcome == "fail"]
            trial.probes.append(probe.name)
            if not failing:
                continue
            trial.alarmed.append(probe.name)
            trial.findings += [item.name for item in failing]
            trial.details += [item.detail.replace(str(setting.root), "RUN") for item in failing]
            if fault is not None:
                trial.found_after = time.monotonic() - began
                trial.named = any(fault.rank in item.ranks for item in failing)
                break
    trial.seconds = time.monotonic() - began
    trial.found = bool(trial.findings)
    return trial


def setting_in(folder: Path, recipe: Recipe, stall_s: float) -> Setting:
    run, pool = RunFolder.create(folder / "run", recipe), get_pool(recipe, "home")
    return Setting(
        recipe, pool, get_chip(pool.chip), None, "cpu", run.path, run.path / "qualify" / "home", stall_s=stall_s
    )


def ask_rivals(fault: Fault | None) -> dict[str, bool]:
    """What the field's rules say about the same pool."""
    with Crew(RANKS, faults=(fault,) if fault else ()) as crew:
        called = crew.call(
            "benchmarks.rivals.node_check:check", {"size": 256, "numel": 2**16}, deadline_s=30.0, stall_s=5.0
        )
    if not called.ok:
        return {"node check, 2 x median": True, "straggler score 0.75": True, "crash, hang or NaN alone": True}
    matmul, gather = ([value[key] for value in called.values] for key in ("matmul", "gather"))
    twice = any(max(times) > 2 * sorted(times)[RANKS // 2] for times in (matmul, gather))
    score = any(min(times) / max(times) < 0.75 for times in (matmul, gather))
    nan = any(value["nan"] for value in called.values)
    return {"node check, 2 x median": twice, "straggler score 0.75": score, "crash, hang or NaN alone": nan}


def trials(arguments: argparse.Namespace) -> Iterator[Trial]:
    """Healthy pools and faulty ones in turn, so that the machine's mood is the same for both."""
    generator = random.Random(arguments.seed)
    recipe, commit = small_recipe(), conditions()["commit"]
    plan: list[Fault | None] = [draw(kind, n, generator) for kind in arguments.kinds for n in range(arguments.times)]
    plan += [None] * arguments.healthy
    generator.shuffle(plan)
    healthy = 0
    with tempfile.TemporaryDirectory() as folder:
        setting = setting_in(Path(folder), recipe, arguments.stall)
        calls = software.recipe_calls(recipe)  # the same for every pool: recorded once
        software.recipe_calls = lambda _recipe: calls
        every = [probe for probe, _ in choose(live_probes(), setting, None).chosen if probe.name != LEFT_OUT]
        cheap = [probe for probe in every if probe.price(setting) <= CHEAP_S]
        for fault in plan:
            setting.failures.clear()
            whole = fault is not None or healthy % arguments.whole_every == 0
            trial = qualify(fault, setting, every if whole else cheap)
            healthy += fault is None
            if generator.random() < arguments.rivals / max(1, arguments.healthy if fault is None else arguments.times):
                trial.rivals = ask_rivals(fault)
            trial.load, trial.commit, trial.seed = os.getloadavg()[0], commit, arguments.seed
            yield trial


def share(hits: int, total: int) -> str:
    low, high = wilson_interval(hits / total, total, CONFIDENCE)
    return f"{hits}/{total} [{100 * low:.1f}, {100 * high:.1f}] %"


def table(done: list[Trial], key: Callable[[Trial], str]) -> list[dict[str, Any]]:
    """A row for each group: recall or false alarms, the rank named, and seconds to find."""
    groups: dict[str, list[Trial]] = defaultdict(list)
    for trial in done:
        groups[key(trial)].append(trial)
    rows = []
    for name, members in groups.items():
        found = [trial for trial in members if trial.found]
        after = sorted(trial.found_after for trial in found if trial.found_after is not None)
        row = {"group": name, "found": share(len(found), len(members)), "n": len(members), "hits": len(found)}
        row |= {"named": sum(trial.named for trial in found)}
        row |= {"found_after_median_s": round(after[len(after) // 2], 2) if after else None}
        asked = [trial for trial in members if trial.rivals]
        for rule in asked[0].rivals if asked else ():
            row[rule] = share(sum(trial.rivals[rule] for trial in asked), len(asked))
        rows.append(row)
    return rows


def alarms_by_probe(healthy: list[Trial]) -> list[dict[str, Any]]:
    names = dict.fromkeys(name for trial in healthy for name in trial.probes)
    asked = {name: [trial for trial in healthy if name in trial.probes] for name in names}
    return [
        {"group": f"healthy, {name}", "found": share(sum(name in one.alarmed for one in trials), len(trials))}
        for name, trials in asked.items()
    ]


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items() if key not in ("n", "hits")))


def run(arguments: argparse.Namespace) -> list[Trial]:
    """All trials of the plan, or those that the minutes allow, each kept in a line as soon as it is done."""
    done: list[Trial] = []
    began = time.monotonic()
    total = arguments.healthy + arguments.times * len(arguments.kinds)
    for trial in trials(arguments):
        done.append(trial)
        if arguments.keep is not None:
            with arguments.keep.open("a") as lines:
                lines.write(json.dumps(asdict(trial)) + "\n")
        wrong = trial.found == (trial.fault is None)
        if wrong or arguments.quick or len(done) % 50 == 0:
            said = "; ".join(trial.findings) or "nothing"
            print(f"{len(done)}/{total}  {trial.fault or 'healthy'}: {said}  {trial.seconds:.1f} s", flush=True)
        if arguments.minutes is not None and time.monotonic() - began > 60.0 * arguments.minutes:
            break
    return done


def brief(trial: Trial) -> dict[str, Any]:
    """A trial as it is stored: the number of its probes, whose names the tables have, and nothing that is empty."""
    filled = {name: value for name, value in asdict(trial).items() if value not in (None, "", [], {}, False)}
    return {**filled, "probes": len(trial.probes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--healthy", type=int, default=1000)
    parser.add_argument("--times", type=int, default=75, help="faults of each kind")
    parser.add_argument("--kinds", nargs="+", default=list(FAULT_KINDS), choices=FAULT_KINDS)
    parser.add_argument("--rivals", type=int, default=100, help="healthy pools, and of each fault, that rivals see too")
    parser.add_argument("--whole-every", type=int, default=5, help="of so many healthy pools one sees all probes")
    parser.add_argument("--stall", type=float, default=6.0, help="seconds of silence after which a rank hangs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="end, and store what there is, after this time")
    parser.add_argument("--keep", type=Path, help="add each trial to this file; store no result")
    parser.add_argument("--join", type=Path, nargs="+", help="run nothing; store the trials of these files as a result")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.healthy, arguments.times, arguments.rivals = 3, 1, 3
    if arguments.join is None:
        done = run(arguments)
    else:
        done = [Trial(**json.loads(line)) for part in arguments.join for line in part.read_text().splitlines()]
    rows = table(done, lambda trial: trial.kind)
    rare = table(
        [t for t in done if t.kind in ("small-error", "flipped-bit")], lambda t: f"{t.kind} at rate {t.rate:g}"
    )
    alarms = alarms_by_probe([trial for trial in done if trial.fault is None])
    show(rows + rare + alarms)
    short = [row["group"] for row in rows if row["group"] in MUST_FIND and row["hits"] < 0.95 * row["n"]]
    print(f"below 95 %: {', '.join(short) or 'none of ' + ', '.join(MUST_FIND)}")
    if not arguments.quick and arguments.keep is None:
        result = {"groups": rows, "by_rate": rare, "false_alarms_by_probe": alarms}
        stored = {name: value for name, value in vars(arguments).items() if name not in ("keep", "join")}
        if arguments.join is not None:
            stored = {"joined": [part.name for part in arguments.join]}
        store("qualifier", {"arguments": stored, **result, "trials": [brief(trial) for trial in done]})


if __name__ == "__main__":
    main()
