"""Our ladder against the policies of others on simulated runs whose pool fails: time and chip-hours to finish.

    python -m benchmarks.policies             # 200 runs, each under every policy: a minute on one core
    python -m benchmarks.policies --quick     # 20 runs, and no result is stored

A run wants a number of updates on a first pool, and has a second one. What is drawn, and from where, stands in
policies.csv: how often published fleets fail, which share of failures comes again until a node is repaired, how many
of them are hangs. Both pools fail by the same draws under every policy. "ours" asks `isthmus.supervise.ladder.decide`
at each failure, with the balance that a step would be told; the others are

- restart, then stop: three restarts without 200 new updates, and then it stops (NVRx's Restart Agent);
- never leave: restarts as long as it takes;
- leave at once: moves at the first failure, and restarts there as long as it takes.

Whoever stops before the end, ours too, is told as such; the time to finish is then with a person who starts the run
again as soon as the node is repaired, which flatters those that stop.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

from scipy.stats import binomtest

from benchmarks.conditions import store
from isthmus.chips import failure_rates, fault_weights, get_chip
from isthmus.errors import IsthmusError
from isthmus.forecast.duration import WIDTH
from isthmus.forecast.goodput import HOUR, goodput, prior
from isthmus.pools import Pool as RecipePool
from isthmus.recipe.supervise import SuperviseSection
from isthmus.records import IncidentRecord, TrainPlace
from isthmus.supervise import balance
from isthmus.supervise.ladder import Decision, Situation, decide
from isthmus.supervise.signals import Signal
from isthmus.supervise.situation import belief

FIRST, SECOND = "ascend-910b-313t", "h800-sxm"
TABLE = Path(__file__).with_suffix(".csv")
OF_CHIPS = ("failure_rates", "fault_weights")
LONGEST_S = 3 * 365 * 24 * HOUR
"""A run that takes longer has not ended."""


def sourced() -> dict[str, list[float]]:
    """The values of policies.csv, by quantity."""
    found: dict[str, list[float]] = {}
    for row in csv.DictReader(TABLE.read_text(encoding="utf-8").splitlines()):
        found.setdefault(row["quantity"], []).append(float(row["value"]))
    return found


@dataclass(frozen=True)
class Side:
    """A pool as it really is: failures per second of the whole pool, and seconds of an update."""

    name: str
    chip: str
    chips: int
    rate: float
    update_s: float


@dataclass(frozen=True)
class Case:
    """A run that is to be made. `piloted` is the ratio of the updates' times, there to here, as pilots told it."""

    seed: str
    first: Side
    second: Side
    updates: int
    between: int
    piloted: float
    instability: float

    @property
    def ratio(self) -> float:
        return self.second.update_s / self.first.update_s


def drawn(seed: str, table: dict[str, list[float]]) -> Case:
    chance = random.Random(f"case/{seed}")

    def one(name: str) -> float:
        return table[name][0]

    chips = int(chance.choice(table["fleet"]))
    chips_there = max(8, int(chips * math.exp(chance.uniform(math.log(one("share_there_least")), 0.0))))
    rates = [fleet.rate for fleet in failure_rates() if fleet.in_prior]
    unstable = math.exp(chance.uniform(0.0, math.log(one("instability_most"))))
    peaks = [get_chip(name).bf16_tflops for name in (FIRST, SECOND)]
    here, there = (peak.value for peak in peaks if peak is not None)
    assert here is not None and there is not None
    spread = math.log(WIDTH) / balance.Z90
    ratio = here * chips / (there * chips_there) * math.exp(chance.gauss(0.0, spread))
    update_s = one("update")
    days = math.exp(chance.uniform(math.log(one("days_least")), math.log(one("days_most"))))
    first = Side("first", FIRST, chips, chance.choice(rates) * unstable * chips / HOUR, update_s)
    second = Side("second", SECOND, chips_there, chance.choice(rates) * chips_there / HOUR, update_s * ratio)
    interval = goodput(prior(FIRST).mean, chips, one("save"), one("restart")).interval_s
    return Case(
        seed=seed,
        first=first,
        second=second,
        updates=int(days * 24 * HOUR / update_s),
        between=max(1, round(interval / update_s)),
        piloted=ratio * math.exp(chance.gauss(0.0, spread)),
        instability=unstable,
    )


