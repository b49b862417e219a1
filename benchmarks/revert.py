"""Planted incidents and broken restores of tiny steps, each beside an undisturbed twin.

    python -m benchmarks.revert --count 300   # the whole: 300 incidents, 300 broken and 300 healthy restores
    python -m benchmarks.revert --quick       # a few of each, and no result is stored

Steps are of all kinds that train: supervised fine-tuning, pretraining, reinforcement learning. An incident is found if
the first signal is of its kind, right if the ladder's rungs are the expected ones in their order, and the end has to
be the twin's: the same bits, and every batch once. Most strike within one process (revert_steps.py), some a rank of
real ones (revert_ranks.py). A restore is broken after the checkpoint was read, and the gate has to refuse it by the
right name; beside it stands what a comparison of the loss alone, within 1 % and 2 %, lets through. Small errors of a
chip that say nothing are told with what it took to find them. Intervals are exact, of 95 %.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from scipy.stats import binomtest

from benchmarks import revert_errors as errors
from benchmarks import revert_ranks as ranked
from benchmarks import revert_restores as broken
from benchmarks.conditions import store
from benchmarks.revert_incidents import INCIDENTS, RARE, Twins, one_incident
from benchmarks.revert_steps import KINDS, in_one_process
from isthmus.errors import IsthmusError

Row = dict[str, Any]


def rate(rows: Sequence[Row], key: str) -> Row:
    """How many rows have it, of those where it is known, with its interval."""
    known = [row for row in rows if row[key] is not None]
    count = sum(bool(row[key]) for row in known)
    if not known:
        return {"count": 0, "of": 0}
    found = binomtest(count, len(known)).proportion_ci(method="exact")
    return {"count": count, "of": len(known), "low": round(found.low, 4), "high": round(found.high, 4)}


def shown(row: Row) -> Row:
    print({key: str(value)[:90] if key == "reason" else value for key, value in row.items()}, flush=True)
    return row


def planned(count: int, chance: random.Random) -> list[tuple[str, str]]:
    """(incident, kind of step), as even as may be; those that take long are rare."""
    rare = [name for name in RARE for _ in range(min(RARE[name] * count // 100, count // len(INCIDENTS)))]
    often = [name for name in INCIDENTS if name not in RARE]
    names = rare + [often[index % len(often)] for index in range(count - len(rare))]
    turns = Counter[str]()
    cases = []
    for name in names:
        kinds = INCIDENTS[name].only
        cases.append((name, kinds[(turns[name] + list(INCIDENTS).index(name)) % len(kinds)]))
        turns[name] += 1
    chance.shuffle(cases)
    return cases


def restores(count: int, twins: Twins, chance: random.Random) -> list[Row]:
    """As many healthy ones as broken ones; checkpoints after which two recorded updates come."""
    rows, place = [], twins.folder / "copy"
    cases = [(name, kind) for name, one in broken.RESTORES.items() for kind in one.kinds]
    cases += [(broken.FILE, kind) for kind in KINDS]
    for index in range(count):
        name, kind = cases[index % len(cases)]
        at = 6 if name in (broken.FILE, "order of epoch 0") else chance.choice([3, 6])
        run = twins.of(kind)
        row = broken.of_files(run, at, place) if name == broken.FILE else broken.one_restore(name, run, at)
        rows.append(shown(row))
        rows.append(broken.one_restore("healthy", twins.of(KINDS[index % len(KINDS)]), chance.choice([3, 6])))
    return rows


def of_incidents(rows: Sequence[Row]) -> Row:
    by_kind = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row)
    in_bits = [row for row in rows if row["kind"] not in ranked.INCIDENTS or ranked.INCIDENTS[row["kind"]].same]
    waits = defaultdict(list)
    for row in rows:
        if row["rungs"] and row.get("to_go_on_s") is not None:
            waits[row["rungs"][-1]].append(row["to_go_on_s"])
    return {
        "incidents": len(rows),
        "found": rate(rows, "found"),
        "right_rungs": rate(rows, "right"),
        "end_is_the_twins_bit_for_bit": rate(in_bits, "same"),
        "every_batch_once": rate(rows, "batches"),
        "updates_made_again": {"median": median(row["lost"] for row in rows), "most": max(row["lost"] for row in rows)},
        "seconds_to_go_on": {rung: round(median(values), 3) for rung, values in waits.items()},
        "by_kind": {kind: _briefly(of) for kind, of in by_kind.items()},
        "by_step": dict(Counter(row["step"] for row in rows)),
        "by_ranks": dict(Counter(row.get("ranks", 1) for row in rows)),
        "wrong": [row for row in rows if not (row["found"] and row["right"] and row["same"] and row["batches"])],
    }


def _briefly(rows: Sequence[Row]) -> Row:
    names = ("found", "right", "same", "batches")
    return {"of": len(rows)} | {name: sum(bool(row[name]) for row in rows) for name in names}


def of_restores(rows: Sequence[Row]) -> Row:
    bad, good = ([row for row in rows if (row["kind"] == "healthy") == healthy] for healthy in (False, True))
    by_kind = defaultdict(list)
    for row in bad:
        by_kind[row["kind"]].append(row)
    return {
        "broken_refused_by_the_right_name": rate(bad, "right"),
        "broken_refused": rate([row | {"refused": row["verdict"] == "refuse"} for row in bad], "refused"),
        "healthy_refused": rate([row | {"refused": not row["right"]} for row in good], "refused"),
        "broken_that_the_loss_lets_pass": {f"{limit} %": rate(bad, f"passes_{limit}") for limit in (1, 2)},
        "by_kind": {
            kind: {"of": len(of), "right": sum(row["right"] for row in of), "loss_lets_pass": rate(of, "passes_1")}
            for kind, of in by_kind.items()
        },
        "wrong": [row for row in rows if not row["right"]],
    }


def of_errors(rows: Sequence[Row]) -> list[Row]:
    """By size and share: found in how many steps, and the updates until then, where a third is computed twice."""
    by = defaultdict(list)
    for row in rows:
        by[row["size"], row["share"]].append(row)
    return [
        {
            "size": size,
            "share_of_computations": share if share is not None else "all of them, alike",
            "steps": len(of),
            "updates_each": errors.UPDATES,
            "found": rate([row | {"found": row["found_at"] is not None} for row in of], "found"),
            "median_update": median([row["found_at"] for row in of if row["found_at"] is not None] or [0]) or None,
            "wrong_computations": sum(row["wrong"] for row in of),
        }
        for (size, share), of in by.items()
    ]


def small_errors(count: int, folder: Path, chance: random.Random) -> list[Row]:
    cases: list[tuple[float, float | None]] = [(size, share) for size in errors.SIZES for share in errors.SHARES]
    cases.append((0.1, None))
    return [
        shown(errors.one_error(size, share, folder / "erring", folder, chance))
        for _ in range(count)
        for size, share in cases
    ]


def of_ranks(count: int, folder: Path, chance: random.Random) -> list[Row]:
    if not count:
        return []
    twins = {ranks: ranked.undisturbed(ranks, folder / f"ranks-{ranks}", folder) for ranks in (1, 2)}
    names = list(ranked.INCIDENTS)
    rows = []
    for index in range(count):
        name = names[index % len(names)]
        twin = twins[ranked.INCIDENTS[name].ranks]
        rows.append(shown(ranked.one_of_ranks(name, folder / "ranked", folder, twin, chance)))
    return rows


def measure(count: int, seed: int, healthy: int, folder: Path) -> Row:
    chance, began, clock = random.Random(seed), time.perf_counter(), Row()

    def lap(name: str) -> None:
        clock[name] = round(time.perf_counter() - began - sum(clock.values()), 1)

    ranks = max(1, count // 15)
    met = of_ranks(ranks, folder, chance)
    lap("incidents of ranks")
    with in_one_process():
        twins = Twins(folder)
        met += [shown(one_incident(*case, twins, chance)) for case in planned(count - ranks, chance)]
        lap("incidents in one process")
        tried = restores(count, twins, chance)
        lap("restores")
        small = small_errors(max(1, count // 150), folder, chance)
        lap("small errors")
        kinds = [KINDS[index % 2] for index in range(healthy)]
        calm = [shown(errors.healthy(kind, index, folder / "calm", folder)) for index, kind in enumerate(kinds)]
        lap("healthy steps")
        alarms = twins.alarms()
    return {
        "seed": seed,
        "incidents": of_incidents(met),
        "alarms_of_undisturbed_twins": alarms,
        "restores": of_restores(tried),
        "small_errors": of_errors(small),
        "healthy_steps_of_100_updates": {
            "with_an_alarm": rate([row | {"alarm": bool(row["alarms"])} for row in calm], "alarm"),
            "alarms": [row for row in calm if row["alarms"]],
            "kinds": list(KINDS[:2]),
        },
        "seconds": clock,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="planted incidents, and as many restores of each sort")
    parser.add_argument("--healthy", type=int, default=40, help="undisturbed steps of 100 updates")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few of each, and store no result")
    options = parser.parse_args()
    if options.count < 2:
        raise IsthmusError("--count must be at least 2")
    count, healthy = (10, 1) if options.quick else (options.count, options.healthy)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(count, options.seed, healthy, Path(folder))
    for name, found in result.items():
        print(f"{name}: {found}")
    if not options.quick:
        store("revert", result)


if __name__ == "__main__":
    main()