@dataclass(frozen=True)
class Failure:
    """After `gap_s` of work; it comes again until `repair_s` after it first came, 0: it is gone at the next start."""

    gap_s: float
    hangs: bool
    repair_s: float


@dataclass
class Fate:
    """The failures of one pool in one run, the same for whoever trains there."""

    side: Side
    chance: random.Random
    hangs: float
    temporary: float
    repair_s: float
    known: list[Failure] = field(default_factory=list)

    def number(self, index: int) -> Failure:
        while len(self.known) <= index:
            gap = self.chance.expovariate(self.side.rate)
            hangs, lasting = self.chance.random() < self.hangs, self.chance.random() > self.temporary
            repair = self.chance.expovariate(1 / self.repair_s)
            self.known.append(Failure(gap, hangs, repair if lasting else 0.0))
        return self.known[index]


@dataclass
class Under:
    """A run under way. Times in seconds; `made` updates, the newest checkpoint after `checkpoint` of them."""

    case: Case
    table: dict[str, list[float]]
    silent_s: float
    now: float = 0.0
    made: int = 0
    best: int = 0
    checkpoint: int = 0
    place: str = "first"
    past: list[IncidentRecord] = field(default_factory=list)
    chip_s: dict[str, float] = field(default_factory=lambda: {"first": 0.0, "second": 0.0})
    failures: int = 0
    stops: int = 0
    moved_at_s: float | None = None

    @property
    def side(self) -> Side:
        return self.case.first if self.place == "first" else self.case.second

    def passes(self, seconds: float, idle: bool = False) -> None:
        self.now += seconds
        if not idle:
            self.chip_s[self.place] += seconds * self.side.chips

    def work(self, seconds: float) -> bool:
        """Make updates for so long, or until all are made: whether they are. Saving takes its time."""
        save = self.table["save"][0] / self.case.between
        each = self.side.update_s + save
        wanted = self.case.updates - self.made
        able = int(seconds / each)
        done = able >= wanted
        self.passes(wanted * each if done else seconds)
        self.made += min(able, wanted)
        self.best = max(self.best, self.made)
        self.checkpoint = max(self.checkpoint, self.made - self.made % self.case.between)
        return done


Answer = Callable[[Under, Signal], str]
"""A policy: "restart", "wait", "revert" or "stop"."""
PATIENT, PATIENCE_S = "ours, patient", 7 * 24 * HOUR


def run_under(
    case: Case, answer: Answer, silent_s: float, table: dict[str, list[float]], rates: Sequence[float]
) -> Under:
    """A run under a policy, from its start to its end or to LONGEST_S."""
    hangs, temporary, repair_s = rates
    fates = {
        side.name: Fate(side, random.Random(f"fate/{case.seed}/{side.name}"), hangs, temporary, repair_s)
        for side in (case.first, case.second)
    }
    at, run, restart_s = {"first": 0, "second": 0}, Under(case, table, silent_s), table["restart"][0]
    run.passes(restart_s)
    while run.now < LONGEST_S:
        failure = fates[run.place].number(at[run.place])
        at[run.place] += 1
        if run.work(failure.gap_s):
            return run
        broken_until = run.now + failure.repair_s
        while True:
            run.failures += 1
            run.passes(silent_s if failure.hangs else 0.0)
            kind = "no beat" if failure.hangs else "ended"
            rung = answer(run, Signal(kind, "drawn", run.made + 1))
            run.made = run.checkpoint
            if rung == "revert":
                run.place, run.moved_at_s = "second", run.now
                run.passes(2 * restart_s)
                break
            if rung == "wait":
                run.passes(run.past[-1].wait_s or 0.0)
            if rung == "stop":
                run.stops += 1
                run.passes(max(0.0, broken_until - run.now), idle=True)
            run.passes(restart_s)
            if run.now >= broken_until:
                break
    return run


def ours(section: SuperviseSection) -> Answer:
    """As `Supervisor._answer` has it: the situation, the decision, and the incident that is kept."""

    def answer(run: Under, signal: Signal) -> str:
        decision = decide(signal, _situation(run, section))
        run.past.append(_incident(run, signal, decision))
        return decision.rung

    return answer


def _situation(run: Under, section: SuperviseSection) -> Situation:
    pools = ["second"] if run.place == "first" else ["first"]
    return Situation(
        section=section,
        pool=run.place,
        ranks=run.side.chips,
        checkpoint=run.checkpoint,
        past=run.past,
        next_pools=pools,
        balance=_balance(run) if run.place == "first" else None,
    )


def _balance(run: Under) -> balance.Balance:
    """What `isthmus.supervise.situation` would tell the ladder of both sides."""
    case, restart_s = run.case, run.table["restart"][0]
    here, there = case.first, case.second
    place = TrainPlace(here.name, here.chips)
    events = [{"time": 0.0}, {"time": run.now}]
    seen = belief(RecipePool(here.name, here.chip, here.chips, here.chips, False, 1, 1), place, run.past[:], events)
    pace, ratio = here.update_s, case.piloted
    other = balance.Pace(pace * ratio / WIDTH, pace * ratio, pace * ratio * WIDTH)
    sides = (
        balance.Pool(here.name, balance.Pace.known(pace), seen, here.chips, restart_s),
        balance.Pool(there.name, other, prior(there.chip), there.chips, restart_s),
    )
    return balance.weigh(*sides, case.updates - run.made, run.made - run.checkpoint, case.between, restart_s)


def _incident(run: Under, signal: Signal, decision: Decision) -> IncidentRecord:
    return IncidentRecord.model_construct(
        step="simulated",
        number=len(run.past) + 1,
        signal=signal.kind,
        detail=signal.detail,
        pool=run.place,
        ranks=run.side.chips,
        culprits=[],
        update=signal.update,
        checkpoint=run.checkpoint,
        rung=decision.rung,
        why=decision.why,
        outcome="done",
        to_pool=decision.to_pool,
        wait_s=decision.wait_s,
    )


class RestartThenStop:
    """Restarts a number of times without so many new updates in between, and stops; a person's start is a new one."""

    def __init__(self, restarts: int, progress: int):
        self._most, self._progress = restarts, progress
        self._spent, self._since = 0, 0

    def __call__(self, run: Under, signal: Signal) -> str:
        del signal
        if run.best - self._since >= self._progress:
            self._spent, self._since = 0, run.best
        if self._spent >= self._most:
            self._spent = 0
            return "stop"
        self._spent += 1
        return "restart"


def never_leave(run: Under, signal: Signal) -> str:
    del run, signal
    return "restart"


def leave_at_once(run: Under, signal: Signal) -> str:
    del signal
    return "revert" if run.place == "first" else "restart"


def policies(table: dict[str, list[float]]) -> dict[str, tuple[Callable[[], Answer], float]]:
    """Of each policy: what makes one, and the seconds after which it gives up a rank that hangs."""
    beat_s, others_s = SuperviseSection().beat_s, table["heartbeat_nvrx"][0]
    most, progress = int(table["restarts_nvrx"][0]), int(table["progress_nvrx"][0])
    return {
        "ours": (lambda: ours(SuperviseSection()), beat_s),
        PATIENT: (lambda: ours(SuperviseSection(patience_s=PATIENCE_S)), beat_s),
        "restart, then stop": (lambda: RestartThenStop(most, progress), others_s),
        "never leave": (lambda: never_leave, beat_s),
        "leave at once": (lambda: leave_at_once, beat_s),
    }


def p10_50_90(values: Sequence[float]) -> list[float | None]:
    """A value that is not finite, of a run that did not end, is larger than all others and told as None."""
    tenths = quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    return [round(value, 3) if math.isfinite(value) else None for value in (tenths[0], tenths[4], tenths[8])]


def share(count: int, of: int) -> dict[str, Any]:
    """With its exact 95 % interval."""
    found = binomtest(count, of).proportion_ci(method="exact") if of else None
    return {"count": count, "of": of, "low": found and round(found.low, 4), "high": found and round(found.high, 4)}


def told(runs: Sequence[Under]) -> dict[str, Any]:
    """Of one policy over all runs. Days and chip-hours at P10, P50 and P90."""
    ended = [run.made >= run.case.updates for run in runs]
    slower = [_seconds(run) / (run.case.updates * run.case.first.update_s) for run in runs]
    moved = [run.moved_at_s / HOUR for run in runs if run.moved_at_s is not None]
    return {
        "ended_by_itself": share(sum(end and not run.stops for run, end in zip(runs, ended, strict=True)), len(runs)),
        "ended_in_the_end": share(sum(ended), len(runs)),
        "days": p10_50_90([_seconds(run) / HOUR / 24 for run in runs]),
        "times_the_undisturbed_first_pool": p10_50_90(slower),
        "thousand_chip_hours": p10_50_90([sum(run.chip_s.values()) / HOUR / 1e3 for run in runs]),
        "moved": share(sum(run.place == "second" for run in runs), len(runs)),
        "failures": p10_50_90([run.failures for run in runs]),
        "hours_until_it_moved": p10_50_90(moved or [math.inf]),
    }


def _seconds(run: Under) -> float:
    return run.now if run.made >= run.case.updates else math.inf


def against(mine: Sequence[Under], other: Sequence[Under]) -> dict[str, Any]:
    """Our time and chip-hours over those of another policy, run by run; under 1 is better. 1 % counts as equal."""
    times = [_ratio(_seconds(one), _seconds(two)) for one, two in zip(mine, other, strict=True)]
    chips = [sum(one.chip_s.values()) / sum(two.chip_s.values()) for one, two in zip(mine, other, strict=True)]
    return {
        "time": p10_50_90(times),
        "chip_hours": p10_50_90(chips),
        "quicker": share(sum(one < 0.99 for one in times), len(times)),
        "slower": share(sum(one > 1.01 for one in times), len(times)),
    }


def _ratio(one: float, two: float) -> float:
    if math.isinf(one):
        return 1.0 if math.isinf(two) else math.inf
    return one / two


def where_worse(cases: Sequence[Case], runs: dict[str, list[Under]]) -> dict[str, Any]:
    """Our time over that of the best of the others, in hindsight, by what the second pool is worth and by how unstable
    the first is."""
    found = {}
    for name, keeps in {
        "second pool quicker": lambda case: case.ratio < 1 / WIDTH,
        "second pool about as quick": lambda case: 1 / WIDTH <= case.ratio <= WIDTH,
        "second pool slower": lambda case: case.ratio > WIDTH,
        "first pool under 5 times the published rates": lambda case: case.instability < 5,
        "first pool 5 times the published rates and more": lambda case: case.instability >= 5,
    }.items():
        chosen = [index for index, case in enumerate(cases) if keeps(case)]
        ratios = [
            _ratio(
                _seconds(runs["ours"][index]),
                min(_seconds(runs[name][index]) for name in runs if not name.startswith("ours")),
            )
            for index in chosen
        ]
        worse = {
            name: share(
                sum(_ratio(_seconds(runs["ours"][i]), _seconds(runs[name][i])) > 1.01 for i in chosen), len(chosen)
            )
            for name in runs
            if not name.startswith("ours")
        }
        found[name] = {
            "runs": len(chosen),
            "time_over_best_other": p10_50_90(ratios or [math.inf]),
            "slower_than": worse,
        }
    return found


def measure(count: int, seed: int) -> dict[str, Any]:
    table = sourced()
    cases = [drawn(f"{seed}/{index}", table) for index in range(count)]
    weights = fault_weights()["stability"]
    rates = (weights["hang"], table["temporary"][0], table["repair"][0] * HOUR)
    runs: dict[str, list[Under]] = {}
    for name, (make, silent_s) in policies(table).items():
        runs[name] = [run_under(case, make(), silent_s, table, rates) for case in cases]
        print(f"{name}: {told(runs[name])}", flush=True)
    others = [name for name in runs if name != "ours"]
    return {
        "runs": count,
        "seed": seed,
        "kind": "simulated",
        "pools": [FIRST, SECOND],
        "hang_share": round(weights["hang"], 4),
        "drawn_from": ["benchmarks/policies.csv", *(f"src/isthmus/chips/{name}.csv" for name in OF_CHIPS)],
        "policies": {name: told(found) for name, found in runs.items()},
        "ours_against": {name: against(runs["ours"], runs[name]) for name in others},
        "where": where_worse(cases, runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="simulated runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="20 runs, and store no result")
    options = parser.parse_args()
    if options.count < 1:
        raise IsthmusError("--count must be at least 1")
    result = measure(20 if options.quick else options.count, options.seed)
    for name, found in result["ours_against"].items():
        print(f"ours against {name}: {found}")
    for name, found in result["where"].items():
        print(f"{name}: {found}")
    if not options.quick:
        store("policies", result)


if __name__ == "__main__":
    main()
